"""One call in a process of its own: how long it takes, and its peak memory above what was there before (on Linux)."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from typing import NamedTuple

import torch

__all__ = ["Usage", "run_alone"]


class Usage(NamedTuple):
    """What a call took."""

    seconds: float
    mib: float
    cpu_seconds: float
    """of all threads; other work on the machine hardly changes them"""


def run_alone(module: str, *arguments: object, exact_memory: bool = False) -> Usage:
    """Calls `module.prepare(*arguments)`, and measures a call of what it returns.

    Args:
        module: its name.
        arguments: for `prepare`, which gets them as strings.
        exact_memory: large arrays go back to the system as soon as they are freed, and do not count in the peak; but
            that takes time.
    """
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.alone", str(torch.get_num_threads()), module]
    environment = {**os.environ, **({"MALLOC_MMAP_THRESHOLD_": "65536"} if exact_memory else {})}
    output = subprocess.run(
        [*command, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    return Usage(*map(float, output.stdout.splitlines()[-1].split()))


def _main() -> None:
    threads, module, *arguments = sys.argv[1:]
    torch.set_num_threads(int(threads))
    call = importlib.import_module(module).prepare(*arguments)
    with open("/proc/self/clear_refs", "w") as stream:
        stream.write("5")  # resets the peak
    before = _memory("VmRSS")
    start, cpu_start = time.perf_counter(), time.process_time()
    call()
    print(time.perf_counter() - start, _memory("VmHWM") - before, time.process_time() - cpu_start)


def _memory(key: str) -> float:
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) / 1024 for line in stream if line.startswith(key))


if __name__ == "__main__":
    _main()
