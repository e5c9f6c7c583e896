"""The accelerator: whether there is one, what it can do, and how models and batches get there.

Besides this module, `losses/rows.py` knows CPUs from GPUs, and which lack float64; the losses choose algorithms by it.
torchreid's own engines and models call `.cuda()`, so another kind also needs a torchreid that knows it.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy.typing as npt
import torch
from torch import Tensor, nn

__all__ = [
    "array_to",
    "check_random_state",
    "collective_backend",
    "count",
    "grad_scaler",
    "has_bfloat16",
    "is_available",
    "is_on_device",
    "name",
    "peak_memory",
    "random_state",
    "random_states",
    "set_random_state",
    "set_random_states",
    "to_device",
    "type_of",
    "use",
]

_Movable = TypeVar("_Movable", Tensor, nn.Module)


def type_of(use_gpu: bool) -> str:
    """The type of the device to train on, as torch names it: `"cuda"` or `"cpu"`."""
    return "cuda" if use_gpu else "cpu"


def is_available() -> bool:
    """Whether there is a GPU."""
    return torch.cuda.is_available()


def count() -> int:
    """The number of GPUs."""
    return torch.cuda.device_count()


def name() -> str:
    """The name of the GPU in use."""
    return torch.cuda.get_device_name()


def use(index: int) -> None:
    """Makes a GPU the one in use, by its index."""
    torch.cuda.set_device(index)


def has_bfloat16() -> bool:
    """Whether the GPU in use computes in bfloat16 itself; torch emulates it slowly on older ones."""
    return torch.cuda.get_device_capability() >= (8, 0)


def collective_backend(use_gpu: bool) -> str:
    """The backend of a process group. Numbers on the CPU go over Gloo, so that sending them does not wait for a GPU."""
    return "cpu:gloo,cuda:nccl" if use_gpu else "gloo"


def to_device(value: _Movable, use_gpu: bool) -> _Movable:
    """Moves a tensor or a model to the device; a tensor in pinned memory without waiting for it."""
    if not use_gpu:
        return value
    return value.cuda(non_blocking=True) if isinstance(value, Tensor) else value.cuda()


def array_to(where: torch.device, values: npt.NDArray[Any]) -> Tensor:
    """Copies an array to a device, without waiting for what a GPU still has to do, as a plain copy would."""
    return torch.from_numpy(values).to(where, non_blocking=True)


def is_on_device(model: nn.Module) -> bool:
    """Whether any parameter of a model is on a GPU."""
    return any(parameter.is_cuda for parameter in model.parameters())


def peak_memory() -> float | None:
    """The most memory that torch has allocated on the GPU so far, in MiB; None if it has not used one."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_initialized() else None


def random_states() -> list[Tensor]:
    """The states of the generators of all GPUs."""
    return torch.cuda.get_rng_state_all() if is_available() else []


def set_random_states(states: list[Tensor]) -> None:
    """Puts back what `random_states` returned, for the GPUs that this machine has."""
    if is_available() and states:
        torch.cuda.set_rng_state_all(states[: count()])


def check_random_state(state: Tensor) -> None:
    """Tries a state on a generator of its own, if there is a GPU.

    Raises:
        RuntimeError: If it is not the state of a GPU's generator.
    """
    if is_available():
        torch.Generator("cuda").set_state(state)


def random_state(device: torch.device) -> Tensor | None:
    """The state of one device's generator; None for the CPU."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state: Tensor | None, device: torch.device) -> None:
    """Puts back what `random_state` returned."""
    if state is not None:
        torch.cuda.set_rng_state(state, device)


def grad_scaler(device: str) -> Any:
    """torch's `GradScaler` for a type of device."""
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device)
    return torch.cuda.amp.GradScaler()  # torch 2.2
