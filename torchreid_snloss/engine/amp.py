"""Mixed precision: where it is available, and the scaling of the loss that float16 needs."""

from __future__ import annotations

import contextlib
from typing import Any, Literal, get_args

import torch
from torch import nn

from torchreid_snloss import device as devices
from torchreid_snloss.arguments import check_choice

__all__ = ["Amp", "autocast", "check_amp", "check_precision", "grad_scaler"]

Amp = Literal["off", "bf16", "fp16"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_amp(amp: str, device: str) -> None:
    """Checks that a precision is available for training.

    Args:
        amp: `"off"`, `"bf16"` or `"fp16"`.
        device: `"cuda"` or `"cpu"`.

    Raises:
        ValueError: for any other value, and for one that the device or this version of torch doesn't support.
    """
    check_choice("amp", amp, get_args(Amp))
    if amp == "bf16" and device != "cpu" and not devices.has_bfloat16():
        raise ValueError(f"amp bf16 needs an Ampere or newer GPU; this is a {devices.name()}: use amp fp16")
    if amp == "fp16" and device == "cpu" and not hasattr(torch.amp, "GradScaler"):
        raise ValueError(f"amp fp16 on a CPU needs torch 2.3 or newer; this is {torch.__version__}")


def check_precision(model: nn.Module, device: str, amp: Amp, micro_batch: int, sync_batchnorm: bool) -> None:
    """Checks that the precision and the other ways to train a batch are available, alone and together.

    Args:
        model: the model.
        device: `"cuda"` or `"cpu"`.
        amp: see `check_amp`.
        micro_batch: the maximum number of images that the model processes at a time; 0: all.
        sync_batchnorm: whether batch norm normalises over all processes.

    Raises:
        ValueError: if one is not available, or two do not work together.
    """
    if sync_batchnorm and device == "cpu":
        raise ValueError("sync_batchnorm needs GPUs, torch doesn't have it for a CPU")
    check_amp(amp, device)
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        if amp == "bf16":
            # Its threads inherit that autocast is enabled, but not the dtype, and would compute in float16.
            raise ValueError("amp bf16 does not work with nn.DataParallel on several GPUs; fp16 does")
        if micro_batch:
            raise ValueError("micro_batch does not work with nn.DataParallel on several GPUs; start it with torchrun")


def autocast(amp: Amp, device: str) -> contextlib.AbstractContextManager[Any]:
    """The context in which the model is called; with `"off"` it does nothing."""
    return contextlib.nullcontext() if amp == "off" else torch.autocast(device, dtype=_DTYPES[amp])


def grad_scaler(amp: Amp, device: str) -> Any:
    """torch's `GradScaler` for float16, whose small gradients would otherwise be 0; None for other precisions."""
    if amp != "fp16":
        return None
    return devices.grad_scaler(device)
