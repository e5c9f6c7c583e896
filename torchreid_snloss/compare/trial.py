"""A trial of a tuning, and how its runs judge it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchreid_snloss.compare.runs import Run

__all__ = ["Trial", "mean_aps", "summary"]


@dataclass(frozen=True)
class Trial:
    """A trial of a tuning.

    Attributes:
        number: Its number, from 0, which is the trial with the config's own values.
        values: What it tried, by key.
        curve: The mAP on the held-out identities in [0, 1], by the number of epochs trained; with several folds, that
            of the first one, and at the end of each further one the mean over the folds so far.
        state: `"finished"`, `"pruned"` if it was ended early, since its mAP was below the median of the earlier trials
            that came to their end, `"failed"`, or `"running"`.
    """

    number: int
    values: dict[str, Any]
    curve: dict[int, float]
    state: str

    @property
    def mean_ap(self) -> float | None:
        """The last mAP in [0, 1]; None for a trial that was never evaluated."""
        return self.curve[max(self.curve)] if self.curve else None


def mean_aps(runs: Sequence[Run]) -> dict[int, float]:
    """The curve of a trial, as far as its runs have come.

    Args:
        runs: The runs of the trial, one for each fold.
    """
    last_epoch = runs[0].settings.max_epoch
    curve = {epoch: mean_ap for epoch, mean_ap in sorted(runs[0].mean_aps().items()) if epoch > 0}
    of_folds: list[float] = []
    for run in runs:
        own = run.mean_aps()
        if last_epoch not in own:
            break
        of_folds.append(own[last_epoch])
        curve[last_epoch * len(of_folds)] = statistics.fmean(of_folds)
    return curve


def summary(runs: Sequence[Run]) -> str:
    """The last results of a trial in one line; with several folds, the mean and the mAP of each."""
    if len(runs) == 1:
        return runs[0].summary()
    of_folds = [100 * run.mean_aps()[run.settings.max_epoch] for run in runs]
    return f"mAP {statistics.fmean(of_folds):.1f}% ({', '.join(f'{mean_ap:.1f}' for mean_ap in of_folds)})"
