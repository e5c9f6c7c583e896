"""Threads for work in NumPy, which releases the GIL while it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from torchreid_snloss.progress import progress_bar

__all__ = ["in_threads", "map_in_threads"]

_T = TypeVar("_T")
_CHUNK_SIZE = 256  # limits the number of finished results that are held in memory


def in_threads(function: Callable[[int], _T], count: int, description: str, unit: str = "query") -> Iterator[_T]:
    """Yields `function(0)` to `function(count - 1)` in this order, computed in as many threads as torch uses.

    Args:
        function: The function of an index.
        count: The number of indices.
        description: The text before the progress bar.
        unit: What an index counts, for the progress bar.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool, progress_bar(description, count, unit) as bar:
        for start in range(0, count, _CHUNK_SIZE):
            end = min(start + _CHUNK_SIZE, count)
            yield from pool.map(function, range(start, end))
            bar.update(end - start)


def map_in_threads(function: Callable[[int], _T], count: int) -> list[_T]:
    """The results for the indices of one block, computed in as many threads as torch uses.

    Args:
        function: The function of an index.
        count: The number of indices.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(function, range(count)))
