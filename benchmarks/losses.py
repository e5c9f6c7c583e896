"""Losses, forward and backward, as multiples of a bare distance matrix; memory and growth with row blocks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.alone import run_alone
from benchmarks.timing import Row, interleaved, rows_of
from torchreid_snloss import FIDILoss, HAP2SLoss, SNLoss

__all__ = ["measure", "measure_memory", "prepare"]

OURS = {"SN": SNLoss, "HAP2S": HAP2SLoss, "FIDI": FIDILoss}
DIMENSION, IMAGES = 2048, 4
_ALL_AT_ONCE = 1 << 30


def bare(features: Tensor, _: Tensor) -> Tensor:
    """What any loss on Euclidean distances needs at least when autograd differentiates it."""
    squares = features.square().sum(dim=1)
    distances = torch.addmm(squares[:, None] + squares, features, features.t(), alpha=-2).clamp(min=1e-12).sqrt()
    return distances.sum()


def sn_anchor_by_anchor(features: Tensor, pids: Tensor, neighbors: int = 10, scale: float = 50.0) -> Tensor:
    """SN loss as it is written down, and as its authors' code has it: a loop over the anchors."""
    unit = torch.nn.functional.normalize(features)
    distances = torch.cdist(unit, unit)
    terms = []
    for anchor in range(len(unit)):
        others = torch.arange(len(unit), device=unit.device) != anchor
        row, same = distances[anchor][others], (pids == pids[anchor])[others]
        support = row.topk(neighbors, largest=False).indices
        near, in_p = row[support], same[support]
        p = near[in_p] if in_p.any() else row[same].min()[None]
        exponentials = (-scale * near).exp()
        q_sum, p_sum = exponentials[~in_p].sum(), (-scale * p).exp().sum()
        squeeze = p.max() - p.min() if len(p) > 1 else p[0]
        terms.append(-(p_sum / (p_sum + q_sum)).log() + 0.1 * squeeze)
    return torch.stack(terms).mean()


def _peers() -> Iterator[tuple[str, int, Callable[[Tensor, Tensor], Tensor]]]:
    """Name, the largest batch that takes no minutes, and the loss."""
    from pytorch_metric_learning import distances, losses, miners
    from torchreid import losses as reid_losses

    yield "torchreid TripletLoss", 2048, reid_losses.TripletLoss()
    yield "SN, anchor by anchor", 512, sn_anchor_by_anchor
    yield "PML ContrastiveLoss", 2048, losses.ContrastiveLoss()
    yield "PML MultiSimilarityLoss", 2048, losses.MultiSimilarityLoss()
    miner = miners.BatchHardMiner(distance=distances.LpDistance())
    triplet = losses.TripletMarginLoss(margin=0.3)
    yield "PML TripletMarginLoss, batch hard", 2048, lambda x, pids: triplet(x, pids, miner(x, pids))
    yield "PML NTXentLoss", 64, losses.NTXentLoss()


def measure(device: str, sizes: tuple[int, ...] = (64, 512, 2048), peers: bool = True, seconds: float = 6) -> list[Row]:
    """Features N x 2048, 4 images an identity."""
    results = []
    for size in sizes:
        features = torch.randn(size, DIMENSION, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        pids = torch.arange(size // IMAGES, device=device).repeat_interleave(IMAGES)
        losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"bare": bare}
        losses |= {name: loss() for name, loss in OURS.items()}
        if peers:
            collecting = SNLoss()
            collecting.collect_statistics = True
            losses["SN, with the engine's statistics"] = collecting
            losses["HAP2S, polynomial"] = HAP2SLoss(weighting="polynomial")
            losses |= {name: loss for name, largest, loss in _peers() if size <= largest}

        def step(loss: Callable[[Tensor, Tensor], Tensor], features: Tensor = features, pids: Tensor = pids) -> None:
            features.grad = None
            loss(features, pids).backward()

        functions = {name: lambda loss=loss, step=step: step(loss) for name, loss in losses.items()}
        results += rows_of(f"losses, {device}", f"N={size}", interleaved(functions, seconds), "bare")
    return results


def measure_memory(repetitions: int = 3) -> list[Row]:
    """Each run in a process of its own."""
    results = []
    for name in OURS:
        case = f"{name}, N=8192, D=512"
        blocks = {"all rows at once": _ALL_AT_ONCE, "row blocks": 0}
        times: dict[str, list[float]] = {rows: [] for rows in blocks}
        for _ in range(repetitions):
            for rows, size in blocks.items():
                times[rows].append(run_alone("benchmarks.losses", name, 8192, 0, size).seconds)
        results += rows_of(
            "row blocks, time", case, {k: statistics.median(v) for k, v in times.items()}, "all rows at once"
        )
        mib = {k: run_alone("benchmarks.losses", name, 8192, 0, v, exact_memory=True).mib for k, v in blocks.items()}
        suite = "row blocks, memory"
        results += [
            Row(suite, case, rows, value, "MiB", value / mib["all rows at once"]) for rows, value in mib.items()
        ]
        value = run_alone("benchmarks.losses", name, 128, 65536, 0, exact_memory=True).mib
        # The ratio is to 512 MiB.
        results.append(Row(suite, f"{name}, N=128, M=65536, D=512", "row blocks", value, "MiB", value / 512))
        growth = {n: run_alone("benchmarks.losses", name, n, 0, 0).seconds for n in (1024, 2048, 4096, 8192, 16384)}
        results += [
            # The ratio is to growth with the square of N.
            Row("growth, D=512", name, f"N={n}", 1e3 * value, "ms", value / growth[1024] / (n / 1024) ** 2)
            for n, value in growth.items()
        ]
    return results


def prepare(name: str, anchors: str, references: str, block_size: str) -> Callable[[], Any]:
    """A forward and backward pass with features of 512 dimensions."""
    torch.manual_seed(0)
    loss = OURS[name](block_size=int(block_size))

    def batch(anchors: int, references: int) -> list[Tensor]:
        arguments = [torch.randn(anchors, 512, requires_grad=True), torch.arange(anchors // 4).repeat_interleave(4)]
        if references:
            arguments += [torch.randn(references, 512, requires_grad=True), torch.randint(0, 32, (references,))]
        return arguments

    for size in (0, 99):
        loss(*batch(64, size)).backward()  # what is loaded at the first call
    arguments = batch(int(anchors), int(references))
    return lambda: loss(*arguments).backward()
