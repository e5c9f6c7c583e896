"""torchreid's transforms for whole batches on the model's device; each image has its own random numbers.

Each class stands for one of torchreid's or torchvision's, takes its parameters from an object of that class, and draws
from the same distributions. `batched` finds the one for each step of a data set's transform.

Images are uint8 up to `to_float`, and every step rounds as Pillow does. Without random transforms, the results equal
torchreid's to the bit on a CPU with AVX2, and to 1/255 elsewhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchreid import data as torchreid_data
from torchvision import transforms
from torchvision.transforms.v2 import functional as vision

from torchreid_snloss.data.draws import Draws
from torchreid_snloss.device import array_to

__all__ = ["BatchTransform", "Resize", "batched"]

BatchTransform: TypeAlias = Callable[[Tensor, Draws], Tensor]
Integers: TypeAlias = npt.NDArray[np.int64]


def batched(steps: Sequence[Any]) -> tuple[list[Any], list[BatchTransform]]:
    """Splits the steps of an image's transform into those that come before its first `Resize`, and batch transforms.

    Args:
        steps: the transforms of a `Compose`.

    Returns:
        the steps to be done for each image by itself, which torchreid's transforms have none of, and the rest as
        batch transforms, of which `Resize` is the first.

    Raises:
        ValueError: for a step that no batch transform stands for; it names the step.
    """
    start = next((number for number, step in enumerate(steps) if type(step) is transforms.Resize), None)
    if start is None:
        raise ValueError("data.batch_transforms needs a transform that resizes images to one height and width")
    rest: list[BatchTransform] = []
    for step in steps[start:]:
        if type(step) not in _BATCHED:
            raise ValueError(f"data.batch_transforms: the transform {step!r} has no batch transform; use False")
        rest.append(_BATCHED[type(step)](step))
    return list(steps[:start]), rest


def _chosen(draws: Draws, probability: float) -> Integers:
    """The numbers of the images to transform; torchreid's transforms leave one alone if its draw is larger."""
    return np.flatnonzero(draws.of("happens").uniform()[:, 0] <= probability)


class Resize:
    """Resizes images with torchvision, bilinear with antialiasing.

    It is called with (n, 3, h, w) images of one size; `of_sizes` takes those of any.
    """

    def __init__(self, step: Any) -> None:
        size = step.size
        if step.interpolation != transforms.InterpolationMode.BILINEAR or not isinstance(size, (list, tuple)):
            raise ValueError(f"data.batch_transforms: {step!r} must resize bilinearly, to a height and a width")
        self.size = [int(length) for length in size]

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        return _resized(images, self.size)

    def of_sizes(self, data: Tensor, sizes: Integers) -> Tensor:
        """Resizes images that lie one after the other, those of one size together.

        Args:
            data: the values of all images, row by row, uint8; each pixel's red, green and blue are side by side.
            sizes: (n, 2), their heights and widths.
        """
        kinds, kind_of = np.unique(sizes, axis=0, return_inverse=True)
        if len(kinds) == 1:
            return _resized(_planar(data.view(-1, *kinds[0], 3)), self.size)
        parts = data.split((3 * sizes.prod(axis=1)).tolist())
        out = data.new_empty(len(sizes), 3, *self.size)
        for number, (height, width) in enumerate(kinds):
            own = np.flatnonzero(kind_of.reshape(-1) == number)
            images = torch.stack([parts[index] for index in own]).view(-1, height, width, 3)
            out[array_to(data.device, own)] = _resized(_planar(images), self.size)
        return out


def _planar(images: Tensor) -> Tensor:
    """(n, 3, h, w) from (n, h, w, 3)."""
    return images.permute(0, 3, 1, 2).contiguous()


def _resized(images: Tensor, size: list[int]) -> Tensor:
    if len(images) == 0:
        return images
    resized: Tensor = vision.resize(images, size, antialias=True)
    return resized


class Flip:
    """`RandomHorizontalFlip`: mirrors images, left to right."""

    def __init__(self, step: Any) -> None:
        self.probability = step.p

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        chosen = array_to(images.device, _chosen(draws.of("flip"), self.probability))
        return images.index_copy_(0, chosen, images.index_select(0, chosen).flip(-1))


class EnlargeAndCrop:
    """`Random2DTranslation`: enlarges images by an eighth, and crops them to their size at a random place."""

    def __init__(self, step: Any) -> None:
        self.size, self.probability = (step.height, step.width), step.p

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        draws = draws.of("crop")
        height, width = self.size
        large = [round(1.125 * height), round(1.125 * width)]
        tops = np.rint(draws.of("top").uniform(0, large[0] - height)[:, 0]).astype(int)
        lefts = np.rint(draws.of("left").uniform(0, large[1] - width)[:, 0]).astype(int)
        parts = list(images)
        chosen = _chosen(draws, self.probability)
        enlarged = _resized(images.index_select(0, array_to(images.device, chosen)), large)
        for number, one in zip(chosen, enlarged):
            y, x = tops[number], lefts[number]
            parts[number] = one[:, y : y + height, x : x + width]
        return torch.stack(parts)


