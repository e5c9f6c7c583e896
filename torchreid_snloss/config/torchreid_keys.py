"""torchreid's config as data: its keys with their defaults, and the function keywords that the keys map to.

Both come from torchreid's `scripts/default_config.py` (1.4.0), which is not part of the installed package.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torchreid import data, optim

from torchreid_snloss.config.ranges import Flag, Integer, Items, Number, Range, Text, Words
from torchreid_snloss.data import IdentitySampler

__all__ = ["BATCH", "DATA_KEYWORDS", "ENGINE_RUN_KEYWORDS", "EPOCHS", "EXPONENTIAL", "IMAGE_KEYWORDS", "KEYS",
           "OPTIMIZER_KEYWORDS", "SAMPLER_KEYWORDS", "SCHEDULER_KEYWORDS", "VIDEO_KEYWORDS", "WEIGHT",
           "Key"]  # fmt: skip


@dataclass(frozen=True)
class Key:
    """A key of the config.

    Attributes:
        default: Its value where nothing is set.
        text: What it means, as the documentation shows it.
        range: What values it may have.
    """

    default: Any
    text: str
    range: Range


EXPONENTIAL = "exponential"
"""The SN paper's schedule, a value of `train.lr_scheduler` in addition to torchreid's."""
BATCH, EPOCHS = 100_000, 1_000_000
"""The most images in a batch and the most epochs, far above what anyone trains with."""
WEIGHT = Number(at_least=0, at_most=1_000_000)
"""The range of a loss's weight."""
_SOME = range(1, 1001)  # the lengths of a list that must not be empty
_NAMES = Items(Text(), _SOME, once=True)
_TRANSFORMS = ("random_flip", "random_crop", "random_patch", "color_jitter", "random_erase")


def _samplers() -> Collection[str]:
    """torchreid's samplers, as they are now, and this package's."""
    return dict.fromkeys([*data.sampler.AVAI_SAMPLERS, IdentitySampler.__name__])


