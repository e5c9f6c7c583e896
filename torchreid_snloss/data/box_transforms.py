"""torchreid's transforms that draw a box in each image of a batch: patches of other images, and erasing."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchreid_snloss.data.draws import Draws
from torchreid_snloss.device import array_to

__all__ = ["Erase", "Patch"]

Integers: TypeAlias = npt.NDArray[np.int64]


def _boxes(draws: Draws, size: Sequence[int], areas: tuple[float, float], lowest_ratio: float) -> tuple[Any, Integers]:
    """Draws boxes as torchreid does: an area and an aspect ratio, up to a hundred times until they fit the image.

    Args:
        draws: of n images.
        size: height and width of an image in pixels.
        areas: the smallest and the largest area, as shares of the image's.
        lowest_ratio: the smallest ratio of height to width; the largest is its inverse.

    Returns:
        (n,) whether one fits, and (n, 2) the heights and widths in pixels.
    """
    height, width = size
    area = draws.of("area").uniform(areas[0], areas[1], times=100) * height * width
    ratio = draws.of("ratio").uniform(lowest_ratio, 1 / lowest_ratio, times=100)
    sizes = np.rint(np.sqrt(np.stack([area * ratio, area / ratio], axis=-1))).astype(np.int64)
    fits = (sizes[..., 0] < height) & (sizes[..., 1] < width)
    each, first = np.arange(len(sizes)), fits.argmax(axis=1)
    return fits[each, first], sizes[each, first]


class Patch:
    """`RandomPatch`: pastes patches of the images before, mirrored and rotated, over images.

    Patches are kept for an epoch, as in torchreid's workers, but only the last 1,024, which are 50 MB at most, or as
    many as there must be before one is pasted.
    """

    def __init__(self, step: Any) -> None:
        self.parameters, self.areas = step, (step.patch_min_area, step.patch_max_area)
        self.start_epoch()

    def start_epoch(self) -> None:
        """Forgets all patches."""
        most = min(max(1024, self.parameters.min_sample_size), self.parameters.patchpool.maxlen)
        self._patches: deque[Tensor] = deque(maxlen=most)

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        draws, given, size = draws.of("patch"), self.parameters, images.shape[-2:]
        fits, sizes = _boxes(draws.of("box"), size, self.areas, given.patch_min_ratio)
        corners = np.stack(
            [draws.of(axis).integers(0, size[axis == "x"] - sizes[:, int(axis == "x")]) for axis in "yx"]
        )
        place = np.concatenate([draws.of(f"place {axis}").uniform() for axis in "yx"], axis=1)
        pick = draws.of("pick").uniform()[:, 0]
        happens = set(draws.chosen(given.prob_happen).tolist())
        mirrored = draws.of("mirror").uniform()[:, 0] > given.prob_flip_leftright
        rotated = draws.of("rotate").uniform()[:, 0] > given.prob_rotate
        angles = draws.of("angle").integers(-10, 10)
        out = images.clone()
        for number, (height, width) in enumerate(sizes):
            if fits[number]:
                y, x = corners[:, number]
                # A copy, so that the batch it was cut from is not kept.
                self._patches.append(images[number, :, y : y + height, x : x + width].clone())
            if len(self._patches) < given.min_sample_size or number not in happens:
                continue
            patch = self._patches[int(pick[number] * len(self._patches))]
            free = np.array(size) - patch.shape[-2:] + 1
            y, x = (place[number] * free).astype(int)
            patch = patch.flip(-1) if mirrored[number] else patch
            patch = _rotated(patch, int(angles[number])) if rotated[number] else patch
            out[number, :, y : y + patch.shape[1], x : x + patch.shape[2]] = patch
        return out


def _rotated(patch: Tensor, degrees: int) -> Tensor:
    """Rotates an image (3, h, w) counterclockwise about its middle, to nearest pixels; black comes in at the edges."""
    height, width = patch.shape[-2:]
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    y = torch.arange(height, device=patch.device).view(-1, 1) + 0.5 - height / 2
    x = torch.arange(width, device=patch.device) + 0.5 - width / 2
    rows = (sin * x + cos * y + height / 2).floor().long()
    columns = (cos * x - sin * y + width / 2).floor().long()
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    rotated: Tensor = patch[:, rows.clamp(0, height - 1), columns.clamp(0, width - 1)] * inside
    return rotated


class Erase:
    """`RandomErasing`: fills a box of a normalised image with the given values."""

    def __init__(self, step: Any) -> None:
        self.probability, self.areas = step.probability, (step.sl, step.sh)
        self.lowest_ratio, self.value = step.r1, np.asarray(step.mean, np.float32)

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        draws, size = draws.of("erase"), images.shape[-2:]
        fits, sizes = _boxes(draws, size, self.areas, self.lowest_ratio)
        tops, lefts = (draws.of("yx"[axis]).integers(0, size[axis] - sizes[:, axis]) for axis in (0, 1))
        value = array_to(images.device, self.value).view(-1, 1, 1)
        for number in draws.chosen(self.probability):
            if fits[number]:
                (height, width), top, left = sizes[number], tops[number], lefts[number]
                images[number, :, top : top + height, left : left + width] = value
        return images
