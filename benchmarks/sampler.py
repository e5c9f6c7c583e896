"""An epoch's indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torchreid import data

from benchmarks.alone import run_alone
from benchmarks.timing import Row, interleaved, rows_of
from torchreid_snloss import IdentitySampler

__all__ = ["measure", "prepare"]

_THEIRS = "torchreid RandomIdentitySampler"


def measure(identities: int = 50_000, images: int = 1_000_000, peers: bool = True) -> list[Row]:
    """Of identities of uneven sizes; batches of 64 with 4 images an identity."""
    source, pids = _training_set(identities, images)
    samplers: dict[str, Any] = {
        _THEIRS: data.sampler.RandomIdentitySampler(source, 64, 4),
        "IdentitySampler": IdentitySampler(source, 64, 4),
    }
    if peers:
        from pytorch_metric_learning.samplers import MPerClassSampler

        samplers["PML MPerClassSampler"] = MPerClassSampler(pids, 4, 64, length_before_new_iter=images)
    functions = {name: lambda sampler=sampler: sum(1 for _ in sampler) for name, sampler in samplers.items()}
    case = f"{identities:,} identities, {images:,} images"
    results = rows_of("sampler", case, interleaved(functions, seconds=0, repetitions=3), _THEIRS)
    if peers:
        mib = {n: run_alone("benchmarks.sampler", identities, n, exact_memory=True).mib for n in (images // 4, images)}
        results += [
            # The ratio is to growth with the number of images.
            Row("sampler, memory", f"{n:,} images", "IdentitySampler", value, "MiB", value / n / (mib[images] / images))
            for n, value in mib.items()
        ]
    return results


def prepare(identities: str, images: str) -> Callable[[], Any]:
    """An epoch of our sampler."""
    sampler = IdentitySampler(_training_set(int(identities), int(images))[0], 64, 4)
    return lambda: sum(1 for _ in sampler)


def _training_set(identities: int, images: int) -> tuple[list[tuple[str, int, int, int]], np.ndarray]:
    rng = np.random.default_rng(0)
    pids = np.sort(np.concatenate([np.arange(identities), rng.integers(0, identities, images - identities)]))
    return [("", int(pid), 0, 0) for pid in pids], pids
