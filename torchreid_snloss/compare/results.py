"""The results of a comparison: a table, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchreid_snloss.checkpoint import atomic_write
from torchreid_snloss.compare.runs import Run
from torchreid_snloss.deprecation import renamed

__all__ = ["MeanStd", "Result", "Results", "Row", "write_csv", "write_json"]

__getattr__ = renamed(__name__, {"Figure": "torchreid_snloss.compare.results.MeanStd"})

_ROW_COLUMNS = ("dataset", "loss", "weight_x", "seeds")


@dataclass(frozen=True)
class Result:
    """The last evaluation of a run on one test set.

    Attributes:
        loss: The name of the loss.
        seed: The seed of the run.
        dataset: The test set.
        mAP: mAP in [0, 1].
        mINP: mINP in [0, 1].
        cmc: The CMC curve, in [0, 1]; the value for rank k is at index k - 1.
        seconds: The median time of an epoch; None if every epoch was interrupted.
        memory: The peak memory in MiB; None if it is unknown.
    """

    loss: str
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
    """A row of the table: a loss on one test set.

    Attributes:
        dataset: The test set.
        loss: The name of the loss.
        weight_x: The weight of the softmax term beside the loss.
        seeds: The number of runs.
        metrics: The metrics by the name of their column, in percent, seconds and MiB.
    """

    dataset: str
    loss: str
    weight_x: float
    seeds: int
    metrics: dict[str, MeanStd]

    @property
    def names(self) -> list[str]:
        """The cells before the metrics, as the table shows them."""
        return [self.dataset, self.loss, f"{self.weight_x:g}", str(self.seeds)]


@dataclass(frozen=True, eq=False)
class Results:
    """The results of all runs.

    Attributes:
        results: The result of each run on each test set.
        rows: The rows of the table, in which the runs of a loss are averaged.
    """

    results: list[Result]
    rows: list[Row]

    @classmethod
    def of(cls, runs: Sequence[Run], unchanged: Sequence[Run] = ()) -> Results:
        """Reads the results of finished runs.

        Args:
            runs: The runs.
            unchanged: The same runs on the unchanged training set, without label noise, outliers or a smaller number
                of identities; empty if there are none.
        """
        results = [result for run in runs for result in _results(run)]
        without_change = [result for run in unchanged for result in _results(run)]
        weights = {run.loss: run.settings.softmax_weight for run in runs}
        rows = []
        for dataset in runs[0].datasets:
            for loss, weight in weights.items():
                of_row, reference = (
                    [result for result in every if (result.dataset, result.loss) == (dataset, loss)]
                    for every in (results, without_change)
                )
                rows.append(Row(dataset, loss, weight, len(of_row), _metrics(of_row, reference)))
        return cls(results, rows)

    @property
    def columns(self) -> list[str]:
        """The header of the table."""
        return [*_ROW_COLUMNS, *self.rows[0].metrics]

    def is_best(self, row: Row, name: str) -> bool:
        """Whether a row has the best mean of its test set. Times and memory have no best mean.

        Args:
            row: One of the rows.
            name: The name of the metric.
        """
        mean = row.metrics[name].mean
        if mean is None or not name.startswith(("mAP", "mINP", "rank")):
            return False
        means = [other.metrics[name].mean for other in self.rows if other.dataset == row.dataset]
        best = min if name == "mAP lost" else max
        return mean == best(other for other in means if other is not None)

    def table(self) -> str:
        """The table as text, which is Markdown too."""
        lines = [self.columns, *([*row.names, *map(str, row.metrics.values())] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines)]
        lines.insert(1, ["-" * width for width in widths])
        padded = ([cell.ljust(width) for cell, width in zip(line, widths)] for line in lines)
        return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def _results(run: Run) -> list[Result]:
    record = run.record()
    seconds = [epoch["seconds"] for epoch in record.epochs.values() if epoch["seconds"] is not None]
    memory = [epoch["memory"] for epoch in record.epochs.values() if epoch["memory"] is not None]
    results = []
    for dataset in run.datasets:
        last = record.evaluations[dataset][run.settings.max_epoch]
        results.append(
            Result(
                loss=run.loss,
                seed=run.seed,
                dataset=dataset,
                mAP=last["mAP"],
                mINP=last["mINP"],
                cmc=last["cmc"],
                seconds=statistics.median(seconds) if seconds else None,
                memory=max(memory, default=None),
            )
        )
    return results


def _metrics(results: Sequence[Result], unchanged: Sequence[Result]) -> dict[str, MeanStd]:
    metrics = {
        "mAP": MeanStd.of([100 * result.mAP for result in results]),
        "mINP": MeanStd.of([100 * result.mINP for result in results]),
    }
    for rank in (1, 5, 10):
        # The CMC curve of a smaller gallery is shorter, and ends at 1.
        metrics[f"rank-{rank}"] = MeanStd.of([100 * result.cmc[min(rank, len(result.cmc)) - 1] for result in results])
    metrics["s/epoch"] = MeanStd.of([result.seconds for result in results], digits=2)
    metrics["peak MiB"] = MeanStd.of([result.memory for result in results], digits=0)
    if unchanged:
        metrics["mAP unchanged"] = MeanStd.of([100 * result.mAP for result in unchanged])
        metrics["mAP lost"] = MeanStd.of([100 * (old.mAP - new.mAP) for old, new in zip(unchanged, results)])
    return metrics


def write_csv(results: Results, path: Path) -> None:
    """Writes the table as CSV, with a column for each mean and one, `sd`, for its standard deviation."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_ROW_COLUMNS, *(column for name in results.rows[0].metrics for column in (name, f"{name} sd"))])
    for row in results.rows:
        numbers = [value for metric in row.metrics.values() for value in (metric.mean, metric.std)]
        writer.writerow([*row.names, *("" if value is None else f"{value:.6g}" for value in numbers)])
    atomic_write(path, lambda stream: stream.write(text.getvalue().encode()))


def write_json(results: Results, path: Path) -> None:
    """Writes the rows of the table and the result of every run as JSON."""
    content: dict[str, Any] = {
        "table": [_row_for_json(row) for row in results.rows],
        "runs": [asdict(result) for result in results.results],
    }
    atomic_write(path, lambda stream: stream.write(json.dumps(content, indent=1).encode()))


def _row_for_json(row: Row) -> dict[str, Any]:
    """The row with the keys of the original file format, so that existing scripts can still read it."""
    figures = {
        name: {"mean": metric.mean, "spread": metric.std, "digits": metric.digits}
        for name, metric in row.metrics.items()
    }
    return {"dataset": row.dataset, "loss": row.loss, "weight_x": row.weight_x, "seeds": row.seeds, "figures": figures}