KEYS: dict[str, Key] = {
    "model.name": Key("resnet50", "one of `torchreid.models`, or `timm/` and the name of a timm model", Text()),
    "model.pretrained": Key(True, "start from ImageNet weights", Flag()),
    "model.load_weights": Key("", "a checkpoint to take the weights from", Text(empty=True)),
    "model.resume": Key(
        "", "a checkpoint to continue, or `auto`: the newest one in `save_dir/model`", Text(empty=True)
    ),
    "data.type": Key("image", "kind of the data sets", Words(("image", "video"))),
    "data.root": Key("reid-data", "the folder that holds the data sets", Text()),
    "data.sources": Key(["market1501"], "data sets to train on", _NAMES),
    "data.targets": Key(["market1501"], "data sets to test on", _NAMES),
    "data.workers": Key(4, "processes that load images", Integer(0, 256)),
    "data.split_id": Key(
        0, "which split, for data sets with several; of `folder` the seed of the split", Integer(0, 1_000_000)
    ),
    "data.height": Key(None, "height in pixels; None: 256, or a timm model's own", Integer(1, 4096, none=True)),
    "data.width": Key(None, "width in pixels; None: 128, or a timm model's own", Integer(1, 4096, none=True)),
    "data.combineall": Key(False, "train on query and gallery too", Flag()),
    "data.transforms": Key(
        ["random_flip"],
        "augmentations in training",
        Items(Words(_TRANSFORMS), once=True),
    ),
    "data.k_tfm": Key(1, "augmented copies of an image", Integer(1, 100)),
    "data.norm_mean": Key(
        None,
        "subtracted from red, green and blue; None: ImageNet's, or a timm model's own",
        Items(Number(at_least=0, at_most=1), (3,), none=True),
    ),
    "data.norm_std": Key(
        None,
        "red, green and blue are divided by it; None: ImageNet's, or a timm model's own",
        Items(Number(at_least=0.001, at_most=1000), (3,), none=True),
    ),
    "data.save_dir": Key("log", "folder for logs, checkpoints and pictures", Text()),
    "data.load_train_targets": Key(False, "load the training images of the targets too, without labels", Flag()),
    "market1501.use_500k_distractors": Key(False, "add the 500,000 distractors to the gallery", Flag()),
    "cuhk03.labeled_images": Key(False, "use boxes drawn by people instead of detected ones", Flag()),
    "cuhk03.classic_split": Key(False, "use the 20 splits of the first protocol", Flag()),
    "cuhk03.use_metric_cuhk03": Key(False, "rank one gallery image per identity, drawn at random", Flag()),
    "sampler.train_sampler": Key(
        "RandomSampler",
        "how batches are drawn; `IdentitySampler` replaces `RandomSampler` for metric losses",
        Words(_samplers),
    ),
    "sampler.train_sampler_t": Key("RandomSampler", "sampler of the targets' training images", Words(_samplers)),
    "sampler.num_instances": Key(4, "images of an identity in a batch", Integer(1, BATCH)),
    "sampler.num_cams": Key(1, "cameras in a batch, for `RandomDomainSampler`; 0 or -1: all", Integer(-1, BATCH)),
    "sampler.num_datasets": Key(
        1, "data sets in a batch, for `RandomDatasetSampler`; 0 or -1: all", Integer(-1, BATCH)
    ),
    "video.seq_len": Key(15, "frames of a tracklet", Integer(1, 1000)),
    "video.sample_method": Key("evenly", "which frames", Words(("evenly", "random", "all"))),
    "video.pooling_method": Key("avg", "how a tracklet's feature is made from its frames'", Words(("avg", "max"))),
    "train.optim": Key("adam", "optimizer", Words(lambda: optim.optimizer.AVAI_OPTIMS)),
    "train.lr": Key(0.0003, "learning rate", Number(above=0, at_most=100)),
    "train.weight_decay": Key(5e-4, "L2 penalty of the weights", Number(at_least=0, at_most=100)),
    "train.max_epoch": Key(60, "epochs to train", Integer(1, EPOCHS)),
    "train.start_epoch": Key(0, "epochs done before; `model.resume` replaces it", Integer(0, EPOCHS)),
    "train.batch_size": Key(32, "images in a batch, over all processes", Integer(1, BATCH)),
    "train.fixbase_epoch": Key(0, "epochs at the start that train `open_layers` only", Integer(0, EPOCHS)),
    "train.open_layers": Key(["classifier"], "the layers trained in these epochs", Items(Text(), once=True)),
    "train.staged_lr": Key(False, "use a smaller learning rate for all layers but `new_layers`", Flag()),
    "train.new_layers": Key(["classifier"], "the layers that keep the whole learning rate", Items(Text(), once=True)),
    "train.base_lr_mult": Key(
        0.1, "share of the learning rate that the other layers get", Number(at_least=0, at_most=1000)
    ),
    "train.lr_scheduler": Key(
        "single_step",
        "schedule of the learning rate; `exponential` is the SN paper's",
        Words(lambda: (*optim.lr_scheduler.AVAI_SCH, EXPONENTIAL)),
    ),
    "train.stepsize": Key(
        [20],
        "epochs after which the learning rate falls; `exponential` starts to fall after the first",
        Items(Integer(1, EPOCHS), _SOME),
    ),
    "train.gamma": Key(
        0.1, "factor of a step; of `exponential`, the factor of the whole fall", Number(above=0, at_most=1)
    ),
    "train.print_freq": Key(20, "batches between two progress lines", Integer(1, 1_000_000)),
    "train.seed": Key(1, "seed of everything random", Integer(0, 2**32 - 1)),
    "sgd.momentum": Key(0.9, "momentum of `sgd` and `rmsprop`", Number(at_least=0, below=1)),
    "sgd.dampening": Key(0.0, "dampening of the momentum", Number(at_least=0, below=1)),
    "sgd.nesterov": Key(False, "use Nesterov's momentum", Flag()),
    "rmsprop.alpha": Key(0.99, "smoothing constant", Number(at_least=0, below=1)),
    "adam.beta1": Key(0.9, "decay of the mean gradient", Number(at_least=0, below=1)),
    "adam.beta2": Key(0.999, "decay of the mean squared gradient", Number(at_least=0, below=1)),
    "loss.name": Key(
        "softmax",
        "`softmax`, `triplet`, `sn`, `hap2s`, `fidi`, `custom`, or several of the last five, as `sn+triplet`",
        Text(),
    ),
    "loss.softmax.label_smooth": Key(True, "smooth the labels by 0.1 in the softmax term of every loss", Flag()),
    "loss.triplet.margin": Key(0.3, "margin, in the unit of the distances", Number(at_least=0, at_most=1_000_000)),
    "loss.triplet.weight_t": Key(1.0, "weight of the triplet term", WEIGHT),
    "loss.triplet.weight_x": Key(0.0, "weight of the softmax term", WEIGHT),
    "test.batch_size": Key(100, "images at a time", Integer(1, BATCH)),
    "test.dist_metric": Key("euclidean", "distance between features", Words(("euclidean", "cosine"))),
    "test.normalize_feature": Key(
        None, "L2-normalise features; None: if the loss normalises them in training", Flag(none=True)
    ),
    "test.ranks": Key([1, 5, 10, 20], "ranks of the CMC curve to print", Items(Integer(1, 1000), once=True)),
    "test.evaluate": Key(False, "test without training", Flag()),
    "test.eval_freq": Key(-1, "epochs between evaluations; -1: evaluate after training only", Integer(-1, EPOCHS)),
    "test.start_eval": Key(0, "the first epoch that may be evaluated", Integer(0, EPOCHS)),
    "test.rerank": Key(False, "re-rank with k-reciprocal neighbours, in a test run", Flag()),
    "test.visrank": Key(False, "draw ranked lists, after training those of the last test", Flag()),
    "test.visrank_topk": Key(10, "images in a ranked list", Integer(1, 1000)),
}
"""By name, `section.key`."""

