"""Values of any kind in a message."""

from __future__ import annotations

from typing import Any

__all__ = ["shortened", "shown"]

_MOST_SHOWN = 200  # characters


def shown(value: Any) -> str:
    """A value as an error message shows it: on one line, and shortened if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python refuses to print an integer of thousands of digits
        return f"a value of type {type(value).__name__} that is too long to show"
    return shortened(" ".join(text.split()) if "\n" in text else text)


def shortened(text: str) -> str:
    """The beginning of a text that is too long for a message."""
    if len(text) <= _MOST_SHOWN:
        return text
    return f"{text[: _MOST_SHOWN // 2]}... ({len(text)} characters)"
