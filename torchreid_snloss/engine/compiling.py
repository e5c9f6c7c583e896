"""`torch.compile` and the channels-last memory format, applied to a model in place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from torchreid_snloss.engine.options import CompileError

__all__ = ["compile_in_place", "is_compiled", "named_compile_errors", "to_channels_last"]


def to_channels_last(model: nn.Module) -> None:
    """Converts a model's weights, and the images it is called with, to the channels-last memory format."""
    model.to(memory_format=torch.channels_last)
    model.register_forward_pre_hook(_images_to_channels_last)


def _images_to_channels_last(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    images, *others = inputs
    return images.contiguous(memory_format=torch.channels_last), *others


def compile_in_place(model: nn.Module) -> None:
    """Compiles a model without changing the names in its state dict; `torch.compile(model)` would change them.

    Raises:
        ValueError: for `nn.DataParallel` on several GPUs.
        CompileError: if torch can't compile on this version of Python.
    """
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise ValueError("compile does not work with nn.DataParallel on several GPUs")
    try:
        model.compile()
    except RuntimeError as error:
        raise CompileError(f"torch.compile: {error}") from error


def is_compiled(model: nn.Module) -> bool:
    """Whether a model or a part of it is compiled, in place or by `torch.compile(model)`."""
    return any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )


@contextlib.contextmanager
def named_compile_errors() -> Iterator[None]:
    """A context in which a failure to compile raises `CompileError`.

    torch compiles a model when it is first called, again for images of another size, and in the first backward pass.
    The classes of its exceptions differ between versions, so they are recognised by the module that defines them.
    """
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo.", "torch._inductor.")):
            raise
        reason = " ".join(str(error).split("\n\n")[0].split())[:300]
        raise CompileError(f"torch.compile can't compile the model: {reason}") from error
