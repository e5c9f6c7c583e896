"""What a run ran on: versions of packages and the hardware."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch
import torchvision

from torchreid_snloss import device, distributed

__all__ = ["hardware", "versions"]


def versions() -> str:
    """The versions of this package, of those that it computes with, and of Python, in words."""
    from torchreid_snloss import __version__  # it is set after the package has imported this module

    numbers = {
        "torchreid-snloss": __version__,
        "torchreid": metadata.version("torchreid"),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "NumPy": metadata.version("numpy"),
        "Python": platform.python_version(),
    }
    return ", ".join(f"{name} {number}" for name, number in numbers.items())


def hardware() -> str:
    """The processor, its cores and the threads of this process; and the GPU, if the process has used one."""
    processor = f"{_processor()} (cores: {os.cpu_count()}, threads: {torch.get_num_threads()})"
    parts = [f"{processor}, {platform.system()} {platform.machine()}"]
    if device.peak_memory() is not None:
        parts.insert(0, f"{distributed.world_size()} x {device.name()}")
    return "; ".join(parts)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"
