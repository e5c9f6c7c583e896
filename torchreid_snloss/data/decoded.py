"""Data sets that only decode their images, and batches of uint8 images of any sizes."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate, get_worker_info
from torchreid import data as torchreid_data

from torchreid_snloss.data.draws import image_keys
from torchreid_snloss.data.readable import NamingFailures, UnreadableImageError, decode, reading_with

if TYPE_CHECKING:
    from torchreid_snloss.data.cache import ImageCache

__all__ = ["DECODED", "DecodedDataset", "collate", "decode_array"]

Pixels = npt.NDArray[np.uint8]

DECODED = "torchreid_snloss"  # the key, in items and batches, of what `BatchTransforms` reads


class DecodedDataset(Dataset[dict[str, Any]]):
    """A data set of torchreid's whose images are only decoded.

    Its items have one more part, `DECODED`, a dictionary: `images`, the images' values; `index`, the number of the
    item; and `copy`, how often it came before in the batch. `img` has no values of the images.

    Args:
        dataset: the data set, of images or tracklets, which returns as `img` what its `transform` gives for an image,
            or this for all frames of a tracklet in one tensor.
        for_each: transforms of Pillow's images that are done here.
        shrink: resizes images so large that they are better resized here, as `Resize.of_large` does.
        seed: the seed of the random numbers, until `start_epoch` is called.

    Attributes:
        dataset: the data set.
        cache: decoded images, or None.
    """

    def __init__(self, dataset: Any, for_each: Sequence[Any], shrink: Callable[[Pixels], Pixels], seed: int) -> None:
        self.cache: ImageCache | None = None
        self._images = _Images(for_each, shrink, str(dataset.transform))
        self._take(dataset)
        self._epoch = torch.tensor([seed % 2**63, 0]).share_memory_()  # workers that live through all epochs read it

    def _take(self, dataset: Any) -> None:
        self.dataset = copy.copy(dataset)
        self.dataset.transform = self._images
        get_item = _base_of(self.dataset).__getitem__
        images, tracklets = torchreid_data.ImageDataset.__getitem__, torchreid_data.VideoDataset.__getitem__
        self._is_torchreids = get_item in (images, tracklets)  # which leave images and results of transforms alone
        # torchreid's images draw no random numbers but those of their transforms.
        self._is_random = self._images.are_random or get_item is not images

    def of(self, dataset: Any) -> DecodedDataset:
        """Another data set of torchreid's, decoded for the transforms of this one."""
        made = copy.copy(self)
        made._take(dataset)
        return made

    def start_epoch(self, seed: int, epoch: int) -> None:
        """Sets what the random numbers follow from, here and in the workers."""
        self._epoch.copy_(torch.tensor([seed % 2**63, epoch]))

    @property
    def epoch(self) -> tuple[int, int]:
        """The seed and the epoch."""
        seed, epoch = self._epoch.tolist()
        return seed, epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        before = Counter[int]()
        items = []
        with reading_with(self._read):
            for number in map(int, numbers):
                self._images.start_item()
                with self._seeded(number, before[number]) if self._is_random else contextlib.nullcontext():
                    item = dict(self.dataset[number])
                images = self._images.taken if self._is_torchreids else self._images.checked(item.get("img"))
                items.append({**item, DECODED: {"images": images, "index": number, "copy": before[number]}})
                before[number] += 1
        return items

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.__getitems__([number])[0]

    def _read(self, path: str) -> Any:
        pixels = None if self.cache is None else self.cache.get(os.fspath(path))
        pixels = decode_array(path) if pixels is None else pixels
        return pixels if self._is_torchreids else Image.fromarray(pixels)  # which others' code may look at, and change

    @contextlib.contextmanager
    def _seeded(self, number: int, earlier: int) -> Iterator[None]:
        """Seeds the generators of Python, NumPy and torch for an item."""
        key = int(image_keys(*self.epoch, number, earlier)[0])
        before = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[], enabled=get_worker_info() is None):
            random.seed(key)
            np.random.seed(key % 2**32)
            torch.default_generator.manual_seed(key)
            try:
                yield
            finally:
                random.setstate(before[0])
                np.random.set_state(before[1])

    # The items of the data set, which others may read, and replace in a copy.

    def __copy__(self) -> DecodedDataset:
        made = object.__new__(DecodedDataset)
        made.__dict__.update(self.__dict__, dataset=copy.copy(self.dataset))
        return made

    @property
    def data(self) -> Any:
        return self.dataset.data

    @data.setter
    def data(self, items: Any) -> None:
        self.dataset.data = items

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _base_of(dataset: Any) -> Any:
    """The first class of a data set that says how an item is made, but for the one that names what can't be read."""
    return next(cls for cls in type(dataset).__mro__ if "__getitem__" in vars(cls) and cls is not NamingFailures)


