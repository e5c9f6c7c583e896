"""The settings of a run: the checked config, with values filled in that the config leaves open.

Every entry point gets its settings from `resolve`: the command lines, the `build_*` functions and `train`. The
`*_kwargs` functions have the same names as those in torchreid's `scripts/default_config.py`, so that a main script
based on torchreid's can import them from here instead.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

from yacs.config import CfgNode

from torchreid_snloss import distributed
from torchreid_snloss.config import ConfigError, leaves, loss_names, metric_weights, softmax_weight, torchreid_keys
from torchreid_snloss.config.check import check_config
from torchreid_snloss.config.decide import decide
from torchreid_snloss.config.rules import torchreids_step
from torchreid_snloss.engine import TrainOptions

__all__ = [
    "Config",
    "Settings",
    "engine_kwargs",
    "engine_run_kwargs",
    "imagedata_kwargs",
    "loss_kwargs",
    "lr_scheduler_kwargs",
    "optimizer_kwargs",
    "resolve",
    "sampler_kwargs",
    "train_options",
    "videodata_kwargs",
    "wants_gpu",
]


def _from(key: str) -> Any:
    """A dataclass field that holds the value of a config key; lists become tuples."""
    return dataclasses.field(metadata={"key": key})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run, made by `resolve`; they can't be changed.

    The documentation of the keys gives the meaning, unit and range of each. `notes` are lines that report the values
    that were filled in; `processes` is the number of processes for which the config was checked.
    """

    use_gpu: bool = _from("use_gpu")
    seed: int = _from("train.seed")
    save_dir: str = _from("data.save_dir")

    data_type: str = _from("data.type")
    root: str = _from("data.root")
    sources: tuple[str, ...] = _from("data.sources")
    targets: tuple[str, ...] = _from("data.targets")
    height: int = _from("data.height")
    width: int = _from("data.width")
    norm_mean: tuple[float, ...] = _from("data.norm_mean")
    norm_std: tuple[float, ...] = _from("data.norm_std")
    val_fraction: float = _from("data.val_fraction")
    val_fold: int = _from("data.val_fold")
    train_fraction: float = _from("data.train_fraction")
    label_noise: float = _from("data.label_noise")
    outliers: float = _from("data.outliers")
    batch_size: int = _from("train.batch_size")
    train_sampler: str = _from("sampler.train_sampler")
    num_instances: int = _from("sampler.num_instances")

    model_name: str = _from("model.name")
    pretrained: bool = _from("model.pretrained")
    last_stride: int = _from("model.last_stride")
    embedding: tuple[int, ...] = _from("model.embedding")
    neck: str = _from("model.neck")
    load_weights: str = _from("model.load_weights")
    resume: str = _from("model.resume")

    loss_name: str = _from("loss.name")

    max_epoch: int = _from("train.max_epoch")
    start_epoch: int = _from("train.start_epoch")
    fixbase_epoch: int = _from("train.fixbase_epoch")
    open_layers: tuple[str, ...] = _from("train.open_layers")
    staged_lr: bool = _from("train.staged_lr")
    new_layers: tuple[str, ...] = _from("train.new_layers")
    optim: str = _from("train.optim")
    lr_scheduler: str = _from("train.lr_scheduler")
    stepsize: tuple[int, ...] = _from("train.stepsize")
    gamma: float = _from("train.gamma")
    warmup_epochs: int = _from("train.warmup_epochs")
    warmup_factor: float = _from("train.warmup_factor")
    channels_last: bool = _from("train.channels_last")

    evaluate: bool = _from("test.evaluate")
    dist_metric: str = _from("test.dist_metric")
    normalize_feature: bool = _from("test.normalize_feature")
    ranks: tuple[int, ...] = _from("test.ranks")
    flip: bool = _from("test.flip")
    multi_query: bool = _from("test.multi_query")
    rerank_in_training: bool = _from("test.rerank_in_training")
    visrank: bool = _from("test.visrank")
    features: str = _from("test.features")
    held_out_only: bool = _from("test.held_out_only")
    use_metric_cuhk03: bool = _from("cuhk03.use_metric_cuhk03")

    notes: tuple[str, ...]
    processes: int
    _cfg: CfgNode = dataclasses.field(repr=False, hash=False)

    @property
    def losses(self) -> tuple[str, ...]:
        """The losses that `loss.name` names."""
        return tuple(loss_names(self._cfg))

    @property
    def metric_weights(self) -> dict[str, float]:
        """The weight of each metric term, by the loss's name; none for softmax alone."""
        return metric_weights(self._cfg)

    @property
    def softmax_weight(self) -> float:
        """The weight of the softmax term."""
        return softmax_weight(self._cfg)

    @property
    def torchreids_step(self) -> bool:
        """Whether torchreid's own engine trains the run, which has softmax or triplet alone then."""
        return torchreids_step(dict(leaves(self._cfg)), self.processes)

    @property
    def logits_only(self) -> bool:
        """Whether the model returns logits alone in training, as torchreid's engine for softmax expects."""
        return self.loss_name == "softmax" and self.torchreids_step

    @property
    def values(self) -> dict[str, Any]:
        """The value of every key, including those that were filled in."""
        return copy.deepcopy(dict(leaves(self._cfg)))

    @property
    def unused_keys(self) -> set[str]:
        """The keys of the losses that `loss.name` does not name."""
        used = tuple(f"loss.{section}." for section in (*self.losses, "softmax", "memory"))
        keys = (key for key in self.values if key.startswith("loss.") and key != "loss.name")
        return {key for key in keys if not key.startswith(used)}

    @property
    def cfg_text(self) -> str:
        """The whole config as YAML, including the values that were filled in."""
        return str(self._cfg.dump())

    def __str__(self) -> str:
        return str(self._cfg)


