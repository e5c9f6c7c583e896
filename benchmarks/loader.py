"""Loading batches: torchreid's loader, batch transforms, and batch transforms with all images decoded beforehand."""

from __future__ import annotations

import contextlib
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torchreid import models, optim, utils

import torchreid_snloss
from benchmarks.timing import Row
from torchreid_snloss.build import build_datamanager
from torchreid_snloss.data import make_pedestrians

__all__ = ["measure"]

_THEIRS = "torchreid DataLoader"
_VARIANTS = {
    _THEIRS: [],
    "batch transforms": ["data.batch_transforms", True],
    "batch transforms, cache": ["data.batch_transforms", True, "data.cache", "ram"],
}
_BATCH = 64
_CASE = "256 x 128, flip, crop, erase"
_OPTIONS = [
    *["data.sources", ["market1501"], "data.targets", ["market1501"], "data.height", 256, "data.width", 128],
    *["data.transforms", ["random_flip", "random_crop", "random_erase"], "train.batch_size", _BATCH],
    *["loss.name", "hap2s", "test.ranks", [1]],
]
_GPU_MODELS = {"ResNet-50, bf16": ("resnet50", "bf16"), "OSNet x1.0": ("osnet_x1_0", "off")}


def measure(device: str, repetitions: int = 3) -> list[Row]:
    """On a CPU the CPU time of each image, in all processes and in the workers; on a GPU training with 4 workers.

    Args:
        device: `"cpu"` or `"cuda"`.
        repetitions: of each variant, in turn, each in a process of its own.
    """
    with tempfile.TemporaryDirectory() as root:
        with contextlib.redirect_stdout(io.StringIO()):
            # 8 images of 64 x 128 pixels each
            number = 250 if device == "cpu" else 1000
            make_pedestrians(Path(root, "market1501"), num_train_pids=number, num_test_pids=2)
        return (_loading if device == "cpu" else _training)(root, repetitions)


def _loading(root: str, repetitions: int, epochs: int = 4) -> list[Row]:
    runs = _interleaved(repetitions, "load", root, 1, epochs)
    images = {
        part: {name: statistics.median(run[part] / run["images"] for run in found) for name, found in runs.items()}
        for part in ("all", "workers", "main")
    }
    results = [
        Row("loader", f"{_CASE}: CPU time of an image, {what}", name, 1e6 * value, "us", value / images[part][_THEIRS])
        for part, what in (("all", "all processes"), ("workers", "in a worker"))
        for name, value in images[part].items()
    ]
    return results + [
        Row(
            "loader, throughput",
            f"{_CASE}: images per CPU second",
            name,
            1 / value,
            "/s",
            images["all"][_THEIRS] / value,
        )
        for name, value in images["all"].items()
    ]


def _training(root: str, repetitions: int, epochs: int = 1) -> list[Row]:
    results = []
    for case, (model, amp) in _GPU_MODELS.items():
        runs = _interleaved(repetitions, "train", root, 4, epochs, model, amp)
        rates = {name: statistics.median(run["rate"] for run in found) for name, found in runs.items()}
        of = f"{case}, 4 workers: time of {_BATCH} images"
        for name, found in runs.items():
            milliseconds, waiting = 1e3 * _BATCH / rates[name], statistics.median(run["waiting"] for run in found)
            results.append(Row("loader, training", of, name, milliseconds, "ms", rates[_THEIRS] / rates[name]))
            results.append(Row("loader, waiting for data", of, name, 100 * waiting, "%", waiting))
    return results


def _interleaved(repetitions: int, what: str, *arguments: object) -> dict[str, list[dict[str, float]]]:
    """The results of each variant, all of them in turn, so that a machine that slows down slows down all of them."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in _VARIANTS}
    for _ in range(repetitions):
        for name, found in runs.items():
            found.append(_alone(what, name, *arguments))
    return runs


def _alone(what: str, *arguments: object) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.loader", what, *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def _manager(variant: str, root: str, workers: int, use_gpu: bool) -> Any:
    cfg = torchreid_snloss.get_default_config()
    cfg.merge_from_list(
        [*_OPTIONS, "data.root", root, "data.workers", workers, "use_gpu", use_gpu, *_VARIANTS[variant]]
    )
    return build_datamanager(cfg)


def _load(variant: str, root: str, workers: str, epochs: str) -> dict[str, float]:
    """CPU seconds of some epochs, with one thread and on the CPU, from the start of the workers to their end."""
    torch.set_num_threads(1)
    loader = _manager(variant, root, int(workers), use_gpu=False).train_loader
    before, images = _cpu_seconds(), 0
    for _ in range(int(epochs)):
        for batch in loader:
            images += len(batch["img"])
    del loader  # its workers end, and count
    main, of_workers = (after - start for after, start in zip(_cpu_seconds(), before))
    return {"images": images, "all": main + of_workers, "main": main, "workers": of_workers}


def _cpu_seconds() -> tuple[float, float]:
    """Those of this process, and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own, children = (usage.ru_utime + usage.ru_stime for usage in usages)
    return own, children


def _train(variant: str, root: str, workers: str, epochs: str, name: str, amp: str) -> dict[str, float]:
    """Images a second of training after an epoch to warm up, and the share of time until a batch is on the GPU."""
    torch.backends.cudnn.benchmark = True  # as the command line does
    manager = _manager(variant, root, int(workers), use_gpu=True)
    model = models.build_model(name, manager.num_train_pids, loss="triplet", pretrained=False).cuda()
    optimizer = optim.build_optimizer(model, optim="adam", lr=1e-5)
    training = torchreid_snloss.ImageHAP2SEngine(manager, model, optimizer, amp=amp, channels_last=True)
    training.set_model_mode("train")
    waited, images, start = 0.0, 0, 0.0
    with training.train_loader.ending_workers():
        for epoch in range(int(epochs) + 1):
            if epoch == 1:
                waited, images, start = 0.0, 0, time.perf_counter()
            for batch in _waiting(manager.train_loader, times := []):
                training.step(batch)
                torch.cuda.synchronize()
                images += len(batch["img"])
            waited += sum(times)
        seconds = time.perf_counter() - start
    return {"rate": images / seconds, "waiting": waited / seconds}


def _waiting(loader: Any, times: list[float]) -> Iterator[Any]:
    """The batches of a loader; `times` gets the seconds that each took to come."""
    start = time.perf_counter()
    for batch in loader:
        times.append(time.perf_counter() - start)
        yield batch
        start = time.perf_counter()


def _main() -> None:
    what, *arguments = sys.argv[1:]
    utils.set_random_seed(1)
    with contextlib.redirect_stdout(io.StringIO()):
        found = {"load": _load, "train": _train}[what](*arguments)
    print(json.dumps(found))


if __name__ == "__main__":
    _main()
