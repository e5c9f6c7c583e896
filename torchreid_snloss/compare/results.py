"""What the runs of a comparison ended with: a table, CSV and JSON."""

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
from torchreid_snloss.config import softmax_weight

__all__ = ["MeanStd", "Result", "Results", "Row", "write_csv", "write_json"]


@dataclass(frozen=True)
class Result:
    """A run's last evaluation on one test set.

    Attributes:
        loss: its name.
        seed: of the run.
        dataset: the test set.
        mAP: in [0, 1].
        mINP: likewise.
        cmc: likewise, at k - 1 that of rank k.
        seconds: an epoch's, the median; None where there was no whole one.
        memory: the most, in MiB; None where it is not known.
    """

    loss: str
    seed: int
    dataset: str
    mAP: float  # noqa: N815 - what everyone calls it
    mINP: float  # noqa: N815
    cmc: list[float]
    seconds: float | None
    memory: float | None


@dataclass(frozen=True)
class MeanStd:
    """A mean over seeds.

    Attributes:
        mean: None where nothing was measured.
        spread: the sample standard deviation; None of one value.
        digits: to show after the point.
    """

    mean: float | None
    spread: float | None
    digits: int

    @classmethod
    def of(cls, values: Sequence[float | None], digits: int = 1) -> MeanStd:
        """Of some runs' values, of which some may be missing."""
        found = [value for value in values if value is not None]
        mean = statistics.fmean(found) if found else None
        return cls(mean, statistics.stdev(found) if len(found) > 1 else None, digits)

    def __str__(self) -> str:
        if self.mean is None:
            return "?"
        spread = "" if self.spread is None else f" ± {self.spread:.{self.digits}f}"
        return f"{self.mean:.{self.digits}f}{spread}"


@dataclass(frozen=True)
class Row:
    """A loss on one test set.

    Attributes:
        dataset: the test set.
        loss: its name.
        weight_x: of the softmax term beside it.
        seeds: how many runs.
        figures: by the name of the column; percent, seconds and MiB.
    """

    dataset: str
    loss: str
    weight_x: float
    seeds: int
    figures: dict[str, MeanStd]

    @property
    def names(self) -> list[str]:
        """What the row is of, as the table shows it."""
        return [self.dataset, self.loss, f"{self.weight_x:g}", str(self.seeds)]


@dataclass(frozen=True, eq=False)
class Results:
    """Of all runs.

    Attributes:
        results: of each run on each test set.
        rows: means over seeds.
    """

    results: list[Result]
    rows: list[Row]

    @classmethod
    def of(cls, runs: Sequence[Run], unchanged: Sequence[Run] = ()) -> Results:
        """Of runs that are finished.

        Args:
            runs: what was run.
            unchanged: the same without noise, outliers or a smaller training set, where they are finished.
        """
        results = [result for run in runs for result in _results(run)]
        before = [result for run in unchanged for result in _results(run)]
        weights = {run.loss: softmax_weight(run.cfg) for run in runs}
        rows = []
        for dataset in runs[0].datasets:
            for loss, weight in weights.items():
                own, old = ([x for x in found if (x.dataset, x.loss) == (dataset, loss)] for found in (results, before))
                rows.append(Row(dataset, loss, weight, len(own), _figures(own, old)))
        return cls(results, rows)

    @property
    def columns(self) -> list[str]:
        """The table's."""
        return ["dataset", "loss", "weight_x", "seeds", *self.rows[0].figures]

    def table(self) -> str:
        """The table as text, which is Markdown too."""
        lines = [self.columns, *([*row.names, *map(str, row.figures.values())] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines)]
        lines.insert(1, ["-" * width for width in widths])
        return "\n".join(f"| {' | '.join(cell.ljust(width) for cell, width in zip(x, widths))} |" for x in lines)


def _results(run: Run) -> list[Result]:
    record = run.record()
    seconds = [epoch["seconds"] for epoch in record.epochs.values() if epoch["seconds"] is not None]
    memory = [epoch["memory"] for epoch in record.epochs.values() if epoch["memory"] is not None]
    measured = statistics.median(seconds) if seconds else None, max(memory, default=None)
    last = {dataset: record.evaluations[dataset][run.cfg.train.max_epoch] for dataset in run.datasets}
    return [Result(run.loss, run.seed, name, x["mAP"], x["mINP"], x["cmc"], *measured) for name, x in last.items()]


def _figures(own: Sequence[Result], unchanged: Sequence[Result]) -> dict[str, MeanStd]:
    figures = {
        "mAP": MeanStd.of([100 * result.mAP for result in own]),
        "mINP": MeanStd.of([100 * result.mINP for result in own]),
    }
    for rank in (1, 5, 10):
        # A gallery with fewer images ends the curve, at 1.
        figures[f"rank-{rank}"] = MeanStd.of([100 * result.cmc[min(rank, len(result.cmc)) - 1] for result in own])
    figures["s/epoch"] = MeanStd.of([result.seconds for result in own], digits=2)
    figures["peak MiB"] = MeanStd.of([result.memory for result in own], digits=0)
    if unchanged:
        figures["mAP unchanged"] = MeanStd.of([100 * result.mAP for result in unchanged])
        figures["mAP lost"] = MeanStd.of([100 * (old.mAP - new.mAP) for old, new in zip(unchanged, own)])
    return figures


def write_csv(results: Results, path: Path) -> None:
    """A row a loss and test set, with each figure's mean and standard deviation, ``sd``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names, figures = results.columns[:4], results.columns[4:]
    writer.writerow([*names, *(name for figure in figures for name in (figure, f"{figure} sd"))])
    for row in results.rows:
        numbers = [value for figure in row.figures.values() for value in (figure.mean, figure.spread)]
        writer.writerow([*row.names, *("" if value is None else f"{value:.6g}" for value in numbers)])
    atomic_write(path, lambda stream: stream.write(text.getvalue().encode()))


def write_json(results: Results, path: Path) -> None:
    """The table's rows, and every run's results."""
    found: dict[str, Any] = {
        "table": [asdict(row) for row in results.rows],
        "runs": [asdict(result) for result in results.results],
    }
    atomic_write(path, lambda stream: stream.write(json.dumps(found, indent=1).encode()))
