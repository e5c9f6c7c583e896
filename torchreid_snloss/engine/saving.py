"""What is saved when an exception ends a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torchreid_snloss import distributed
from torchreid_snloss.engine.checkpointer import Checkpointer
from torchreid_snloss.engine.monitor import LearningMonitor
from torchreid_snloss.engine.options import NonFiniteError, NothingLearntError, Stopped, WriteError
from torchreid_snloss.errors import text_of

__all__ = ["saving_what_is_trained"]


@contextlib.contextmanager
def saving_what_is_trained(
    checkpointer: Checkpointer, learning: LearningMonitor, save: Callable[[], None]
) -> Iterator[None]:
    """A context in which an exception saves the steps that are trained and not saved yet, before it goes on.

    On several processes the steps of the epoch under way are not saved, since the processes would have to agree.

    Args:
        checkpointer: The run's checkpointer.
        learning: The run's monitor, which counts steps.
        save: Saves.
    """
    try:
        yield
    except (Stopped, NonFiniteError, NothingLearntError, WriteError):  # has saved; must not; must not; can't
        raise
    except Exception:
        most = checkpointer.num_batches()  # after the last batch the epoch counts as a whole, or not at all
        batch = checkpointer.state.batch
        in_epoch = batch > 0 and (most is None or batch < most) and learning.steps > learning.skipped
        if (in_epoch and distributed.world_size() == 1) or (checkpointer.unsaved and not in_epoch):
            try:
                save()
            except Exception as failed:  # the first one counts, such as a GPU's that answers no more
                print(f"** What was trained since the last checkpoint is not saved: {text_of(failed)}")
        raise
