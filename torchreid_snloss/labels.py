"""Identities and cameras of any integer type, or strings, made comparable between queries and gallery.

NumPy compares int64 with uint64 as float64, in which different large numbers are equal, and NaN with nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["comparable_labels"]


def comparable_labels(shape: Sequence[int], **labels: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Codes for the labels of queries and gallery: equal where the labels are equal, and in their order.

    Args:
        shape: (queries, gallery), how many there are.
        **labels: The labels of the queries, then those of the gallery, by the names to show in errors.

    Raises:
        ValueError: If there is not one label for each query or gallery image, or a number is not whole.
        TypeError: If labels are neither integers nor strings, or those of one side are integers and of the other
            strings.
    """
    (q_name, query), (g_name, gallery) = labels.items()
    sides = [
        _exact(name, side, length, what)
        for name, side, length, what in (
            (q_name, query, shape[0], "query"),
            (g_name, gallery, shape[1], "gallery image"),
        )
    ]
    kinds = ["strings" if side.dtype.kind in "US" else "integers" for side in sides]
    if kinds[0] != kinds[1] or {side.dtype.kind for side in sides} == {"U", "S"}:
        given = [np.asarray(side).dtype for side in (query, gallery)]
        raise TypeError(f"{q_name} and {g_name} must be of the same kind, got {given[0]} and {given[1]}")
    _, codes = np.unique(np.concatenate(sides), return_inverse=True)
    codes = codes.reshape(-1).astype(np.int64)
    return codes[: len(sides[0])], codes[len(sides[0]) :]


def _exact(name: str, labels: ArrayLike, length: int, what: str) -> NDArray[Any]:
    """The labels as int64, or as Python's integers where these are larger, or as strings."""
    array = np.asarray(labels)
    if np.ma.is_masked(labels):
        raise ValueError(f"{name} must hold whole numbers, got masked values")
    if array.dtype.kind in "fUS" and not hasattr(labels, "dtype"):
        array = np.asarray(labels, dtype=object)  # else large integers become floats, and NaN beside text becomes text
    if array.shape != (length,):
        raise ValueError(f"{name} must be of shape ({length},), one for each {what}, got {array.shape}")
    if array.dtype.kind in "US":
        return array
    if array.dtype.kind in "bi" or (array.dtype.kind == "u" and array.dtype.itemsize < 8):
        return array.astype(np.int64)
    if array.dtype.kind not in "ufO":
        raise TypeError(f"{name} must hold only integers or only strings, got {array.dtype}")
    values = array.tolist()
    if values and (all(isinstance(v, str) for v in values) or all(isinstance(v, bytes) for v in values)):
        return np.array(values)
    for index, value in enumerate(values):
        if not isinstance(value, Real):
            raise TypeError(f"{name} must hold only integers or only strings, got {value!r} at index {index}")
        if not isinstance(value, Integral) and not (math.isfinite(value) and value == math.trunc(value)):
            raise ValueError(f"{name} must hold whole numbers, got {value!r} at index {index}")
    exact = np.array([int(value) for value in values], dtype=object)
    fits = all(-(2**63) <= value < 2**63 for value in exact)
    return exact.astype(np.int64) if fits else exact
