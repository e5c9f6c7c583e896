"""Data loaders' workers that the system kills."""

from __future__ import annotations

import multiprocessing.connection
import signal
from collections.abc import Iterable, Iterator
from typing import Any

from torchreid_snloss.data.readable import UnreadableImageError

__all__ = ["WorkerKilledError", "batches_of"]


class WorkerKilledError(RuntimeError):
    """A data loader's worker is gone, usually since the system has no memory left."""


def batches_of(loader: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader.

    Raises:
        WorkerKilledError: If a worker is gone, for which torch and Python raise one of several errors.
    """
    batches = iter(loader)
    while True:
        try:
            data = next(batches)
        except StopIteration:
            return
        except UnreadableImageError:
            raise
        except Exception as error:
            workers = getattr(batches, "_workers", ())
            if workers:  # one may be about to be gone
                multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1)
            for worker in workers:
                worker.join(timeout=0.01)
                if worker.exitcode is not None and worker.exitcode < 0:
                    raise WorkerKilledError(
                        f"a data loader's worker was killed by {signal.Signals(-worker.exitcode).name}; it may lack "
                        "memory, or space in /dev/shm: try fewer data.workers"
                    ) from error
            raise
        yield data
