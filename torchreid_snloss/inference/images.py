"""Images that are named by a folder or a text file, without identities."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchreid import data

from torchreid_snloss.config import ConfigError
from torchreid_snloss.data.folder_files import files_below, is_image, natural_order
from torchreid_snloss.data.readable import read_image
from torchreid_snloss.errors import printable
from torchreid_snloss.settings import Settings

__all__ = ["ImageList", "image_loader", "list_images"]

_LONGEST = 200  # characters of a line that is no path


class ImageList(Dataset[dict[str, Any]]):
    """Images as a test loader of torchreid gives them, with 0 for identity and camera.

    Attributes:
        data: the items, (path, 0, 0).
        transform: turns an image into a tensor.
    """

    def __init__(self, paths: Sequence[str], transform: Callable[[Image.Image], Tensor]) -> None:
        self.data = [(path, 0, 0) for path in paths]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, pid, camid = self.data[index]
        return {"img": self.transform(read_image(path)), "pid": pid, "camid": camid, "impath": path}


def list_images(place: str) -> list[str]:
    """The image files that a command line's `--images` names.

    Args:
        place: a folder, in which and below which all images count, in natural order; a text file with a path on each
            line, relative to the file; or one image.

    Raises:
        ConfigError: if there is no such folder or file, it has no images, or a file of the list does not exist.
    """
    if os.path.isdir(place):
        paths = _images_below(place)
    elif is_image(place) and os.path.isfile(place):
        paths = [place]
    else:
        paths = _read_list(place)
    if not paths:
        raise ConfigError(f"--images {place!r} has no images")
    return paths


def _images_below(folder: str) -> list[str]:
    try:
        below = [parts for parts in files_below(folder) if not any(part.startswith(".") for part in parts)]
    except OSError as error:
        raise ConfigError(f"--images {error.filename!r} can't be read: {error.strerror}") from error
    files = [os.path.join(*parts) for parts in below]
    names = sorted(filter(is_image, files), key=natural_order)
    if names and len(names) < len(files):
        print(f"=> {len(files) - len(names)} files in {folder} are left out: their names do not end as an image's")
    return [os.path.join(folder, name) for name in names]


def _read_list(file: str) -> list[str]:
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape") as stream:
            lines = [line.strip() for line in stream]
    except OSError as error:
        raise ConfigError(f"--images {file!r} can't be read: {error.strerror}") from error
    folder = Path(file).parent
    paths = [str(folder / line) for line in lines if line]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        first = printable(missing[0], _LONGEST)
        raise ConfigError(f"--images {file!r}: {len(missing)} of its {len(paths)} files do not exist, first '{first}'")
    return paths


def image_loader(settings: Settings, paths: Sequence[str]) -> DataLoader[dict[str, Any]]:
    """A loader of images in the size and with the mean and standard deviation of the settings, in the given order."""
    _, transform = data.transforms.build_transforms(
        settings.height, settings.width, [], norm_mean=list(settings.norm_mean), norm_std=list(settings.norm_std)
    )
    return DataLoader(
        ImageList(paths, transform),
        batch_size=settings.values["test.batch_size"],
        num_workers=settings.values["data.workers"],
        pin_memory=settings.use_gpu,
    )
