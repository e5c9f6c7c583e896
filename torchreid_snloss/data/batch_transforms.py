"""torchreid's transforms for whole batches on the model's device; each image has its own random numbers.

Each class stands for one of torchreid's or torchvision's, takes its parameters from an object of that class, and draws
from the same distributions. `batched` finds the one for each step of a data set's transform.

Images are uint8 up to `to_float`. Without random transforms, the results equal torchreid's to 2/255.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchreid import data as torchreid_data
from torchvision import transforms
from torchvision.transforms.v2 import functional as vision

from torchreid_snloss.data.box_transforms import Erase, Patch
from torchreid_snloss.data.draws import Draws
from torchreid_snloss.device import array_to

__all__ = ["Resize", "Step", "batched"]

Step: TypeAlias = Callable[[Tensor, Draws], Tensor]


def batched(transform: Any) -> tuple[list[Any], Resize, list[Step]]:
    """Splits an image's transform into what comes before its first `Resize`, and batch transforms.

    Args:
        transform: torchreid's or torchvision's transform of an image; a `Compose` may hold others.

    Returns:
        the steps to be done for each image by itself, which torchreid's transforms have none of; and as batch
        transforms `Resize` and the rest.

    Raises:
        ValueError: for a step that no batch transform stands for, or not in this order; it names the step.
    """
    steps = _steps_of(transform)
    start = next((number for number, step in enumerate(steps) if type(step) is transforms.Resize), None)
    if start is None:
        raise ValueError(
            f"data.batch_transforms needs a Resize of torchvision's to a height and a width, got {steps}; use False"
        )
    resize = Resize(steps[start])
    rest: list[Step] = []
    size, are_floats = resize.size, False
    for step in steps[start + 1 :]:
        if type(step) not in _BATCHED:
            raise ValueError(f"data.batch_transforms: the transform {step!r} has no batch transform; use False")
        if type(step) in (_OF_BYTES if are_floats else _OF_FLOATS):
            raise ValueError(
                f"data.batch_transforms: {type(step).__name__} has no batch transform "
                f"{'after' if are_floats else 'before'} ToTensor; use False"
            )
        are_floats |= type(step) is transforms.ToTensor
        made = _BATCHED[type(step)](step)
        size = made.size if isinstance(made, Resize) else size
        if isinstance(made, EnlargeAndCrop) and made.size != size:
            raise ValueError(
                f"data.batch_transforms: {type(step).__name__} to {made.size} (height, width) has no batch transform "
                f"for images of {size}; use False"
            )
        rest.append(made)
    return steps[:start], resize, rest


def _steps_of(transform: Any) -> list[Any]:
    if isinstance(transform, transforms.Compose):
        return [step for part in transform.transforms for step in _steps_of(part)]
    return [transform]


class Resize:
    """Resizes images with torchvision, bilinear with antialiasing.

    It is called with (n, 3, h, w) images of one size; `of_sizes` takes those of any.
    """

    def __init__(self, step: Any) -> None:
        size = step.size
        if step.interpolation != transforms.InterpolationMode.BILINEAR or np.shape(size) != (2,):
            raise ValueError(f"data.batch_transforms: {step!r} must resize bilinearly, to a height and a width")
        self.size = (int(size[0]), int(size[1]))
        self._of_image = step

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        return _resized(images, self.size)

    def of_large(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Resizes an image (h, w, 3) that takes more bytes than the result as float32: four times the pixels."""
        if image.shape[0] * image.shape[1] <= 4 * self.size[0] * self.size[1]:
            return image
        return np.asarray(self._of_image(Image.fromarray(image)))

    def of_sizes(self, data: Tensor, sizes: npt.NDArray[np.int64]) -> Tensor:
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


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    if len(images) == 0:
        return images
    resized: Tensor = vision.resize(images, list(size), antialias=True)
    return resized


class Flip:
    """`RandomHorizontalFlip`: mirrors images, left to right."""

    def __init__(self, step: Any) -> None:
        self.probability = step.p

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        chosen = array_to(images.device, draws.of("flip").chosen(self.probability))
        return images.index_copy_(0, chosen, images.index_select(0, chosen).flip(-1))


class EnlargeAndCrop:
    """`Random2DTranslation`: enlarges images by an eighth, and crops them to their size at a random place."""

    def __init__(self, step: Any) -> None:
        if step.interpolation != Image.Resampling.BILINEAR:
            raise ValueError(f"data.batch_transforms: {type(step).__name__} must resize bilinearly; use False")
        self.size, self.probability = (step.height, step.width), step.p

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        draws = draws.of("crop")
        height, width = self.size
        large = round(1.125 * height), round(1.125 * width)
        tops = np.rint(draws.of("top").uniform(0, large[0] - height)[:, 0]).astype(int)
        lefts = np.rint(draws.of("left").uniform(0, large[1] - width)[:, 0]).astype(int)
        parts = list(images)
        chosen = draws.chosen(self.probability)
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


_BATCHED: dict[type, Callable[[Any], Step]] = {
    transforms.Resize: Resize,
    transforms.RandomHorizontalFlip: Flip,
    torchreid_data.transforms.Random2DTranslation: EnlargeAndCrop,
    torchreid_data.transforms.RandomPatch: Patch,
    transforms.ColorJitter: Jitter,
    transforms.ToTensor: lambda step: to_float,
    transforms.Normalize: Normalize,
    torchreid_data.transforms.RandomErasing: Erase,
}
# What needs uint8, or float32; the others take both.
_OF_BYTES = (
    torchreid_data.transforms.Random2DTranslation,
    torchreid_data.transforms.RandomPatch,
    transforms.ColorJitter,
    transforms.ToTensor,
)
_OF_FLOATS = (transforms.Normalize, torchreid_data.transforms.RandomErasing)
