"""The config: its keys with their defaults and ranges, files and options, and the rules for values."""

from torchreid_snloss.config.tree import (
    ConfigError,
    get_default_config,
    leaves,
    load_config,
    loss_names,
    merge_options,
    metric_weights,
    softmax_weight,
    unknown_key,
    weight_key,
)
from torchreid_snloss.deprecation import renamed

__all__ = [
    "ConfigError",
    "get_default_config",
    "leaves",
    "load_config",
    "loss_names",
    "merge_options",
    "metric_weights",
    "softmax_weight",
    "unknown_key",
    "weight_key",
]

_MOVED = ("engine_run_kwargs", "imagedata_kwargs", "lr_scheduler_kwargs", "optimizer_kwargs", "videodata_kwargs")
__getattr__ = renamed(__name__, {name: f"torchreid_snloss.settings.{name}" for name in _MOVED})
