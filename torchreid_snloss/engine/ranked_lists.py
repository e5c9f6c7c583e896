"""Ranked lists as pictures: torchreid draws them, a query at a time, and failures name the file."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from torchreid import utils

from torchreid_snloss.data.picture_names import distinct_names, drawable
from torchreid_snloss.data.readable import UnreadableImageError
from torchreid_snloss.engine.options import WriteError
from torchreid_snloss.progress import progress

__all__ = ["RankedLists", "draw_ranked_lists", "named_drawing_failures"]


class RankedLists:
    """Draws the ranked lists of a test at once, and those of a training run's last evaluation at the end of the run.

    Args:
        at_the_end: whether to draw those of a training run.
        rerank: whether these are re-ranked, as in a test run.
        max_epoch: how many epochs the run trains.
    """

    def __init__(self, at_the_end: bool = False, rerank: bool = False, max_epoch: int = 0) -> None:
        self._at_the_end, self._max_epoch = at_the_end, max_epoch
        self.rerank = at_the_end and rerank
        self._drawings: list[Callable[[], None]] = []

    def due(self, epoch: int) -> bool:
        """Whether a training run draws the lists of an evaluation after a number of epochs."""
        return self._at_the_end and epoch >= self._max_epoch

    def add(self, *lists: Any) -> None:
        """Takes the lists of an evaluation, the arguments of `draw_ranked_lists`."""
        self._drawings.append(functools.partial(draw_ranked_lists, *lists))
        if not self._at_the_end:
            self.draw()

    def draw(self) -> None:
        """Draws what has not been drawn."""
        self._at_the_end = False
        while self._drawings:
            self._drawings.pop(0)()


def draw_ranked_lists(folder: str | Path, datamanager: Any, dataset: str, indices: NDArray[np.int64]) -> None:
    """Draws the ranked list of each query as torchreid's `visualize_ranked_results` does from a distance matrix.

    Args:
        folder: The folder of the pictures.
        datamanager: The data manager of torchreid.
        dataset: The name of a test set.
        indices: (queries, topk), the gallery images of each query, nearest first, as `nearest_gallery` returns them: a
            list that is shorter ends with -1.

    Raises:
        UnreadableImageError: For an image that OpenCV can't read, though Pillow may.
        WriteError: If a picture was not written, which OpenCV does not say.
    """
    query, gallery = datamanager.fetch_test_loaders(dataset)
    listed = np.unique(indices[indices >= 0])
    visualize = inspect.unwrap(utils.visualize_ranked_results)  # `drawable` has all queries in view, as that must
    topk = indices.shape[1]
    size = {"width": datamanager.width, "height": datamanager.height}
    print(f"Drawing ranked lists of {len(query)} queries ...")
    with (
        named_drawing_failures(folder, query, gallery),
        drawable(query, [gallery[index] for index in listed], str(folder)) as (queries, others, save_dir),
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),  # it says the same in every call
    ):
        places = np.searchsorted(listed, indices)
        for item, row, own in progress("drawing", zip(queries, indices, places), "query", len(queries)):
            nearest = [others[place] for place in own[row >= 0]]
            order = np.arange(len(nearest))[None]  # in the place of distances
            visualize(order, ([item], nearest), datamanager.data_type, save_dir=save_dir, topk=topk, **size)
    print(f'Done. Images have been saved to "{folder}" ...')


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
    expected = len(set(distinct_names(paths)))
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
