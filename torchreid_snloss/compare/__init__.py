"""`torchreid-snloss-compare` trains several losses with the same budget and writes a report on their results."""

from torchreid_snloss.compare.command import main

__all__ = ["main"]
