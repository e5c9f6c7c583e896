"""The rules of the config, as tables: the words that a key takes, and what values must be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torchreid import data, optim

from torchreid_snloss import distributed
from torchreid_snloss.config import ConfigError
from torchreid_snloss.data import IdentitySampler

__all__ = ["EXPONENTIAL", "RULES", "Rule", "choices", "torchreids_loss"]

EXPONENTIAL = "exponential"
"""The SN paper's schedule, a `train.lr_scheduler` beside torchreid's."""


def choices() -> dict[str, Collection[str]]:
    """The words that a key takes, or each word of its list; torchreid's own lists, as they are now."""
    return {
        "data.type": ("image", "video"),
        "train.optim": optim.optimizer.AVAI_OPTIMS,
        "train.lr_scheduler": (*optim.lr_scheduler.AVAI_SCH, EXPONENTIAL),
        "model.neck": ("none", "bnneck"),
        "video.pooling_method": ("avg", "max"),
        "sampler.train_sampler": dict.fromkeys([*data.sampler.AVAI_SAMPLERS, IdentitySampler.__name__]),
        "test.dist_metric": ("euclidean", "cosine"),
        "train.nonfinite": ("stop", "skip"),
        # torchreid's build_transforms ignores a name it does not know.
        "data.transforms": ("random_flip", "random_crop", "random_patch", "color_jitter", "random_erase"),
    }


@dataclass(frozen=True)
class Rule:
    """What the values of some keys must be.

    Attributes:
        keys: the keys.
        test: takes their values, in order; what it gives is true where the rule is kept.
        message: what is expected; a value that breaks the rule is shown behind it.
    """

    keys: tuple[str, ...]
    test: Callable[..., Any]
    message: str

    def check(self, values: Mapping[str, Any]) -> None:
        """Raises ConfigError if the values of a config, by key, break the rule."""
        given = {key: values[key] for key in self.keys}
        if not self.test(*given.values()):
            raise ConfigError(f"{self.message}; got " + ", ".join(f"{key} {value}" for key, value in given.items()))


def torchreids_loss(name: str) -> bool:
    """Whether `loss.name` is one of torchreid's alone, which its own engines train."""
    return name in ("softmax", "triplet")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _one_gpu(use_gpu: bool) -> bool:
    """Whether there is no `nn.DataParallel` on several GPUs."""
    return not use_gpu or torch.cuda.device_count() < 2 or distributed.world_size() > 1


def _falls(schedule: str, stepsize: Any, max_epoch: int, gamma: float) -> bool:
    steps = stepsize if isinstance(stepsize, (list, tuple)) else [stepsize]
    if schedule != EXPONENTIAL:
        return True
    return all(map(_is_count, steps)) and min(steps[:1], default=0) < max_epoch and gamma > 0


