"""Images that can't be read are named, where torchreid tries again forever."""

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
    """An image file that is missing, empty, cut off or no image."""


class ReadableImageDataset(data.ImageDataset):
    """torchreid's ``ImageDataset``, which reads an image once and says which file can't be read."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, pid, camid, dsetid = self.data[index]
        image = read_image(path)
        if self.transform is not None:
            image = self._transform_image(self.transform, self.k_tfm, image)
        return {"img": image, "pid": pid, "camid": camid, "impath": path, "dsetid": dsetid}


def read_image(path: str) -> Image.Image:
    """An image in RGB.

    Raises:
        UnreadableImageError: names the file.
    """
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for a broken file
        raise UnreadableImageError(f"can't read the image {path!r}: {error}") from error


def all_loaders(datamanager: Any) -> list[Any]:
    """The loaders of a data manager: training, and query and gallery of each test set."""
    return [datamanager.train_loader, *test_loaders(datamanager)]


def test_loaders(datamanager: Any) -> list[Any]:
    """The loaders of query and gallery of each test set, of a data manager or an engine."""
    return [loader for split in datamanager.test_loader.values() for loader in split.values()]


def name_unreadable_images(datamanager: Any) -> None:
    """Makes a data manager's image data sets :class:`ReadableImageDataset`, but for those that read their own way."""
    for loader in all_loaders(datamanager):
        if type(loader.dataset).__getitem__ is data.ImageDataset.__getitem__:
            loader.dataset.__class__ = ReadableImageDataset
