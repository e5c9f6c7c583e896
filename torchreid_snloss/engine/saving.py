"""What is saved when an exception ends a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torchreid_snloss import distributed
from torchreid_snloss.engine.checkpointer import Checkpointer
from torchreid_snloss.engine.monitor import LearningMonitor
from torchreid_snloss.engine.options import Stopped, WriteError

__all__ = ["saving_what_is_trained"]


@contextlib.contextmanager
def saving_what_is_trained(
    checkpointer: Checkpointer, learning: LearningMonitor, save: Callable[[], None]
) -> Iterator[None]:
    """Within it an exception saves the steps that are trained and not saved yet, before it goes on.

    Args:
        checkpointer: The run's checkpointer.
        learning: The run's monitor, which counts steps.
        save: Saves.
    """
    try:
        yield
    except (Stopped, ArithmeticError, WriteError):  # has saved; must not; can't
        raise
    except Exception:
        in_epoch = checkpointer.state.batch > 0 and learning.steps > learning.skipped
        if (in_epoch and distributed.world_size() == 1) or (checkpointer.unsaved and not in_epoch):
            with contextlib.suppress(Exception):  # the first one counts, such as a GPU's that answers no more
                save()
        raise