RULES = [
    Rule(
        ("data.sources", "data.targets"),
        lambda sources, targets: sources and targets,
        "data.sources and data.targets must name at least one data set each",
    ),
    Rule(
        ("data.height", "data.width"),
        lambda height, width: min(height, width) >= 1,
        "data.height and data.width must be at least 1",
    ),
    Rule(("data.workers",), lambda workers: workers >= 0, "data.workers must be at least 0"),
    Rule(("data.k_tfm",), lambda k_tfm: k_tfm == 1, "data.k_tfm must be 1, torchreid's engines take no more"),
    Rule(
        ("data.norm_mean", "data.norm_std"),
        lambda mean, std: (
            all(len(norm or ()) in (0, 3) and all(map(_is_number, norm or ())) for norm in (mean, std))
            and min(std or [1]) > 0
        ),
        "data.norm_mean and data.norm_std must be 3 numbers each, the latter above 0",
    ),
    Rule(("data.val_fraction",), lambda share: 0 <= share < 1, "data.val_fraction must be at least 0 and below 1"),
    Rule(("data.train_fraction",), lambda share: 0 < share <= 1, "data.train_fraction must be above 0 and at most 1"),
    Rule(("data.label_noise",), lambda share: 0 <= share < 1, "data.label_noise must be at least 0 and below 1"),
    Rule(("data.outliers",), lambda share: 0 <= share <= 1, "data.outliers must be at least 0 and at most 1"),
    Rule(
        ("train.save_freq", "train.keep"),
        lambda save_freq, keep: save_freq >= 1 and keep >= 0,
        "train.save_freq must be at least 1 and train.keep at least 0",
    ),
    Rule(
        ("train.nonfinite", "loss.name"),
        lambda nonfinite, name: nonfinite == "stop" or not torchreids_loss(name),
        "train.nonfinite skip needs loss sn, hap2s, fidi or custom",
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
    Rule(("model.last_stride",), lambda stride: stride in (0, 1, 2), "model.last_stride must be 0, 1 or 2"),
    Rule(("model.embedding",), lambda widths: all(map(_is_count, widths)), "model.embedding must be a list of widths"),
    Rule(("train.warmup_factor",), lambda factor: 0 < factor <= 1, "train.warmup_factor must be above 0 and at most 1"),
    Rule(
        ("train.lr_scheduler", "train.stepsize", "train.max_epoch", "train.gamma"),
        _falls,
        "train.lr_scheduler exponential needs a first train.stepsize below train.max_epoch and train.gamma above 0",
    ),
    Rule(("train.micro_batch",), lambda images: images >= 0, "train.micro_batch must be at least 0"),
    Rule(
        ("train.sync_batchnorm", "use_gpu"),
        lambda sync_batchnorm, use_gpu: not sync_batchnorm or use_gpu,
        "train.sync_batchnorm True needs GPUs, use_gpu True",
    ),
    Rule(
        ("loss.memory.size", "loss.memory.start_epoch"),
        lambda size, epoch: min(size, epoch) >= 0,
        "loss.memory.size and loss.memory.start_epoch must be at least 0",
    ),
    Rule(
        ("loss.memory.size", "data.type"),
        lambda size, kind: size == 0 or kind == "image",
        "loss.memory.size above 0 needs data.type image",
    ),
    Rule(("train.seed",), lambda seed: seed >= 0, "train.seed must be at least 0"),
    Rule(("train.lr",), lambda lr: 0 < lr < float("inf"), "train.lr must be above 0 and finite"),
    Rule(("train.print_freq",), lambda batches: batches >= 1, "train.print_freq must be at least 1"),
    Rule(
        ("train.batch_size", "test.batch_size"),
        lambda train, test: min(train, test) >= 1,
        "train.batch_size and test.batch_size must be at least 1",
    ),
    Rule(
        ("train.start_epoch", "train.max_epoch"),
        lambda start, end: 0 <= start < end,
        "train.start_epoch must be at least 0 and below train.max_epoch",
    ),
    Rule(
        ("train.warmup_epochs", "train.max_epoch"),
        lambda epochs, end: 0 <= epochs < end,
        "train.warmup_epochs must be at least 0 and below train.max_epoch",
    ),
    Rule(
        ("train.stepsize",),
        lambda steps: steps and all(map(_is_count, steps if isinstance(steps, (list, tuple)) else [steps])),
        "train.stepsize must be a list of epochs above 0",
    ),
    Rule(
        ("train.open_layers", "train.fixbase_epoch"),
        lambda layers, epochs: layers or epochs <= 0,
        "train.open_layers must name a layer where train.fixbase_epoch is above 0",
    ),
    Rule(("test.ranks",), lambda ranks: all(map(_is_count, ranks)), "test.ranks must be a list of whole numbers"),
    Rule(
        ("test.normalize_feature",),
        lambda value: value is None or isinstance(value, bool),
        "test.normalize_feature must be True or False, or None for the loss's own",
    ),
    Rule(("test.visrank_topk",), lambda images: images >= 1, "test.visrank_topk must be at least 1"),
]
"""The rules about numbers, lists, and keys that go together; the first that is broken is told."""
