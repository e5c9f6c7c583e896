"""Which checkpoint of a folder is the newest, and how good its best one is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchreid_snloss import distributed
from torchreid_snloss.checkpoint.files import load_checked
from torchreid_snloss.checkpoint.names import BEST, named_checkpoints
from torchreid_snloss.checkpoint.schema import FORMAT_VERSION
from torchreid_snloss.checkpoint.torch_file import CheckpointError, peek_torch_file
from torchreid_snloss.values import shown

__all__ = ["best_mean_ap", "find_newest", "newest_checkpoint"]


def newest_checkpoint(folder: str | Path, run: str | None = None) -> Path | None:
    """Calls `find_newest` on rank 0. All processes must call this, and get its result or its error."""
    found: Path | CheckpointError | None = None
    if distributed.rank() == 0:
        try:
            found = find_newest(folder, run)
        except CheckpointError as error:
            found = error
    found = distributed.broadcast_object(found)
    if isinstance(found, CheckpointError):
        raise found
    return found


def find_newest(folder: str | Path, run: str | None = None) -> Path | None:
    """Finds the newest checkpoint in a folder that can be loaded. A printed line names each damaged one.

    What a checkpoint holds says how new it is, not the time of its file, which a copy does not keep: the run that
    started last counts first, then the epoch, then the batch. The best checkpoint counts only where it is the only one,
    as after a kill between its writing and that of the other.

    Args:
        folder: The folder with the checkpoints.
        run: The identifier of the run whose checkpoints count. None for all runs.

    Returns:
        The file, or None if there is none.

    Raises:
        CheckpointError: If a newer checkpoint is of a later version or can't be read, or if `run` is None and there are
            checkpoints but none can be loaded.
    """
    best, named = Path(folder) / BEST, named_checkpoints(folder)
    files: list[tuple[tuple[str, int, int], Path]] = []
    unknown: list[tuple[tuple[str, int, int], str]] = []
    reasons: list[str] = []
    for epoch, batch, path in [*named, *([(0, 0, best)] if best.is_file() else [])]:
        try:
            position, later = _position(path, epoch, batch)
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError):
                unknown.append((("", epoch, batch), str(error)))
            elif path != best or not named:
                print(f"** Skipped a checkpoint: {error}")
            reasons.append(str(error))
            continue
        if later:
            reasons.append(
                f"{str(path)!r} was written by a later version of torchreid-snloss, in format {shown(later)}"
            )
            unknown.append((position, reasons[-1]))
        elif path != best or not named:
            files.append((position, path))
    newest, reached = None, ("", -1, -1)
    for position, path in sorted(files, reverse=True):
        if run is not None and position[0] != run:
            continue
        try:
            load_checked(path)
        except CheckpointError as error:
            print(f"** Skipped a checkpoint: {error}")
            reasons.append(str(error))
        else:
            newest, reached = path, position
            break
    for position, reason in unknown:
        if (run is None or position[0] == run) and _is_newer(position, reached):
            raise CheckpointError(f"the newest checkpoint can't be loaded: {reason}")
    if newest is None and run is None and reasons:
        raise CheckpointError(f"none of the checkpoints in {str(folder)!r} can be loaded: {reasons[0]}")
    return newest


def _is_newer(position: tuple[str, int, int], than: tuple[str, int, int]) -> bool:
    """Whether a checkpoint is of a later run, where both are known, or was trained further and would be overwritten."""
    of_later_run = bool(position[0] and than[0]) and position > than
    return of_later_run or position[1:] > than[1:]


def _position(path: Path, epoch: int, batch: int) -> tuple[tuple[str, int, int], float]:
    """How far a checkpoint is: its run, which sorts by when it started, its epoch and batch; else those of its name.

    Returns:
        The position, and the version of the format if it is a later one than this version reads; else 0.
    """
    content = peek_torch_file(path)
    if not isinstance(content, dict):
        return ("", epoch, batch), 0
    run, state, version = content.get("run"), content.get("progress"), content.get("format_version")
    inside: tuple[Any, Any] = content.get("epoch"), state.get("batch") if isinstance(state, dict) else 0
    if all(type(number) is int for number in inside):
        epoch, batch = inside
    later = version if isinstance(version, (int, float)) and version > FORMAT_VERSION else 0
    return (run if isinstance(run, str) else "", epoch, batch), later


def best_mean_ap(folder: Path) -> float | None:
    """The mAP of the best checkpoint in a folder; None if there is none, or one that does not tell."""
    try:
        return float(peek_torch_file(folder / BEST)["progress"]["best"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return None