class Jitter:
    """`ColorJitter` with brightness and contrast, in an order of each image's own."""

    def __init__(self, step: Any) -> None:
        if step.saturation is not None or step.hue is not None:
            raise ValueError(f"data.batch_transforms: {step!r} changes saturation or hue, which has no batch transform")
        self.brightness, self.contrast = step.brightness or (1.0, 1.0), step.contrast or (1.0, 1.0)

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        draws = draws.of("jitter")
        ranges = {"brightness": self.brightness, "contrast": self.contrast, "order": (-1.0, 1.0)}
        drawn = np.stack([draws.of(name).uniform(*limits) for name, limits in ranges.items()]).astype(np.float32)
        factors = array_to(images.device, drawn).view(3, -1, 1, 1, 1)
        few = len(images) if images.is_cuda else 2  # a CPU's cache holds few
        for part, drawn_of_part in zip(images.split(few), factors.split(few, dim=1)):
            part.copy_(_jittered(part, *drawn_of_part))
        return images


def _jittered(images: Tensor, brightness: Tensor, contrast: Tensor, order: Tensor) -> Tensor:
    mixed = images.float()
    for first in (True, False):
        now = (order > 0) == first
        # Pillow mixes an image with black for brightness, and with its mean grey value for contrast.
        grey = torch.where(now, _mean_grey(mixed), 0)
        mixed = mixed.sub_(grey).mul_(torch.where(now, contrast, brightness)).add_(grey).clamp_(0, 255).floor_()
    return mixed


def _mean_grey(images: Tensor) -> Tensor:
    """The mean of each image's grey values, each rounded as by Pillow, which float32 can do; (n, 1, 1, 1)."""
    red, green, blue = images.flatten(2).unbind(dim=1)
    grey = (red * 19595).add_(green * 38470).add_(blue * 7471).add_(0x8000).div_(0x10000).floor_()
    return grey.double().mean(dim=-1).add_(0.5).floor_().float().view(-1, 1, 1, 1)


def to_float(images: Tensor, draws: Draws) -> Tensor:
    """`ToTensor`: from uint8 to float32 in [0, 1]."""
    return images.float().div_(255)


class Normalize:
    """`Normalize`: subtracts the mean of each channel, and divides by its standard deviation."""

    def __init__(self, step: Any) -> None:
        self.mean, self.std = (np.asarray(value, np.float32) for value in (step.mean, step.std))

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        mean, std = (array_to(images.device, value).view(-1, 1, 1) for value in (self.mean, self.std))
        return images.sub_(mean).div_(std)


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

    Patches are kept for an epoch, as in torchreid's workers, but not more than the last 1,024: on a GPU, 50 MB at most.
    """

    most = 1024

    def __init__(self, step: Any) -> None:
        self.parameters, self.areas = step, (step.patch_min_area, step.patch_max_area)
        self.start_epoch()

    def start_epoch(self) -> None:
        """Forgets all patches."""
        self._patches: deque[Tensor] = deque(maxlen=min(self.most, self.parameters.patchpool.maxlen))

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        draws, given, size = draws.of("patch"), self.parameters, images.shape[-2:]
        fits, sizes = _boxes(draws.of("box"), size, self.areas, given.patch_min_ratio)
        corners = np.stack(
            [draws.of(axis).integers(0, size[axis == "x"] - sizes[:, int(axis == "x")]) for axis in "yx"]
        )
        place = np.concatenate([draws.of(f"place {axis}").uniform() for axis in "yx"], axis=1)
        pick = draws.of("pick").uniform()[:, 0]
        happens = set(_chosen(draws, given.prob_happen).tolist())
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
        for number in _chosen(draws, self.probability):
            if fits[number]:
                (height, width), top, left = sizes[number], tops[number], lefts[number]
                images[number, :, top : top + height, left : left + width] = value
        return images


_BATCHED: dict[type, Callable[[Any], BatchTransform]] = {
    transforms.Resize: Resize,
    transforms.RandomHorizontalFlip: Flip,
    torchreid_data.transforms.Random2DTranslation: EnlargeAndCrop,
    torchreid_data.transforms.RandomPatch: Patch,
    transforms.ColorJitter: Jitter,
    transforms.ToTensor: lambda step: to_float,
    transforms.Normalize: Normalize,
    torchreid_data.transforms.RandomErasing: Erase,
}
