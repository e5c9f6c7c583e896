"""What a command line of this package sets before torch and torchreid are imported."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

__all__ = ["is_command_line", "prepare_imports"]

_PACKAGE = "torchreid_snloss"


def is_command_line() -> bool:
    """Whether this process is one of the package's command lines, rather than a script that imports the package."""
    words = sys.orig_argv
    if "-m" in words[:-1] and words[words.index("-m") + 1].split(".")[0] == _PACKAGE:
        return True
    path = Path(sys.argv[0])  # of a spawned worker, what its parent had
    return path.stem.startswith("torchreid-snloss") or _PACKAGE in (path.parent.name, path.parent.parent.name)


def prepare_imports() -> None:
    """For a command line, hides a warning that does not apply, and has threads wait for each other without a core.

    torchreid warns that it lacks its compiled evaluator; `register()` puts another in the place of the slow one.

    OpenMP's threads wait for each other after each operation, and GNU's keep their cores busy meanwhile: for 300,000
    turns, or for 1,000 if it knows that there are more threads than cores. Of other processes it knows nothing, and on
    a busy machine each wait then takes a core from the thread that is waited for. The shorter wait is set here for all
    cases, unless the user has set another. It changes no result.
    """
    if not is_command_line():
        return
    warnings.filterwarnings("ignore", "Cython evaluation", UserWarning, r"torchreid\.(reid\.)?metrics\.rank$")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
