"""Which run this is: after a restart by torchrun, the same one as before."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from torchreid_snloss import distributed
from torchreid_snloss.checkpoint import atomic_write
from torchreid_snloss.engine.checkpointer import new_run

__all__ = ["identify_run", "restarted"]

_FILE = ".run"


def restarted() -> bool:
    """Whether torchrun has restarted the processes. All processes must call it."""
    return distributed.all_reduce_max(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))) > 0


def identify_run(folder: Path, restarted: bool) -> str:
    """An identifier of this run, which its checkpoints hold. All processes must call it.

    If torchrun may restart the run, rank 0 leaves it in a file, next to what torchrun calls the run. A restart whose
    first start got no further than an import thus doesn't find the identifier of an earlier run.

    Args:
        folder: The folder of the checkpoints.
        restarted: Whether torchrun has restarted the processes.
    """
    run = new_run()
    if distributed.rank() == 0 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        file, launch = folder / _FILE, _launch()
        before = file.read_text(encoding="utf-8").split("\n") if restarted and file.exists() else []
        if before[:1] == [launch] and len(before) > 1:
            run = before[1]
        else:
            content = f"{launch}\n{run}\n"
            atomic_write(file, lambda stream: stream.write(content.encode()))
    return distributed.broadcast_object(run)


def _launch() -> str:
    """What is the same in all restarts; on one machine it has the process number of torchrun, which starts them all."""
    parts = [os.environ.get("TORCHELASTIC_RUN_ID", "")]
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        parts += [socket.gethostname(), str(os.getppid())]
    return " ".join(" ".join(parts).split())
