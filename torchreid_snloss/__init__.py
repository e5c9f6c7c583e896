"""SN, HAP2S and FIDI loss for person re-identification with torchreid.

`register()` adds them to torchreid; importing the package changes nothing in torchreid.
"""

from torchreid_snloss.run.program import prepare_imports

prepare_imports()

from torchreid_snloss.build import build_datamanager, build_engine, build_model, build_optimizer
from torchreid_snloss.checkpoint import CheckpointError, load_checkpoint, load_weights
from torchreid_snloss.config import ConfigError, get_default_config, load_config
from torchreid_snloss.data import IdentitySampler, SyntheticPedestrians, SyntheticTracklets
from torchreid_snloss.engine import (
    ImageFIDIEngine,
    ImageHAP2SEngine,
    ImageMetricEngine,
    ImageSNEngine,
    VideoFIDIEngine,
    VideoHAP2SEngine,
    VideoMetricEngine,
    VideoSNEngine,
)
from torchreid_snloss.losses import FIDILoss, HAP2SLoss, SNLoss
from torchreid_snloss.register import register
from torchreid_snloss.session import train
from torchreid_snloss.settings import Settings, resolve

__version__ = "0.3.0.dev0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "FIDILoss",
    "HAP2SLoss",
    "IdentitySampler",
    "ImageFIDIEngine",
    "ImageHAP2SEngine",
    "ImageMetricEngine",
    "ImageSNEngine",
    "SNLoss",
    "Settings",
    "SyntheticPedestrians",
    "SyntheticTracklets",
    "VideoFIDIEngine",
    "VideoHAP2SEngine",
    "VideoMetricEngine",
    "VideoSNEngine",
    "build_datamanager",
    "build_engine",
    "build_model",
    "build_optimizer",
    "get_default_config",
    "load_checkpoint",
    "load_config",
    "load_weights",
    "register",
    "resolve",
    "train",
]
