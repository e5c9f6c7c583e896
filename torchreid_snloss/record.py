"""The record of a run for a report: terms by epoch, evaluations, and features and average precisions of two of them."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchreid_snloss import device, environment
from torchreid_snloss.checkpoint.atomic import atomic_write, remove_unfinished
from torchreid_snloss.errors import text_of
from torchreid_snloss.evaluation import Ranking
from torchreid_snloss.record_schema import (
    FORMAT_VERSION,
    Features,
    Record,
    to_average_precisions,
    to_record,
    to_splits,
)

if sys.platform != "win32":
    import resource

__all__ = [
    "Features",
    "Record",
    "RecordError",
    "Recorder",
    "has_record",
    "read_average_precisions",
    "read_features",
    "read_record",
]

_FILE = "record.json"


class RecordError(ValueError):
    """A file of a record is missing or damaged, or was written by a later version."""


class Recorder:
    """Writes the `Record` of a run to a file, which is complete at any moment, and features beside it.

    Args:
        folder: The folder to write to. A record that an earlier run left there is continued.
        start_epoch: How many epochs have been trained. Entries of later epochs are dropped from the record.
    """

    def __init__(self, folder: str | Path, start_epoch: int = 0) -> None:
        self._folder = Path(folder)
        remove_unfinished(self._folder)
        record = read_record(self._folder) if has_record(self._folder) else Record()
        evaluations = {dataset: _up_to(start_epoch, found) for dataset, found in record.evaluations.items()}
        self._session: dict[str, str] = {}  # filled in when the first result is there, and the run is on its device
        self._record = Record(_up_to(start_epoch, record.epochs), evaluations, record.sessions)

    def add_epoch(self, epoch: int, terms: dict[str, float], seconds: float | None) -> None:
        """Records an epoch.

        Args:
            epoch: The number of the epoch, counted from 1.
            terms: The means of the terms over the epoch.
            seconds: The time the epoch took; None if it was interrupted.
        """
        self._record.epochs[epoch] = {"terms": terms, "seconds": seconds, "memory": _peak_memory()}
        self._write()

    def add_evaluation(self, epoch: int, dataset: str, ranking: Ranking, query: Features, gallery: Features) -> None:
        """Records an evaluation.

        The features and average precisions before training and those of the latest evaluation are kept.

        Args:
            epoch: How many epochs have been trained.
            dataset: The name of the test set.
            ranking: The result of the evaluation.
            query: The features of the queries.
            gallery: The features of the gallery.
        """
        evaluation = {"mAP": ranking.mean_ap, "mINP": ranking.mean_inp, "cmc": [float(value) for value in ranking.cmc]}
        splits = {"query": query, "gallery": gallery}
        arrays = {f"{split}_{name}": value for split, x in splits.items() for name, value in vars(x).items()}
        arrays["average_precisions"] = ranking.average_precisions
        path = _features_path(self._folder, dataset, after=epoch > 0)
        atomic_write(path, lambda stream: np.savez(stream, **arrays))
        self._record.evaluations.setdefault(dataset, {})[epoch] = evaluation
        self._write()

    def _write(self) -> None:
        if not self._session:
            now = datetime.datetime.now(datetime.timezone.utc)
            self._session = {"began": f"{now:%Y-%m-%d %H:%M} UTC"}
            self._session |= {"versions": environment.versions(), "hardware": environment.hardware()}
            self._record.sessions.append(self._session)
        text = json.dumps({"format_version": FORMAT_VERSION, **vars(self._record)})
        atomic_write(self._folder / _FILE, lambda stream: stream.write(text.encode()))


def has_record(folder: str | Path) -> bool:
    """Whether a `Recorder` has written a record to the folder."""
    return (Path(folder) / _FILE).exists()


def read_record(folder: str | Path) -> Record:
    """Reads the record that a `Recorder` has written.

    Args:
        folder: The folder of the `Recorder`.

    Raises:
        RecordError: If the file is missing, damaged or not a record, or was written by a later version.
    """
    path = Path(folder) / _FILE
    content = _read(path, lambda: json.loads(path.read_bytes()))
    version = content.get("format_version", 0) if isinstance(content, dict) else 0
    if type(version) is int and version > FORMAT_VERSION:
        raise RecordError(
            f"{str(path)!r} was written by a later version of torchreid-snloss, in format {version}; this one reads "
            f"formats up to {FORMAT_VERSION}"
        )
    record: Record = _read(path, lambda: to_record(content))
    return record


def read_features(folder: str | Path, dataset: str, after: bool) -> tuple[Features, Features]:
    """Reads the features of the queries and of the gallery.

    Args:
        folder: The folder of the `Recorder`.
        dataset: The name of the test set.
        after: True for the features of the last evaluation, False for those before training.

    Raises:
        RecordError: If the file is missing or damaged, or does not hold features.
    """
    path = _features_path(Path(folder), dataset, after)
    query, gallery = _read(path, lambda: to_splits(path))
    return query, gallery


def read_average_precisions(
    folder: str | Path, dataset: str, after: bool
) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
    """Reads the average precision of each query, as the evaluation computed it, with re-ranking if the run re-ranks.

    Args:
        folder: The folder of the `Recorder`.
        dataset: The name of the test set.
        after: True for the last evaluation, False for the one before training.

    Returns:
        The identities of the queries, (queries,), and their average precisions, (queries,), in [0, 1], NaN for a query
        without a match. None for a record of this package before 0.3, which has no average precisions.

    Raises:
        RecordError: If the file is missing or damaged, or does not hold what a `Recorder` writes.
    """
    path = _features_path(Path(folder), dataset, after)
    found: tuple[NDArray[np.int64], NDArray[np.float64]] | None = _read(path, lambda: to_average_precisions(path))
    return found


def _read(path: Path, read: Callable[[], Any]) -> Any:
    """Calls a function that reads a file of a record, and names the file if that fails."""
    again = f"remove {str(path.parent / _FILE)!r} to begin a new one; a comparison then makes the run again"
    try:
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        raise RecordError(f"the record of a run has lost {str(path)!r}; {again}") from None
    except OSError as error:
        raise RecordError(f"can't read {str(path)!r}: {error.strerror}") from error
    try:
        return read()
    except Exception as error:  # a damaged file raises nearly any class
        reason = text_of(error, longest=200)
        raise RecordError(f"the record of a run is damaged, in {str(path)!r}: {reason}; {again}") from error


def _features_path(folder: Path, dataset: str, after: bool) -> Path:
    return folder / f"{dataset}-{'after' if after else 'before'}.npz"


def _up_to(last_epoch: int, values: dict[int, Any]) -> dict[int, Any]:
    return {epoch: value for epoch, value in values.items() if epoch <= last_epoch}


def _peak_memory() -> float | None:
    if (on_gpu := device.peak_memory()) is not None:
        return on_gpu
    if sys.platform == "win32":
        return None
    if sys.platform == "linux":  # ru_maxrss survives exec, so it may be the peak of the parent process
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM:")), None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