# The rest: keywords of torchreid's functions, and the keys that hold their values.
SAMPLER_KEYWORDS = {
    "train_sampler": "sampler.train_sampler",
    "num_instances": "sampler.num_instances",
    "num_cams": "sampler.num_cams",
    "num_datasets": "sampler.num_datasets",
}
DATA_KEYWORDS = {
    "root": "data.root",
    "sources": "data.sources",
    "targets": "data.targets",
    "height": "data.height",
    "width": "data.width",
    "transforms": "data.transforms",
    "norm_mean": "data.norm_mean",
    "norm_std": "data.norm_std",
    "use_gpu": "use_gpu",
    "split_id": "data.split_id",
    "combineall": "data.combineall",
    "batch_size_train": "train.batch_size",
    "batch_size_test": "test.batch_size",
    "workers": "data.workers",
    **SAMPLER_KEYWORDS,
}
IMAGE_KEYWORDS = {
    **DATA_KEYWORDS,
    "k_tfm": "data.k_tfm",
    "load_train_targets": "data.load_train_targets",
    "train_sampler_t": "sampler.train_sampler_t",
    "cuhk03_labeled": "cuhk03.labeled_images",
    "cuhk03_classic_split": "cuhk03.classic_split",
    "market1501_500k": "market1501.use_500k_distractors",
}
VIDEO_KEYWORDS = {**DATA_KEYWORDS, "seq_len": "video.seq_len", "sample_method": "video.sample_method"}
OPTIMIZER_KEYWORDS = {
    "optim": "train.optim",
    "lr": "train.lr",
    "weight_decay": "train.weight_decay",
    "momentum": "sgd.momentum",
    "sgd_dampening": "sgd.dampening",
    "sgd_nesterov": "sgd.nesterov",
    "rmsprop_alpha": "rmsprop.alpha",
    "adam_beta1": "adam.beta1",
    "adam_beta2": "adam.beta2",
    "staged_lr": "train.staged_lr",
    "new_layers": "train.new_layers",
    "base_lr_mult": "train.base_lr_mult",
}
SCHEDULER_KEYWORDS = {
    "lr_scheduler": "train.lr_scheduler",
    "stepsize": "train.stepsize",
    "gamma": "train.gamma",
    "max_epoch": "train.max_epoch",
}
ENGINE_RUN_KEYWORDS = {
    "save_dir": "data.save_dir",
    "max_epoch": "train.max_epoch",
    "start_epoch": "train.start_epoch",
    "fixbase_epoch": "train.fixbase_epoch",
    "open_layers": "train.open_layers",
    "start_eval": "test.start_eval",
    "eval_freq": "test.eval_freq",
    "test_only": "test.evaluate",
    "print_freq": "train.print_freq",
    "dist_metric": "test.dist_metric",
    "normalize_feature": "test.normalize_feature",
    "visrank": "test.visrank",
    "visrank_topk": "test.visrank_topk",
    "use_metric_cuhk03": "cuhk03.use_metric_cuhk03",
    "ranks": "test.ranks",
    "rerank": "test.rerank",
}
