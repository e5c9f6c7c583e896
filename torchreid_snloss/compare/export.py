"""The results of a comparison as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchreid_snloss.checkpoint import atomic_write
from torchreid_snloss.compare.results import ROW_COLUMNS, Results, Row
from torchreid_snloss.compare.tuning import Tuning

__all__ = ["write_csv", "write_json"]


def write_csv(results: Results, path: Path) -> None:
    """Writes the table as CSV.

    Each mean has a column, and one, `sd`, for its standard deviation. Each difference to a baseline has a column, and
    two for the ends of its interval, `low` and `high`.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    metrics = [column for name in results.rows[0].metrics for column in (name, f"{name} sd")]
    differences = [f"mAP - {name}{end}" for name in results.baselines for end in ("", " low", " high")]
    writer.writerow([*ROW_COLUMNS, *metrics, *differences])
    for row in results.rows:
        numbers = [value for metric in row.metrics.values() for value in (metric.mean, metric.std)]
        for name in results.baselines:
            found = row.differences.get(name)
            numbers += [None] * 3 if found is None else [100 * found.mean, 100 * found.low, 100 * found.high]
        writer.writerow([*row.names, *("" if value is None else f"{value:.6g}" for value in numbers)])
    atomic_write(path, lambda stream: stream.write(text.getvalue().encode()))


def write_json(results: Results, path: Path, tunings: Sequence[Tuning] = ()) -> None:
    """Writes the rows of the table, the result of every run and the trials of a tuning as JSON."""
    content: dict[str, Any] = {
        "table": [_row_for_json(row) for row in results.rows],
        "runs": [asdict(result) for result in results.results],
        "tuning": [
            {
                "variant": tuning.variant.name,
                "split": tuning.split,
                "folds": tuning.folds,
                "trials": [asdict(trial) for trial in tuning.trials],
            }
            for tuning in tunings
        ],
    }
    atomic_write(path, lambda stream: stream.write(json.dumps(content, indent=1).encode()))


def _row_for_json(row: Row) -> dict[str, Any]:
    figures = {
        name: {"mean": metric.mean, "spread": metric.std, "digits": metric.digits}
        for name, metric in row.metrics.items()
    }
    differences = {
        name: {"mean": 100 * found.mean, "low": 100 * found.low, "high": 100 * found.high, "verdict": found.verdict}
        for name, found in row.differences.items()
    }
    return {
        "dataset": row.dataset,
        "variant": row.variant,
        "trained_with": row.trained_with,
        "seeds": row.seeds,
        "figures": figures,
        "mAP_differences": differences,
    }
