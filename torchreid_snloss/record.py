"""What a run leaves behind for a report: the terms of each epoch, every evaluation, and the features of two of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from torchreid_snloss.checkpoint import atomic_write
from torchreid_snloss.evaluation import Ranking

if sys.platform != "win32":
    import resource

__all__ = ["Features", "Record", "Recorder", "has_record", "read_features", "read_record", "to_features"]

_FILE = "record.json"


@dataclass(eq=False)
class Record:
    """A run, by epochs: 0 is before training.

    Attributes:
        epochs: of each epoch trained ``terms`` (the means of what the progress line shows), ``seconds`` (None where a
            run was interrupted in it, and the terms are those after that) and ``memory`` (the most so far, in MiB: on a
            GPU what torch has allocated, else the process's; None on Windows without a GPU).
        evaluations: of each data set's evaluations ``mAP``, ``mINP`` and ``cmc`` (a list), in [0, 1].
    """

    epochs: dict[int, dict[str, Any]] = field(default_factory=dict)
    evaluations: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Features:
    """Features of one split of a test set, as the evaluation compares them.

    Attributes:
        features: float32 (images, dimension).
        pids: (images,) identities.
        camids: (images,) cameras.
        paths: (images,) files; of a tracklet its first.
    """

    features: NDArray[np.float32]
    pids: NDArray[np.int64]
    camids: NDArray[np.int64]
    paths: NDArray[np.str_]


class Recorder:
    """Writes a :class:`Record`, a file that is whole at any moment, and features beside it.

    Args:
        folder: to write into; what an earlier run left there is gone on with.
        start_epoch: epochs trained so far; what is recorded of later ones is dropped.
    """

    def __init__(self, folder: str | Path, start_epoch: int = 0) -> None:
        self._folder = Path(folder)
        record = read_record(self._folder) if has_record(self._folder) else Record()
        evaluations = {name: _up_to(start_epoch, found) for name, found in record.evaluations.items()}
        self._record = Record(_up_to(start_epoch, record.epochs), evaluations)

    def add_epoch(self, epoch: int, terms: dict[str, float], seconds: float | None) -> None:
        """Notes an epoch, counted from 1."""
        self._record.epochs[epoch] = {"terms": terms, "seconds": seconds, "memory": _peak_memory()}
        self._write()

    def add_evaluation(self, epoch: int, dataset: str, ranking: Ranking, query: Features, gallery: Features) -> None:
        """Notes an evaluation after so many epochs; of features the first one's and the last one's stay."""
        figures = {"mAP": ranking.mean_ap, "mINP": ranking.mean_inp, "cmc": [float(value) for value in ranking.cmc]}
        splits = {"query": query, "gallery": gallery}
        arrays = {f"{split}_{name}": value for split, x in splits.items() for name, value in vars(x).items()}
        path = _features_path(self._folder, dataset, after=epoch > 0)
        atomic_write(path, lambda stream: np.savez(stream, **arrays))
        self._record.evaluations.setdefault(dataset, {})[epoch] = figures
        self._write()

    def _write(self) -> None:
        text = json.dumps(vars(self._record))
        atomic_write(self._folder / _FILE, lambda stream: stream.write(text.encode()))


def has_record(folder: str | Path) -> bool:
    """Whether a :class:`Recorder` wrote something there."""
    return (Path(folder) / _FILE).exists()


def read_record(folder: str | Path) -> Record:
    """Reads what a :class:`Recorder` wrote.

    Raises:
        OSError, ValueError: if there is none, or it can't be read.
    """
    found = json.loads((Path(folder) / _FILE).read_text(encoding="utf-8"))
    evaluations = {name: _by_number(evaluations) for name, evaluations in found["evaluations"].items()}
    return Record(_by_number(found["epochs"]), evaluations)


def read_features(folder: str | Path, dataset: str, after: bool) -> tuple[Features, Features]:
    """The features of queries and gallery.

    Args:
        folder: of the :class:`Recorder`.
        dataset: the test set's name.
        after: those of the last evaluation, and not those before training.

    Raises:
        OSError, ValueError: if there are none, or they can't be read.
    """
    with np.load(_features_path(Path(folder), dataset, after)) as arrays:
        query, gallery = (
            Features(*(arrays[f"{split}_{name}"] for name in Features.__dataclass_fields__))
            for split in ("query", "gallery")
        )
    return query, gallery


def to_features(batches: Sequence[dict[str, Any]], items: Sequence[Any], normalize: bool) -> Features:
    """Of one split of a test set.

    Args:
        batches: with features in ``img``, ``pid`` and ``camid``, in the order of the images.
        items: the data set's, of which each starts with its path, or a tracklet's paths.
        normalize: L2-normalise features.
    """
    features = torch.cat([batch["img"].float() for batch in batches])
    paths = [item[0] if isinstance(item[0], str) else item[0][0] for item in items]
    return Features(
        (torch.nn.functional.normalize(features) if normalize else features).numpy(),
        torch.cat([batch["pid"] for batch in batches]).numpy(),
        torch.cat([batch["camid"] for batch in batches]).numpy(),
        np.array(paths),
    )


def _features_path(folder: Path, dataset: str, after: bool) -> Path:
    return folder / f"{dataset}-{'after' if after else 'before'}.npz"


def _by_number(found: dict[str, Any]) -> dict[int, Any]:
    return {int(epoch): value for epoch, value in found.items()}


def _up_to(epoch: int, found: dict[int, Any]) -> dict[int, Any]:
    return {number: value for number, value in found.items() if number <= epoch}


def _peak_memory() -> float | None:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        return None
    if sys.platform == "linux":  # where getrusage tells of the process that started this one, if that is larger
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
