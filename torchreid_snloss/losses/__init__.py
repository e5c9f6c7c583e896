"""The losses: SN, HAP2S and FIDI, each a formula on top of `MetricLoss`."""

from torchreid_snloss.arguments import check_choice, check_integer, check_number
from torchreid_snloss.deprecation import renamed
from torchreid_snloss.losses.base import MetricLoss
from torchreid_snloss.losses.differences import Differences
from torchreid_snloss.losses.fidi import FIDILoss
from torchreid_snloss.losses.global_batch import Criterion, GlobalBatchLoss
from torchreid_snloss.losses.hap2s import HAP2SLoss
from torchreid_snloss.losses.memory import Memory
from torchreid_snloss.losses.mined import MinedLoss
from torchreid_snloss.losses.products import Products
from torchreid_snloss.losses.search import Interval, OnlyWith
from torchreid_snloss.losses.sn import SNLoss
from torchreid_snloss.losses.statistics import StatisticsCollector, means

__all__ = [
    "LOSSES",
    "Criterion",
    "Differences",
    "FIDILoss",
    "GlobalBatchLoss",
    "HAP2SLoss",
    "Interval",
    "Memory",
    "MetricLoss",
    "MinedLoss",
    "OnlyWith",
    "Products",
    "SNLoss",
    "StatisticsCollector",
    "check_choice",
    "check_integer",
    "check_number",
    "means",
]

LOSSES: dict[str, type[MetricLoss]] = {"sn": SNLoss, "hap2s": HAP2SLoss, "fidi": FIDILoss}
"""The losses by their name in a config, `loss.name`."""

__getattr__ = renamed(__name__, {"quotients": "torchreid_snloss.losses.means"})
