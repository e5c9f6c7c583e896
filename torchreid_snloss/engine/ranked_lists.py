"""What goes wrong while torchreid draws ranked lists, told with the name of the file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
from torchreid import utils

from torchreid_snloss.data.picture_names import distinct_names
from torchreid_snloss.data.readable import UnreadableImageError
from torchreid_snloss.engine.options import WriteError

__all__ = ["named_drawing_failures"]


@contextlib.contextmanager
def named_drawing_failures(folder: str | Path, query: Sequence[Any], gallery: Sequence[Any]) -> Iterator[None]:
    """Within it ranked lists may be drawn, of images (not of tracklets, whose frames torchreid copies).

    Args:
        folder: The folder of the pictures.
        query: The items of the query set, each with its image's path first.
        gallery: The items of the gallery.

    Raises:
        UnreadableImageError: For an image that OpenCV can't read, though Pillow may.
        WriteError: If a picture was not written, which OpenCV does not say.
    """
    folder = Path(folder)
    before = _pictures(folder)
    try:
        yield
    except cv2.error as error:
        for path, *_ in (*query, *gallery):
            if not _opencv_reads(path):
                raise UnreadableImageError(
                    f"can't draw ranked lists: OpenCV can't read the image {str(path)!r}, though Pillow can"
                ) from error
        raise
    paths = [item[0] for item in query if isinstance(item[0], str)]
    registered = hasattr(utils.visualize_ranked_results, "__wrapped__")  # torchreid itself names them after the files
    expected = len(set(distinct_names(paths) if registered else [Path(path).stem for path in paths]))
    after = _pictures(folder)
    written = sum(before.get(name) != state for name, state in after.items())
    if written < expected:
        raise WriteError(f"only {written} of {expected} ranked lists could be written to {str(folder)!r}")


def _pictures(folder: Path) -> dict[str, int]:
    """When each picture that is not empty was written, by its name."""
    states = {path.name: path.stat() for path in folder.glob("*.jpg")} if folder.is_dir() else {}
    return {name: state.st_mtime_ns for name, state in states.items() if state.st_size > 0}


def _opencv_reads(path: Any) -> bool:
    try:
        return cv2.imread(path) is not None
    except (cv2.error, UnicodeError):
        return False
