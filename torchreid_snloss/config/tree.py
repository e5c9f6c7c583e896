"""The config tree: its defaults, and YAML files and options merged into it."""

from __future__ import annotations

import ast
import collections
import contextlib
import copy
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml
from yacs.config import CfgNode

from torchreid_snloss.config.file import find_file, read_yaml, with_number
from torchreid_snloss.config.keys import KEYWORD_KEYS, OLD_KEYS, ONE_OR_MORE, all_keys
from torchreid_snloss.config.ranges import shown

__all__ = [
    "ConfigError",
    "get_default_config",
    "leaves",
    "load_config",
    "loss_names",
    "merge_options",
    "metric_weights",
    "softmax_weight",
    "unknown_key",
    "weight_key",
]


_TOO_DEEP = (MemoryError, RecursionError)
"""What Python raises for a literal that is nested too deep."""


class ConfigError(ValueError):
    """An error in the config, or in the data or files it names, that prevents training."""


def get_default_config() -> CfgNode:
    """torchreid's config tree with this package's keys, `loss.sn`, `loss.hap2s`, `loss.fidi` and `use_gpu` added.

    The keys and defaults of the losses are those of their constructors; the weights are those of `MetricEngine`.
    """
    cfg = CfgNode()
    for key, known in all_keys().items():
        *sections, name = key.split(".")
        node = cfg
        for section in sections:
            node = node.setdefault(section, CfgNode())
        node[name] = CfgNode(new_allowed=True) if key in KEYWORD_KEYS else copy.deepcopy(known.default)
    return cfg


def load_config(config_file: str = "", options: Sequence[Any] = (), tell: Callable[[str], None] = print) -> CfgNode:
    """Loads the default config and merges a YAML file and then `KEY VALUE` options into it.

    Args:
        config_file: path of a YAML file in torchreid's format; no file if empty. The `configs/...` files that come with
            the package are also found where it is installed.
        options: keys and values in turn, such as `["loss.name", "sn", "train.lr", "0.001"]`.
        tell: called with each line about the config, such as one about an old name of a key.

    Raises:
        ConfigError: for a missing or broken file, an unknown key, or a value whose type differs from the default's.
    """
    cfg = get_default_config()
    if config_file:
        try:
            changes = list(leaves(read_yaml(find_file(config_file, tell))))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"can't read the config file {config_file!r}: {' '.join(str(error).split())}") from error
        except (AttributeError, RecursionError) as error:
            raise ConfigError(f"config file {config_file!r} must hold sections of keys, and nothing else") from error
        _set_all(cfg, changes, config_file, tell)
    if len(options) % 2 != 0:
        raise ConfigError(f"options come in pairs, KEY VALUE, but the last one, {options[-1]!r}, has no value")
    merge_options(cfg, zip(options[::2], options[1::2]), tell)
    return cfg


def merge_options(cfg: CfgNode, options: Iterable[tuple[str, Any]], tell: Callable[[str], None] = print) -> None:
    """Merges options into a config, as `load_config` does.

    Args:
        cfg: the config, which is changed.
        options: keys and their values.
        tell: as for `load_config`.

    Raises:
        ConfigError: as `load_config` does.
    """
    for key, value in options:
        _set(cfg, key, value, tell)


def _set_all(cfg: CfgNode, changes: Sequence[tuple[str, Any]], config_file: str, tell: Callable[[str], None]) -> None:
    """Sets what a config file holds."""
    sections = {key[: end.start()] for key in dict(leaves(cfg)) for end in re.finditer(r"\.", key)} | {*KEYWORD_KEYS}
    # The file itself has no key twice, but `loss.sn.scale: 10` may be written in one line, too.
    times = collections.Counter(OLD_KEYS.get(key) or key for key, _ in changes)
    if twice := [name for name, number in times.items() if number > 1]:
        raise ConfigError(f"config file {config_file!r} sets {shown(twice[0])} more than once")
    for key, value in changes:
        if key in sections and (value is None or (value == {} and key not in KEYWORD_KEYS)):
            tell(f"=> config section {key} is empty")
        else:
            _set(cfg, key, value, tell)


