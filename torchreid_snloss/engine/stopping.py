"""Ctrl-C and SIGTERM, noted while a run is under way and agreed on among all processes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from torchreid_snloss import distributed

__all__ = ["StopSignals", "leave_signals_to_the_parent"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Notes the signals that ask a run to stop, so that it can finish its step and save before it does.

    Attributes:
        number: the signal that all processes know of, after `requested` returned True.
    """

    def __init__(self) -> None:
        self.number = 0
        self._received = 0  # by this process
        self._process = os.getpid()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within it a first signal is noted, and a second one interrupts at once by `KeyboardInterrupt`."""
        self._received, self._process = 0, os.getpid()
        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        try:
            yield
        finally:
            self._received = 0
            for number, handler in before.items():
                signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether a signal came to any process. All processes must ask together, and all get the same answer."""
        self.number = distributed.all_reduce_max(self._received)
        return self.number != 0

    def _receive(self, number: int, _: object) -> None:
        if os.getpid() != self._process:  # a worker whose own worker_init_fn left it with this handler
            os._exit(128 + number)
        if self._received:
            raise KeyboardInterrupt
        self._received = number


def leave_signals_to_the_parent(_: int) -> None:
    """A data loader's `worker_init_fn`: a signal to the whole process group must not end workers before the step ends.

    Workers get a group of their own. They don't ignore SIGTERM, by which Python ends them when the process exits.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
