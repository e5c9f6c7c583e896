"""Image files that can't be read raise an error with their name; torchreid tries to read them again forever."""

from __future__ import annotations

from typing import Any

from PIL import Image
from torchreid import data

__all__ = [
    "ReadableImageDataset",
    "UnreadableImageError",
    "all_loaders",
    "name_unreadable_images",
    "read_image",
    "test_loaders",
]


class UnreadableImageError(OSError):
    """An image file is missing, empty, truncated or not an image."""


class ReadableImageDataset(data.ImageDataset):
    """torchreid's `ImageDataset`, but an image that can't be read raises `UnreadableImageError` at once."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, pid, camid, dsetid = self.data[index]
        image = read_image(path)
        if self.transform is not None:
            image = self._transform_image(self.transform, self.k_tfm, image)
        return {"img": image, "pid": pid, "camid": camid, "impath": path, "dsetid": dsetid}


def read_image(path: str) -> Image.Image:
    """Reads an image in RGB.

    Args:
        path: The image file.

    Raises:
        UnreadableImageError: If the file can't be read. The message names it.
    """
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for a broken file
        raise UnreadableImageError(f"can't read the image {path!r}: {error}") from error


def all_loaders(datamanager: Any) -> list[Any]:
    """All loaders of a data manager: the training loader, and query and gallery of each test set."""
    return [datamanager.train_loader, *test_loaders(datamanager)]


def test_loaders(datamanager: Any) -> list[Any]:
    """The loaders of query and gallery of each test set, of a data manager or an engine."""
    return [loader for split in datamanager.test_loader.values() for loader in split.values()]


def name_unreadable_images(datamanager: Any) -> None:
    """Turns the image data sets of a data manager into `ReadableImageDataset`.

    A data set with a `__getitem__` of its own is not changed.

    Args:
        datamanager: A data manager of torchreid.
    """
    for loader in all_loaders(datamanager):
        if type(loader.dataset).__getitem__ is data.ImageDataset.__getitem__:
            loader.dataset.__class__ = ReadableImageDataset