class _Images:
    """Takes the place of a data set's transform. It keeps the images of an item, and returns a token for each.

    Args:
        for_each: transforms of Pillow's images that are done here.
        shrink: resizes large images.
        replaced: the transform whose place it takes, as text.

    Attributes:
        are_random: whether the transforms may draw random numbers.
        taken: the images of the item.
    """

    def __init__(self, for_each: Sequence[Any], shrink: Callable[[Pixels], Pixels], replaced: str) -> None:
        self._for_each, self._shrink, self._replaced = for_each, shrink, replaced
        self.are_random = bool(for_each)
        self.start_item()

    def __repr__(self) -> str:  # by which a file of features knows it again
        return f"{self._replaced} on batches"

    def start_item(self) -> None:
        """Forgets the images of the item before, which may have failed."""
        self.taken: list[Pixels] = []

    def __call__(self, image: Any) -> Tensor:
        if self._for_each:
            image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
            for transform in self._for_each:
                image = transform(image)
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            before = f" that {self._for_each} give" if self._for_each else ""
            raise UnreadableImageError(
                f"data.batch_transforms resizes RGB images of uint8, (height, width, 3), but the images{before} are "
                f"{pixels.dtype} {pixels.shape}; use False"
            )
        self.taken.append(self._shrink(pixels))
        return _tokens(len(self.taken), len(self.taken))[0]

    def checked(self, img: Any) -> list[Pixels]:
        """The images of an item, if its `img` is what this object has returned for them, and nothing else.

        Raises:
            UnreadableImageError: if it is not.
        """
        tokens = _tokens(1, len(self.taken))
        expected = tokens[0] if len(tokens) == 1 and getattr(img, "ndim", 0) == 3 else tokens
        if not isinstance(img, Tensor) or not torch.equal(img, expected):
            raise UnreadableImageError(
                "data.batch_transforms needs a data set that calls its transform once for each image, and returns the "
                "results as they are; use False"
            )
        return self.taken


def _tokens(first: int, last: int) -> Tensor:
    """What stands for the transformed images of these numbers: no part of one is another part, or of another."""
    return torch.arange(12.0 * first, 12.0 * (last + 1)).view(last - first + 1, 3, 2, 2)


def decode_array(path: str) -> Pixels:
    """Reads an image as uint8 (height, width, 3), with the values that Pillow gives.

    torchvision decodes a colour JPEG in two thirds of Pillow's time, with the same values. Pillow reads all else, and
    says what is wrong with a file.

    Raises:
        UnreadableImageError: if the file can't be read, for any reason. The message names it.
    """
    if str(path).lower().endswith((".jpg", ".jpeg")):
        with contextlib.suppress(RuntimeError, ValueError, OSError):
            if os.path.isfile(path):
                with open(path, "rb", buffering=0) as file:
                    content = bytearray(file.read())
                if 0 < _number_of_pixels(content) <= (Image.MAX_IMAGE_PIXELS or sys.maxsize):
                    decoded = torchvision.io.decode_jpeg(torch.frombuffer(content, dtype=torch.uint8))
                    if len(decoded) == 3:
                        return np.asarray(decoded.permute(1, 2, 0))
    return np.asarray(decode(path))


def _number_of_pixels(jpeg: bytearray) -> int:
    """The pixels of a JPEG file, by its frame header (ITU-T T.81, B.2.2); 0 if there is none.

    Pillow reads it too, and refuses images that would fill the memory, but takes a fifth of the time of decoding.
    """
    start = 2
    while start + 9 <= len(jpeg) and jpeg[start] == 0xFF:
        marker = jpeg[start + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(jpeg[at : at + 2], "big") for at in (start + 5, start + 7))
            return height * width
        start += 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big")
    return 0


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Makes a batch as torch does, with the values of all images, of whatever sizes, one after the other.

    What only `BatchTransforms` reads are arrays, since each tensor that a worker sends takes a file of its own.
    """
    decoded = [item[DECODED] for item in items]
    images = [image for one in decoded for image in one["images"]]
    own = {
        "shape": (len(items), *items[0]["img"].shape[:-3]),
        "pixels": torch.from_numpy(np.concatenate([image.reshape(-1) for image in images])),
        "sizes": np.array([image.shape[:2] for image in images]),
        "index": np.array([one["index"] for one in decoded]),
        "copy": np.array([one["copy"] for one in decoded]),
    }
    rest = [{key: value for key, value in item.items() if key not in ("img", DECODED)} for item in items]
    return {**default_collate(rest), DECODED: own}
