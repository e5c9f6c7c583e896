"""The report of a comparison: one HTML file that contains every image it shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from torchreid_snloss.checkpoint import atomic_write
from torchreid_snloss.compare import charts
from torchreid_snloss.compare.drawing import styles_of
from torchreid_snloss.compare.provenance import Provenance
from torchreid_snloss.compare.queries import RankedQueries
from torchreid_snloss.compare.ranked import DistanceHistograms
from torchreid_snloss.compare.results import Result, Results, mean_over_splits
from torchreid_snloss.compare.runs import Run, by_variant
from torchreid_snloss.compare.trial_charts import BySeed, forest, seed_chart, trial_chart
from torchreid_snloss.compare.tuning import Tuning
from torchreid_snloss.progress import progress
from torchreid_snloss.record import RecordError
from torchreid_snloss.settings import Settings

__all__ = ["write_page"]

_NUM_MAP_IDENTITIES = 16
_CMC_RANKS = 20
_MOST_NAMES = 4  # of variants in the title


def write_page(
    results: Results, runs: Sequence[Run], path: Path, command: str, map_kind: str, tunings: Sequence[Tuning] = ()
) -> None:
    """Writes the report, which refers to `results.csv` and `results.json` beside it.

    The table, the differences and the learning curves are there for all test sets; the other charts and the ranked
    lists show the first one. What shows a single run of each variant shows that with the first seed on the first split.

    Args:
        results: The results of the runs.
        runs: The finished runs, those of one variant next to each other and in the order of their splits and seeds.
        path: The file to write.
        command: The command line to show.
        map_kind: How the map of features is made, `"tsne"` or `"pca"`.
        tunings: The tunings that found the values of the runs; empty if they have those of the config.

    Raises:
        RecordError: If a record is damaged, or the runs were tested on different images.
        UnreadableImageError: If an image of a ranked list can't be read.
    """
    grouped = by_variant(runs)
    first_runs = [own[0] for own in grouped.values()]
    datasets = runs[0].datasets
    dataset = datasets[0]
    sections: dict[str, Callable[[], Any]] = {
        "mean_ap_charts": lambda: {name: _mean_ap_charts(results, name) for name in datasets},
        "trial_charts": lambda: [trial_chart(tuning.name, tuning.trials) for tuning in tunings],
        "learning_charts": lambda: {name: _learning_charts(grouped, name) for name in datasets},
        "term_charts": lambda: _term_charts(first_runs),
        "cmc_chart": lambda: _cmc_chart(results, dataset),
        "of_features": lambda: _of_features(first_runs, dataset, map_kind),
    }
    drawn = {name: draw() for name, draw in progress("report", sections.items(), "section", len(sections))}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    variants = list(grouped)
    names = ", ".join(variants) if len(variants) <= _MOST_NAMES else f"{len(variants)} variants"
    page = environment.get_template("report.html").render(
        results=results,
        num_runs=len(runs),
        provenance=Provenance.of(runs),
        verdicts={name: _verdicts(results, name) for name in datasets},
        title=f"{names} on {', '.join(datasets)}",
        facts=_facts(runs),
        variants=variants,
        datasets=datasets,
        dataset=dataset,
        reranked=any(run.settings.rerank_in_training for run in runs),
        num_seeds=len({run.seed for run in runs}),
        num_splits=len({run.split for run in runs}),
        seed=runs[0].seed,
        command=command,
        map_name={"tsne": "t-SNE", "pca": "PCA"}[map_kind],
        num_map_identities=_NUM_MAP_IDENTITIES,
        tunings=tunings,
        **drawn.pop("of_features"),
        **drawn,
    )
    # A path may contain bytes that are not valid UTF-8, which Python represents as lone surrogates.
    atomic_write(path, lambda stream: stream.write(page.encode(errors="replace")))


def _facts(runs: Sequence[Run]) -> list[str]:
    """What the runs were trained with and tested on. Where variants differ, all their values are named."""
    of_run: list[Callable[[Settings], str]] = [
        lambda s: s.model_name,
        lambda s: f"{s.height} x {s.width}",
        lambda s: f"{s.max_epoch} epochs",
        lambda s: f"batch {s.batch_size}",
        lambda s: f"trained on {', '.join(s.sources)}",
        lambda s: f"tested on {', '.join(dict.fromkeys(s.targets))}",
        lambda s: f"{s.label_noise:.0%} of the training images have another identity's label" if s.label_noise else "",
        lambda s: f"{s.outliers:.0%} of the training images are outliers" if s.outliers else "",
        lambda s: f"{s.train_fraction:.0%} of the training identities" if s.train_fraction < 1 else "",
    ]
    facts = [" or ".join(dict.fromkeys(text(run.settings) for run in runs)) for text in of_run]
    return [fact for fact in facts if fact]


def _verdicts(results: Results, dataset: str) -> dict[str, dict[str, list[str]]]:
    """The variants that are ahead of each baseline, behind it or neither, by the baseline and the direction."""
    rows = [row for row in results.rows if row.dataset == dataset]
    verdicts: dict[str, dict[str, list[str]]] = {}
    for baseline in results.baselines:
        found: dict[str, list[str]] = {"ahead": [], "behind": [], "no difference shown": [], "no interval": []}
        for row in rows:
            if difference := row.differences.get(baseline):
                found[difference.direction].append(row.variant)
            elif baseline in row.unknown:
                found["no interval"].append(f"{row.variant}, since {row.unknown[baseline]}")
        verdicts[baseline] = {word: names for word, names in found.items() if names}
    return {baseline: found for baseline, found in verdicts.items() if found}


def _mean_ap_charts(results: Results, dataset: str) -> list[Markup]:
    """A chart of the mAP of each seed, and one for each baseline with the difference of every other variant to it."""
    mean_aps: dict[str, BySeed] = {}
    rows = [row for row in results.rows if row.dataset == dataset]
    for row in rows:
        own = [result for result in results.results if (result.dataset, result.variant) == (dataset, row.variant)]
        means = mean_over_splits(own, [100 * result.mAP for result in own])
        mean_aps[row.variant] = {seed: float(mean) for seed, mean in means.items()}
    drawn = [seed_chart(mean_aps, results.before[dataset].metrics["mAP"].mean or 0.0, dataset)]
    for baseline in results.baselines:
        others = [row for row in rows if row.variant != baseline]
        by_seed = {
            row.variant: {seed: value - mean_aps[baseline][seed] for seed, value in mean_aps[row.variant].items()}
            for row in others
        }
        if others:
            differences = {row.variant: row.differences.get(baseline) for row in others}
            drawn.append(forest(differences, by_seed, baseline, dataset))
    return drawn


def _learning_charts(grouped: dict[str, list[Run]], dataset: str) -> list[Markup]:
    """The charts of mAP and of rank-1 by epoch."""
    evaluations = {name: [run.record().evaluations[dataset] for run in runs] for name, runs in grouped.items()}
    metrics: dict[str, Callable[[dict[str, Any]], float]] = {
        "mAP, %": lambda evaluation: 100 * float(evaluation["mAP"]),
        "rank-1, %": lambda evaluation: 100 * float(evaluation["cmc"][0]),
    }
    drawn = []
    for label, percent in metrics.items():
        curves = {}
        for name, of_runs in evaluations.items():
            epochs = sorted(set.intersection(*map(set, of_runs)))
            means = mean_over_splits(grouped[name], [[percent(own[epoch]) for epoch in epochs] for own in of_runs])
            curves[name] = (epochs, [values.tolist() for values in means.values()])
        drawn.append(charts.mean_curves(curves, "epochs trained", label, dataset))
    return drawn


def _term_charts(runs: Sequence[Run]) -> list[Markup]:
    """A chart for each run, with the terms of its loss by epoch."""
    of_runs = {}
    for run in runs:
        by_epoch = run.record().epochs
        epochs = sorted(by_epoch)
        if not epochs:
            raise RecordError(f"the record of the run in {str(run.folder)!r} holds no epochs; remove that folder")
        names = [name for name in by_epoch[epochs[-1]]["terms"] if name.startswith("loss")]
        terms = {name: [by_epoch[epoch]["terms"].get(name, np.nan) for epoch in epochs] for name in names}
        if terms:
            of_runs[run.variant] = (epochs, terms)
    styles = styles_of(name for _, terms in of_runs.values() for name in terms)
    return [charts.term_curves(variant, *of_run, styles) for variant, of_run in of_runs.items()]


def _cmc_chart(results: Results, dataset: str) -> Markup:
    """The CMC curves: the percentage of queries with a match among the first k gallery images, by k."""
    curves = {}
    own = [result for result in results.results if result.dataset == dataset]
    ranks = max(min(len(result.cmc), _CMC_RANKS) for result in own)

    def percent(result: Result) -> list[float]:
        padded = [*result.cmc, *[1.0] * ranks]  # the curve of a smaller gallery is shorter, and ends at 1
        return [100 * value for value in padded[:ranks]]

    for variant in dict.fromkeys(result.variant for result in own):
        of_variant = [result for result in own if result.variant == variant]
        means = mean_over_splits(of_variant, map(percent, of_variant))
        curves[variant] = (range(1, ranks + 1), [values.tolist() for values in means.values()])
    return charts.mean_curves(curves, "rank k", "queries with a match, %", dataset)


def _of_features(runs: Sequence[Run], dataset: str, kind: str) -> dict[str, Any]:
    """Histograms of distances, maps of the features of some identities, and ranked lists.

    The features of a run may take gigabytes: each file of them is read once, and those of one run are in memory.
    """
    ranked = RankedQueries(runs, dataset)
    histograms: list[Markup] = []
    maps: list[Markup] = []
    shown: list[int] | None = None
    for run in progress("features", runs, "run", len(runs)):
        metric = run.settings.dist_metric
        query, gallery = run.features(dataset, after=False)
        if shown is None:
            pids = np.random.default_rng(0).permutation(np.intersect1d(query.pids, gallery.pids))
            shown = sorted(pids[:_NUM_MAP_IDENTITIES].tolist())
            maps.append(charts.feature_map("before training", query, gallery, shown, metric, kind))
        before = DistanceHistograms.of(query, gallery, metric)
        del query, gallery
        query, gallery = run.features(dataset, after=True)
        histograms.append(charts.histograms(run.variant, before, DistanceHistograms.of(query, gallery, metric)))
        maps.append(charts.feature_map(run.variant, query, gallery, shown, metric, kind))
        ranked.add(query, gallery)
        del query, gallery
    return {"histograms": histograms, "maps": maps, "queries": ranked.queries()}
