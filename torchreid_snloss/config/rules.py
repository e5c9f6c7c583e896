"""The rules of the config among several keys, as a table; the range of each key is with its default."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torchreid_snloss import device, distributed
from torchreid_snloss.config import ConfigError
from torchreid_snloss.config.torchreid_keys import EXPONENTIAL
from torchreid_snloss.data.folder_layouts import finds_a_camera

__all__ = ["RULES", "Rule", "number_of_folds", "torchreids_step"]


@dataclass(frozen=True)
class Rule:
    """A constraint on the values of some keys.

    Attributes:
        keys: the keys.
        test: a function of their values, in order, whose result is true if the rule is satisfied.
        message: what is expected; the error message appends the values.
    """

    keys: tuple[str, ...]
    test: Callable[..., Any]
    message: str

    def check(self, values: Mapping[str, Any]) -> None:
        """Raises ConfigError if the values of a config, by key, break the rule."""
        given = {key: values[key] for key in self.keys}
        if not self.test(*given.values()):
            raise ConfigError(f"{self.message}; got " + ", ".join(f"{key} {value}" for key, value in given.items()))


TORCHREIDS_LOSSES = ("softmax", "triplet")
"""The losses that torchreid's own engines train, each alone."""


def torchreids_step(values: Mapping[str, Any], processes: int) -> bool:
    """Whether torchreid's own engine trains the run, rather than a `MetricEngine`.

    Args:
        values: the values of a config, by key.
        processes: the number of processes.

    Returns:
        True for softmax or triplet alone, unless the run asks for something that torchreid's engines can't do.
    """
    more_than_torchreid = (
        values["train.own_step"],
        values["train.amp"] != "off",
        values["train.micro_batch"] != 0,
        values["train.nonfinite"] != "stop",
        values["train.sync_batchnorm"],
        processes > 1 and not values["test.evaluate"],
    )
    return values["loss.name"] in TORCHREIDS_LOSSES and not any(more_than_torchreid)


def number_of_folds(fraction: float) -> int:
    """How many disjoint shares the training identities have. Rounded fractions such as 0.3333334 are fine."""
    return math.floor((1 + 1e-6) / fraction)


def _one_gpu(use_gpu: bool) -> bool:
    """Whether there is no `nn.DataParallel` on several GPUs."""
    return not use_gpu or device.count() < 2 or distributed.world_size() > 1


RULES = [
    Rule(
        ("data.folder.camera",),
        finds_a_camera,
        "data.folder.camera must be auto, none, or a regular expression with one group, the camera, as 'cam(\\d+)'",
    ),
    Rule(("data.k_tfm",), lambda k_tfm: k_tfm == 1, "data.k_tfm must be 1, torchreid's engines do not support more"),
    Rule(
        ("data.cache", "data.batch_transforms"),
        lambda cache, batch_transforms: cache == "off" or batch_transforms,
        "data.cache ram needs data.batch_transforms True: decoding is a tenth of torchreid's time for an image",
    ),
    Rule(
        ("data.val_fold", "data.val_fraction"),
        lambda fold, fraction: fold == 0 or (fraction > 0 and fold < number_of_folds(fraction)),
        "data.val_fold counts from 0, and needs a data.val_fraction above 0 and at most 1 / (data.val_fold + 1)",
    ),
    Rule(
        ("loss.memory.size", "loss.name"),
        lambda size, name: size == 0 or name not in TORCHREIDS_LOSSES,
        "loss.memory.size needs loss sn, hap2s, fidi or custom",
    ),
    Rule(
        ("loss.memory.start_epoch", "train.max_epoch", "loss.memory.size", "test.evaluate"),
        lambda start, end, size, evaluate: start < end or size == 0 or evaluate,
        "loss.memory.start_epoch must be below train.max_epoch",
    ),
    Rule(
        ("train.amp", "use_gpu"),
        lambda amp, use_gpu: amp != "bf16" or _one_gpu(use_gpu),
        "train.amp bf16 trains on one GPU, hide the others with CUDA_VISIBLE_DEVICES",
    ),
    Rule(
        ("train.compile", "use_gpu"),
        lambda compiled, use_gpu: not compiled or _one_gpu(use_gpu),
        "train.compile trains on one GPU, hide the others with CUDA_VISIBLE_DEVICES",
    ),
    Rule(
        ("train.lr_scheduler", "train.stepsize", "train.max_epoch"),
        lambda schedule, steps, end: schedule != EXPONENTIAL or steps[0] < end,
        "train.lr_scheduler exponential needs a first train.stepsize below train.max_epoch",
    ),
    Rule(
        ("sampler.train_sampler", "train.batch_size", "sampler.num_cams"),
        lambda sampler, batch, cams: sampler != "RandomDomainSampler" or cams <= 0 or batch % cams == 0,
        "RandomDomainSampler needs a train.batch_size that is a multiple of sampler.num_cams",
    ),
    Rule(
        ("sampler.train_sampler", "train.batch_size", "sampler.num_datasets"),
        lambda sampler, batch, sets: sampler != "RandomDatasetSampler" or sets <= 0 or batch % sets == 0,
        "RandomDatasetSampler needs a train.batch_size that is a multiple of sampler.num_datasets",
    ),
    Rule(
        ("train.sync_batchnorm", "use_gpu", "test.evaluate"),
        lambda sync_batchnorm, use_gpu, evaluate: not sync_batchnorm or use_gpu or evaluate,
        "train.sync_batchnorm True needs GPUs, use_gpu True",
    ),
    Rule(
        ("loss.memory.size", "data.type"),
        lambda size, kind: size == 0 or kind == "image",
        "loss.memory.size above 0 needs data.type image",
    ),
    Rule(
        ("test.features", "test.evaluate"),
        lambda features, evaluate: not features or evaluate,
        "test.features needs a test run, test.evaluate True, since training changes the weights",
    ),
    Rule(
        ("test.held_out_only", "data.val_fraction", "test.evaluate"),
        lambda alone, fraction, evaluate: not alone or (fraction > 0 and not evaluate),
        "test.held_out_only True needs a training run with a data.val_fraction above 0",
    ),
    Rule(
        ("train.start_epoch", "train.max_epoch"),
        lambda start, end: start < end,
        "train.start_epoch must be at least 0 and below train.max_epoch",
    ),
    Rule(
        ("train.warmup_epochs", "train.max_epoch"),
        lambda epochs, end: epochs < end,
        "train.warmup_epochs must be at least 0 and below train.max_epoch",
    ),
    Rule(
        ("train.open_layers", "train.fixbase_epoch"),
        lambda layers, epochs: layers or epochs == 0,
        "train.open_layers must name a layer where train.fixbase_epoch is above 0",
    ),
]
"""The rules about keys that go together; the first that is broken is told."""
