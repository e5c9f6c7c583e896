"""The ranked lists of the report: some queries, each with the nearest images of every variant."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from torchreid_snloss.compare.ranked import Ranked, average_precisions, choose_queries, unsquared
from torchreid_snloss.compare.runs import Run
from torchreid_snloss.data.readable import read_image
from torchreid_snloss.record import RecordError

__all__ = ["ranked_queries"]

_NUM_QUERIES = 8
_LIST_LENGTH = 10
_THUMBNAIL_HEIGHT = 112  # pixels


@dataclass(frozen=True)
class _Thumbnail:
    name: str  # of the image file
    jpeg: str  # base64


@dataclass(frozen=True)
class _RankedImage:
    thumbnail: _Thumbnail
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
    thumbnail: _Thumbnail
    lists: list[_RankedList]

    @property
    def lowest(self) -> float:
        return min(ranked.average_precision for ranked in self.lists)

    @property
    def highest(self) -> float:
        return max(ranked.average_precision for ranked in self.lists)


def ranked_queries(runs: Sequence[Run], dataset: str) -> list[_Query]:
    """Some queries with the ranked list of each run: half those on which the runs differ most, half at random.

    Args:
        runs: A run of each variant.
        dataset: The test set.

    Raises:
        RecordError: If the runs were tested on different images, or a record is damaged.
        UnreadableImageError: If an image can't be read.
    """
    query, gallery = runs[0].features(dataset, after=True)
    for run in runs:
        others = run.features(dataset, after=True)
        if not all(np.array_equal(one.pids, other.pids) for one, other in zip((query, gallery), others)):
            raise RecordError(
                f"the runs in {str(runs[0].folder)!r} and {str(run.folder)!r} were tested on other images"
            )
    # The features are read again, since those of all runs together may take gigabytes.
    precisions = np.array(
        [average_precisions(*run.features(dataset, after=True), run.settings.dist_metric) for run in runs]
    )
    rows = choose_queries(precisions, _NUM_QUERIES)
    rankings = [Ranked.of(*run.features(dataset, after=True), run.settings.dist_metric, rows) for run in runs]
    thumbnails: dict[str, _Thumbnail] = {}  # an image may appear in several lists

    def thumbnail(path: str) -> _Thumbnail:
        if path not in thumbnails:
            thumbnails[path] = _thumbnail(path)
        return thumbnails[path]

    def ranked_list(run: Run, ranked: Ranked, row: int, average_precision: float) -> _RankedList:
        nearest = ranked.ranking(row)[:_LIST_LENGTH]
        distances = unsquared(ranked.distances[row, nearest], run.settings.dist_metric)
        images = [
            _RankedImage(thumbnail(gallery.paths[index]), float(distance), bool(ranked.same[row, index]))
            for index, distance in zip(nearest, distances)
        ]
        return _RankedList(run.variant, average_precision, images)

    return [
        _Query(
            pid=int(query.pids[index]),
            thumbnail=thumbnail(query.paths[index]),
            lists=[
                ranked_list(run, ranked, row, float(of_run[index]))
                for run, ranked, of_run in zip(runs, rankings, precisions)
            ],
        )
        for row, index in enumerate(rows)
    ]


def _thumbnail(path: str) -> _Thumbnail:
    path = str(path)  # convert a NumPy string
    image = read_image(path)
    image.thumbnail((_THUMBNAIL_HEIGHT, _THUMBNAIL_HEIGHT), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=80)
    return _Thumbnail(Path(path).name, base64.b64encode(stream.getvalue()).decode())
