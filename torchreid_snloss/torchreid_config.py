"""torchreid's config as data: its keys with their defaults, and the keywords of its functions that they are for.

Both are those of torchreid's `scripts/default_config.py` (1.4.0), which no package installs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["DATA_KEYWORDS", "ENGINE_RUN_KEYWORDS", "IMAGE_KEYWORDS", "KEYS", "OPTIMIZER_KEYWORDS", "SAMPLER_KEYWORDS",
           "SCHEDULER_KEYWORDS", "VIDEO_KEYWORDS", "Key"]  # fmt: skip


class Key(NamedTuple):
    """A key of the config.

    Attributes:
        default: its value where nothing is set.
        text: what it means, as the documentation shows it.
        type: the type of its values, where the default is None.
    """

    default: Any
    text: str
    type: type | None = None


KEYS: dict[str, Key] = {
    "model.name": Key("resnet50", "one of `torchreid.models`"),
    "model.pretrained": Key(True, "start from ImageNet weights"),
    "model.load_weights": Key("", "a checkpoint to take the weights from"),
    "model.resume": Key("", "a checkpoint to continue, or `auto`: the newest one in `save_dir/model`"),
    "data.type": Key("image", "`image` or `video`"),
    "data.root": Key("reid-data", "the folder that holds the data sets"),
    "data.sources": Key(["market1501"], "data sets to train on"),
    "data.targets": Key(["market1501"], "data sets to test on"),
    "data.workers": Key(4, "processes that load images"),
    "data.split_id": Key(0, "which split, for data sets with several"),
    "data.height": Key(256, "height of an image in pixels"),
    "data.width": Key(128, "width of an image in pixels"),
    "data.combineall": Key(False, "train on query and gallery too"),
    "data.transforms": Key(
        ["random_flip"], "any of `random_flip`, `random_crop`, `random_patch`, `color_jitter`, `random_erase`"
    ),
    "data.k_tfm": Key(1, "augmented copies of an image"),
    "data.norm_mean": Key([0.485, 0.456, 0.406], "subtracted from red, green and blue, in [0, 1]"),
    "data.norm_std": Key([0.229, 0.224, 0.225], "red, green and blue are divided by it"),
    "data.save_dir": Key("log", "folder for logs, checkpoints and pictures"),
    "data.load_train_targets": Key(False, "load the training images of the targets too, without labels"),
    "market1501.use_500k_distractors": Key(False, "add the 500,000 distractors to the gallery"),
    "cuhk03.labeled_images": Key(False, "use boxes drawn by people instead of detected ones"),
    "cuhk03.classic_split": Key(False, "use the 20 splits of the first protocol"),
    "cuhk03.use_metric_cuhk03": Key(False, "rank one gallery image per identity, drawn at random"),
    "sampler.train_sampler": Key(
        "RandomSampler", "one of torchreid's, or `IdentitySampler`, which replaces `RandomSampler` for metric losses"
    ),
    "sampler.train_sampler_t": Key("RandomSampler", "sampler of the targets' training images"),
    "sampler.num_instances": Key(4, "images of an identity in a batch"),
    "sampler.num_cams": Key(1, "cameras in a batch, for `RandomDomainSampler`"),
    "sampler.num_datasets": Key(1, "data sets in a batch, for `RandomDatasetSampler`"),
    "video.seq_len": Key(15, "frames of a tracklet"),
    "video.sample_method": Key("evenly", "which frames: `evenly`, `random` or `all`"),
    "video.pooling_method": Key("avg", "how a tracklet's feature is made from its frames': `avg` or `max`"),
    "train.optim": Key("adam", "`adam`, `amsgrad`, `sgd`, `rmsprop` or `radam`"),
    "train.lr": Key(0.0003, "learning rate"),
    "train.weight_decay": Key(5e-4, "L2 penalty of the weights"),
    "train.max_epoch": Key(60, "epochs to train"),
    "train.start_epoch": Key(0, "epochs done before; `model.resume` replaces it"),
    "train.batch_size": Key(32, "images in a batch, over all processes"),
    "train.fixbase_epoch": Key(0, "epochs at the start that train `open_layers` only"),
    "train.open_layers": Key(["classifier"], "the layers trained in these epochs"),
    "train.staged_lr": Key(False, "use a smaller learning rate for all layers but `new_layers`"),
    "train.new_layers": Key(["classifier"], "the layers that keep the whole learning rate"),
    "train.base_lr_mult": Key(0.1, "share of the learning rate that the other layers get"),
    "train.lr_scheduler": Key(
        "single_step", "`single_step`, `multi_step`, `cosine` or `exponential` (the SN paper's schedule)"
    ),
    "train.stepsize": Key(
        [20], "epochs after which the learning rate falls; `exponential` starts to fall after the first"
    ),
    "train.gamma": Key(0.1, "factor of a step; of `exponential`, the factor of the whole fall"),
    "train.print_freq": Key(20, "batches between two progress lines"),
    "train.seed": Key(1, "seed of everything random"),
    "sgd.momentum": Key(0.9, "momentum of `sgd` and `rmsprop`"),
    "sgd.dampening": Key(0.0, "dampening of the momentum"),
    "sgd.nesterov": Key(False, "use Nesterov's momentum"),
    "rmsprop.alpha": Key(0.99, "smoothing constant"),
    "adam.beta1": Key(0.9, "decay of the mean gradient"),
    "adam.beta2": Key(0.999, "decay of the mean squared gradient"),
    "loss.name": Key(
        "softmax", "`softmax`, `triplet`, `sn`, `hap2s`, `fidi`, `custom`, or several of the last five, as `sn+triplet`"
    ),
    "loss.softmax.label_smooth": Key(True, "smooth the labels by 0.1 in the softmax term of every loss"),
    "loss.triplet.margin": Key(0.3, "margin, in the unit of the distances"),
    "loss.triplet.weight_t": Key(1.0, "weight of the triplet term"),
    "loss.triplet.weight_x": Key(0.0, "weight of the softmax term"),
    "test.batch_size": Key(100, "images at a time"),
    "test.dist_metric": Key("euclidean", "`euclidean` or `cosine`"),
    "test.normalize_feature": Key(
        None, "L2-normalise features; None: if the loss normalises them in training", type=bool
    ),
    "test.ranks": Key([1, 5, 10, 20], "ranks of the CMC curve to print"),
    "test.evaluate": Key(False, "test without training"),
    "test.eval_freq": Key(-1, "epochs between evaluations; -1: evaluate after training only"),
    "test.start_eval": Key(0, "the first epoch that may be evaluated"),
    "test.rerank": Key(False, "re-rank with k-reciprocal neighbours, in a test run"),
    "test.visrank": Key(False, "draw ranked lists; after training this takes another test run"),
    "test.visrank_topk": Key(10, "images in a ranked list"),
}  # fmt: skip
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
