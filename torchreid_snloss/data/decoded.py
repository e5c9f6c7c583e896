"""Data sets that only decode their images, and batches of uint8 images of any sizes."""

from __future__ import annotations

import contextlib
import copy
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torchvision
from PIL import Image
from torch.utils.data import Dataset, default_collate, get_worker_info
from torchreid import data as torchreid_data

from torchreid_snloss.data.draws import image_keys
from torchreid_snloss.data.readable import NamingFailures, UnreadableImageError, decode, reading_with

if TYPE_CHECKING:
    from torchreid_snloss.data.cache import ImageCache

__all__ = ["DecodedDataset", "collate", "decode_array"]

Pixels = npt.NDArray[np.uint8]


class DecodedDataset(Dataset[dict[str, Any]]):
    """A data set of torchreid's whose images are only decoded.

    Its items have more parts: `pixels`, the images' values; `sizes`, their heights and widths; `index`, the number
    of the item; and `copy`, how often it came before in the batch. `img` is (0,) for an image, (frames, 0) for a
    tracklet.

    Args:
        dataset: the data set, of images or tracklets, which reads with torchreid's `read_image` and uses `transform`.
        for_each: transforms of Pillow's images that are done here.
        seed: the seed of the random numbers, until `start_epoch` is called.

    Attributes:
        dataset: the data set.
        cache: decoded images, or None.
    """

    def __init__(self, dataset: Any, for_each: Sequence[Any], seed: int) -> None:
        self.dataset = copy.copy(dataset)
        self.cache: ImageCache | None = None
        self._images = self.dataset.transform = _Images(for_each)
        # torchreid's images draw no random numbers but those of their transforms.
        plain = _base_of(self.dataset).__getitem__ is torchreid_data.ImageDataset.__getitem__
        self._is_random = bool(for_each) or not plain
        self._epoch = torch.tensor([seed % 2**63, 0]).share_memory_()  # workers that live through all epochs read it

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
                with self._seeded(number, before[number]) if self._is_random else contextlib.nullcontext():
                    item = dict(self.dataset[number])
                items.append({**item, **self._images.take(), "index": number, "copy": before[number]})
                before[number] += 1
        return items

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.__getitems__([number])[0]

    def _read(self, path: str) -> Any:
        if self.cache is not None and (cached := self.cache.get(os.fspath(path))) is not None:
            return cached
        return decode_array(path)

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
    """Takes the place of a data set's transform, and keeps the images that the data set reads for an item."""

    def __init__(self, for_each: Sequence[Any]) -> None:
        self._for_each = for_each
        self._read: list[Pixels] = []

    def __call__(self, image: Any) -> torch.Tensor:
        if self._for_each:
            image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
            for transform in self._for_each:
                image = transform(image)
        self._read.append(np.asarray(image))
        return torch.empty(0)

    def take(self) -> dict[str, Any]:
        """Returns the images since the last time, for `collate`."""
        images, self._read = self._read, []
        if not images:
            raise UnreadableImageError(
                "data.batch_transforms needs a data set that calls its transform for each image; use False"
            )
        return {"pixels": images, "sizes": [image.shape[:2] for image in images]}


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
                decoded = torchvision.io.decode_jpeg(torch.from_numpy(np.fromfile(path, dtype=np.uint8)))
                if len(decoded) == 3:
                    return np.asarray(decoded.permute(1, 2, 0))
    return np.asarray(decode(path))


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Makes a batch as torch does, with the values of all images, of whatever sizes, one after the other.

    What only `BatchTransforms` reads are arrays, since each tensor that a worker sends takes a file of its own.
    """
    own = ("img", "pixels", "sizes", "index", "copy")
    rest = [{key: value for key, value in item.items() if key not in own} for item in items]
    return {
        **default_collate(rest),
        "shape": (len(items), *items[0]["img"].shape[:-1]),
        "pixels": torch.from_numpy(np.concatenate([one.reshape(-1) for item in items for one in item["pixels"]])),
        "sizes": np.array([size for item in items for size in item["sizes"]]),
        "index": np.array([item["index"] for item in items]),
        "copy": np.array([item["copy"] for item in items]),
    }
