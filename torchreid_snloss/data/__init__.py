"""Data: the identity sampler, synthetic data sets, changes to the training set, held-out identities, image files."""

from torchreid_snloss.data.readable import UnreadableImageError, name_unreadable_images
from torchreid_snloss.data.sampler import IdentitySampler
from torchreid_snloss.data.synthetic import SyntheticPedestrians, SyntheticTracklets, make_pedestrians
from torchreid_snloss.data.training_set import (
    add_label_noise,
    add_outliers,
    keep_fraction,
    set_training_items,
    stable_order,
)
from torchreid_snloss.data.validation import VALIDATION, hold_out

__all__ = [
    "VALIDATION",
    "IdentitySampler",
    "SyntheticPedestrians",
    "SyntheticTracklets",
    "UnreadableImageError",
    "add_label_noise",
    "add_outliers",
    "hold_out",
    "keep_fraction",
    "make_pedestrians",
    "name_unreadable_images",
    "set_training_items",
    "stable_order",
]
