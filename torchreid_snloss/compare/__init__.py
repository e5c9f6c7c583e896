"""`torchreid-snloss-compare` trains several losses on the same budget and reports what they do."""

from torchreid_snloss.compare.command import main

__all__ = ["main"]
