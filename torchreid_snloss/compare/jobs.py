"""Several tasks side by side, each at a place of its own, and all of them stopped in order."""

from __future__ import annotations

import contextlib
import os
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TextIO

from torchreid_snloss import device
from torchreid_snloss.config import ConfigError
from torchreid_snloss.engine.stopping import handling_signals

__all__ = ["Place", "check_jobs", "print_line", "run_side_by_side"]

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Place:
    """What one of several tasks at a time may use.

    Attributes:
        variables: Environment variables for the processes that the task starts, which give them one GPU or their share
            of the cores.
        alone: Whether no other task runs at the same time.
        stop_requests: How many times the tasks have been asked to stop so far.
    """

    variables: dict[str, str]
    alone: bool
    stop_requests: Callable[[], int]


class _Halt:
    """Whether to stop, and the exit code that this gives."""

    def __init__(self, signals: list[int]) -> None:
        self._signals = signals
        self._failed = 0

    def fail(self, code: int) -> None:
        self._failed = self._failed or code

    def requests(self) -> int:
        # A task that a signal has stopped fails too, which is no second request.
        return max(len(self._signals), bool(self._failed))

    @property
    def code(self) -> int:
        return 128 + self._signals[0] if self._signals else self._failed


def check_jobs(jobs: int, use_gpu: bool) -> None:
    """Raises ConfigError unless there is a GPU, or on a CPU a core, for each of the tasks side by side."""
    if jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, got {jobs}")
    most, what = (len(_gpus()), "GPUs") if use_gpu else (_cores(), "CPU cores")
    if jobs > max(1, most):
        raise ConfigError(f"--jobs must be at most {max(1, most)}, the number of {what}, got {jobs}")


def run_side_by_side(tasks: Sequence[Callable[[Place], int]], jobs: int, use_gpu: bool) -> int:
    """Calls the tasks in their order, up to `jobs` of them at a time, each in a thread.

    A signal that asks this process to end, or a task that fails, stops the tasks that are running and leaves out the
    rest.

    Args:
        tasks: Functions of the place at which they run, which return an exit code.
        jobs: How many run at a time.
        use_gpu: Whether each gets a GPU rather than a share of the cores.

    Returns:
        The exit code: 0; that of the first task that failed; 128 plus the signal's number if a signal came.
    """
    signals: list[int] = []
    # A console of Windows sends Ctrl-C to all its processes, so that nothing is to be passed on.
    noting = contextlib.nullcontext() if os.name == "nt" else handling_signals(signals.append)
    with noting, ThreadPoolExecutor(jobs) as pool:
        halt = _Halt(signals)
        places: queue.SimpleQueue[Place] = queue.SimpleQueue()
        for variables in _shares(jobs, use_gpu):
            places.put(Place(variables, jobs == 1, halt.requests))

        def run(task: Callable[[Place], int]) -> None:
            if halt.requests():
                return
            place = places.get()
            try:
                halt.fail(task(place))
            except BaseException:
                halt.fail(1)
                raise
            finally:
                places.put(place)

        futures = [pool.submit(run, task) for task in tasks]
        while wait(futures, timeout=0.1).not_done:  # Python handles signals in this thread only, when it wakes up
            pass
        for future in futures:
            future.result()
        return halt.code


def print_line(text: str, stream: TextIO | None = None) -> None:
    """Prints a line in one piece, so that no other task's comes before its end; to standard output by default."""
    print(f"{text}\n", end="", file=stream, flush=True)


def _shares(jobs: int, use_gpu: bool) -> list[dict[str, str]]:
    """Environment variables for each of the places. A single one leaves everything as it is."""
    if jobs == 1:
        return [{}]
    if use_gpu:
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in _gpus()[:jobs]]
    threads = str(max(1, _cores() // jobs))
    return [{name: os.environ.get(name, threads) for name in _THREADS} for _ in range(jobs)]


def _gpus() -> list[str]:
    """The GPUs as `CUDA_VISIBLE_DEVICES` names them."""
    given = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (given or [str(index) for index in range(device.count())])[: device.count()]


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
