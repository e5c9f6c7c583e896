"""The states of all random number generators that training uses."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torchreid import utils

from torchreid_snloss import device

__all__ = ["random_states", "seed_generators", "set_random_states", "set_torch_random_state", "torch_random_state"]


def seed_generators(*parts: int) -> None:
    """Seeds Python's, NumPy's and torch's generators from several numbers, such as a run's seed and an epoch."""
    utils.set_random_seed(int(np.random.SeedSequence(list(parts)).generate_state(1)[0]))


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, as tensors and plain data that a checkpoint can hold."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": device.random_states(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Restores the states that `random_states` returned. States of GPUs that this machine lacks are ignored."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    device.set_random_states(states["cuda"])


TorchState = tuple[torch.Tensor, "torch.Tensor | None"]


def torch_random_state(where: torch.device) -> TorchState:
    """The states of torch's generators alone, on the CPU and on one device; cheap enough for every micro-batch."""
    return torch.get_rng_state(), device.random_state(where)


def set_torch_random_state(state: TorchState, where: torch.device) -> None:
    """Puts back what `torch_random_state` returned."""
    torch.set_rng_state(state[0])
    device.set_random_state(state[1], where)
