"""Every key of the config: torchreid's, this package's, and those of its losses."""

from __future__ import annotations

import inspect

from torchreid_snloss.engine import MetricEngine
from torchreid_snloss.losses import LOSSES
from torchreid_snloss.torchreid_config import KEYS as TORCHREID_KEYS
from torchreid_snloss.torchreid_config import Key

__all__ = ["KEYWORD_KEYS", "MAY_BE_NONE", "OLD_KEYS", "OUR_KEYS", "SECTIONS", "WEIGHTS", "all_keys", "loss_keys"]

OUR_KEYS: dict[str, Key] = {
    "model.last_stride": Key(0, "stride of a ResNet's last stage, 1 or 2; 0: the model's own"),
    "model.embedding": Key([], "widths of layers after the pooled features, as `[1024, 128]`"),
    "model.neck": Key("none", "`none`, or `bnneck`: a batch norm after the features of the metric loss"),
    "test.flip": Key(False, "average the features of an image and its mirror image"),
    "test.multi_query": Key(False, "average the features of a query over Market-1501's gt_bbox images of it"),
    "test.rerank_in_training": Key(
        False, "re-rank in the evaluations of a training run too, where torchreid ignores `test.rerank`"
    ),
    "data.val_fraction": Key(0.0, "share of the training identities held out to choose the best checkpoint by"),
    "data.train_fraction": Key(1.0, "share of the training identities to train on"),
    "data.label_noise": Key(0.0, "share of the training images that get another identity's label, drawn at random"),
    "data.outliers": Key(
        0.0, "share of the training images replaced by a small patch of themselves, like a failed detection"
    ),
    "train.save_freq": Key(1, "epochs between checkpoints"),
    "train.keep": Key(3, "newest checkpoints to keep; 0: all"),
    "train.nonfinite": Key("stop", "what to do at a NaN or infinite loss or gradient: `stop`, or `skip` the step"),
    "train.amp": Key("off", "mixed precision: `off`, `bf16` or `fp16`"),
    "train.channels_last": Key(False, "use the channels-last memory format"),
    "train.compile": Key(False, "compile the model with `torch.compile`"),
    "train.warmup_epochs": Key(0, "epochs in which the learning rate rises to the schedule's"),
    "train.warmup_factor": Key(0.01, "share of the learning rate in the first of these epochs"),
    "train.micro_batch": Key(
        0, "images that a process puts through the model at a time, for batches larger than its memory; 0: all"
    ),
    "train.sync_batchnorm": Key(False, "compute batch norm over all processes' images"),
    "train.record": Key(
        False, "write what a report is drawn from to `save_dir/record`, and evaluate before training too"
    ),
    "loss.custom.target": Key("", "a class or function, as `pytorch_metric_learning.losses.CircleLoss`"),
    "loss.custom.kwargs": Key({}, "its keywords"),
    "loss.custom.miner": Key("", "as `pytorch_metric_learning.miners.MultiSimilarityMiner`; empty: none"),
    "loss.custom.miner_kwargs": Key({}, "its keywords"),
    "loss.custom.weight_m": Key(1.0, "weight of the criterion"),
    "loss.custom.weight_x": Key(1.0, "weight of the softmax term"),
    "loss.memory.size": Key(0, "how many features; 0: none"),
    "loss.memory.start_epoch": Key(0, "the epoch, from 0, in which they are first used"),
}
"""The keys that torchreid does not have."""

SECTIONS = {
    "loss.custom": "any criterion, by where it is imported from",
    "loss.memory": "features of earlier batches as further references",
}
"""What some sections are about."""

OLD_KEYS = {"data.use_unlabeled_targets": "data.load_train_targets", "test.visactmap": None}
"""Keys of older torchreid configs: their present names, None: obsolete."""
KEYWORD_KEYS = ("loss.custom.kwargs", "loss.custom.miner_kwargs")
"""Keys whose value is a mapping of any names."""
MAY_BE_NONE = ("loss.hap2s.margin", "data.norm_mean", "data.norm_std", "test.normalize_feature")
WEIGHTS = ("weight_m", "weight_x")
"""Keys of a loss's section that are the engine's."""


def loss_keys() -> dict[str, Key]:
    """The keys of SN, HAP2S and FIDI loss, with the defaults of their constructors; the docstrings are their texts."""
    weights = inspect.signature(MetricEngine).parameters
    found: dict[str, Key] = {}
    for name, loss in LOSSES.items():
        parameters = {**inspect.signature(loss).parameters, **{key: weights[key] for key in WEIGHTS}}
        del parameters["reduction"]  # training needs the mean
        found |= {f"loss.{name}.{key}": Key(parameter.default, "") for key, parameter in parameters.items()}
    return found


def all_keys() -> dict[str, Key]:
    """Every key but `use_gpu`, whose default depends on the machine."""
    return {**TORCHREID_KEYS, **OUR_KEYS, **loss_keys()}
