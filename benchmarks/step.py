"""A training step: model, losses, optimizer."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from torchreid import data, engine, models, optim

import torchreid_snloss
from benchmarks.timing import Row, interleaved, rows_of

__all__ = ["make_manager", "measure"]

_CASES = {
    "cpu": [("osnet_x0_25", 128, 64, 64), ("resnet50", 256, 128, 16)],
    "cuda": [("resnet50", 256, 128, 64)],
}
_THEIRS = "torchreid ImageTripletEngine"


def measure(device: str, seconds: float = 60) -> list[Row]:
    """`forward_backward` of a batch in memory, 4 images an identity, softmax beside the metric loss."""
    results = []
    with tempfile.TemporaryDirectory() as root:
        for name, height, width, batch_size in _CASES[device]:
            manager = make_manager(root, height, width, batch_size, device)
            batch = next(iter(manager.train_loader))
            steps = {label: _step(make, name, manager, batch, device) for label, make in _engines(device)}
            case = f"{name}, {height}x{width}, batch {batch_size}, {device}"
            results += rows_of("training step", case, interleaved(steps, seconds, repetitions=3), _THEIRS)
    return results


def make_manager(root: str, height: int, width: int, batch_size: int, device: str) -> Any:
    """torchreid's, for drawn people, 4 images an identity; it prints nothing."""
    torchreid_snloss.register()
    with contextlib.redirect_stdout(io.StringIO()):
        return data.ImageDataManager(
            root=root,
            sources="synthetic",
            height=height,
            width=width,
            batch_size_train=batch_size,
            num_instances=4,
            train_sampler="IdentitySampler",
            workers=0,
            use_gpu=device == "cuda",
        )


def _engines(device: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    yield _THEIRS, lambda *args, **kwargs: engine.ImageTripletEngine(*args, weight_x=1, **kwargs)
    for cls in (torchreid_snloss.ImageSNEngine, torchreid_snloss.ImageHAP2SEngine, torchreid_snloss.ImageFIDIEngine):
        yield cls.__name__, cls
    options: dict[str, dict[str, Any]] = {"channels_last": {"channels_last": True}, "bf16": {"amp": "bf16"}}
    options["bf16, channels_last"] = {"amp": "bf16", "channels_last": True}
    if device == "cuda":
        options["bf16, channels_last, compile"] = {"amp": "bf16", "channels_last": True, "compile": True}
    for label, more in options.items():
        yield (
            f"ImageSNEngine, {label}",
            lambda *args, more=more, **kwargs: torchreid_snloss.ImageSNEngine(*args, **more, **kwargs),
        )


def _step(make: Callable[..., Any], name: str, manager: Any, batch: Any, device: str) -> Callable[[], Any]:
    model = models.build_model(name, manager.num_train_pids, loss="triplet", pretrained=False).to(device)
    optimizer = optim.build_optimizer(model, optim="adam", lr=1e-5)
    training = make(manager, model, optimizer, use_gpu=device == "cuda")
    training.set_model_mode("train")
    return lambda: training.forward_backward(batch)
