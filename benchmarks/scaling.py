"""Training on several processes of one thread each: throughput, what of a step is communication, and its bytes."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing
from torchreid import models, optim

import torchreid_snloss
from benchmarks.alone import run_alone
from benchmarks.step import make_manager
from benchmarks.timing import Row
from torchreid_snloss import distributed

__all__ = ["measure", "prepare"]

MODEL, HEIGHT, WIDTH, BATCH = "resnet50", 256, 128, 32
_ROUNDS, _STEPS = 3, 4


def measure() -> list[Row]:
    """`ImageSNEngine.forward_backward` of one global batch on 1 and on 2 processes, and on 2 that do not talk."""
    times: dict[str, list[float]] = {"1 process": [], "2 processes": [], "2 processes apart, half a batch each": []}
    bytes_sent = 0.0
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(io.StringIO()):
        _manager(root)  # draws the data set
        for _ in range(_ROUNDS):
            for name, (processes, together) in zip(times, [(1, True), (2, True), (2, False)]):
                seconds, sent = _run(processes, together, root)
                times[name].append(seconds)
                bytes_sent = sent if (processes, together) == (2, True) else bytes_sent
    seconds = {name: statistics.median(values) for name, values in times.items()}
    one, two, apart = seconds.values()
    case = f"{MODEL}, {HEIGHT}x{WIDTH}, global batch {BATCH}, one thread a process"
    rows = [Row("processes", case, name, BATCH / value, "im/s", one / value) for name, value in seconds.items()]
    rows.append(Row("processes", case, "communication, share of a step", 100 * (two - apart) / two, "%", two / apart))
    # Features there and back (two copies in an all-reduce), and the weights' gradients, an all-reduce.
    parameters = sum(p.numel() for p in models.build_model(MODEL, 200, loss="triplet", pretrained=False).parameters())
    expected = 4 * (BATCH * 2048 // 2 + BATCH * 2048 + parameters) / 2**20
    rows.append(Row("processes", case, "sent by a process, a step", bytes_sent, "MiB", bytes_sent / expected))
    return rows + _measure_micro_batches()


def _measure_micro_batches() -> list[Row]:
    rows: list[Row] = []
    for batch, micro_batch in ((64, 0), (1024, 64), (1024, 0)):
        usage = run_alone(__name__, batch, micro_batch, exact_memory=True)
        name = f"batch {batch}" + (f", micro_batch {micro_batch}" if micro_batch else "")
        for unit, value in (("MiB", usage.mib), ("im/s", batch / usage.seconds)):
            baseline = next((row.value for row in rows if row.unit == unit), value)
            rows.append(Row(f"micro-batches, {unit}", "osnet_x0_25, 128x64", name, value, unit, value / baseline))
    return sorted(rows, key=lambda row: row.suite)


def prepare(batch: str, micro_batch: str) -> Callable[[], object]:
    """A training step in a process of its own."""
    images, size = torch.randn(int(batch), 3, 128, 64), int(batch)
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(io.StringIO()):
        manager = _manager(root)
        model = models.build_model("osnet_x0_25", size // 4, loss="triplet", pretrained=False)
    optimizer = optim.build_optimizer(model, optim="sgd", lr=1e-4)
    training = torchreid_snloss.ImageSNEngine(manager, model, optimizer, use_gpu=False, micro_batch=int(micro_batch))
    training.set_model_mode("train")
    small = {"img": images[:8], "pid": torch.arange(8) // 4}
    training.forward_backward(small)  # buffers that every size needs
    return lambda: training.forward_backward({"img": images, "pid": torch.arange(size) // 4})


def _run(processes: int, together: bool, root: str) -> tuple[float, float]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    multiprocessing.spawn(_work, (processes, together, port, root), nprocs=processes)
    results = [torch.load(f"{root}/{rank}") for rank in range(processes)]
    return max(seconds for seconds, _ in results), results[0][1] / processes


def _manager(root: str) -> Any:
    return make_manager(root, HEIGHT, WIDTH, BATCH, "cpu")


def _work(rank: int, processes: int, together: bool, port: int, root: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    if together and processes > 1:
        distributed.start(use_gpu=False)
    with contextlib.redirect_stdout(io.StringIO()):
        manager = _manager(root)
        model = models.build_model(MODEL, manager.num_train_pids, loss="triplet", pretrained=False)
    batch = next(iter(manager.train_loader))
    half = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
    part = {"img": batch["img"][half], "pid": batch["pid"][half]}
    training = torchreid_snloss.ImageSNEngine(
        manager, model, optim.build_optimizer(model, optim="sgd", lr=1e-4), use_gpu=False
    )
    training.set_model_mode("train")
    for _ in range(2):
        training.forward_backward(part)
    times, before = [], _sent()
    for _ in range(_STEPS):
        start = time.perf_counter()
        training.forward_backward(part)
        times.append(time.perf_counter() - start)
    if dist.is_initialized():
        dist.barrier()
    torch.save((statistics.median(times), (_sent() - before) / _STEPS / 2**20), f"{root}/{rank}")
    distributed.stop()


def _sent() -> float:
    """Bytes that went over the loopback interface (on Linux)."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return float(line.split()[9])
