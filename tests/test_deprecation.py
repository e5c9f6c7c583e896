"""Names of release 0.2 that have changed still work, and warn."""

from __future__ import annotations

import importlib

import pytest


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("torchreid_snloss.checkpoint", "write_whole", "atomic_write"),
        ("torchreid_snloss.compare.ranked", "Distances", "DistanceHistograms"),
        ("torchreid_snloss.compare.ranked", "shown", "unsquared"),
        ("torchreid_snloss.compare.results", "Figure", "MeanStd"),
        ("torchreid_snloss.evaluation", "noted_rankings", "capture_rankings"),
        ("torchreid_snloss.distributed", "add_up", "all_reduce_sum"),
        ("torchreid_snloss.distributed", "largest", "all_reduce_max"),
        ("torchreid_snloss.engine", "Resumable", "TrainingLoop"),
        ("torchreid_snloss.engine", "resumable", "with_training_loop"),
        ("torchreid_snloss.losses", "quotients", "means"),
        ("torchreid_snloss.evaluation", "noting", "capturing"),
        ("torchreid_snloss.heads", "Headed", "ModelWithHead"),
    ],
)
def test_an_old_name_is_the_new_one_and_warns(module: str, old: str, new: str) -> None:
    imported = importlib.import_module(module)
    with pytest.warns(DeprecationWarning, match=f"{module}.{old} is now {module}.{new}") as warnings:
        found = getattr(imported, old)
    assert found is vars(imported)[new]
    assert warnings[0].filename == __file__
    with pytest.raises(AttributeError, match="has no attribute 'never_there'"):
        imported.never_there  # noqa: B018
