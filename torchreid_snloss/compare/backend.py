"""matplotlib, imported without the backend that the environment names, which may not be there.

A notebook sets `MPLBACKEND`, and the processes that it starts inherit it. The report draws figures without a backend.
"""

from __future__ import annotations

import contextlib
import os

__all__ = ["Axes", "Figure", "MaxNLocator", "PolyCollection", "matplotlib"]

_given = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
finally:
    if _given is not None:
        os.environ["MPLBACKEND"] = _given
if _given is not None:
    with contextlib.suppress(ValueError):  # a backend that is not installed
        matplotlib.rcParams["backend"] = _given
