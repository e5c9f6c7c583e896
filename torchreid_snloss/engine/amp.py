"""Mixed precision: where it can be had, and the scaling of the loss that float16 needs."""

from __future__ import annotations

import contextlib
from typing import Any, Literal, get_args

import torch

from torchreid_snloss.losses.base import check_choice

__all__ = ["Amp", "autocast", "check_amp", "grad_scaler"]

Amp = Literal["off", "bf16", "fp16"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_amp(amp: str, device: str) -> None:
    """Checks that a precision can be trained in.

    Args:
        amp: ``"off"``, ``"bf16"`` or ``"fp16"``.
        device: ``"cuda"`` or ``"cpu"``.

    Raises:
        ValueError: for another word, and for one that the device or this torch can't do.
    """
    check_choice("amp", amp, get_args(Amp))
    if amp == "bf16" and device == "cuda" and torch.cuda.get_device_capability() < (8, 0):  # torch would emulate it
        raise ValueError(f"amp bf16 takes a GPU that computes in bfloat16, {torch.cuda.get_device_name()} does not")
    if amp == "fp16" and device == "cpu" and not hasattr(torch.amp, "GradScaler"):
        raise ValueError(f"amp fp16 on a CPU takes torch 2.3 or newer, this is {torch.__version__}")


def autocast(amp: Amp, device: str) -> contextlib.AbstractContextManager[Any]:
    """What the model is called in; with ``"off"`` it does nothing."""
    return contextlib.nullcontext() if amp == "off" else torch.autocast(device, dtype=_DTYPES[amp])


def grad_scaler(amp: Amp, device: str) -> Any:
    """torch's ``GradScaler`` for float16, whose gradients would else vanish; None for the rest."""
    if amp != "fp16":
        return None
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device)
    return torch.cuda.amp.GradScaler()  # torch 2.2
