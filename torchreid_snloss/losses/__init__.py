"""The losses: SN, HAP2S and FIDI, each a formula on top of :class:`MetricLoss`."""

from torchreid_snloss.losses.base import MetricLoss, check_number
from torchreid_snloss.losses.fidi import FIDILoss
from torchreid_snloss.losses.hap2s import HAP2SLoss
from torchreid_snloss.losses.sn import SNLoss

__all__ = ["LOSSES", "FIDILoss", "HAP2SLoss", "MetricLoss", "SNLoss", "check_number"]

LOSSES: dict[str, type[MetricLoss]] = {"sn": SNLoss, "hap2s": HAP2SLoss, "fidi": FIDILoss}
"""The losses by their name in a config, ``loss.name``."""
