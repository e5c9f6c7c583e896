"""Logging of an epoch: the progress bar, the means of its terms, and the record."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from torchreid_snloss.engine.testing import Evaluated
from torchreid_snloss.progress import progress_bar
from torchreid_snloss.record import Features, Recorder

__all__ = ["EpochLog", "PrintFrequency"]


class PrintFrequency(int):
    """torchreid's `print_freq`, with which an epoch also prints after its last batch, however few it has.

    torchreid prints where `batch % print_freq` is 0.

    Args:
        print_freq: After how many batches a line is printed.
        batches: How many an epoch has.
    """

    def __new__(cls, print_freq: int, batches: int) -> PrintFrequency:
        """Makes an integer that knows the last batch."""
        made = super().__new__(cls, print_freq)
        made._last = batches
        return made

    _last: int

    def __rmod__(self, batch: int) -> int:
        """Called for `batch % self`, since this class is more special than that of `batch`."""
        return 0 if batch == self._last else batch % int(self)


class EpochLog:
    """Logs the steps of an epoch, and writes the record of a run if it has one."""

    def __init__(self) -> None:
        self._recorder: Recorder | None = None
        self._bar: tqdm[Any] | None = None
        self._batch_size = 0
        self._seconds: float | None = None
        self._values: dict[str, list[float]] = {}

    def start_record(self, folder: str | Path, start_epoch: int) -> None:
        """Starts a record in `folder`, or continues the record there from `start_epoch` on."""
        self._recorder = Recorder(folder, start_epoch)

    def stop_record(self) -> None:
        """Stops recording."""
        self._recorder = None

    @contextlib.contextmanager
    def epoch(self, epoch: int, max_epoch: int, batches: int, done: int, batch_size: int, unit: str) -> Iterator[None]:
        """Within it steps move a progress bar, and are noted for `record_epoch`.

        Args:
            epoch: its number, from 1.
            max_epoch: how many there are.
            batches: in the epoch.
            done: of these, trained by an earlier run; the seconds of such an epoch are not known.
            batch_size: images or tracklets in a batch.
            unit: which of the two.
        """
        began = time.perf_counter()
        self._values, self._batch_size = {}, batch_size
        title = f"epoch {epoch}/{max_epoch}"
        with progress_bar(title, batches * batch_size, unit, done * batch_size) as self._bar:
            try:
                yield
            finally:
                self._bar = None
        self._seconds = None if done else time.perf_counter() - began

    def record_epoch(self, epoch: int) -> None:
        """Records the epoch whose steps were noted.

        Args:
            epoch: its number, from 1.
        """
        if self._recorder is not None:
            means = {name: sum(values) / len(values) for name, values in self._values.items()}
            terms = {name: mean for name, mean in means.items() if math.isfinite(mean)}  # not so of a statistic
            self._recorder.add_epoch(epoch, terms, self._seconds)

    def add_step(self, summary: Mapping[str, float]) -> None:
        """Adds the values of a step to the log; does nothing outside an epoch."""
        if self._bar is None:
            return
        for name, value in summary.items():
            self._values.setdefault(name, []).append(value)
        shown = {name: value for name, value in summary.items() if name.startswith(("loss", "acc"))}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(self._batch_size)

    def add_evaluation(self, epoch: int, dataset: str, found: Evaluated) -> None:
        """Records an evaluation, if the run has a record.

        Args:
            epoch: after how many epochs.
            dataset: the name of the data set.
            found: the evaluation.
        """
        if self._recorder is not None:
            query, gallery = (
                Features(split.features.float().numpy(), split.pids, split.camids, np.array(split.paths))
                for split in (found.query, found.gallery)
            )
            self._recorder.add_evaluation(epoch, dataset, found.ranking, query, gallery)
