"""The report: one HTML file with everything in it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from torchreid_snloss.checkpoint import atomic_write
from torchreid_snloss.compare import charts
from torchreid_snloss.compare.ranked import Distances, Ranked, average_precisions, choose_queries, shown
from torchreid_snloss.compare.results import Results
from torchreid_snloss.compare.runs import Run
from torchreid_snloss.data.readable import read_image
from torchreid_snloss.progress import progress

__all__ = ["write_page"]

_QUERIES = 8
_LENGTH = 10  # of a ranked list
_IDENTITIES = 16  # on the map
_THUMBNAIL = 112  # pixels high


def write_page(results: Results, runs: Sequence[Run], path: Path, command: str, map_kind: str) -> None:
    """Writes the report.

    Args:
        results: of the runs.
        runs: those that are finished.
        path: the file.
        command: the command line that made it.
        map_kind: ``"tsne"`` or ``"pca"``, of the map of features.

    Raises:
        UnreadableImageError: for an image of a ranked list that can't be read.
    """
    by_loss: dict[str, list[Run]] = {}
    for run in runs:
        by_loss.setdefault(run.loss, []).append(run)
    first = [own[0] for own in by_loss.values()]
    dataset = runs[0].datasets[0]
    sections: dict[str, Callable[[], str]] = {
        "Results": lambda: _table(results),
        "Learning": lambda: _learning(by_loss, dataset),
        "CMC": lambda: _figures([charts.cmc_curves(_cmc(results, dataset))]),
        "Distances": lambda: _figures(_histogram(run, dataset) for run in first),
        "Map of test features": lambda: _figures(_maps(first, dataset, map_kind), "narrow"),
        "Ranked lists": lambda: _lists(first, dataset),
    }
    facts = _facts(runs, dataset, map_kind)
    parts = [
        f"<section><h2>{title}</h2><p>{_NOTES[title].format(**facts)}</p>{draw()}</section>"
        for title, draw in progress("report", sections.items(), "section", len(sections))
    ]
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    page = Template(template).substitute(
        title=html.escape(f"{', '.join(by_loss)} on {', '.join(runs[0].datasets)}"),
        about=_about(runs),
        command=html.escape(command),
        sections="\n".join(parts),
    )
    atomic_write(path, lambda stream: stream.write(page.encode(errors="replace")))


def _facts(runs: Sequence[Run], dataset: str, map_kind: str) -> dict[str, str]:
    return {
        "seeds": str(len({run.seed for run in runs})),
        "seed": str(runs[0].seed),
        "dataset": html.escape(dataset),
        "map": {"tsne": "t-SNE", "pca": "PCA"}[map_kind],
        "identities": str(_IDENTITIES),
        "more": " Of several test sets the charts below are of the first." if len(runs[0].datasets) > 1 else "",
        "chosen": "The first half are the queries on which the losses differ most, the rest are drawn at random."
        if len({run.loss for run in runs}) > 1
        else "They are drawn at random.",
        "reranked": " The lists are without the re-ranking that the table has."
        if runs[0].cfg.test.rerank_in_training
        else "",
    }


def _about(runs: Sequence[Run]) -> str:
    cfg = runs[0].cfg
    noise = {
        f"{cfg.data.label_noise:.0%} of the training images have another identity's label": cfg.data.label_noise > 0,
        f"{cfg.data.outliers:.0%} of the training images are outliers": cfg.data.outliers > 0,
        f"{cfg.data.train_fraction:.0%} of the training identities": cfg.data.train_fraction < 1,
    }
    facts = [
        f"{cfg.model.name}, {cfg.data.height} x {cfg.data.width}",
        f"{cfg.train.max_epoch} epochs, batch {cfg.train.batch_size}",
        f"trained on {', '.join(cfg.data.sources)}, tested on {', '.join(runs[0].datasets)}",
        f"seeds 1 to {max(run.seed for run in runs)}" if runs[-1].seed > 1 else "seed 1",
        *(text for text, true in noise.items() if true),
    ]
    return " · ".join(map(html.escape, facts))


def _table(results: Results) -> str:
    best = {}
    for dataset in {row.dataset for row in results.rows}:
        rows = [row for row in results.rows if row.dataset == dataset]
        for name in rows[0].figures:
            means = [mean for row in rows if (mean := row.figures[name].mean) is not None]
            if name.startswith(("mAP", "mINP", "rank")):
                best[dataset, name] = (min if name == "mAP lost" else max)(means)
    several = len({row.dataset for row in results.rows}) > 1
    head = "".join(f"<th>{name}</th>" for name in results.columns[1:])
    body, above = "", None
    for row in results.rows:
        if several and row.dataset != above:
            body += f"<tr><th scope=rowgroup>{html.escape(row.dataset)}</th></tr>"
            above = row.dataset
        _, loss, *others = row.names
        body += f"<tr><th scope=row>{html.escape(loss)}</th>" + "".join(f"<td>{other}</td>" for other in others)
        for name, figure in row.figures.items():
            mark = ' class="best"' if figure.mean is not None and best.get((row.dataset, name)) == figure.mean else ""
            body += f"<td{mark}>{figure}</td>"
        body += "</tr>"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _figures(drawings: Iterable[str], kind: str = "wide") -> str:
    return f'<div class="{kind}">' + "".join(f"<figure>{drawing}</figure>" for drawing in drawings) + "</div>"


def _learning(by_loss: dict[str, list[Run]], dataset: str) -> str:
    evaluations = {loss: [run.record().evaluations[dataset] for run in own] for loss, own in by_loss.items()}
    figures: dict[str, Callable[[dict[str, Any]], float]] = {
        "mAP, %": lambda found: 100 * float(found["mAP"]),
        "rank-1, %": lambda found: 100 * float(found["cmc"][0]),
    }
    drawings = []
    for label, value in figures.items():
        curves = {}
        for loss, found in evaluations.items():
            epochs = sorted(set.intersection(*map(set, found)))
            curves[loss] = [(epochs, [value(run[epoch]) for epoch in epochs]) for run in found]
        drawings.append(charts.learning_curves(curves, label))
    terms = []
    for loss, own in by_loss.items():
        epochs = sorted(trained := own[0].record().epochs)
        names = [name for name in trained[epochs[-1]]["terms"] if name.startswith("loss")]
        own_terms = {name: (epochs, [trained[epoch]["terms"].get(name, np.nan) for epoch in epochs]) for name in names}
        terms.append(charts.loss_curves(loss, own_terms))
    return _figures(drawings) + _figures(terms, "narrow")


def _cmc(results: Results, dataset: str) -> charts.Curves:
    curves: dict[str, list[tuple[list[float], list[float]]]] = {}
    for result in results.results:
        if result.dataset == dataset:
            cmc = [100 * value for value in result.cmc[:20]]
            curves.setdefault(result.loss, []).append((list(map(float, range(1, len(cmc) + 1))), cmc))
    return curves


def _histogram(run: Run, dataset: str) -> str:
    before, after = (Distances.of(*run.features(dataset, after), run.cfg.test.dist_metric) for after in (False, True))
    return charts.histograms(run.loss, before, after)


def _maps(runs: Sequence[Run], dataset: str, kind: str) -> Iterator[str]:
    query, gallery = runs[0].features(dataset, after=False)
    pids = np.intersect1d(query.pids, gallery.pids)
    drawn = sorted(np.random.default_rng(0).permutation(pids)[:_IDENTITIES].tolist())
    metric = runs[0].cfg.test.dist_metric
    yield charts.feature_map("before training", query, gallery, drawn, metric, kind)
    for run in runs:
        yield charts.feature_map(run.loss, *run.features(dataset, after=True), drawn, metric, kind)


def _lists(runs: Sequence[Run], dataset: str) -> str:
    metric = runs[0].cfg.test.dist_metric
    precisions = np.array([average_precisions(*run.features(dataset, after=True), metric) for run in runs])
    rows = choose_queries(precisions, _QUERIES)
    thumbnails: dict[str, str] = {}
    query, gallery = runs[0].features(dataset, after=True)
    lists = [Ranked.of(*run.features(dataset, after=True), metric, rows) for run in runs]
    text = ""
    for number, row in enumerate(rows):
        asked = _image(query.paths[row], "query", thumbnails)
        text += f'<article class="query"><div class="asked">{asked}<p>identity {query.pids[row]}</p></div><div>'
        for run, ranked, precision in zip(runs, lists, precisions[:, row]):
            nearest = ranked.ranking(number)[:_LENGTH]
            distances = shown(ranked.distances[number, nearest], metric)
            text += f'<div class="list"><h3>{html.escape(run.loss)} <small>AP {precision:.0%}</small></h3><ol>'
            for index, match, distance in zip(nearest, ranked.same[number, nearest], distances):
                kind, mark = ("right", "✓") if match else ("wrong", "✗")
                image = _image(gallery.paths[index], kind, thumbnails)
                text += f'<li class="{kind}">{image}<span>{mark} {distance:.2f}</span></li>'
            text += "</ol></div>"
        text += "</div></article>"
    return text


def _image(path: str, alt: str, thumbnails: dict[str, str]) -> str:
    if path not in thumbnails:
        image = read_image(str(path))
        image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        image.save(stream, format="JPEG", quality=80)
        thumbnails[path] = base64.b64encode(stream.getvalue()).decode()
    title = html.escape(Path(str(path)).name)
    return f'<img alt="{alt}" title="{title}" src="data:image/jpeg;base64,{thumbnails[path]}">'


_NOTES = {
    "Results": """Percent, mean ± sample standard deviation over seeds, of the network after its last epoch, and not of
        the best checkpoint. Seconds are an epoch's, the median, its evaluation not included; memory is the process's,
        on a GPU the GPU's. <em>weight_x</em> is the weight of the softmax term beside the loss. The best of a column is
        bold.{more}""",
    "Learning": """The evaluation on {dataset} by epochs trained, mean of {seeds} seeds, with a band from the lowest to
        the highest; 0 is before training. Below, the terms of each loss with seed {seed}, means of an epoch.""",
    "CMC": "The share of queries that have a match among the k nearest gallery images.",
    "Distances": """Between queries and gallery images of {dataset}, with seed {seed}, before training and after. The
        less the two overlap, the better one distance tells whether two images show one person.""",
    "Map of test features": """{map} of the images of {identities} identities of {dataset}, drawn at random, with seed
        {seed}. A colour with a shape is an identity, a rim marks a query.""",
    "Ranked lists": """The same queries with each loss, with seed {seed}, nearest image first, with its distance.
        {chosen} Images of a query's own identity under its own camera are left out, as in the evaluation.{reranked}""",
}
