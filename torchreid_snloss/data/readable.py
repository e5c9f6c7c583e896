"""Images that can't be loaded raise an error with their name; torchreid tries to read them again forever."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any, cast

from PIL import Image

from torchreid_snloss.errors import text_of

__all__ = [
    "NamingFailures",
    "UnreadableImageError",
    "all_loaders",
    "decode",
    "name_unreadable_images",
    "read_image",
    "reading_with",
    "test_loaders",
]


class UnreadableImageError(OSError):
    """An image can't be loaded: its file is missing, empty, truncated, not an image, too large, and so on."""


class NamingFailures:
    """Put before a data set's class: whatever its `__getitem__` raises becomes an `UnreadableImageError`."""

    data: Any

    def __getitem__(self, index: int) -> Any:
        try:
            return super().__getitem__(index)  # type: ignore[misc]
        except UnreadableImageError:
            raise
        except Exception as error:  # of any data set, file format or transform
            raise UnreadableImageError(f"can't load {_name(self.data[index][0])}: {_reason(error)}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time, and a data loader's worker may have to make it again.
        # `__getstate__` is there since Python 3.11, and before where a class of the user's own defines it.
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _restore, (type(self).__bases__[1],), state


def _naming_failures(cls: type[Any]) -> type[Any]:
    return (
        cls if issubclass(cls, NamingFailures) else type(cls.__name__, (NamingFailures, cls), {"__doc__": cls.__doc__})
    )


def _restore(cls: type[Any]) -> Any:
    from torchreid_snloss.register import register

    register()  # in a worker that was spawned, torchreid is as new
    return object.__new__(_naming_failures(cls))


def read_image(path: str) -> Image.Image:
    """Reads an image in RGB. `register` puts it in the place of torchreid's function.

    Args:
        path: The image file.

    Raises:
        UnreadableImageError: If the file can't be read, for any reason. The message names it.
    """
    if _readers:
        picture: Image.Image = _readers[-1](path)  # or an array, which the data set's transform then knows
        return picture
    return decode(path)


_readers: list[Callable[[str], Any]] = []


@contextlib.contextmanager
def reading_with(reader: Callable[[str], Any]) -> Iterator[None]:
    """A context in which `read_image`, and so torchreid's data sets, read with another function."""
    _readers.append(reader)
    try:
        yield
    finally:
        _readers.pop()


def decode(path: str) -> Image.Image:
    """Reads an image in RGB with Pillow.

    Args:
        path: The image file.

    Raises:
        UnreadableImageError: If the file can't be read, for any reason. The message names it.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # such as a pipe, which nobody may ever write to
            raise OSError("it is not a regular file")
        with Image.open(path) as file:
            # Pillow would not scale larger values, but cut them off.
            if file.mode == "F" or (
                file.mode.startswith("I") and cast("tuple[float, float]", file.getextrema())[1] > 255
            ):
                kind = "floating-point values" if file.mode == "F" else "16 or more bits"
                raise OSError(f"it has {kind} a channel (Pillow's mode {file.mode}): convert it to 8 bits a channel")
            return file.convert("RGB")
    except Exception as error:  # Pillow's plugins raise what they like
        raise UnreadableImageError(f"can't read the image {_name(path)}: {_reason(error)}") from error


def _name(path: Any) -> str:
    """A path, or the first and the last one of a tracklet."""
    if isinstance(path, (tuple, list)) and len(path) > 1:
        return f"the tracklet from {str(path[0])!r} to {str(path[-1])!r}"
    return f"{str(path[0] if isinstance(path, (tuple, list)) and path else path)!r}"


def _reason(error: Exception) -> str:
    text = text_of(error)
    if text == type(error).__name__ or (isinstance(error, OSError) and str(error)):
        return text
    return f"{type(error).__name__}: {text}"


def all_loaders(datamanager: Any) -> list[Any]:
    """All loaders of a data manager: the training loader, and query and gallery of each test set."""
    return [datamanager.train_loader, *test_loaders(datamanager)]


def test_loaders(datamanager: Any) -> list[Any]:
    """The query and gallery loaders of each test set of a data manager or an engine."""
    return [loader for split in datamanager.test_loader.values() for loader in split.values()]


def name_unreadable_images(datamanager: Any) -> None:
    """Makes the data sets of a data manager name the image or tracklet that can't be loaded.

    Args:
        datamanager: A data manager of torchreid.
    """
    for loader in all_loaders(datamanager):
        if loader is not None and hasattr(loader.dataset, "data"):
            with contextlib.suppress(TypeError):  # a class that Python can't replace
                loader.dataset.__class__ = _naming_failures(type(loader.dataset))
