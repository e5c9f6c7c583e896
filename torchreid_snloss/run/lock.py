"""A lock on the folder of a training run, so that no two runs write to it at once."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from torchreid_snloss import distributed

if sys.platform != "win32":
    import fcntl

__all__ = ["FolderInUseError", "locked", "locked_on_all_ranks", "pass_on"]

_NAME = ".lock"
_PASSED_ON = "TORCHREID_SNLOSS_LOCK"
_held: dict[str, int] = {}  # file descriptors, by the folder


class FolderInUseError(RuntimeError):
    """Another process is training in the folder."""


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Holds the lock on a folder, which is created if needed.

    The system releases the lock when this process ends, in whatever way. Within it this process may lock the folder
    again. Where files can't be locked, a printed line says so.

    Args:
        folder: The folder.

    Raises:
        FolderInUseError: If another process holds the lock.
        OSError: If the folder can't be written to.
    """
    key = os.path.realpath(folder)
    if key in _held:
        yield
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    passed_on = _passed_on(folder)
    descriptor = os.open(folder / _NAME, os.O_RDWR | os.O_CREAT, 0o666) if passed_on is None else passed_on
    try:
        _lock(descriptor, folder)
        _held[key] = descriptor
        yield
    finally:
        _held.pop(key, None)
        os.close(descriptor)


@contextlib.contextmanager
def locked_on_all_ranks(folder: str | Path) -> Iterator[None]:
    """Holds the lock on rank 0. If rank 0 can't get it, every process raises what rank 0 does."""
    with contextlib.ExitStack() as stack:
        error: Exception | None = None
        if distributed.rank() == 0:
            try:
                stack.enter_context(locked(folder))
            except (FolderInUseError, OSError) as raised:  # raised again, on all
                error = raised
        if error := distributed.broadcast_object(error):
            raise error
        yield


def pass_on(folder: str | Path) -> tuple[dict[str, str], tuple[int, ...]]:
    """What a process must get to hold the lock of this process too: environment variables and file descriptors.

    The lock is then released when both have ended. On a system without such locks it is nothing.

    Args:
        folder: The folder, which this process has locked.
    """
    if sys.platform == "win32":
        return {}, ()
    descriptor = _held[os.path.realpath(folder)]
    return {_PASSED_ON: str(descriptor)}, (descriptor,)


def _passed_on(folder: Path) -> int | None:
    """The file descriptor of this folder's lock that the parent passed on, once."""
    given = os.environ.pop(_PASSED_ON, "")
    if not given.isdecimal():
        return None
    try:
        same = os.path.samestat(os.fstat(int(given)), os.stat(folder / _NAME))
    except OSError:
        return None
    if same:
        os.set_inheritable(int(given), False)
    return int(given) if same else None


def _lock(descriptor: int, folder: Path) -> None:
    if sys.platform == "win32":
        print(f"=> {folder} can't be locked on this system: start no second run there")
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FolderInUseError(f"another process is training in {folder}") from None
    except OSError as error:
        print(f"=> {folder} can't be locked ({error.strerror}): start no second run there")


def _leave_to_the_parent() -> None:
    """In a forked process, such as a data loader's worker, which may outlive its parent for some seconds."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_leave_to_the_parent)
