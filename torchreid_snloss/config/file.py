"""Reads a config file, and refuses what YAML allows and a config should not hold."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from torchreid_snloss.config.ranges import shown

__all__ = ["find_file", "own_configs", "own_configs_folder", "read_yaml", "with_number"]

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
_MOST_CHARACTERS = 100_000  # of a file, and of what its aliases make of it


class Date(str):
    """Text that YAML takes for a date."""

    def __repr__(self) -> str:
        return f"the date {self}"


class _Loader(yaml.SafeLoader):
    """A safe loader that names the line of a value that can't be read."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, OverflowError, TypeError) as error:  # as of !!int x, or of an integer of 5,000 digits
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error


# Without the check that there is such a day.
_Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda _, node: Date(node.value))


def find_file(name: str, tell: Callable[[str], None] = print) -> Path:
    """The path of a config file. Those of the package, `configs/...`, are also found where it is installed.

    Args:
        name: The path that was given.
        tell: Called with a line that says so if the file is one of the package.
    """
    path = Path(name)
    if not path.exists() and path.parts[:1] == ("configs",):
        own = own_configs_folder().joinpath(*path.parts[1:])
        if own.is_file():
            tell(f"=> {name} is the package's own, {own}")
            return own
    return path


def own_configs_folder() -> Path:
    """The folder of the configs that come with the package: within it, or beside it in a clone."""
    package = Path(__file__).parent.parent
    beside = package.parent / "configs"
    return beside if (package.parent / "setup.py").is_file() and beside.is_dir() else package / "configs"


def own_configs() -> dict[str, str]:
    """The names of the configs and variants files that come with the package, with the first comment of each."""
    folder, found = own_configs_folder(), {}
    for path in sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.relative_to(folder).parts), path)):
        text = path.read_text(encoding="utf-8")
        comment = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
        found[f"configs/{path.relative_to(folder).as_posix()}"] = " ".join(line.strip("# ") for line in comment)
    return found


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        OSError, UnicodeDecodeError, yaml.YAMLError: If it can't be read, has the same key twice in one section, or is
            too long, with its aliases written out.
        RecursionError: If an alias refers to what contains it, or sections are nested without end.
    """
    with open(path, encoding="utf-8") as stream:
        text = stream.read(_MOST_CHARACTERS + 1)
    _check_length(len(text))
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _check_length(_length(root, {}))
        return loader.construct_document(root)
    finally:
        loader.dispose()


def with_number(value: Any) -> Any:
    """The value, or the number if it is text such as 1e-1, which YAML takes for text."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _check_length(characters: int) -> None:
    if characters > _MOST_CHARACTERS:
        raise yaml.YAMLError(f"it is too long: with its aliases, it has more than {_MOST_CHARACTERS:,} characters")


def _length(node: yaml.Node, known: dict[yaml.Node, int | None]) -> int:
    """The characters of a node with its aliases written out, counted once for each node."""
    if node in known:
        length = known[node]
        if length is None:
            raise RecursionError
        return length
    known[node] = None
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        parts = [part for pair in node.value for part in pair]
    else:
        parts = node.value if isinstance(node, yaml.SequenceNode) else []
    own = len(node.value) if isinstance(node, yaml.ScalarNode) else 0
    known[node] = total = 1 + own + sum(_length(part, known) for part in parts)
    return total


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        line = key.start_mark.line + 1
        if key.value in lines:
            raise yaml.YAMLError(f"the key {shown(key.value)} is there twice, in lines {lines[key.value]} and {line}")
        lines[key.value] = line
