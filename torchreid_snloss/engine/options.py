"""What a run does besides training, and the exceptions that end one."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["CompileError", "NonFiniteError", "NothingLearntError", "Stopped", "TrainOptions", "WriteError"]


@dataclass
class TrainOptions:
    """What a run does besides training.

    Attributes:
        save_freq: epochs between checkpoints, >= 1. The last epoch and every evaluation are always followed by one.
        keep: how many of this run's newest checkpoints to keep, >= 1; 0 keeps all. The best by mAP is kept beside them.
        nonfinite: what a NaN or infinite loss or gradient does: `"stop"` ends the run (the last good checkpoint stays),
            `"skip"` leaves the step out. torchreid's own engines can only stop.
        flip: whether a test's features are the mean of those of an image and of its mirror image.
        rerank: whether every evaluation re-ranks, those during training too.
        multi_query: whether a query's feature is the mean over the images of `gt_bbox` (see `pool_queries`).
        record: whether to evaluate before training too, and to leave a `Record` with features in `save_dir/record`.
    """

    save_freq: int = 1
    keep: int = 3
    nonfinite: Literal["stop", "skip"] = "stop"
    flip: bool = False
    rerank: bool = False
    multi_query: bool = False
    record: bool = False


class NonFiniteError(ArithmeticError):
    """A term of the loss, its gradient or a weight became NaN or infinite."""


class NothingLearntError(ArithmeticError):
    """An epoch's steps changed no weight, and nothing says that later ones will."""


class WriteError(OSError):
    """A checkpoint can't be written. The message names the file, and the last one that was."""


class CompileError(RuntimeError):
    """torch.compile can't compile the model, or finds no compiler."""


class Stopped(Exception):  # noqa: N818 - no error
    """Leaves `run()` after Ctrl-C or SIGTERM, once the step is finished and a checkpoint written.

    Attributes:
        signal: the signal's number.
    """

    def __init__(self, number: int, checkpoint: Path | None) -> None:
        name = signal.Signals(number).name
        how = f"resume with: model.resume {checkpoint}" if checkpoint else "nothing was trained yet"
        super().__init__(f"stopped by {name}; {how}")
        self.signal = number
