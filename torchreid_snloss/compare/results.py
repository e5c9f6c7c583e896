"""The results of a comparison, and its table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchreid_snloss.compare.bootstrap import Difference, Evaluation, difference
from torchreid_snloss.compare.runs import Run, by_variant
from torchreid_snloss.compare.variants import BASELINES, describe
from torchreid_snloss.deprecation import renamed
from torchreid_snloss.record import RecordError

__all__ = ["ROW_COLUMNS", "MeanStd", "Result", "Results", "Row", "mean_over_splits"]

__getattr__ = renamed(__name__, {"Figure": "torchreid_snloss.compare.results.MeanStd"})

ROW_COLUMNS = ("dataset", "variant", "trained with", "seeds")
"""The columns before the metrics."""


@dataclass(frozen=True)
class Result:
    """The last evaluation of a run on one test set.

    Attributes:
        variant: The name of the variant.
        split: The number of the split, from 1; 0 without splits.
        seed: The seed of the run.
        dataset: The test set.
        mAP: mAP in [0, 1].
        mINP: mINP in [0, 1].
        cmc: The CMC curve, in [0, 1]; the value for rank k is at index k - 1.
        seconds: The median time of an epoch; None if every epoch was interrupted.
        memory: The peak memory in MiB; None if it is unknown.
    """

    variant: str
    split: int
    seed: int
    dataset: str
    mAP: float  # noqa: N815 - the name everyone uses
    mINP: float  # noqa: N815
    cmc: list[float]
    seconds: float | None
    memory: float | None


@dataclass(frozen=True)
class MeanStd:
    """The mean and the standard deviation of a metric over seeds.

    Attributes:
        mean: The mean; None if nothing was measured.
        std: The sample standard deviation; None for fewer than two values.
        digits: How many digits to show after the decimal point.
    """

    mean: float | None
    std: float | None
    digits: int

    @classmethod
    def of(cls, values: Sequence[float | None], digits: int = 1) -> MeanStd:
        """Computes mean and standard deviation of the values that are not None."""
        measured = [value for value in values if value is not None]
        mean = statistics.fmean(measured) if measured else None
        return cls(mean, statistics.stdev(measured) if len(measured) > 1 else None, digits)

    def __str__(self) -> str:
        if self.mean is None:
            return "?"
        std = "" if self.std is None else f" ± {self.std:.{self.digits}f}"
        return f"{self.mean:.{self.digits}f}{std}"


@dataclass(frozen=True)
class Row:
    """A row of the table: a variant on one test set.

    Attributes:
        dataset: The test set.
        variant: The name of the variant.
        trained_with: What it was trained with: the losses with their weights, and for softmax alone the batches.
        seeds: The number of runs, on each split.
        metrics: The metrics by the name of their column, in percent, seconds and MiB.
        differences: The difference of mAP to each baseline, by the baseline's name; none to itself.
        unknown: Why there is no difference to a baseline, by the baseline's name.
    """

    dataset: str
    variant: str
    trained_with: str
    seeds: int
    metrics: dict[str, MeanStd]
    differences: dict[str, Difference]
    unknown: dict[str, str]

    @property
    def names(self) -> list[str]:
        """The cells before the metrics, as the table shows them."""
        return [self.dataset, self.variant, self.trained_with, str(self.seeds)]


@dataclass(frozen=True, eq=False)
class Results:
    """The results of all runs.

    Attributes:
        results: The result of each run on each test set.
        rows: The rows of the table, in which the runs of a variant are averaged.
        before: By test set a row of the networks before training, in which the runs of all variants are averaged.
        baselines: The names of the variants that the others are compared with.
        findings: A line for each difference to a baseline, which says in words what its interval shows.
    """

    results: list[Result]
    rows: list[Row]
    before: dict[str, Row]
    baselines: list[str]
    findings: list[str]

    @classmethod
    def of(cls, runs: Sequence[Run], unchanged: Sequence[Run] = ()) -> Results:
        """Reads the results of finished runs.

        Args:
            runs: The runs, those of a variant next to each other.
            unchanged: The same runs on the unchanged training set, without label noise, outliers or a smaller number
                of identities; empty if there are none.
        """
        results = [_result(run, name, run.settings.max_epoch) for run in runs for name in run.datasets]
        without_change = [_result(run, name, run.settings.max_epoch) for run in unchanged for name in run.datasets]
        grouped = by_variant(runs)
        baselines = [name for name in BASELINES if name in grouped]
        rows, findings = [], []
        for dataset in runs[0].datasets:
            # Read once, since each run is compared several times and its features may take gigabytes.
            precisions = {run: run.average_precisions(dataset) for run in runs} if baselines else {}
            for variant, own in grouped.items():
                of_row, reference = (
                    [result for result in every if (result.dataset, result.variant) == (dataset, variant)]
                    for every in (results, without_change)
                )
                differences, unknown = {}, {}
                for name in (name for name in baselines if name != variant):
                    found = _difference(own, grouped[name], precisions)
                    if isinstance(found, Difference):
                        differences[name] = found
                        text = f"{found}, {found.verdict}"
                    else:
                        unknown[name] = found
                        text = f"no interval, since {found}"
                    findings.append(f"{dataset}: {variant}, mAP - {name}: {text}")
                seeds = len({run.seed for run in own})
                metrics = _metrics(of_row, reference)
                rows.append(Row(dataset, variant, _trained_with(own), seeds, metrics, differences, unknown))
        before = {dataset: _before_training(runs, dataset) for dataset in runs[0].datasets}
        return cls(results, rows, before, baselines, findings)

    @property
    def columns(self) -> list[str]:
        """The header of the table."""
        return [*ROW_COLUMNS, "mAP", *(f"mAP - {name}" for name in self.baselines), *list(self.rows[0].metrics)[1:]]

    def cells(self, row: Row) -> list[str]:
        """The cells of a row, in the order of the columns."""
        mean_ap, *others = map(str, row.metrics.values())
        return [*row.names, mean_ap, *(str(row.differences.get(name, "")) for name in self.baselines), *others]

    def table(self) -> str:
        """The table as text, which is Markdown too."""
        lines = [self.columns, *map(self.cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines)]
        lines.insert(1, ["-" * width for width in widths])
        padded = ([cell.ljust(width) for cell, width in zip(line, widths)] for line in lines)
        return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def _trained_with(runs: Sequence[Run]) -> str:
    """What the runs of a variant were trained with. A tuning may have found other weights for each split."""
    descriptions = {describe(run.settings) for run in runs}
    return descriptions.pop() if len(descriptions) == 1 else f"{describe(runs[0].settings, weights=False)}, tuned"


def _difference(
    variant: Sequence[Run],
    baseline: Sequence[Run],
    precisions: Mapping[Run, tuple[NDArray[np.int64], NDArray[np.float64]]],
) -> Difference | str:
    """The difference of mAP between two variants, or the reason why it has no interval.

    Args:
        variant: The runs of the variant.
        baseline: The runs of the baseline, with the same splits and seeds in the same order.
        precisions: The identities and average precisions of each run's queries on one test set.
    """
    sides = [
        [Evaluation(run.seed, *precisions[run], split=str(run.split or "")) for run in runs]
        for runs in (variant, baseline)
    ]
    for run, its_baseline, one, other in zip(variant, baseline, *sides):
        if not np.array_equal(one.pids, other.pids):
            folders = " and ".join(repr(str(one.folder)) for one in (run, its_baseline))
            raise RecordError(f"the runs in {folders} were tested on other images")
    try:
        return difference(sides[0], sides[1])
    except ValueError as error:  # as of a test set with a single identity
        return str(error)


def _result(run: Run, dataset: str, epoch: int) -> Result:
    record = run.record()
    seconds = [found["seconds"] for found in record.epochs.values() if found["seconds"] is not None]
    memory = [found["memory"] for found in record.epochs.values() if found["memory"] is not None]
    evaluation = record.evaluations[dataset][epoch]
    return Result(
        variant=run.variant,
        split=run.split,
        seed=run.seed,
        dataset=dataset,
        mAP=evaluation["mAP"],
        mINP=evaluation["mINP"],
        cmc=evaluation["cmc"],
        seconds=statistics.median(seconds) if seconds else None,
        memory=max(memory, default=None),
    )


def _before_training(runs: Sequence[Run], dataset: str) -> Row:
    results = [_result(run, dataset, 0) for run in runs]
    of_rows = [statistics.fmean(own.mAP for own in results if own.variant == name) for name in by_variant(runs)]
    low, high = (f"{100 * end:.1f}" for end in (min(of_rows), max(of_rows)))
    networks = "the networks of all rows" + ("" if low == high else f", mAP {low} to {high}")
    seeds = len({run.seed for run in runs})
    return Row(dataset, "before training", networks, seeds, _accuracies(results), {}, {})


def mean_over_splits(
    runs: Sequence[Run | Result], values: Iterable[float | Sequence[float] | None]
) -> dict[int, NDArray[np.float64]]:
    """Averages a value, or several in an array, over the splits.

    Args:
        runs: The runs, or their results.
        values: What is averaged, of each run; None, as for an unknown time, is left out.

    Returns:
        The mean by seed.
    """
    by_seed: dict[int, list[float | Sequence[float]]] = {}
    for run, value in zip(runs, values):
        if value is not None:
            by_seed.setdefault(run.seed, []).append(value)
    return {seed: np.asarray(own, dtype=np.float64).mean(axis=0) for seed, own in by_seed.items()}


def _over_seeds(results: Sequence[Result], values: Iterable[float | None], digits: int = 1) -> MeanStd:
    """Mean and standard deviation over seeds of the mean over splits, of a value for each result."""
    means = mean_over_splits(results, values)
    return MeanStd.of([float(mean) for mean in means.values()], digits)


def _accuracies(results: Sequence[Result]) -> dict[str, MeanStd]:
    metrics = {
        "mAP": _over_seeds(results, (100 * result.mAP for result in results)),
        "mINP": _over_seeds(results, (100 * result.mINP for result in results)),
    }
    for rank in (1, 5, 10):
        # The CMC curve of a smaller gallery is shorter, and ends at 1.
        shares = (result.cmc[min(rank, len(result.cmc)) - 1] for result in results)
        metrics[f"rank-{rank}"] = _over_seeds(results, (100 * share for share in shares))
    return metrics


def _metrics(results: Sequence[Result], unchanged: Sequence[Result]) -> dict[str, MeanStd]:
    metrics = _accuracies(results)
    metrics["s/epoch"] = _over_seeds(results, (result.seconds for result in results), digits=2)
    metrics["peak MiB"] = _over_seeds(results, (result.memory for result in results), digits=0)
    if unchanged:  # a result for each of the others, in the same order
        metrics["mAP unchanged"] = _over_seeds(results, (100 * old.mAP for old in unchanged))
        lost = (100 * (old.mAP - new.mAP) for old, new in zip(unchanged, results))
        metrics["mAP lost"] = _over_seeds(results, lost)
    return metrics
