"""What a key of the config may hold: a type and a range, as a check and in words."""

from __future__ import annotations

import math
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torchreid_snloss.values import shortened, shown

__all__ = ["Flag", "Integer", "Items", "Keywords", "Number", "Range", "Text", "Words", "shortened", "shown"]

_LONGEST = 4096  # characters of a path
_MANY = 1000  # items, more than any list needs


@dataclass(frozen=True, kw_only=True)
class Range(ABC):
    """The values that a key may have.

    Attributes:
        kind: The type of the values, as the documentation shows it.
        none: Whether None is allowed, too.
    """

    kind: ClassVar[type]
    none: bool = False

    @property
    @abstractmethod
    def bounds(self) -> str:
        """The range in words, without the type."""

    def expected(self, value: Any) -> str:
        """What must be in the place of a bad value, for the message."""
        return self.bounds

    @property
    def plural(self) -> str:
        """What a list of such values is a list of."""
        return f"any of {self.bounds}"

    @abstractmethod
    def holds(self, value: Any) -> bool:
        """Whether a value other than None is of the type and within the range."""

    def problem(self, key: str, value: Any) -> str | None:
        """What is wrong with the value of a key; None if nothing is."""
        if (value is None and self.none) or (value is not None and self.holds(value)):
            return None
        return f"{key} must be {self.expected(value)}{', or None' if self.none else ''}; got {key} {shown(value)}"


@dataclass(frozen=True, kw_only=True)
class Flag(Range):
    """True or False."""

    kind = bool

    @property
    def bounds(self) -> str:
        return "True or False"

    def holds(self, value: Any) -> bool:
        return isinstance(value, bool)


@dataclass(frozen=True)
class Integer(Range):
    """An integer.

    Attributes:
        least: The smallest value allowed.
        most: The largest value allowed. Every integer has one, so that no size can exhaust the memory or overflow.
    """

    least: int
    most: int

    kind = int

    @property
    def bounds(self) -> str:
        if self.most - self.least == 2:
            return f"{self.least}, {self.least + 1} or {self.most}"
        return f"from {self.least} to {self.most:,}"

    @property
    def plural(self) -> str:
        return f"whole numbers {self.bounds}"

    def expected(self, value: Any) -> str:
        if not isinstance(value, int) or isinstance(value, bool):
            return f"a whole number {self.bounds}"
        if self.most - self.least == 2:
            return self.bounds
        return f"at least {self.least}" if value < self.least else f"at most {self.most:,}"

    def holds(self, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.least <= value <= self.most


@dataclass(frozen=True, kw_only=True)
class Number(Range):
    """A finite number.

    Attributes:
        above: The number must be greater than this; None sets no such bound.
        at_least: The number must be this or greater; None sets no such bound.
        below: The number must be less than this; None sets no such bound.
        at_most: The number must be this or less; None sets no such bound.
    """

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    kind = float

    @property
    def bounds(self) -> str:
        bounds = {"above": self.above, "at least": self.at_least, "below": self.below, "at most": self.at_most}
        return " and ".join(f"{words} {bound:,}" for words, bound in bounds.items() if bound is not None)

    @property
    def plural(self) -> str:
        return f"numbers {self.bounds}"

    def expected(self, value: Any) -> str:
        if isinstance(value, float) and not math.isfinite(value):
            return f"finite, {self.bounds}"
        return self.bounds if _is_number(value) else f"a number {self.bounds}"

    def holds(self, value: Any) -> bool:
        return (
            _is_number(value)
            and not (isinstance(value, float) and not math.isfinite(value))
            and (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class Text(Range):
    """Text of one line, such as a name or a path.

    Attributes:
        empty: Whether it may be empty.
    """

    empty: bool = False

    kind = str

    @property
    def bounds(self) -> str:
        return "any" if self.empty else "not empty"

    @property
    def plural(self) -> str:
        return "names"

    def expected(self, value: Any) -> str:
        return f"text of one line{'' if self.empty else ', not empty'}, of at most {_LONGEST:,} characters"

    def holds(self, value: Any) -> bool:
        return (
            type(value) is str  # and no date of YAML
            and (self.empty or bool(value.strip()))
            and len(value) <= _LONGEST
            # No control characters. What Python makes of bytes of a path that are no UTF-8 is fine.
            and not any(
                unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") and not "\udc80" <= letter <= "\udcff"
                for letter in value
            )
        )


@dataclass(frozen=True)
class Words(Range):
    """One of some words.

    Attributes:
        words: The words, or a function that returns them, for a list of torchreid's that may grow.
    """

    words: Collection[str] | Callable[[], Collection[str]]

    kind = str

    @property
    def bounds(self) -> str:
        return ", ".join(self.words() if callable(self.words) else self.words)

    def holds(self, value: Any) -> bool:
        return isinstance(value, str) and value in (self.words() if callable(self.words) else self.words)

    def problem(self, key: str, value: Any) -> str | None:
        return None if self.holds(value) else f"{key} must be one of {self.bounds}, got {shown(value)}"


@dataclass(frozen=True)
class Items(Range):
    """A list.

    Attributes:
        of: What each item must be.
        lengths: How many items there may be.
        once: Whether each item may be there only once.
    """

    of: Range
    lengths: Sequence[int] = range(_MANY + 1)
    once: bool = False

    kind = list

    @property
    def bounds(self) -> str:
        least, most = min(self.lengths), max(self.lengths)
        number = "1 or more " if least == 1 else "" if most >= _MANY else f"at most {most} "
        return f"{f'{most} ' if least == most else number}{self.of.plural}{', all different' if self.once else ''}"

    def expected(self, value: Any) -> str:
        return f"a list of {self.bounds}"

    def holds(self, value: Any) -> bool:
        return (
            isinstance(value, (list, tuple))
            and len(value) in self.lengths
            and all(item is not None and self.of.holds(item) for item in value)
            and not (self.once and len(set(value)) < len(value))
        )

    def problem(self, key: str, value: Any) -> str | None:
        if isinstance(value, (list, tuple)) and isinstance(self.of, Words):
            for item in value:
                if problem := self.of.problem(key, item):
                    return problem
        return super().problem(key, value)


@dataclass(frozen=True, kw_only=True)
class Keywords(Range):
    """Keywords for a class or a function: names with numbers, text, lists, or further keywords."""

    kind = dict

    @property
    def bounds(self) -> str:
        return "any names"

    def expected(self, value: Any) -> str:
        return "keywords: names with numbers, text, lists and such"

    def holds(self, value: Any) -> bool:
        try:
            return isinstance(value, Mapping) and _is_plain(value)
        except RecursionError:
            return False


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(item) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) is str or isinstance(value, (bool, int, float))  # and no date of YAML
