"""The report of a comparison: one HTML file that contains every image it shows."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from torchreid_snloss.checkpoint import atomic_write
from torchreid_snloss.compare import charts
from torchreid_snloss.compare.ranked import (
    DistanceHistograms,
    Ranked,
    average_precisions,
    choose_queries,
    unsquared,
)
from torchreid_snloss.compare.results import Results
from torchreid_snloss.compare.runs import Run
from torchreid_snloss.compare.tuning import Tuning
from torchreid_snloss.data.readable import read_image
from torchreid_snloss.progress import progress
from torchreid_snloss.record import RecordError

__all__ = ["write_page"]

_NUM_QUERIES = 8
_LIST_LENGTH = 10
_NUM_MAP_IDENTITIES = 16
_CMC_RANKS = 20
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


def write_page(
    results: Results, runs: Sequence[Run], path: Path, command: str, map_kind: str, tunings: Sequence[Tuning] = ()
) -> None:
    """Writes the report. Charts and ranked lists are those of the first test set.

    Args:
        results: The results of the runs.
        runs: The finished runs, those of one variant next to each other and in the order of their seeds.
        path: The file to write.
        command: The command line to show.
        map_kind: How the map of features is made, `"tsne"` or `"pca"`.
        tunings: The tunings that found the values of the runs; empty if they have those of the config.

    Raises:
        UnreadableImageError: If an image of a ranked list can't be read.
    """
    by_variant: dict[str, list[Run]] = {}
    for run in runs:
        by_variant.setdefault(run.variant, []).append(run)
    first_seed = [own[0] for own in by_variant.values()]
    datasets = runs[0].datasets
    dataset = datasets[0]
    settings = runs[0].settings  # the page only shows settings that are the same for all runs
    metric = settings.dist_metric
    sections: dict[str, Callable[[], Any]] = {
        "learning_charts": lambda: _learning_charts(by_variant, dataset),
        "term_charts": lambda: _term_charts(first_seed),
        "cmc_chart": lambda: charts.cmc_curves(_cmc_curves(results, dataset)),
        "histograms": lambda: [_histograms(run, dataset, metric) for run in first_seed],
        "maps": lambda: _maps(first_seed, dataset, metric, map_kind),
        "queries": lambda: _queries(first_seed, dataset, metric),
    }
    drawn = {name: draw() for name, draw in progress("report", sections.items(), "section", len(sections))}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        results=results,
        variants=list(by_variant),
        datasets=datasets,
        dataset=dataset,
        settings=settings,
        num_seeds=len({run.seed for run in runs}),
        seed=runs[0].seed,
        command=command,
        map_name={"tsne": "t-SNE", "pca": "PCA"}[map_kind],
        num_map_identities=_NUM_MAP_IDENTITIES,
        **drawn,
    )
    # A path may contain bytes that are not valid UTF-8, which Python represents as lone surrogates.
    atomic_write(path, lambda stream: stream.write(page.encode(errors="replace")))


def _learning_charts(by_variant: dict[str, list[Run]], dataset: str) -> list[Markup]:
    """The charts of mAP and of rank-1 by epoch."""
    evaluations = {name: [run.record().evaluations[dataset] for run in runs] for name, runs in by_variant.items()}
    metrics: dict[str, Callable[[dict[str, Any]], float]] = {
        "mAP, %": lambda evaluation: 100 * float(evaluation["mAP"]),
        "rank-1, %": lambda evaluation: 100 * float(evaluation["cmc"][0]),
    }
    drawn = []
    for label, percent in metrics.items():
        curves = {}
        for name, of_seeds in evaluations.items():
            epochs = sorted(set.intersection(*map(set, of_seeds)))
            curves[name] = [(epochs, [percent(by_epoch[epoch]) for epoch in epochs]) for by_epoch in of_seeds]
        drawn.append(charts.learning_curves(curves, label))
    return drawn


def _term_charts(runs: Sequence[Run]) -> list[Markup]:
    """A chart for each run, with the terms of its loss by epoch."""
    drawn = []
    for run in runs:
        by_epoch = run.record().epochs
        epochs = sorted(by_epoch)
        if not epochs:
            raise RecordError(f"the record of the run in {str(run.folder)!r} holds no epochs; remove that folder")
        names = [name for name in by_epoch[epochs[-1]]["terms"] if name.startswith("loss")]
        terms = {name: (epochs, [by_epoch[epoch]["terms"].get(name, np.nan) for epoch in epochs]) for name in names}
        drawn.append(charts.loss_curves(run.variant, terms))
    return drawn


def _cmc_curves(results: Results, dataset: str) -> charts.Curves:
    curves: dict[str, list[tuple[list[float], list[float]]]] = {}
    for result in results.results:
        if result.dataset == dataset:
            percent = [100 * value for value in result.cmc[:_CMC_RANKS]]
            ranks = [float(rank) for rank in range(1, len(percent) + 1)]
            curves.setdefault(result.variant, []).append((ranks, percent))
    return curves


def _histograms(run: Run, dataset: str, metric: str) -> Markup:
    before, after = (DistanceHistograms.of(*run.features(dataset, after), metric) for after in (False, True))
    return charts.histograms(run.variant, before, after)


def _maps(runs: Sequence[Run], dataset: str, metric: str, kind: str) -> list[Markup]:
    """Maps of the features of some identities: before training, and after it for each run."""
    query, gallery = runs[0].features(dataset, after=False)
    pids = np.random.default_rng(0).permutation(np.intersect1d(query.pids, gallery.pids))
    shown = sorted(pids[:_NUM_MAP_IDENTITIES].tolist())
    before = charts.feature_map("before training", query, gallery, shown, metric, kind)
    after = [charts.feature_map(run.variant, *run.features(dataset, after=True), shown, metric, kind) for run in runs]
    return [before, *after]


def _queries(runs: Sequence[Run], dataset: str, metric: str) -> list[_Query]:
    """Some queries with the ranked list of each run."""
    query, gallery = runs[0].features(dataset, after=True)
    for run in runs:
        others = run.features(dataset, after=True)
        if not all(np.array_equal(one.pids, other.pids) for one, other in zip((query, gallery), others)):
            raise RecordError(
                f"the runs in {str(runs[0].folder)!r} and {str(run.folder)!r} were tested on other images"
            )
    precisions = np.array([average_precisions(*run.features(dataset, after=True), metric) for run in runs])
    rows = choose_queries(precisions, _NUM_QUERIES)
    rankings = [Ranked.of(*run.features(dataset, after=True), metric, rows) for run in runs]
    thumbnails: dict[str, _Thumbnail] = {}  # an image may appear in several lists

    def thumbnail(path: str) -> _Thumbnail:
        if path not in thumbnails:
            thumbnails[path] = _thumbnail(path)
        return thumbnails[path]

    def ranked_list(run: Run, ranked: Ranked, row: int, average_precision: float) -> _RankedList:
        nearest = ranked.ranking(row)[:_LIST_LENGTH]
        distances = unsquared(ranked.distances[row, nearest], metric)
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
