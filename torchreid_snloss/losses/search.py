"""The values of a loss's arguments that a tuning tries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torchreid_snloss.arguments import check_number

__all__ = ["Choices", "DeclaredSpace", "Interval", "OnlyWith", "SearchSpace", "tried"]


@dataclass(frozen=True)
class Interval:
    """The numbers from `low` to `high`, both included.

    Attributes:
        low: the smallest number; with `log` above 0.
        high: the largest number, greater than `low`.
        log: whether a tuning draws uniformly from the logarithms, for an argument whose order of magnitude matters.
            Default is False.

    Raises:
        TypeError: for bounds that are not numbers, or a `log` that is neither True nor False.
        ValueError: for bounds that are not finite or not in this order, or a `low` of 0 or less with `log`.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.log, bool):
            raise TypeError(f"log must be True or False, got {self.log!r}")
        check_number("low", self.low, above=0 if self.log else None)
        check_number("high", self.high, above=self.low)


Choices: TypeAlias = tuple[bool | int | float | str | None, ...]
SearchSpace: TypeAlias = Mapping[str, Interval | Choices]


@dataclass(frozen=True)
class OnlyWith:
    """Values that are tried only where another argument has one value, since the loss uses them only there.

    Attributes:
        argument: the other argument.
        value: its value.
        values: what is tried then.
    """

    argument: str
    value: Any
    values: Interval | Choices


DeclaredSpace: TypeAlias = Mapping[str, Interval | Choices | OnlyWith]
"""What a loss declares for its arguments."""


def tried(space: DeclaredSpace, arguments: Mapping[str, Any]) -> SearchSpace:
    """What a tuning tries of a loss's search space if the loss has these arguments."""
    found: dict[str, Interval | Choices] = {}
    for name, values in space.items():
        if not isinstance(values, OnlyWith):
            found[name] = values
        elif arguments[values.argument] == values.value:
            found[name] = values.values
    return found
