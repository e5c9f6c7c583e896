"""The engines: torchreid's, with the losses of this package."""

from torchreid_snloss.deprecation import renamed
from torchreid_snloss.engine.features_file import FeaturesError
from torchreid_snloss.engine.image import ImageFIDIEngine, ImageHAP2SEngine, ImageMetricEngine, ImageSNEngine
from torchreid_snloss.engine.loop import TrainingLoop
from torchreid_snloss.engine.loss_engine import LossEngine
from torchreid_snloss.engine.metric import MetricEngine, check_weights
from torchreid_snloss.engine.options import (
    CompileError,
    NonFiniteError,
    NothingLearntError,
    Stopped,
    TrainOptions,
    WriteError,
)
from torchreid_snloss.engine.video import VideoFIDIEngine, VideoHAP2SEngine, VideoMetricEngine, VideoSNEngine
from torchreid_snloss.engine.wrapping import with_training_loop

__all__ = [
    "ENGINES",
    "CompileError",
    "FeaturesError",
    "ImageFIDIEngine",
    "ImageHAP2SEngine",
    "ImageMetricEngine",
    "ImageSNEngine",
    "LossEngine",
    "MetricEngine",
    "NonFiniteError",
    "NothingLearntError",
    "Stopped",
    "TrainOptions",
    "TrainingLoop",
    "VideoFIDIEngine",
    "VideoHAP2SEngine",
    "VideoMetricEngine",
    "VideoSNEngine",
    "WriteError",
    "check_weights",
    "with_training_loop",
]

ENGINES: dict[tuple[str, str], type[MetricEngine]] = {
    ("image", "sn"): ImageSNEngine,
    ("image", "hap2s"): ImageHAP2SEngine,
    ("image", "fidi"): ImageFIDIEngine,
    ("image", "custom"): ImageMetricEngine,
    ("video", "sn"): VideoSNEngine,
    ("video", "hap2s"): VideoHAP2SEngine,
    ("video", "fidi"): VideoFIDIEngine,
    ("video", "custom"): VideoMetricEngine,
}
"""The engines that `register` adds to `torchreid.engine`, by the kind of data and the loss that each is for.

For a config, `torchreid_snloss.build.engine_class` chooses the engine.
"""

_ENGINE = "torchreid_snloss.engine"
__getattr__ = renamed(__name__, {"Resumable": f"{_ENGINE}.TrainingLoop", "resumable": f"{_ENGINE}.with_training_loop"})
