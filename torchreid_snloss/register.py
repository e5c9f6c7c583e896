"""Puts the plugin into torchreid's extension points. The only module that changes torchreid."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

from torchreid import data, engine, losses, metrics, models, utils

from torchreid_snloss import evaluation, rerank
from torchreid_snloss.data import IdentitySampler, SyntheticPedestrians, SyntheticTracklets
from torchreid_snloss.engine import ENGINES
from torchreid_snloss.losses import LOSSES

__all__ = ["register"]


@functools.cache  # holds a call that went through, and lets one that raised be tried again
def register() -> None:
    """Makes torchreid know this package's losses, engines, sampler and dataset. Calling it again does nothing.

    Afterwards, in PyPI's layout (``torchreid.reid.*``) as in upstream's (``torchreid.*``):

    - ``torchreid.losses`` and ``torchreid.engine`` have the classes, ``SNLoss``, ``ImageSNEngine`` and so on;
    - ``torchreid.models.build_model`` takes ``loss='sn'``, ``'hap2s'`` and ``'fidi'``;
    - data managers take ``train_sampler='IdentitySampler'`` and the datasets ``'synthetic'`` and
      ``'synthetic_video'``;
    - ``torchreid.metrics.evaluate_rank`` is :func:`torchreid_snloss.evaluation.evaluate_rank` where torchreid has no
      compiled one, and that one where it has; within ``capture_rankings()`` either notes mINP as well;
    - ``torchreid.utils.re_ranking`` is :func:`torchreid_snloss.rerank.re_ranking`.

    What torchreid had keeps its behaviour. Evaluation and re-ranking give its results, in less time and memory.

    Raises:
        RuntimeError: if torchreid has something else by one of these names; nothing is changed then.
    """
    additions = [(losses, loss) for loss in LOSSES.values()] + [(engine, cls) for cls in ENGINES.values()]
    for module, cls in additions:
        if hasattr(module, cls.__name__):
            raise RuntimeError(f"{module.__name__} has a {cls.__name__} already, this package can't add its own")
    if IdentitySampler.__name__ in data.sampler.AVAI_SAMPLERS:
        raise RuntimeError("torchreid has a sampler named IdentitySampler already, this package can't add its own")

    try:
        data.register_image_dataset("synthetic", SyntheticPedestrians)
        data.register_video_dataset("synthetic_video", SyntheticTracklets)
    except ValueError as error:
        raise RuntimeError(
            "torchreid has a data set named 'synthetic' already, this package can't add its own"
        ) from error
    for module, cls in additions:
        setattr(module, cls.__name__, cls)
    models.build_model = _with_our_losses(models.build_model)
    data.sampler.AVAI_SAMPLERS.append(IdentitySampler.__name__)
    build_train_sampler = _with_our_sampler(data.sampler.build_train_sampler)
    data.sampler.build_train_sampler = build_train_sampler
    data.datamanager.build_train_sampler = build_train_sampler  # imported there by name
    compiled = metrics.rank.IS_CYTHON_AVAI
    evaluate_rank = evaluation.capturing(metrics.rank.evaluate_rank) if compiled else evaluation.evaluate_rank
    metrics.evaluate_rank = metrics.rank.evaluate_rank = evaluate_rank
    utils.re_ranking = rerank.re_ranking
    sys.modules[engine.Engine.__module__].re_ranking = rerank.re_ranking  # type: ignore[attr-defined] # by name too


def _with_our_losses(build_model: Any) -> Any:
    @functools.wraps(build_model)
    def build(name: str, num_classes: int, loss: str = "softmax", *args: Any, **kwargs: Any) -> Any:
        # 'triplet' is what makes torchreid's models return (logits, features) in training.
        return build_model(name, num_classes, "triplet" if loss in LOSSES else loss, *args, **kwargs)

    return build


def _with_our_sampler(build_train_sampler: Any) -> Any:
    signature = inspect.signature(build_train_sampler)

    @functools.wraps(build_train_sampler)
    def build(data_source: Any, train_sampler: str, *args: Any, **kwargs: Any) -> Any:
        if train_sampler != IdentitySampler.__name__:
            return build_train_sampler(data_source, train_sampler, *args, **kwargs)
        call = signature.bind(data_source, train_sampler, *args, **kwargs)
        call.apply_defaults()
        return IdentitySampler(data_source, call.arguments["batch_size"], call.arguments["num_instances"])

    return build
