"""Ctrl-C, SIGTERM and a closed terminal: noted while a run is under way, and agreed on among all processes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from torchreid_snloss import distributed

__all__ = [
    "SignalInterrupt",
    "StopSignals",
    "handling_signals",
    "ignore_signals",
    "interrupting_signals",
    "leave_signals_to_the_parent",
    "stop_signals",
]


class SignalInterrupt(KeyboardInterrupt):
    """A signal that interrupts at once, as Ctrl-C does.

    Attributes:
        signal: The signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


# What asks a run to stop; there is no SIGHUP on Windows.
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def stop_signals() -> list[signal.Signals]:
    """The signals that ask a process to stop. One that is ignored stays ignored, such as SIGHUP under `nohup`."""
    return [number for number in _SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]


@contextlib.contextmanager
def handling_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Within it a signal calls `handle`. Python lets no other thread than the main one set handlers."""
    process = os.getpid()

    def receive(number: int, _: object) -> None:
        if os.getpid() != process:  # a worker whose own worker_init_fn left it with this handler
            os._exit(128 + number)
        handle(number)

    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, receive) for number in stop_signals()} if is_main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) != signal.SIG_IGN:  # by `ignore_signals`
                signal.signal(number, handler)


def ignore_signals() -> None:
    """Ignores the signals that ask a process to stop, since it is about to end."""
    if threading.current_thread() is threading.main_thread():
        for number in stop_signals():
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def interrupting_signals() -> Iterator[list[int]]:
    """Within it a signal raises `SignalInterrupt`. The list that this gives holds the numbers of those that came."""
    received: list[int] = []

    def interrupt(number: int) -> None:
        received.append(number)
        raise SignalInterrupt(number)

    with handling_signals(interrupt):
        yield received


class StopSignals:
    """Records the signals that ask a run to stop, so that it can finish its step and save a checkpoint first.

    Attributes:
        number: the number of the signal, the same on all processes, once `requested` has returned True.
    """

    def __init__(self) -> None:
        self.number = 0
        self._received = 0  # by this process

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within it a first signal is noted, and a second one interrupts at once.

        Raises:
            SignalInterrupt: at a second signal, and at the end for one that nobody asked about.
        """
        self._received = 0
        try:
            with handling_signals(self._receive):
                yield
            if self._received:
                raise SignalInterrupt(self._received)
        finally:
            self._received = 0

    def requested(self) -> bool:
        """Whether any process received a signal. It is a collective operation with the same result on all processes."""
        self.number = distributed.all_reduce_max(self._received)
        return self.number != 0

    def _receive(self, number: int) -> None:
        if self._received:
            self._received = 0
            raise SignalInterrupt(number)
        self._received = number


def leave_signals_to_the_parent(_: int) -> None:
    """A `worker_init_fn` for data loaders, so that a signal to the process group does not end workers during a step.

    Workers move to a process group of their own. They don't ignore SIGTERM, because Python uses it to end them on exit.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
