"""The ranked lists of the report: some queries, each with the nearest images of every variant."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from torchreid_snloss.compare.ranked import choose_queries, unsquared
from torchreid_snloss.compare.runs import Run
from torchreid_snloss.data.readable import read_image
from torchreid_snloss.evaluation import nearest_gallery
from torchreid_snloss.record import Features, RecordError

__all__ = ["RankedQueries"]

_NUM_QUERIES = 8
_LIST_LENGTH = 10
_LARGEST = 224  # pixels; a picture is shown smaller until the reader asks for large ones
_NO_FEATURES = np.empty((0, 0), dtype=np.float32)


@dataclass(frozen=True)
class _Picture:
    name: str  # of the image file
    jpeg: str  # base64


@dataclass(frozen=True)
class _RankedImage:
    picture: _Picture
    pid: int
    camid: int
    distance: float
    is_match: bool


@dataclass(frozen=True)
class _RankedList:
    variant: str
    average_precision: float
    images: list[_RankedImage]


@dataclass(frozen=True)
class _Query:
    pid: int
    camid: int
    picture: _Picture
    lists: list[_RankedList]

    @property
    def lowest(self) -> float:
        return min(ranked.average_precision for ranked in self.lists)

    @property
    def highest(self) -> float:
        return max(ranked.average_precision for ranked in self.lists)


class RankedQueries:
    """Some queries of a test set, with the ranked list of each run: half those on which the runs differ most, half at
    random.

    Args:
        runs: A run of each variant.
        dataset: The test set.

    Raises:
        RecordError: If the runs were tested on different queries, or a record is damaged.
    """

    def __init__(self, runs: Sequence[Run], dataset: str) -> None:
        self._runs = runs
        pids, precisions = zip(*(run.average_precisions(dataset) for run in runs))
        for run, of_run in zip(runs, pids):
            self._check_same(run, pids[0], of_run)
        self._precisions = np.array(precisions)
        self._rows = choose_queries(self._precisions, _NUM_QUERIES)
        self._pictures: dict[str, _Picture] = {}  # an image may appear in several lists
        self._lists: list[list[_RankedList]] = []  # of each run, by query
        self._labels: tuple[Features, Features] | None = None  # of the first run, without features

    def add(self, query: Features, gallery: Features) -> None:
        """Ranks the gallery by the features of the next run.

        Raises:
            RecordError: If the run was tested on different images.
            UnreadableImageError: If an image can't be read.
        """
        number = len(self._lists)
        run, metric = self._runs[number], self._runs[number].settings.dist_metric
        rerank = run.settings.rerank_in_training
        if self._labels is None:
            # A slice would keep the features in memory.
            self._labels = replace(query, features=_NO_FEATURES), replace(gallery, features=_NO_FEATURES)
        for first, own in zip(self._labels, (query, gallery)):
            self._check_same(run, first.pids, own.pids)
        # Re-ranking compares the queries with each other too.
        rows, places = (slice(None), self._rows) if rerank else (self._rows, range(len(self._rows)))
        labels = (query.pids[rows], gallery.pids, query.camids[rows], gallery.camids)
        nearest, distances = nearest_gallery(
            query.features[rows], gallery.features, *labels, _LIST_LENGTH, metric=metric, rerank=rerank
        )
        lists = []
        for row, place in zip(self._rows, places):
            found = nearest[place] >= 0
            indices = nearest[place][found]
            # The paths of the first run, whose images are the same, so that each is read once.
            images = [
                _RankedImage(self._picture(path), int(pid), int(camid), float(distance), pid == query.pids[row])
                for path, pid, camid, distance in zip(
                    self._labels[1].paths[indices],
                    gallery.pids[indices],
                    gallery.camids[indices],
                    distances[place][found] if rerank else unsquared(distances[place][found], metric),
                )
            ]
            lists.append(_RankedList(run.variant, float(self._precisions[number, row]), images))
        self._lists.append(lists)

    def queries(self) -> list[_Query]:
        """The queries with the lists of all runs, once they are added."""
        assert self._labels is not None
        query, _ = self._labels
        return [
            _Query(int(query.pids[row]), int(query.camids[row]), self._picture(query.paths[row]), list(lists))
            for row, lists in zip(self._rows, zip(*self._lists))
        ]

    def _check_same(self, run: Run, first: NDArray[np.int64], own: NDArray[np.int64]) -> None:
        if not np.array_equal(first, own):
            raise RecordError(
                f"the runs in {str(self._runs[0].folder)!r} and {str(run.folder)!r} were tested on other images"
            )

    def _picture(self, path: str) -> _Picture:
        if path not in self._pictures:
            self._pictures[path] = _picture(path)
        return self._pictures[path]


def _picture(path: str) -> _Picture:
    path = str(path)  # convert a NumPy string
    image = read_image(path)
    image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=80)
    return _Picture(Path(path).name, base64.b64encode(stream.getvalue()).decode())
