"""Options for what a run does besides training, and the exceptions that end a run."""

from __future__ import annotations

import signal
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from torchreid_snloss.arguments import check_choice, check_integer

__all__ = ["CompileError", "NonFiniteError", "NothingLearntError", "Stopped", "TrainOptions", "WriteError"]


@dataclass
class TrainOptions:
    """Options for what a run does besides training.

    Attributes:
        save_freq: epochs between checkpoints, >= 1. A checkpoint is also saved after the last epoch and after every
            evaluation.
        keep: how many of this run's newest checkpoints to keep, >= 1; 0 keeps all. The best by mAP is kept as well.
        nonfinite: what to do if the loss or a gradient is NaN or infinite: `"stop"` ends the run (the last good
            checkpoint stays), `"skip"` skips the step. torchreid's own engines can only stop.
        flip: whether test features are the mean over an image and its mirror image.
        rerank: whether to re-rank in every evaluation, including those during training.
        multi_query: whether a query's feature is the mean over the images of `gt_bbox` (see `pool_queries`).
        features: the file that a test run leaves its features in, or tests from if it is there; empty: none.
        record: whether to evaluate before training too, and to write a `Record` with features to `save_dir/record`.

    Raises:
        TypeError, ValueError: for a value of another type or out of its range.
    """

    save_freq: int = 1
    keep: int = 3
    nonfinite: Literal["stop", "skip"] = "stop"
    flip: bool = False
    rerank: bool = False
    multi_query: bool = False
    features: str = ""
    record: bool = False

    def __post_init__(self) -> None:
        check_integer("save_freq", self.save_freq, at_least=1)
        check_integer("keep", self.keep, at_least=0)
        check_choice("nonfinite", self.nonfinite, ("stop", "skip"))
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if kind in (bool, str) and type(value) is not kind:
                raise TypeError(f"{field.name} must be of type {kind.__name__}, got {value!r}")


class NonFiniteError(ArithmeticError):
    """A term of the loss, its gradient, a weight or a test feature is NaN or infinite."""


class NothingLearntError(ArithmeticError):
    """An epoch's steps changed no weight, and nothing says that later ones will."""


class WriteError(OSError):
    """A checkpoint can't be written. The message names the file, and the last one that was."""


class CompileError(RuntimeError):
    """torch.compile can't compile the model, or finds no compiler."""


class Stopped(Exception):  # noqa: N818 - not an error
    """Raised by `run()` after Ctrl-C or SIGTERM, once the step is finished and a checkpoint is written.

    Attributes:
        signal: the number of the signal.
    """

    def __init__(self, number: int, checkpoint: Path | None) -> None:
        name = signal.Signals(number).name
        how = f"resume with: model.resume {checkpoint}" if checkpoint else "nothing was trained yet"
        super().__init__(f"stopped by {name}; {how}")
        self.signal = number
