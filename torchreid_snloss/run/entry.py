"""What both command lines do around their work: signals, standard streams, and one line for whatever goes wrong."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from torchreid_snloss import distributed
from torchreid_snloss.engine.stopping import ignore_signals, interrupting_signals
from torchreid_snloss.run.failures import concerns_one_process, describe, exit_code, report
from torchreid_snloss.run.log import log_of, note
from torchreid_snloss.run.streams import safe_standard_streams

__all__ = ["run_command"]


_Arguments = TypeVar("_Arguments")


def run_command(
    program: str,
    parse: Callable[[], _Arguments],
    command: Callable[[_Arguments], int],
    when_stopped: str = "",
    ends_process: bool = False,
) -> int:
    """Calls a command line's work, and turns any exception into one line on standard error and an exit code.

    The traceback of an unexpected exception is in the run's log or, where there is none yet, in a file of its own; the
    line names it. SIGTERM and a closed terminal interrupt like Ctrl-C, unless they are ignored, as under `nohup`.

    Args:
        program: The name that the line begins with.
        parse: Reads the arguments, and may end the process, as argparse does after its help.
        command: The work, which gets them; returns an exit code. That some code within it ends the process is a
            failure.
        when_stopped: Words to add to the line after a signal.
        ends_process: Whether the process ends with the command, so that a further signal must not change its exit code.
    """
    parsed = False
    with _safe_ends(), interrupting_signals() as received:
        try:
            arguments = parse()
            parsed = True
            code = command(arguments)
        except BaseException as error:
            if isinstance(error, SystemExit) and not parsed:  # of argparse, which has said why
                raise
            code = exit_code(error)
            # If all ranks report the same error, only rank 0 prints it.
            if concerns_one_process(error) or distributed.rank() == 0:
                line = describe(error) + (when_stopped if code > 128 else _where_the_traceback_is(error))
                print(f"{program}: {line}", file=sys.stderr)
            if code == 2:  # all ranks refuse alike; one that just exits may make Gloo abort another
                with contextlib.suppress(RuntimeError):
                    distributed.stop()
        if code == 0 and received:  # in a place where Python drops exceptions
            code = 128 + received[0]
        if ends_process:
            ignore_signals()
    return code


@contextlib.contextmanager
def _safe_ends() -> Iterator[None]:
    """Within it neither printing nor a thread, such as TensorBoard's, ends in a traceback on the terminal."""
    before = threading.excepthook

    def tell(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_value is not None:
            note(failed.exc_value)
            print(f"** A thread ended: {describe(failed.exc_value)}{_where_the_traceback_is(failed.exc_value)}")

    with safe_standard_streams():
        threading.excepthook = tell
        try:
            yield
        finally:
            threading.excepthook = before


def _where_the_traceback_is(error: BaseException) -> str:
    text = report(error)
    if "\n" not in text.strip():  # the line says it all
        return ""
    path = log_of(error)
    if path is None or not _holds(path, describe(error)):
        path = None
        with (
            contextlib.suppress(OSError),
            tempfile.NamedTemporaryFile(
                "w",
                prefix="torchreid-snloss-",
                suffix=".log",
                delete=False,
                encoding="utf-8",
                errors="backslashreplace",
            ) as file,
        ):
            file.write(text)
            path = Path(file.name)
    return f"; the traceback is in {str(path)!r}" if path is not None else ""


def _holds(path: Path, text: str) -> bool:
    """Whether the log, unless it is a device, got the text, which a full disk prevents."""
    with contextlib.suppress(OSError):
        return path.is_file() and text.encode(errors="backslashreplace") in path.read_bytes()
    return False
