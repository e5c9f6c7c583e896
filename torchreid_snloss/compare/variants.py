"""The rows of a comparison: each a name and the options by which it differs from the config."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from yacs.config import CfgNode

from torchreid_snloss.config import ConfigError, leaves
from torchreid_snloss.config.file import find_file, read_yaml, with_number
from torchreid_snloss.config.ranges import shown
from torchreid_snloss.losses import Interval
from torchreid_snloss.losses.search import Choices, SearchSpace
from torchreid_snloss.settings import Settings

__all__ = ["BASELINES", "CONTROL", "SOFTMAX", "Variant", "describe", "of_loss", "read_variants"]

CONTROL, SOFTMAX = "control", "softmax"
"""The names of the two baselines: softmax on the metric losses' batches, and on random batches."""

_NAME = re.compile(r"[^\W_][\w.+-]*")
_LONGEST_NAME = 100  # bytes, which are what file systems count
_TAKEN = re.compile(r"tuning|tuned-.*|results\.(csv|json)|report\.html", re.IGNORECASE)
_INTERVAL = {"low", "high", "log"}


@dataclass(frozen=True)
class Variant:
    """A row of a comparison.

    Attributes:
        name: The name of the row and of its folder.
        options: Keys and values that are set on top of the config.
        search: The values that a tuning of this row tries, by key; None for those that its losses declare.
    """

    name: str
    options: Mapping[str, Any]
    search: SearchSpace | None = None


BASELINES = {
    CONTROL: Variant(CONTROL, {"loss.name": "softmax", "sampler.train_sampler": "IdentitySampler"}),
    SOFTMAX: Variant(SOFTMAX, {"loss.name": "softmax", "sampler.train_sampler": "RandomSampler"}),
}
"""What every loss is compared with. The control tells what the loss does, and softmax on random batches is what
torchreid's users have."""


def of_loss(name: str, base: CfgNode) -> Variant:
    """The row of a loss with the values of the config.

    Args:
        name: A value of `loss.name`; `"softmax"` is the baseline on random batches.
        base: The config.
    """
    if name == SOFTMAX:
        return BASELINES[SOFTMAX]
    options: dict[str, Any] = {"loss.name": name}
    if name.split("+")[0] == "triplet" and base.loss.triplet.weight_x == 0:
        # torchreid's triplet loss has no softmax term by default, while all the other losses have one.
        options["loss.triplet.weight_x"] = 1.0
    return Variant(name, options)


def describe(settings: Settings, weights: bool = True) -> str:
    """What a run is trained with, as `"sn x 0.5 + softmax"` or `"softmax, random batches"`.

    Args:
        settings: The settings of the run.
        weights: Whether to give weights other than 1.
    """
    of_terms = {**settings.metric_weights, "softmax": settings.softmax_weight}
    terms = [
        name if weight == 1 or not weights else f"{name} x {weight:.3g}"
        for name, weight in of_terms.items()
        if weight > 0
    ]
    if len(terms) > 1 or "softmax" not in settings.losses:
        return " + ".join(terms)
    sampler = settings.train_sampler
    if sampler in ("IdentitySampler", "RandomIdentitySampler"):
        return f"softmax, P x {settings.num_instances} batches"
    return "softmax, " + ("random batches" if sampler == "RandomSampler" else f"batches of {sampler}")


def read_variants(path: str) -> list[Variant]:
    """Reads a file of variants: a YAML mapping of names to options, and under `search` what a tuning is to try.

    Args:
        path: The path of the file, or of one that comes with the package, `configs/variants/...`. A value under
            `search` is a list of choices, or `low`, `high` and, for a logarithmic scale, `log: true`.

    Raises:
        ConfigError: If the file can't be read, or holds anything else. Keys and values of the options are checked when
            a config is made of them.
    """
    try:
        content = read_yaml(find_file(path))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        itself = isinstance(error, RecursionError)
        text = "an alias refers to what contains it" if itself else " ".join(str(error).split())
        raise ConfigError(f"can't read the variants file {path!r}: {text}") from error
    if not isinstance(content, Mapping) or not content:
        raise ConfigError(f"the variants file {path!r} must map names to options, got {shown(content)}")
    return [_variant(path, name, options) for name, options in content.items()]


def _variant(path: str, name: Any, options: Any) -> Variant:
    where = f"variants file {path!r}"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: a name must begin with a letter or digit and have only letters, digits and . _ + -, got "
            f"{shown(name)}"
        )
    if name in BASELINES:
        raise ConfigError(f"{where}: {name} is the name of a baseline, which --baselines adds")
    if (size := len(name.encode())) > _LONGEST_NAME:
        raise ConfigError(f"{where}: a name must have at most {_LONGEST_NAME} bytes, got {size}, {shown(name)}")
    if _TAKEN.fullmatch(name):
        raise ConfigError(
            f"{where}: {name} is what a comparison names a file or folder of its own, choose another name"
        )
    if not isinstance(options, Mapping) or not options:
        raise ConfigError(f"{where}: {name} must hold options, such as loss.name: hap2s, got {shown(options)}")
    given = dict(options)
    search = given.pop("search", None)
    changes = list(leaves(given))
    if twice := [key for key, number in Counter(key for key, _ in changes).items() if number > 1]:
        raise ConfigError(f"{where}: {name} sets {shown(twice[0])} more than once")
    return Variant(name, dict(changes), None if search is None else _search(f"{where}: {name}", search))


def _search(where: str, search: Any) -> SearchSpace:
    if not isinstance(search, Mapping) or not search:
        raise ConfigError(f"{where}: search must map keys to what is tried, got {shown(search)}")
    return {str(key): _values(f"{where}: search: {key}", values) for key, values in search.items()}


def _values(where: str, values: Any) -> Interval | Choices:
    plain = (bool, int, float, str, type(None))
    if isinstance(values, list) and len(values) > 1 and all(isinstance(value, plain) for value in values):
        return tuple(map(with_number, values))
    if isinstance(values, Mapping) and {"low", "high"} <= set(values) <= _INTERVAL:
        try:
            return Interval(**{key: with_number(value) for key, value in values.items()})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}: {error}") from error
    raise ConfigError(
        f"{where} must be a list of two or more numbers, words or null, or low, high and log; got {shown(values)}"
    )
