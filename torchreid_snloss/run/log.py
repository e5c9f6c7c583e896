"""The log of a run: what the first process prints, and how the run failed."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, cast

from torchreid_snloss import distributed
from torchreid_snloss.config import ConfigError
from torchreid_snloss.run.failures import report
from torchreid_snloss.run.screen import Screen
from torchreid_snloss.run.streams import SafeStream, Tee

__all__ = ["log_of", "log_only", "log_path", "logged", "note"]

_LOG = "torchreid_snloss_log"  # an attribute of an exception
_open: list[tuple[Path, SafeStream]] = []  # the logs of this process


@contextlib.contextmanager
def logged(save_dir: str, name: str) -> Iterator[None]:
    """Within it what rank 0 prints is in a file, and so is the exception that ends it; other ranks have none.

    The screen shows the same without the steps of torchreid's work.

    A standard output or a log that can't be written any more doesn't end the run.

    Args:
        save_dir: The folder of the log, which is created if needed.
        name: The beginning of its name, which the time follows.

    Raises:
        ConfigError: If the log can't be created.
    """
    if distributed.rank() > 0:
        yield
        return
    path = Path(save_dir) / (name + time.strftime("-%Y-%m-%d-%H-%M-%S"))
    try:
        os.makedirs(save_dir, exist_ok=True)
        # Names of files may hold bytes that are no UTF-8.
        log = open(path, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"data.save_dir {save_dir!r} can't be written to: {error}") from error
    safe_log = SafeStream(log, lambda error: _tell_of_log(path, error))
    # torchreid's Logger is not used because it closes standard output at the end.
    tee = Tee(Screen(sys.stdout), safe_log)
    with contextlib.redirect_stdout(cast(TextIO, tee)):
        _open.append((path, safe_log))
        try:
            yield
        except BaseException as error:
            note(error)
            raise
        finally:
            _open.pop()
            tee.flush()
            with contextlib.suppress(OSError):
                log.close()


def note(error: BaseException) -> None:
    """Writes an exception, with its traceback if nobody expected it, to the log of the run, if there is one."""
    if _open:
        path, log = _open[-1]
        log.write(report(error))
        log.flush()
        setattr(error, _LOG, path)


def log_only(text: str) -> None:
    """Writes a line to the log of the run alone, if there is one."""
    if _open:
        _open[-1][1].write(text + "\n")


def log_of(error: BaseException) -> Path | None:
    """The log of the run that an error ended; None if there was none yet, or if the log is not complete."""
    path: Path | None = getattr(error, _LOG, None)
    return path


def log_path() -> Path | None:
    """The log of the run, if there is one."""
    return _open[-1][0] if _open else None


def _tell_of_log(path: Path, error: Exception) -> None:
    SafeStream(sys.stderr).write(f"** The log {str(path)!r} can't be written: {error}; the run goes on without it\n")
