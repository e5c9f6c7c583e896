"""How a run's failure is told: one line, and an exit code."""

from __future__ import annotations

import signal
import traceback

from torchreid_snloss.checkpoint import CheckpointError
from torchreid_snloss.config import ConfigError
from torchreid_snloss.data import UnreadableImageError, WorkerKilledError
from torchreid_snloss.distributed import PeerError
from torchreid_snloss.engine import CompileError, NonFiniteError, NothingLearntError, Stopped, WriteError
from torchreid_snloss.engine.features_file import FeaturesError
from torchreid_snloss.engine.stopping import SignalInterrupt
from torchreid_snloss.errors import ExportError
from torchreid_snloss.record import RecordError

__all__ = ["concerns_one_process", "describe", "exit_code", "report"]

_BEFORE_TRAINING = (ConfigError, CheckpointError, RecordError, FeaturesError)
_ON_THE_WAY = (ExportError, NonFiniteError, NothingLearntError, WriteError)
_OF_ONE_PROCESS = (CompileError, UnreadableImageError, WorkerKilledError, PeerError)
_LONGEST = 1000  # characters of a message of which nobody knows how long it is


def exit_code(error: BaseException) -> int:
    """The exit code: 2 for what can't be run with, 1 for what stops a run on its way, 128 + number for a signal."""
    if isinstance(error, (Stopped, SignalInterrupt)):
        return 128 + error.signal
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return 2 if isinstance(error, _BEFORE_TRAINING) else 1


def concerns_one_process(error: BaseException) -> bool:
    """Whether other ranks may not have the same error, so that each process tells its own."""
    return not isinstance(error, (*_BEFORE_TRAINING, *_ON_THE_WAY, Stopped, KeyboardInterrupt))


def describe(error: BaseException) -> str:
    """The error in one line, without the program's name."""
    if isinstance(error, Stopped):
        return str(error)
    if isinstance(error, SignalInterrupt):
        return f"stopped by {signal.Signals(error.signal).name}"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    text = _text(error)
    if _is_expected(error):
        return f"error: {text}"
    name = type(error).__name__
    return f"error: {name}: {text[:_LONGEST]}" if text else f"error: {name}"


def report(error: BaseException) -> str:
    """What a log should hold of an error: the line, after the traceback where nobody expected the error."""
    trace = "" if _is_expected(error) or isinstance(error, (Stopped, KeyboardInterrupt)) else _trace(error)
    return f"{trace}{describe(error)}\n"


def _is_expected(error: BaseException) -> bool:
    return isinstance(error, (*_BEFORE_TRAINING, *_ON_THE_WAY, *_OF_ONE_PROCESS))


def _text(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception as failed:  # of an exception class of a user's own
        return f"(its message can't be shown: {type(failed).__name__})"
    if text.startswith("Caught ") and "Traceback" in text:  # of a data loader's worker, which puts its traceback before
        text = text.strip().splitlines()[-1]
        text = text.removeprefix("torchreid_snloss.data.readable.UnreadableImageError: ")
    return " ".join(text.split())


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))
