"""One training run of a comparison, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchreid_snloss.checkpoint import atomic_write, remove_unfinished
from torchreid_snloss.compare.ranked import average_precisions
from torchreid_snloss.config import ConfigError, leaves, load_config, loss_names
from torchreid_snloss.config.ranges import shown
from torchreid_snloss.engine.differences import NEUTRAL_KEYS
from torchreid_snloss.engine.stopping import stop_signals
from torchreid_snloss.record import (
    Features,
    Record,
    has_record,
    read_average_precisions,
    read_features,
    read_record,
)
from torchreid_snloss.run.lock import FolderInUseError, locked, pass_on
from torchreid_snloss.settings import Settings, decide

__all__ = ["Run"]

_SETTINGS = "settings.yaml"


@dataclass(frozen=True, eq=False)
class Run:
    """A training run with one loss and one seed.

    Attributes:
        loss: The value of `loss.name`.
        seed: The value of `train.seed`.
        settings: The settings of the run.
        arguments: Arguments of `torchreid-snloss` that give these settings.
    """

    loss: str
    seed: int
    settings: Settings
    arguments: list[str]

    @property
    def folder(self) -> Path:
        """The folder of the log, the checkpoints and the record."""
        return Path(self.settings.save_dir)

    @property
    def datasets(self) -> list[str]:
        """The test sets."""
        return list(dict.fromkeys(self.settings.targets))

    @property
    def _records(self) -> Path:
        return self.folder / "record"

    def record(self) -> Record:
        """Reads what the run has recorded so far."""
        return read_record(self._records)

    def features(self, dataset: str, after: bool) -> tuple[Features, Features]:
        """Reads the features of queries and gallery, before or after training."""
        return read_features(self._records, dataset, after)

    def average_precisions(self, dataset: str) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
        """Reads the identities of the queries and their average precisions after training.

        Returns:
            As `read_average_precisions` does. A record of this package before 0.3 has none; they are computed from its
            features, unless the run re-ranked: then they are unknown, and None is returned.
        """
        found = read_average_precisions(self._records, dataset, after=True)
        if found is None and not self.settings.rerank_in_training:
            query, gallery = self.features(dataset, after=True)
            return query.pids, average_precisions(query, gallery, self.settings.dist_metric)
        return found

    def finished(self) -> bool:
        """Whether the run was evaluated after its last epoch."""
        if not has_record(self._records):
            return False
        evaluations = self.record().evaluations
        return all(self.settings.max_epoch in evaluations.get(name, {}) for name in self.datasets)

    def other_settings(self) -> list[str]:
        """A line for each key in which an earlier run in the same folder differs; empty if there was no such run."""
        if not has_record(self._records):  # nothing of that run is used
            return []
        path = self.folder / _SETTINGS
        try:
            config = load_config(str(path))
            names = [name for name in loss_names(config) if name != "softmax" and name not in config.loss]
            if names:
                raise ConfigError(f"{str(path)!r} has the loss {shown(names[0])}, which is unknown")
            before, _ = decide(config)
        except (ConfigError, AttributeError, KeyError, TypeError) as error:  # of a value that nothing can be decided by
            reason = error if isinstance(error, ConfigError) else f"{str(path)!r} has a value that no run has: {error}"
            raise ConfigError(f"the settings of the run in {self.folder} are damaged: {reason}; remove it") from error
        was, now = dict(leaves(before)), self.settings.values
        return [
            f"{key} was {was[key]}, is {now[key]}" for key in now if was[key] != now[key] and key not in NEUTRAL_KEYS
        ]

    def execute(self) -> int:
        """Starts or resumes the run, and waits until it ends.

        Ctrl-C, SIGTERM and a closed terminal make it write a checkpoint and stop.

        Returns:
            The exit code; 128 plus the signal's number if a signal came.

        Raises:
            ConfigError: If another process is training in the folder.
        """
        # The run writes its output to a log. torchreid's warning is about an evaluator that is not used here.
        command = [sys.executable, "-W", "ignore:Cython evaluation", "-m", "torchreid_snloss", *self.arguments]
        if not has_record(self._records):
            command += ["model.resume", ""]  # a record that starts in the middle of a run would be useless
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self.folder))
            except FolderInUseError as error:
                raise ConfigError(str(error)) from error
            noted = stack.enter_context(_signals())
            remove_unfinished(self.folder)
            atomic_write(self.folder / _SETTINGS, lambda stream: stream.write(self.settings.cfg_text.encode()))
            sent = 0
            # It holds the lock even if this process is killed.
            variables, descriptors = pass_on(self.folder)
            process = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, **variables},
                pass_fds=descriptors,
            )
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=0.05)
                    if noted:
                        return 128 + noted[0]
                    return code if code >= 0 else 128 - code
                while sent < len(noted):
                    process.send_signal(signal.SIGTERM)  # Ctrl-C would be a traceback while Python starts
                    sent += 1

    def summary(self) -> str:
        """The last results in one line."""
        last = self.record().evaluations[self.datasets[0]][self.settings.max_epoch]
        return f"mAP {last['mAP']:.1%}, rank-1 {last['cmc'][0]:.1%}"


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Within it the list that this gives gets the signals that ask this process to end.

    On Windows, where a console sends Ctrl-C to both processes, nothing.
    """
    noted: list[int] = []
    numbers = [] if os.name == "nt" else stop_signals()

    def note(number: int, _: Any) -> None:
        noted.append(number)

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
