"""Every key of the config: torchreid's, this package's, and those of its losses."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from torchreid_snloss import device
from torchreid_snloss.config.ranges import Flag, Integer, Items, Keywords, Number, Range, Text, Words, shortened, shown
from torchreid_snloss.config.torchreid_keys import BATCH, EPOCHS, WEIGHT, Key
from torchreid_snloss.config.torchreid_keys import KEYS as TORCHREID_KEYS
from torchreid_snloss.data.folder_layouts import LAYOUTS
from torchreid_snloss.losses import LOSSES

__all__ = [
    "KEYWORD_KEYS",
    "MOST_FOLDS",
    "OLD_KEYS",
    "ONE_OR_MORE",
    "OUR_KEYS",
    "SECTIONS",
    "WEIGHTS",
    "LossArgument",
    "all_keys",
    "loss_keys",
]

MOST_FOLDS = 1000
"""The most shares of the training identities that can be held out in turn."""

OUR_KEYS: dict[str, Key] = {
    "model.last_stride": Key(0, "stride of a ResNet's last stage; 0: the model's own", Integer(0, 2)),
    "model.embedding": Key(
        [], "widths of layers after the pooled features, as `[1024, 128]`", Items(Integer(1, 8192), range(5))
    ),
    "model.neck": Key(
        "none", "`bnneck`: a batch norm after the features of the metric loss", Words(("none", "bnneck"))
    ),
    "test.flip": Key(False, "average the features of an image and its mirror image", Flag()),
    "test.multi_query": Key(False, "average the features of a query over Market-1501's gt_bbox images of it", Flag()),
    "test.features": Key(
        "", "a file for the features of a test run, which tests from it once it is there; empty: none", Text(empty=True)
    ),
    "test.rerank_in_training": Key(
        False, "re-rank in the evaluations of a training run too, where torchreid ignores `test.rerank`", Flag()
    ),
    "test.held_out_only": Key(
        False, "evaluate on the identities that `data.val_fraction` holds out, and on no test set", Flag()
    ),
    "data.modules": Key(
        [],
        "Python files, or modules by their names, to import first, such as `my_data.py`, which registers data sets of "
        "your own; their code runs",
        Items(Text(), once=True),
    ),
    "data.folder.path": Key(
        "", "the folder or CSV file, relative to `data.root`; empty: `data.root` itself", Text(empty=True)
    ),
    "data.folder.layout": Key(
        "auto",
        "`market`: names as `0001_c1_01.jpg`; `people`: a folder for each person; `csv`: a CSV file with columns path, "
        "identity, camera and split; `auto`: the one that the folder has",
        Words(LAYOUTS),
    ),
    "data.folder.camera": Key(
        "auto",
        "how the camera is found in a file's name: `auto` as `c1` or `cam1`, `none`, or a regular expression with the "
        "camera as group, as `lens(\\d+)`",
        Text(),
    ),
    "data.folder.junk": Key(
        ["-1"],
        "identities that are left out, in quotes; leading zeros of numbers don't matter",
        Items(Text(), once=True),
    ),
    "data.folder.test_fraction": Key(
        0.3,
        "share of the people to test on if the folder is not split, drawn at random with the seed `data.split_id`",
        Number(above=0, below=1),
    ),
    "data.val_fraction": Key(
        0.0, "share of the training identities held out to choose the best checkpoint by", Number(at_least=0, below=1)
    ),
    "data.val_fold": Key(
        0,
        "which of the disjoint shares of size `data.val_fraction` is held out, counted from 0",
        Integer(0, MOST_FOLDS - 1),
    ),
    "data.train_fraction": Key(1.0, "share of the training identities to train on", Number(above=0, at_most=1)),
    "data.label_noise": Key(
        0.0,
        "share of the training images that get another identity's label, drawn at random",
        Number(at_least=0, below=1),
    ),
    "data.outliers": Key(
        0.0,
        "share of the training images replaced by a small patch of themselves, like a failed detection",
        Number(at_least=0, at_most=1),
    ),
    "data.batch_transforms": Key(
        False, "transform whole batches on the model's device; workers decode images only", Flag()
    ),
    "data.cache": Key(
        "off",
        "`ram`: decode each image once, and keep all in memory that workers and processes share",
        Words(("off", "ram")),
    ),
    "train.save_freq": Key(1, "epochs between checkpoints", Integer(1, EPOCHS)),
    "train.keep": Key(3, "newest checkpoints to keep; 0: all", Integer(0, EPOCHS)),
    "train.nonfinite": Key(
        "stop",
        "what to do at a NaN or infinite loss or gradient: stop the run, or skip the step",
        Words(("stop", "skip")),
    ),
    "train.own_step": Key(
        False, "train softmax and triplet in this package's step too, as `train.amp` and the like do", Flag()
    ),
    "train.amp": Key("off", "mixed precision", Words(("off", "bf16", "fp16"))),
    "train.channels_last": Key(False, "use the channels-last memory format", Flag()),
    "train.compile": Key(False, "compile the model with `torch.compile`", Flag()),
    "train.warmup_epochs": Key(0, "epochs in which the learning rate rises to the schedule's", Integer(0, EPOCHS)),
    "train.warmup_factor": Key(
        0.01, "share of the learning rate in the first of these epochs", Number(at_least=1e-6, at_most=1)
    ),
    "train.micro_batch": Key(
        0,
        "images that a process puts through the model at a time, 2 or more, for batches larger than its memory; 0: all",
        Integer(0, BATCH),
    ),
    "train.sync_batchnorm": Key(False, "compute batch norm over all processes' images", Flag()),
    "train.record": Key(
        False, "write what a report is drawn from to `save_dir/record`, and evaluate before training too", Flag()
    ),
    "loss.custom.target": Key(
        "", "a class or function, as `pytorch_metric_learning.losses.CircleLoss`", Text(empty=True)
    ),
    "loss.custom.kwargs": Key({}, "its keywords", Keywords()),
    "loss.custom.miner": Key(
        "", "as `pytorch_metric_learning.miners.MultiSimilarityMiner`; empty: none", Text(empty=True)
    ),
    "loss.custom.miner_kwargs": Key({}, "its keywords", Keywords()),
    "loss.custom.weight_m": Key(1.0, "weight of the criterion", WEIGHT),
    "loss.custom.weight_x": Key(1.0, "weight of the softmax term", WEIGHT),
    "loss.memory.size": Key(0, "how many features; 0: none", Integer(0, 1_000_000)),
    "loss.memory.start_epoch": Key(0, "the epoch, from 0, in which they are first used", Integer(0, EPOCHS)),
}
"""The keys that torchreid does not have."""

SECTIONS = {
    "data.folder": "the data set `folder`, images in a folder of your own",
    "loss.custom": "any criterion, given by its import path",
    "loss.memory": "features of earlier batches as additional references",
}
"""Descriptions of some sections."""

OLD_KEYS = {"data.use_unlabeled_targets": "data.load_train_targets", "test.visactmap": None}
"""Keys of older torchreid configs with their current names; None if a key is obsolete."""
ONE_OR_MORE = ("data.modules",)
"""Keys of lists for which a single word is a list of one."""
KEYWORD_KEYS = ("loss.custom.kwargs", "loss.custom.miner_kwargs")
"""Keys whose value is a mapping of any names."""
WEIGHTS = ("weight_m", "weight_x")
"""Keys of a loss's section that are arguments of the engine."""


