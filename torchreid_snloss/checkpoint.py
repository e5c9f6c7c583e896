"""Loading the checkpoints that torchreid's own engines write."""

from __future__ import annotations

import contextlib

import numpy as np
import torch

__all__ = ["numpy_scalars_allowed"]


def numpy_scalars_allowed() -> contextlib.AbstractContextManager[None]:
    """Within it ``torch.load`` takes NumPy scalars, and still no other object that is not a tensor or plain data.

    torchreid's engines store rank-1 as a NumPy scalar, which ``torch.load`` refuses by default since torch 2.6. Before
    that there is nothing to allow.
    """
    if not hasattr(torch.serialization, "safe_globals"):
        return contextlib.nullcontext()
    scalar = np.float64(0).__reduce__()[0]
    allowed = [np.dtype, *(type(np.dtype(kind)) for kind in (np.float32, np.float64))]
    names = [f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")]  # NumPy 1 and 2
    return torch.serialization.safe_globals([*allowed, *((scalar, name) for name in names)])  # type: ignore[list-item]
