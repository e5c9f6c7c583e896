"""The engines: torchreid's, with the losses of this package."""

from torchreid_snloss.engine.image import ImageFIDIEngine, ImageHAP2SEngine, ImageSNEngine
from torchreid_snloss.engine.metric import LossEngine, MetricEngine, check_weights
from torchreid_snloss.engine.resumable import CompileError, NonFiniteError, Resumable, Stopped, TrainOptions, resumable

__all__ = [
    "ENGINES",
    "CompileError",
    "ImageFIDIEngine",
    "ImageHAP2SEngine",
    "ImageSNEngine",
    "LossEngine",
    "MetricEngine",
    "NonFiniteError",
    "Resumable",
    "Stopped",
    "TrainOptions",
    "check_weights",
    "resumable",
]

ENGINES: dict[tuple[str, str], type[LossEngine]] = {
    ("image", "sn"): ImageSNEngine,
    ("image", "hap2s"): ImageHAP2SEngine,
    ("image", "fidi"): ImageFIDIEngine,
}
"""The engines by ``data.type`` and ``loss.name`` of a config."""