@dataclass(frozen=True)
class LossArgument(Range):
    """What a loss's constructor accepts for one of its arguments: the check is the constructor's own.

    Attributes:
        loss: The name of the loss.
        argument: The name of the argument.
    """

    loss: str
    argument: str

    @property
    def kind(self) -> type:  # type: ignore[override]
        return type(inspect.signature(LOSSES[self.loss]).parameters[self.argument].default)

    @property
    def bounds(self) -> str:
        words = get_args(get_type_hints(LOSSES[self.loss].__init__)[self.argument])
        if self.kind is str:
            return ", ".join(words)
        if self.kind is bool:
            return "True or False"
        lowest = {"at least 0": 0.0, "above 0": sys.float_info.min, "at least 1": 1.0, "above 1": 1.5}
        accepted = (text for text, value in lowest.items() if not self._error(self.kind(value)))
        lower = next(accepted, "as its meaning says,")
        return f"{lower} and at most {_LARGEST:,}{', or None' if not self._error(None) else ''}"

    def holds(self, value: Any) -> bool:
        return self.problem("", value) is None

    def problem(self, key: str, value: Any) -> str | None:
        plain = value is None or isinstance(value, (bool, int, float, str))
        if not plain or (isinstance(value, (int, float)) and _LARGEST < abs(value) < float("inf")):
            return f"{key} must be {self.bounds}; got {key} {shown(value)}"
        error = self._error(value)
        return f"loss.{self.loss}: {shortened(error)}" if error else None

    def _error(self, value: Any) -> str:
        try:
            LOSSES[self.loss](**{self.argument: value})
        except (TypeError, ValueError) as error:
            return str(error)
        return ""


_LARGEST = 1_000_000_000  # for the numbers of the losses, whose checks have no upper bound


def loss_keys() -> dict[str, Key]:
    """The keys of SN, HAP2S and FIDI loss with the losses' own defaults; their texts come from the docstrings."""
    found: dict[str, Key] = {}
    for name, loss in LOSSES.items():
        defaults = {key: parameter.default for key, parameter in inspect.signature(loss).parameters.items()}
        del defaults["reduction"]  # training needs the mean
        found |= {f"loss.{name}.{key}": Key(default, "", LossArgument(name, key)) for key, default in defaults.items()}
        for key, default in (("weight_m", loss.default_weight), ("weight_x", 1.0)):
            found[f"loss.{name}.{key}"] = Key(default, "", WEIGHT)
    return found


def all_keys() -> dict[str, Key]:
    """Every key; the default of `use_gpu` depends on the machine, and the engine's docstring is its text."""
    return {**TORCHREID_KEYS, **OUR_KEYS, **loss_keys(), "use_gpu": Key(device.is_available(), "", Flag())}
