"""What a run shows on the screen; its log holds all of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from torchreid_snloss import device
from torchreid_snloss.config import get_default_config, leaves
from torchreid_snloss.config.decide import decide
from torchreid_snloss.environment import versions
from torchreid_snloss.run.streams import SafeStream
from torchreid_snloss.settings import Settings

__all__ = ["Screen", "data_lines", "setting_lines", "version_line"]

# What torchreid prints about each step of its work, and its tables of each data set, which `data_lines` replaces.
_LOG_ONLY = re.compile(
    r"""
    Building\ (train|test)\ transforms\ \.\.\.
    | \+\ (resize|random|color|to\ torch|normalization|center|pad).*
    | =>\ Loading\ (train|test)\ \((source|target)\)\ dataset
    | =>\ Loaded\ \w+
    | \ \ -{30,}
    | \ \ (subset|train|query|gallery)\ +\|.*
    | \ \ \*{10,}(\ Summary\ \*+)?
    | \ \ (\#\ )?(source|target)[a-z\ ]*:.*
    | Extracting\ features\ from\ .*
    | Done,\ obtained\ .*\ matrix
    | Speed:\ .*\ sec/batch
    | Normal\w*\ features\ with\ L2\ norm\ \.\.\.
    | Computing\ distance\ matrix\ .*
    | Computing\ CMC\ and\ mAP\ \.\.\.
    | \#\ (query:|gallery)\ \d+
    | Visualizing\ top-\d+\ ranks\ \.\.\.
    | -\ done\ \d+/\d+
    """,
    re.VERBOSE,
)


class Screen(SafeStream):
    """Standard output without the lines of torchreid that only the log needs, and without empty lines beside them."""

    _line = ""
    _skipped = True  # so that no empty line comes first

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            hidden = _LOG_ONLY.fullmatch(line) is not None or (self._skipped and not line)
            if not hidden:
                super().write(line + "\n")
            self._skipped = hidden
        return len(text)

    def flush(self) -> None:
        if self._line and not _LOG_ONLY.fullmatch(self._line):  # else it is shown, or not, when it ends
            super().write(self._line)
            self._line, self._skipped = "", False
        super().flush()


def version_line(settings: Settings) -> str:
    """The versions and the device of a run."""
    where = device.name() if settings.use_gpu else f"CPU, {torch.get_num_threads()} of {os.cpu_count()} threads"
    return f"{versions()}; {where}"


def setting_lines(settings: Settings) -> Iterator[str]:
    """The keys in which a run differs from the defaults, a line for each section of the config."""
    defaults = dict(leaves(decide(get_default_config())[0]))
    sections: dict[str, list[str]] = {}
    for key, value in settings.values.items():
        if key not in defaults or value != defaults[key]:
            section, _, name = key.rpartition(".")
            sections.setdefault(section, []).append(f"{name} {value!r}" if value == "" else f"{name} {value}")
    for section, values in sections.items():
        yield f"  {section + ': ' if section else ''}{', '.join(values)}"


def data_lines(settings: Settings, datamanager: Any) -> Iterator[str]:
    """The sets of a run as a table: how many identities, images and cameras each has, as it is trained or tested on."""
    unit = "tracklets" if settings.data_type == "video" else "images"
    yield f"  {'':12}{'identities':>12}{unit:>12}{'cameras':>12}"
    if not settings.evaluate:
        yield _data_line("train", datamanager.train_loader.dataset.train, settings.sources)
    for name, splits in datamanager.test_dataset.items():
        for split in ("query", "gallery"):
            yield _data_line(split, splits[split], [name])


def _data_line(split: str, items: Iterable[Any], names: Iterable[str]) -> str:
    images = list(items)
    pids, camids = ({item[part] for item in images} for part in (1, 2))
    return f"  {split:12}{len(pids):>12,}{len(images):>12,}{len(camids):>12,}   {' + '.join(names)}"
