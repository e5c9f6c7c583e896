"""What the files of a record hold, and their checks."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FORMAT_VERSION", "Features", "Record", "to_average_precisions", "to_record", "to_splits"]

FORMAT_VERSION = 1  # records of this package before 0.3 have none


@dataclass(eq=False)
class Record:
    """What happened in a run, by epoch. Epochs are counted from 1; epoch 0 is the evaluation before training.

    Attributes:
        epochs: A dictionary for each trained epoch. `terms` holds the means of what the progress line shows. `seconds`
            is None if the run was interrupted in this epoch, and `terms` then covers the steps after the interruption.
            `memory` is the peak so far in MiB: what torch has allocated on a GPU, otherwise what the process used; it
            is None on Windows without a GPU.
        evaluations: By data set and epoch a dictionary with `mAP`, `mINP` and `cmc` (a list), in [0, 1].
        sessions: For each process that has trained, one after the other, a dictionary with `began`, the time of its
            first result, `versions` and `hardware`. A record of this package before 0.3 has none.
    """

    epochs: dict[int, dict[str, Any]] = field(default_factory=dict)
    evaluations: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    sessions: list[dict[str, str]] = field(default_factory=list)


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


def to_record(content: Any) -> Record:
    """Makes a record from the content of its file.

    Raises:
        ValueError: If the content is anything else.
    """
    if not isinstance(content, dict) or not {"epochs", "evaluations"} <= set(content):
        raise ValueError("it has no epochs and evaluations")
    version = content.get("format_version", 0)
    if type(version) is not int or version < 0:
        raise ValueError(f"its format version must be an integer from 0 to {FORMAT_VERSION}, got {version!r}")
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
    sessions = content.get("sessions", [])
    if not isinstance(sessions, list):
        raise ValueError("its sessions are not a list")
    for session in sessions:
        if not all(isinstance(_dictionary(session).get(key), str) for key in ("began", "versions", "hardware")):
            raise ValueError("a session has no time, versions or hardware")
    return Record(epochs, evaluations, sessions)


def to_splits(path: Path) -> list[Features]:
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


def to_average_precisions(path: Path) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
    """Reads and checks the identities of the queries and their average precisions.

    Returns:
        None if the file is of this package before 0.3, which kept no average precisions.

    Raises:
        ValueError: If they are anything else.
    """
    with np.load(path) as arrays:
        known = "average_precisions" in arrays
        if known:  # the features, which may take gigabytes, are not read
            pids, values = arrays["query_pids"], arrays["average_precisions"]
    if not known:
        to_splits(path)
        return None
    if pids.ndim != 1 or pids.dtype.kind not in "iu":
        raise ValueError("its identities are not a list of integers")
    if values.shape != pids.shape or values.dtype != np.float64:
        raise ValueError("its average precisions do not match its queries")
    if not (np.isnan(values) | ((values >= 0) & (values <= 1))).all() or np.isnan(values).all():
        raise ValueError("its average precisions are not in [0, 1]")
    return pids, values


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _dictionary(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a dictionary, got a {type(value).__name__}")
    return value


def _by_epoch(values: Any) -> dict[int, Any]:
    if not all(epoch.isdecimal() for epoch in _dictionary(values)):
        raise ValueError("an epoch is not a number")
    return {int(epoch): _dictionary(value) for epoch, value in _dictionary(values).items()}  # JSON's keys are strings
