"""What a process that was killed, or a disk that became full, leaves in the journal of a tuning."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from torchreid_snloss.run.lock import FolderInUseError, locked

__all__ = ["mend"]


def mend(journal: Path, folder: Path) -> None:
    """Removes a last line that was cut off, after which Optuna could append nothing, and a lock that nobody holds.

    What the line said is told again: a trial whose end is lost goes on, and ends with what its run has recorded.

    Args:
        journal: The path of the journal; it need not exist.
        folder: The folder whose lock a comparison holds while it tunes. While another one does, nothing is changed.
    """
    lock = Path(f"{journal}.lock")  # Optuna's
    if not journal.is_file() or not (os.path.lexists(lock) or _cut(journal.read_bytes())):
        return
    with contextlib.suppress(FolderInUseError), locked(folder):
        lock.unlink(missing_ok=True)
        content = journal.read_bytes()
        if _cut(content):
            os.truncate(journal, content.rfind(b"\n") + 1)


def _cut(content: bytes) -> bool:
    return bool(content) and not content.endswith(b"\n")
