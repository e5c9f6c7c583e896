"""Data: the identity sampler, the synthetic data set, held-out identities, unreadable images."""

from torchreid_snloss.data.readable import UnreadableImageError, name_unreadable_images
from torchreid_snloss.data.sampler import IdentitySampler
from torchreid_snloss.data.synthetic import SyntheticPedestrians, SyntheticTracklets, make_pedestrians
from torchreid_snloss.data.validation import VALIDATION, hold_out

__all__ = [
    "VALIDATION",
    "IdentitySampler",
    "SyntheticPedestrians",
    "SyntheticTracklets",
    "UnreadableImageError",
    "hold_out",
    "make_pedestrians",
    "name_unreadable_images",
]
