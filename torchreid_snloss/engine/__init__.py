"""The engines: torchreid's, with the losses of this package."""

from torchreid_snloss.engine.image import ImageFIDIEngine, ImageHAP2SEngine, ImageMetricEngine, ImageSNEngine
from torchreid_snloss.engine.metric import LossEngine, MetricEngine, check_weights
from torchreid_snloss.engine.resumable import CompileError, NonFiniteError, Resumable, Stopped, TrainOptions, resumable
from torchreid_snloss.engine.video import VideoFIDIEngine, VideoHAP2SEngine, VideoMetricEngine, VideoSNEngine

__all__ = [
    "ENGINES",
    "CompileError",
    "ImageFIDIEngine",
    "ImageHAP2SEngine",
    "ImageMetricEngine",
    "ImageSNEngine",
    "LossEngine",
    "MetricEngine",
    "NonFiniteError",
    "Resumable",
    "Stopped",
    "TrainOptions",
    "VideoFIDIEngine",
    "VideoHAP2SEngine",
    "VideoMetricEngine",
    "VideoSNEngine",
    "check_weights",
    "resumable",
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
"""The engines by ``data.type`` and ``loss.name`` of a config; several losses take those of ``"custom"``."""
