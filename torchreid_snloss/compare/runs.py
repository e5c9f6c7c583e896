"""One training run of a comparison, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from torchreid_snloss.checkpoint import atomic_write, remove_unfinished
from torchreid_snloss.compare.jobs import Place
from torchreid_snloss.compare.ranked import average_precisions
from torchreid_snloss.config import ConfigError, leaves, load_config, loss_names
from torchreid_snloss.config.decide import decide
from torchreid_snloss.config.ranges import shown
from torchreid_snloss.data import VALIDATION
from torchreid_snloss.engine.differences import NEUTRAL_KEYS
from torchreid_snloss.record import (
    Features,
    Record,
    has_record,
    read_average_precisions,
    read_features,
    read_record,
)
from torchreid_snloss.run.lock import FolderInUseError, locked, pass_on
from torchreid_snloss.settings import Settings

__all__ = ["STOPPED", "Run", "RunFailedError", "by_variant", "check_folder", "neutral_keys"]


def _classes(of: type[BaseException]) -> list[str]:
    return [of.__name__, *(name for cls in of.__subclasses__() for name in _classes(cls))]


_SETTINGS = "settings.yaml"
_IMAGES = "# images: "  # in the last line of the settings, before the digest
# What the end of a log says of the disk, the data or the memory, in the words of this package or with a class.
_OUTSIDE = re.compile(
    rf"error: (can't |a data loader's worker was killed|({'|'.join(_classes(OSError))}|\w*MemoryError)\b"
    r"|.*(CUDA error|cuDNN error|out of memory|an('t|not) allocate memory|No space left on device))"
)
STOPPED = (129, 128 + signal.SIGINT, 128 + signal.SIGTERM)
"""The exit codes of a run that was asked to stop; after any other signal it has crashed."""

_LONGEST = 4000  # characters of a failed run's messages that are passed on


class RunFailedError(Exception):
    """The process of a run has ended with an error of its own; the message names the run, the reason and the log."""


def neutral_keys(settings: Settings, split: int) -> set[str]:
    """The keys that may differ between a run and an earlier one in its folder, such as those of losses it doesn't use.

    Args:
        settings: The settings of the run.
        split: The number of the split, which its data root tells from others; without splits (0) the data may be moved.
    """
    return {*NEUTRAL_KEYS} - ({"data.root"} if split else set()) | settings.unused_keys


@dataclass(frozen=True, eq=False)
class Run:
    """A training run of one variant.

    Attributes:
        variant: The name of the variant.
        settings: The settings of the run.
        split: The number of the data root, from 1; 0 if the comparison has only the config's.
        images: A digest of its images, for all folds of a trial that of the first. Empty if it is unknown, and not
            compared with that of an earlier run.
    """

    variant: str
    settings: Settings
    split: int = 0
    images: str = ""

    @property
    def seed(self) -> int:
        """The value of `train.seed`."""
        return self.settings.seed

    @property
    def name(self) -> str:
        """What the run is called in messages."""
        return f"{self.variant}, {f'split {self.split}, ' if self.split else ''}seed {self.seed}"

    @property
    def folder(self) -> Path:
        """The folder of the log, the checkpoints and the record."""
        return Path(self.settings.save_dir)

    @property
    def datasets(self) -> list[str]:
        """The sets that it is tested on."""
        return [VALIDATION] if self.settings.held_out_only else list(dict.fromkeys(self.settings.targets))

    @property
    def _records(self) -> Path:
        return self.folder / "record"

    def record(self) -> Record:
        """Reads what the run has recorded so far."""
        return read_record(self._records) if has_record(self._records) else Record()

    def features(self, dataset: str, after: bool) -> tuple[Features, Features]:
        """Reads the features of queries and gallery, before or after training."""
        return read_features(self._records, dataset, after)

    def average_precisions(self, dataset: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Does what `read_average_precisions` does, after training; for a record without any, from its features."""
        found = read_average_precisions(self._records, dataset, after=True)
        if found is not None:
            return found
        query, gallery = self.features(dataset, after=True)
        rerank = self.settings.rerank_in_training
        return query.pids, average_precisions(query, gallery, self.settings.dist_metric, rerank)

    def finished(self) -> bool:
        """Whether the run was evaluated after its last epoch."""
        evaluations = self.record().evaluations
        return all(self.settings.max_epoch in evaluations.get(name, {}) for name in self.datasets)

    def mean_aps(self) -> dict[int, float]:
        """The mAP on the first set by the number of epochs trained, as far as the run has come."""
        evaluations = self.record().evaluations.get(self.datasets[0], {})
        return {epoch: found["mAP"] for epoch, found in evaluations.items()}

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
            raise ConfigError(
                f"the settings of the run in {self.folder} are damaged: {reason}; remove that folder"
            ) from error
        was, now = dict(leaves(before)), self.settings.values
        ignored = {*neutral_keys(self.settings, self.split), "model.resume"}
        other = [f"{key} was {was[key]}, is {now[key]}" for key in now if was[key] != now[key] and key not in ignored]
        digest = re.search(rf"^{_IMAGES}(\w+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        if digest and self.images and digest[1] != self.images:  # earlier versions wrote no digest
            other.append(f"the images were others, those of data.root {was['data.root']}, not {now['data.root']}")
        return other

    def check(self) -> None:
        """Raises an error if the folder is a file or holds a run with other settings, or its record is damaged."""
        check_folder(self.folder)
        if other := self.other_settings():
            raise ConfigError(
                f"{self.folder} holds a run with other settings ({'; '.join(other)}): "
                "set another data.save_dir, or remove that folder"
            )
        self.finished()

    def execute(self, place: Place, may_go_on: Callable[[], bool] = lambda: True) -> int:
        """Starts or resumes the run, and waits until it ends.

        A request to stop makes it write a checkpoint and end.

        Args:
            place: Where it runs.
            may_go_on: Called about once a second; False ends the run at once, without a checkpoint or a message.

        Returns:
            The exit code; 128 plus the signal's number after a signal.

        Raises:
            ConfigError: If another process is training in the folder, or has trained there with other settings.
        """
        # The run writes its output to a log.
        command = [sys.executable, "-m", "torchreid_snloss"]
        command += ["--config-file", str(self.folder / _SETTINGS)]
        if has_record(self._records):  # a record that starts in the middle of a run would be useless
            command += ["model.resume", "auto"]
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self.folder))
            except FolderInUseError as error:
                raise ConfigError(str(error)) from error
            self.check()  # again, as another comparison may have trained here in the meantime
            remove_unfinished(self.folder)
            if not has_record(self._records):  # the run starts anew, and must not resume from what was here
                shutil.rmtree(self.folder / "model", ignore_errors=True)
            text = self.settings.cfg_text + (f"{_IMAGES}{self.images}\n" if self.images else "")
            atomic_write(self.folder / _SETTINGS, lambda stream: stream.write(text.encode()))
            # The progress bars of several runs would overwrite each other.
            messages = None if place.alone else stack.enter_context(tempfile.TemporaryFile())
            # It holds the lock even if this process is killed.
            variables, descriptors = pass_on(self.folder)
            process = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=messages,
                start_new_session=True,
                env={**os.environ, **place.variables, **variables},
                pass_fds=descriptors,
            )
            code, ended_early = _wait(process, place.stop_requests, may_go_on)
            if messages is not None and code != 0 and not ended_early:
                messages.seek(0)
                print(messages.read()[-_LONGEST:].decode(errors="replace"), end="", file=sys.stderr, flush=True)
            return code

    def failed_by_its_values(self, code: int, values: Iterable[str]) -> bool:
        """Whether the values of a trial, by their keys, made the run fail, and not the disk, the data or the memory."""
        last = self._end_of_log()[1] if code in (1, 2) else ""
        if code == 2:  # a setting was refused
            return any(key in last for key in values)
        return last.startswith("error: ") and not _OUTSIDE.match(last)  # as where the loss has become NaN

    def failure(self, name: str, code: int) -> str:
        """What to say of a run that has failed, in a line.

        Args:
            name: What the run is called.
            code: The exit code.
        """
        log, last = self._end_of_log()
        reason = last.removeprefix("error: ") if last.startswith("error: ") else f"exit code {code}"
        if code - 128 in {*signal.Signals}:  # a crash, or the system was out of memory
            reason = f"it was ended by {signal.Signals(code - 128).name}"
        return f"{name} failed: {reason}; its log is {log}" if log else f"{name} failed: {reason}"

    def _end_of_log(self) -> tuple[Path | None, str]:
        """The newest log since the run was last started, and its last line, as far as there are any."""
        started = (self.folder / _SETTINGS).stat().st_mtime_ns
        times = {path: path.stat().st_mtime_ns for path in self.folder.glob("train.log-*")}
        logs = sorted((path for path, time in times.items() if time >= started), key=times.__getitem__)
        lines = logs[-1].read_text(encoding="utf-8", errors="replace").splitlines() if logs else []
        return logs[-1] if logs else None, lines[-1] if lines else ""

    def summary(self) -> str:
        """The last results in one line."""
        evaluations = self.record().evaluations[self.datasets[0]]
        last = evaluations[max(evaluations)]
        return f"mAP {last['mAP']:.1%}, rank-1 {last['cmc'][0]:.1%}"


def check_folder(folder: Path) -> None:
    """Raises ConfigError if a file lies where the folder, or one that it is in, should be."""
    if files := [path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()]:
        raise ConfigError(f"{str(files[0])!r} is a file, but a folder is needed there: remove it, or rename the row")


def by_variant(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each variant, in their order, by the variant's name."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.variant, []).append(run)
    return grouped


def _wait(
    process: subprocess.Popen[bytes], stop_requests: Callable[[], int], may_go_on: Callable[[], bool]
) -> tuple[int, bool]:
    """Waits until a process ends, and passes requests to stop on to it.

    Returns:
        The exit code, and whether `may_go_on` ended the process.
    """
    sent, ended, polls = 0, False, 0
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=0.05)
                return code if code >= 0 else 128 - code, ended
            polls += 1
            if not ended and polls % 20 == 0 and not may_go_on():
                ended = True
                process.kill()
                if sys.stderr.isatty():
                    print(file=sys.stderr)  # after its progress bar
            while sent < stop_requests():
                process.send_signal(signal.SIGTERM)  # Ctrl-C would be a traceback while Python starts
                sent += 1
    except BaseException:  # as of a record or a journal that can't be read any more; the run must not go on alone
        process.terminate()
        process.wait()
        raise
