"""Argument checks with one-line messages that state the expected and the actual value."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["check_choice", "check_integer", "check_number"]


def check_number(name: str, value: float, above: float | None = None, at_least: float | None = None) -> float:
    """Checks a hyper-parameter.

    Args:
        name: the argument's name, for the message.
        value: the value to check.
        above: the number must be greater than this; None sets no bound.
        at_least: the number must be this or greater; None sets no bound.

    Returns:
        `value` as a float.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is not finite, or out of the range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        finite = False
    if not finite:
        raise ValueError(f"{name} must be finite, got {value!r}")
    if above is not None and not value > above:
        raise ValueError(f"{name} must be greater than {above}, got {value!r}")
    if at_least is not None and not value >= at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value!r}")
    return float(value)


def check_integer(name: str, value: int, at_least: int) -> int:
    """Checks an integer.

    Args:
        name: the argument's name, for the message.
        value: the value to check.
        at_least: the smallest integer allowed.

    Returns:
        `value` as an int.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return int(check_number(name, value, at_least=at_least))


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
