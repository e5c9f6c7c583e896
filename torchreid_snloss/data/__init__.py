"""Data: the identity sampler and the synthetic dataset."""

from torchreid_snloss.data.sampler import IdentitySampler
from torchreid_snloss.data.synthetic import SyntheticPedestrians, make_pedestrians

__all__ = ["IdentitySampler", "SyntheticPedestrians", "make_pedestrians"]
