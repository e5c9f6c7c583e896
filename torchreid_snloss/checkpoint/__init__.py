"""Checkpoint files: written whole or not at all, checked when they are read; no code in them runs."""

from torchreid_snloss.checkpoint.atomic import atomic_write, remove_unfinished
from torchreid_snloss.checkpoint.files import (
    load_checkpoint,
    load_resumable,
    load_weights,
    put_weights,
    restore,
    save_checkpoint,
    settings_of,
)
from torchreid_snloss.checkpoint.fitting import num_classes
from torchreid_snloss.checkpoint.names import BEST, checkpoint_name, model_folder, own_names
from torchreid_snloss.checkpoint.newest import find_newest, newest_checkpoint
from torchreid_snloss.checkpoint.torch_file import CheckpointError
from torchreid_snloss.deprecation import renamed

__all__ = [
    "BEST",
    "CheckpointError",
    "atomic_write",
    "checkpoint_name",
    "find_newest",
    "load_checkpoint",
    "load_resumable",
    "load_weights",
    "model_folder",
    "newest_checkpoint",
    "num_classes",
    "own_names",
    "put_weights",
    "remove_unfinished",
    "restore",
    "save_checkpoint",
    "settings_of",
]

__getattr__ = renamed(__name__, {"write_whole": "torchreid_snloss.checkpoint.atomic_write"})
