"""The record of a run for a report: the terms of each epoch, the evaluations, and the features of two of them."""

from __future__ import annotations

import json
import math
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from torchreid_snloss import device
from torchreid_snloss.checkpoint.atomic import atomic_write, remove_unfinished
from torchreid_snloss.errors import text_of
from torchreid_snloss.evaluation import Ranking

if sys.platform != "win32":
    import resource

__all__ = ["Features", "Record", "RecordError", "Recorder", "has_record", "read_features", "read_record", "to_features"]

_FILE = "record.json"
_FORMAT_VERSION = 1  # records of this package before 0.3 have none


class RecordError(ValueError):
    """A file of a record is missing or damaged, or was written by a later version."""


@dataclass(eq=False)
class Record:
    """What happened in a run, by epoch. Epochs are counted from 1; epoch 0 is the evaluation before training.

    Attributes:
        epochs: A dictionary for each trained epoch. `terms` holds the means of what the progress line shows. `seconds`
            is None if the run was interrupted in this epoch, and `terms` then covers the steps after the interruption.
            `memory` is the peak so far in MiB: what torch has allocated on a GPU, otherwise what the process used; it
            is None on Windows without a GPU.
        evaluations: By data set and epoch a dictionary with `mAP`, `mINP` and `cmc` (a list), in [0, 1].
    """

    epochs: dict[int, dict[str, Any]] = field(default_factory=dict)
    evaluations: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Features:
    """The features of one split of a test set, as the evaluation compares them.

    Attributes:
        features: (images, dimension), float32.
        pids: (images,), the identities.
        camids: (images,), the cameras.
        paths: (images,), the image files; for a tracklet its first frame.
    """

    features: NDArray[np.float32]
    pids: NDArray[np.int64]
    camids: NDArray[np.int64]
    paths: NDArray[np.str_]


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
        self._record = Record(_up_to(start_epoch, record.epochs), evaluations)

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
        """Records an evaluation. The features before training and those of the latest evaluation are kept.

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
        path = _features_path(self._folder, dataset, after=epoch > 0)
        atomic_write(path, lambda stream: np.savez(stream, **arrays))
        self._record.evaluations.setdefault(dataset, {})[epoch] = evaluation
        self._write()

    def _write(self) -> None:
        text = json.dumps({"format_version": _FORMAT_VERSION, **vars(self._record)})
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
    if type(version) is int and version > _FORMAT_VERSION:
        raise RecordError(
            f"{str(path)!r} was written by a later version of torchreid-snloss, in format {version}; this one reads "
            f"formats up to {_FORMAT_VERSION}"
        )
    record: Record = _read(path, lambda: _to_record(content))
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
    query, gallery = _read(path, lambda: _to_splits(path))
    return query, gallery


def to_features(batches: Sequence[dict[str, Any]], items: Sequence[Any], normalize: bool) -> Features:
    """Collects the features of one split of a test set.

    Args:
        batches: The batches in the order of the images, with features in `img`, `pid` and `camid`.
        items: The items of the data set. Each starts with the path of the image, or the paths of the tracklet.
        normalize: Whether to L2-normalise the features.
    """
    features = torch.cat([batch["img"].float() for batch in batches])
    paths = [item[0] if isinstance(item[0], str) else item[0][0] for item in items]
    return Features(
        (torch.nn.functional.normalize(features) if normalize else features).numpy(),
        torch.cat([batch["pid"] for batch in batches]).numpy(),
        torch.cat([batch["camid"] for batch in batches]).numpy(),
        np.array(paths),
    )


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


def _to_record(content: Any) -> Record:
    """Makes a record from the content of its file.

    Raises:
        ValueError: If the content is anything else.
    """
    if not isinstance(content, dict) or not {"epochs", "evaluations"} <= set(content):
        raise ValueError("it has no epochs and evaluations")
    version = content.get("format_version", 0)
    if type(version) is not int or version < 0:
        raise ValueError(f"its format version must be an integer from 0 to {_FORMAT_VERSION}, got {version!r}")
    epochs = _by_epoch(content["epochs"])
    for epoch in epochs.values():
        terms = _dictionary(epoch["terms"])
        if not all(_is_number(value) for value in terms.values()):
            raise ValueError("a term is not a finite number")
        if not all(epoch[key] is None or (_is_number(epoch[key]) and epoch[key] >= 0) for key in ("seconds", "memory")):
            raise ValueError("seconds or memory is not a finite number")
    evaluations = {dataset: _by_epoch(found) for dataset, found in _dictionary(content["evaluations"]).items()}
    for evaluation in (evaluation for found in evaluations.values() for evaluation in found.values()):
        cmc = evaluation["cmc"]
        if not isinstance(cmc, list) or not cmc:
            raise ValueError("the CMC curve is not a list")
        values = (evaluation["mAP"], evaluation["mINP"], *cmc)
        if not all(_is_number(value) and 0 <= value <= 1 + 1e-6 for value in values):
            raise ValueError("mAP, mINP or the CMC curve is not in [0, 1]")
    return Record(epochs, evaluations)


def _to_splits(path: Path) -> list[Features]:
    """Reads and checks the features of queries and gallery.

    Raises:
        ValueError: If they are anything else.
    """
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"its part {damaged!r} does not match its checksum")
    with np.load(path) as arrays:
        splits = [
            Features(*(arrays[f"{split}_{name}"] for name in Features.__dataclass_fields__))
            for split in ("query", "gallery")
        ]
    for split in splits:
        if split.features.ndim != 2 or split.features.dtype != np.float32 or not np.isfinite(split.features).all():
            raise ValueError("its features are not a matrix of finite numbers")
        for values, kinds in ((split.pids, "iu"), (split.camids, "iu"), (split.paths, "U")):
            if values.shape != split.features.shape[:1] or values.dtype.kind not in kinds:
                raise ValueError("its identities, cameras or paths do not match its features")
    if splits[0].features.shape[1] != splits[1].features.shape[1]:
        raise ValueError("the features of queries and gallery have different dimensions")
    return splits


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _dictionary(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a dictionary, got a {type(value).__name__}")
    return value


def _features_path(folder: Path, dataset: str, after: bool) -> Path:
    return folder / f"{dataset}-{'after' if after else 'before'}.npz"


def _by_epoch(values: Any) -> dict[int, Any]:
    if not all(epoch.isdecimal() for epoch in _dictionary(values)):
        raise ValueError("an epoch is not a number")
    return {int(epoch): _dictionary(value) for epoch, value in _dictionary(values).items()}  # JSON's keys are strings


def _up_to(last_epoch: int, values: dict[int, Any]) -> dict[int, Any]:
    return {epoch: value for epoch, value in values.items() if epoch <= last_epoch}


def _peak_memory() -> float | None:
    if (on_gpu := device.peak_memory()) is not None:
        return on_gpu
    if sys.platform == "win32":
        return None
    if sys.platform == "linux":  # ru_maxrss survives exec, so it may be the peak of the parent process
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
