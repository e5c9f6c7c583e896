"""Engines for video re-identification, one for each loss."""

from __future__ import annotations

from typing import Any, Literal

from torchreid import engine

from torchreid_snloss.arguments import check_choice
from torchreid_snloss.engine.loss_engine import LossEngine
from torchreid_snloss.engine.metric import MetricEngine
from torchreid_snloss.losses import FIDILoss, HAP2SLoss, SNLoss

__all__ = ["VideoFIDIEngine", "VideoHAP2SEngine", "VideoMetricEngine", "VideoSNEngine"]


class _Tracklets:
    """Trains on each frame of a tracklet as on an image, and tests on tracklets' pooled features, as torchreid does.

    Args:
        *args: the arguments of the engine.
        pooling_method: `"avg"` or `"max"` over a tracklet's frames.
        **options: the keyword arguments of the engine.

    Raises:
        ValueError: for another pooling method.
    """

    parse_data_for_train = engine.VideoSoftmaxEngine.parse_data_for_train
    extract_features = engine.VideoSoftmaxEngine.extract_features

    def __init__(self, *args: Any, pooling_method: Literal["avg", "max"] = "avg", **options: Any) -> None:
        check_choice("pooling_method", pooling_method, ("avg", "max"))
        self.pooling_method = pooling_method
        super().__init__(*args, **options)


class VideoMetricEngine(_Tracklets, MetricEngine):
    """Trains on torchreid's `VideoDataManager` as `ImageMetricEngine` does on images, and takes `pooling_method`."""


class VideoSNEngine(_Tracklets, LossEngine):
    """Trains with `SNLoss` and softmax on torchreid's `VideoDataManager`.

    A batch of P x K tracklets is a batch of P x K x `seq_len` images. It takes the arguments of `MetricEngine`,
    `pooling_method`, and the keywords of `SNLoss`.

    Example:
        ```python
        datamanager = data.VideoDataManager(
            root='reid-data', sources='synthetic_video', height=128, width=64, seq_len=4,
            batch_size_train=16, num_instances=4, train_sampler='IdentitySampler'
        )
        engine = torchreid_snloss.VideoSNEngine(
            datamanager, model, optimizer, scale=10.0, pooling_method='avg', scheduler=scheduler
        )
        ```
    """

    loss_class = SNLoss


class VideoHAP2SEngine(_Tracklets, LossEngine):
    """Trains with `HAP2SLoss` and softmax, and is used like `VideoSNEngine`."""

    loss_class = HAP2SLoss


class VideoFIDIEngine(_Tracklets, LossEngine):
    """Trains with `FIDILoss` and softmax, and is used like `VideoSNEngine`."""

    loss_class = FIDILoss
