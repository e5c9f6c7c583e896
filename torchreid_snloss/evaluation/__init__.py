"""CMC, mAP, mINP and ranked lists: from features, a block of queries at a time, or from a matrix of distances."""

from torchreid_snloss.deprecation import renamed
from torchreid_snloss.evaluation.features import FeatureRanker, nearest_gallery, rank_features
from torchreid_snloss.evaluation.ranking import Ranking, rank_gallery
from torchreid_snloss.evaluation.upstream import capture_rankings, capturing, evaluate_rank

__all__ = [
    "FeatureRanker",
    "Ranking",
    "capture_rankings",
    "capturing",
    "evaluate_rank",
    "nearest_gallery",
    "rank_features",
    "rank_gallery",
]

__getattr__ = renamed(
    __name__,
    {
        "noted_rankings": "torchreid_snloss.evaluation.capture_rankings",
        "noting": "torchreid_snloss.evaluation.capturing",
    },
)
