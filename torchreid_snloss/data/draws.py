"""Random numbers as a function of seed, epoch and image: it does not matter who draws them, or when."""

from __future__ import annotations

import zlib
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Draws", "Floats", "Keys", "image_keys"]

Keys: TypeAlias = npt.NDArray[np.uint64]
Floats: TypeAlias = npt.NDArray[np.float64]

_GAMMA = 0x9E3779B97F4A7C15


def _mixed(numbers: Keys) -> Keys:
    """SplitMix64's mixing function (Steele, Lea and Flood, OOPSLA 2014, figure 16)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def image_keys(*parts: Any) -> Keys:
    """A 64-bit key for each image.

    Args:
        *parts: whole numbers, at least 0, or arrays (n,) of them, such as seed, epoch and the numbers of images.

    Returns:
        (n,)
    """
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = _mixed(key + _mixed(np.atleast_1d(np.asarray(part)).astype(np.uint64) + np.uint64(_GAMMA)))
    return key


class Draws:
    """The random numbers of a batch, independent between images and between transforms.

    Args:
        keys: (n,), from `image_keys`.
        name: what they are drawn for. Transforms of different names draw different numbers.
    """

    def __init__(self, keys: Keys, name: str = "") -> None:
        self._keys, self._name = keys, name
        self._start = image_keys(keys, zlib.crc32(name.encode()))
        self._drawn = 0

    def __len__(self) -> int:
        return len(self._keys)

    def of(self, name: str) -> Draws:
        """The numbers of the same images for another purpose."""
        return Draws(self._keys, f"{self._name}/{name}")

    def uniform(self, low: float = 0.0, high: float = 1.0, times: int = 1) -> Floats:
        """Draws numbers from [low, high), with SplitMix64 started at the key of each image.

        Returns:
            (n, times)
        """
        steps = np.arange(self._drawn + 1, self._drawn + times + 1, dtype=np.uint64) * np.uint64(_GAMMA)
        self._drawn += times
        bits = _mixed(self._start[:, None] + steps)
        drawn: Floats = low + (high - low) * ((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)
        return drawn

    def chosen(self, probability: float) -> npt.NDArray[np.int64]:
        """The numbers of the images for which something of that probability happens; 1 is always."""
        return np.flatnonzero(self.of("happens").uniform()[:, 0] <= probability)

    def integers(self, low: int, high: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Draws a whole number from low to high, both included; `high` is a number, or (n,) of them.

        Returns:
            (n,)
        """
        steps = np.floor(self.uniform()[:, 0] * (np.asarray(high) - low + 1))
        drawn: npt.NDArray[np.int64] = low + steps.astype(np.int64)
        return drawn
