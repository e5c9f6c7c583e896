"""Which images a run of a comparison trains and tests on, so that results of others are not taken for its own."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

from torchreid_snloss.config import get_default_config
from torchreid_snloss.data.fingerprint import fingerprint
from torchreid_snloss.loading import load_data
from torchreid_snloss.settings import Settings, resolve

__all__ = ["images_digests"]

_DATA = ("data.", "cuhk03.", "market1501.", "video.", "test.held_out_only")
_OTHER = {  # keys of these sections that do not say which images there are, or that each seed draws by
    *(f"data.{key}" for key in ("save_dir", "workers", "cache", "batch_transforms", "load_train_targets")),
    *(f"data.{key}" for key in ("label_noise", "outliers")),
}


def images_digests() -> Callable[[Settings], str]:
    """Makes a function that loads the data of a run and returns a digest of its images, identities and cameras.

    The labels and outliers drawn for each seed are not in the digest, nor where the data lies; of `data.train_fraction`
    it has the draw of one seed. Data of the same settings is loaded once.
    The function raises ConfigError for data that a run could not load either.
    """
    known: dict[str, str] = {}

    def digest(settings: Settings) -> str:
        values = {key: value for key, value in settings.values.items() if key.startswith(_DATA) and key not in _OTHER}
        name = json.dumps(values)
        if name not in known:
            known[name] = _digest(values)
        return known[name]

    return digest


def _digest(values: Mapping[str, Any]) -> str:
    cfg = get_default_config()  # a row whose batches do not fit the data must not fail here, but in its own run
    for key, value in values.items():
        *sections, last = key.split(".")
        functools.reduce(getattr, sections, cfg)[last] = value
    cfg.use_gpu, cfg.data.workers = False, 0
    with contextlib.redirect_stdout(io.StringIO()):  # each run prints it to its own log
        datamanager = load_data(resolve(cfg))
    splits = {"train": datamanager.train_loader.dataset.train}
    for name, test_set in sorted(datamanager.test_dataset.items()):
        splits |= {f"{name} {split}": test_set[split] for split in ("query", "gallery")}
    content: dict[str, Any] = {name: sorted(fingerprint(items)["labels"].values()) for name, items in splits.items()}
    if "folder" in (*cfg.data.sources, *cfg.data.targets):
        content["numbering"] = "over all people"  # a pairing of queries must not mix it with an earlier one
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
