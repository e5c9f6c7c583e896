"""Fills in what a config leaves open and other keys decide, such as the sampler and the image size."""

from __future__ import annotations

from yacs.config import CfgNode

from torchreid_snloss.backbones import fill_input
from torchreid_snloss.config import ConfigError, metric_weights
from torchreid_snloss.data import IdentitySampler

__all__ = ["decide"]


def decide(cfg: CfgNode) -> tuple[CfgNode, tuple[str, ...]]:
    """Fills in what a config leaves open, without checking it.

    Args:
        cfg: the config, which is not modified.

    Returns:
        A copy with all values, and lines about those that were filled in.

    Raises:
        ConfigError: for a timm model that timm does not know, or if timm is not installed.
    """
    decided, notes = cfg.clone(), []
    decided.defrost()
    try:
        notes += fill_input(cfg.model.name, decided.data)
    except ValueError as error:
        raise ConfigError(f"model.name: {error}") from error
    weights = metric_weights(cfg)
    normalises = any(weight != 0 and bool(cfg.loss[name].get("normalize")) for name, weight in weights.items())
    if cfg.test.normalize_feature is None:
        decided.test.normalize_feature = normalises
        if decided.test.normalize_feature:
            notes.append(f"=> test.normalize_feature: True, as loss {cfg.loss.name!r} normalises features too")
    elif normalises and not cfg.test.normalize_feature and cfg.test.dist_metric == "euclidean":
        notes.append(
            f"=> test.normalize_feature: False in the config, though loss {cfg.loss.name!r} normalises features: the "
            "test compares them with their lengths; leave the key out, or set it to True, to test as is trained"
        )
    if cfg.sampler.train_sampler == "RandomSampler" and any(weights.values()) and not cfg.test.evaluate:
        decided.sampler.train_sampler = IdentitySampler.__name__
        notes.append(
            f"=> sampler.train_sampler: IdentitySampler in place of RandomSampler, since loss {cfg.loss.name!r} needs "
            f"{cfg.sampler.num_instances} images of an identity (sampler.num_instances) in a batch"
        )
        if not cfg.model.pretrained and not cfg.model.load_weights and cfg.sampler.num_instances > 2:
            notes.append(
                "=> the network has no pretrained weights: with few images, sampler.num_instances 2 may train better "
                f"than {cfg.sampler.num_instances}, which may train worse than softmax on random batches"
            )
    decided.freeze()
    return decided, tuple(notes)