Config: TypeAlias = CfgNode | Settings
"""The argument types of `resolve`."""


def resolve(cfg: Config) -> Settings:
    """Checks a config and fills in what it leaves open.

    If `test.normalize_feature` is None, it becomes True if a metric loss normalises its features, and otherwise False.
    With a metric loss, the `IdentitySampler` replaces the default `RandomSampler`. For image size, mean and standard
    deviation None becomes the model's own.

    Args:
        cfg: a config from `get_default_config` or `load_config`, which is not modified, or settings, which are returned
            as they are.

    Raises:
        ConfigError: for errors that can be detected from the config alone, with the key, its value and the allowed
            values.
    """
    processes = distributed.world_size()
    if isinstance(cfg, Settings):
        if cfg.processes != processes:  # the process group was joined after `resolve`
            check_config(cfg._cfg)
            return dataclasses.replace(cfg, processes=processes)
        return cfg
    if not isinstance(cfg, CfgNode):
        raise ConfigError(f"a config must be a CfgNode or Settings, got {type(cfg).__name__}")
    check_config(cfg)
    decided, notes = decide(cfg)
    values = dict(leaves(decided))
    keys = {f.name: f.metadata["key"] for f in dataclasses.fields(Settings) if "key" in f.metadata}
    fields = {name: _frozen(values[key]) for name, key in keys.items()}
    return Settings(**fields, notes=notes, processes=processes, _cfg=decided)


def wants_gpu(cfg: Config) -> bool:
    """Whether a run is to use the GPU, which is asked before its processes are joined and the config is resolved."""
    return bool(getattr(cfg, "use_gpu", False))  # what is no config is told when it is resolved


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def imagedata_kwargs(cfg: Config) -> dict[str, Any]:
    """Keywords of torchreid's `ImageDataManager`."""
    return _pick(cfg, torchreid_keys.IMAGE_KEYWORDS)


def videodata_kwargs(cfg: Config) -> dict[str, Any]:
    """Keywords of torchreid's `VideoDataManager`."""
    return _pick(cfg, torchreid_keys.VIDEO_KEYWORDS)


def sampler_kwargs(cfg: Config) -> dict[str, Any]:
    """Keywords of torchreid's `build_train_sampler`."""
    return _pick(cfg, {"batch_size": "train.batch_size", **torchreid_keys.SAMPLER_KEYWORDS})


def optimizer_kwargs(cfg: Config) -> dict[str, Any]:
    """Keywords of torchreid's `build_optimizer`."""
    return _pick(cfg, torchreid_keys.OPTIMIZER_KEYWORDS)


def lr_scheduler_kwargs(cfg: Config) -> dict[str, Any]:
    """Keywords of torchreid's `build_lr_scheduler`."""
    return _pick(cfg, torchreid_keys.SCHEDULER_KEYWORDS)


def engine_run_kwargs(cfg: Config) -> dict[str, Any]:
    """Keywords of torchreid's `Engine.run`."""
    return _pick(cfg, torchreid_keys.ENGINE_RUN_KEYWORDS)


def loss_kwargs(cfg: Config) -> dict[str, dict[str, Any]]:
    """The section of each metric loss, `loss.sn` and so on, by its name."""
    settings = resolve(cfg)
    values, sections = settings.values, {name: f"loss.{name}." for name in settings.metric_weights}
    return {
        name: {key.removeprefix(section): value for key, value in values.items() if key.startswith(section)}
        for name, section in sections.items()
    }


def engine_kwargs(cfg: Config) -> dict[str, Any]:
    """Keywords of the engine for `loss.name` and `data.type`, except for its criteria and their weights."""
    settings = resolve(cfg)
    keys = {
        "use_gpu": "use_gpu",
        "label_smooth": "loss.softmax.label_smooth",
        "channels_last": "train.channels_last",
        "compile": "train.compile",
    }
    if settings.data_type == "video":
        keys["pooling_method"] = "video.pooling_method"
    if settings.torchreids_step:
        if settings.loss_name == "triplet":
            keys |= {name: f"loss.triplet.{name}" for name in ("margin", "weight_t", "weight_x")}
    else:
        if not settings.evaluate:
            keys |= {name: f"train.{name}" for name in ("amp", "micro_batch", "sync_batchnorm")}
        keys |= {"memory_size": "loss.memory.size", "memory_start_epoch": "loss.memory.start_epoch"}
    return _pick(settings, keys)


def train_options(cfg: Config) -> TrainOptions:
    """The engine's options for what it does besides training."""
    keys = {name: f"train.{name}" for name in ("save_freq", "keep", "nonfinite", "record")}
    keys |= {"flip": "test.flip", "rerank": "test.rerank_in_training", "multi_query": "test.multi_query"}
    keys |= {"features": "test.features"}
    return TrainOptions(**_pick(cfg, keys))


def _pick(cfg: Config, keys: Mapping[str, str]) -> dict[str, Any]:
    values = resolve(cfg).values
    return {keyword: values[key] for keyword, key in keys.items()}