def leaves(tree: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the keys and values of a config. A key includes its sections, as in `loss.sn.scale`.

    A section of a file that has no keys is yielded as a value, an empty dictionary.
    """
    for key, value in tree.items():
        if isinstance(value, Mapping) and value and f"{path}{key}" not in KEYWORD_KEYS:
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _set(cfg: CfgNode, key: str, value: Any, tell: Callable[[str], None]) -> None:
    known = dict(leaves(cfg))
    if key in OLD_KEYS:
        tell(f"=> config key {key} is {OLD_KEYS[key] or 'obsolete and ignored'}")
        if OLD_KEYS[key] is None:
            return
        key = str(OLD_KEYS[key])
    swallowed = [item for item in value if isinstance(item, str) and item in known] if isinstance(value, list) else []
    if swallowed:
        raise ConfigError(f"{key} got {shown(value)}: put `--` between its values and the option {swallowed[0]}")
    if key not in known:
        raise ConfigError(unknown_key(key, known))
    if isinstance(value, Mapping) and key not in KEYWORD_KEYS:
        raise ConfigError(f"{key} is not a section: it must have a value, as its default {known[key]!r}, got {{}}")
    if value is False and known[key] == "off":
        value = "off"  # a bare off in YAML
    if value in ("None", "null"):  # a key that must have a value is told when the config is resolved
        value = None
    if isinstance(known[key], float) and not isinstance(value, bool):
        # yacs takes no 1 where the default is 1.0.
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # what is no number yacs finds out below
            value = float(value)
    if key in KEYWORD_KEYS:
        value = _keywords(key, value)
    if key in ONE_OR_MORE and isinstance(value, str) and not value.lstrip().startswith(("[", "(")):
        value = [value]
    if isinstance(known[key], str) and type(value) is str and not value.lstrip().startswith(("'", '"')):
        value = repr(value)  # yacs would take text such as 2024 for a number
    try:
        cfg.merge_from_list([key, value])
    except (ValueError, TypeError, *_TOO_DEEP) as error:
        hint = "; text that looks like something else needs quotes" if isinstance(known[key], str) else ""
        raise ConfigError(
            f"{key} must be of type {type(known[key]).__name__}, as its default {known[key]!r}, "
            f"got {shown(value)}{hint}"
        ) from error


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The message for a key that is not known, with those that are like it."""
    guesses = difflib.get_close_matches(str(key), known, n=3)
    hint = f", did you mean {' or '.join(guesses)}?" if guesses else ""
    return f"unknown config key {shown(key)}{hint}"


def _keywords(key: str, value: Any) -> CfgNode:
    if isinstance(value, str):
        with contextlib.suppress(ValueError, SyntaxError, *_TOO_DEEP):  # what is no literal is told below
            value = ast.literal_eval(value)
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{key} must hold keywords, as \"{{'gamma': 80}}\", got {shown(value)}")
    try:
        return CfgNode({name: with_number(given) for name, given in value.items()}, new_allowed=True)
    except (AssertionError, RecursionError) as error:
        raise ConfigError(f"{key} must hold numbers, text, lists and such, got {shown(value)}") from error


def loss_names(cfg: CfgNode) -> list[str]:
    """The losses that `loss.name` names, one or several."""
    return str(cfg.loss.name).split("+")


def metric_weights(cfg: CfgNode) -> dict[str, float]:
    """The weight of each metric loss, that is, of each loss but softmax; empty for softmax alone."""
    names = [name for name in loss_names(cfg) if name != "softmax"]
    return {name: cfg.loss[name][weight_key(name)] for name in names}


def weight_key(name: str) -> str:
    """The name of the key, in the section of a metric loss, that holds its weight."""
    return "weight_t" if name == "triplet" else "weight_m"


def softmax_weight(cfg: CfgNode) -> float:
    """The weight of the softmax term. With several losses, it is the `weight_x` of the first one."""
    first = loss_names(cfg)[0]
    return 1.0 if first == "softmax" else float(cfg.loss[first].weight_x)
