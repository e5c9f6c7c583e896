"""The losses: SN, HAP2S and FIDI, each a formula on top of :class:`MetricLoss`."""

from torchreid_snloss.losses.base import MetricLoss, check_integer, check_number, quotients
from torchreid_snloss.losses.base import quotients as means
from torchreid_snloss.losses.fidi import FIDILoss
from torchreid_snloss.losses.global_batch import Criterion, GlobalBatchLoss
from torchreid_snloss.losses.hap2s import HAP2SLoss
from torchreid_snloss.losses.memory import Memory
from torchreid_snloss.losses.mined import MinedLoss
from torchreid_snloss.losses.sn import SNLoss

__all__ = [
    "LOSSES",
    "Criterion",
    "FIDILoss",
    "GlobalBatchLoss",
    "HAP2SLoss",
    "Memory",
    "MetricLoss",
    "MinedLoss",
    "SNLoss",
    "check_integer",
    "check_number",
    "means",
    "quotients",
]

LOSSES: dict[str, type[MetricLoss]] = {"sn": SNLoss, "hap2s": HAP2SLoss, "fidi": FIDILoss}
"""The losses by their name in a config, ``loss.name``."""
