"""``torchreid-snloss-compare``: losses trained on the same budget, and a report of what they do."""

from torchreid_snloss.compare.command import main

__all__ = ["main"]
