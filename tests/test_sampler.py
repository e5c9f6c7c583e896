"""The identity sampler: each statement of its docstring, on many random data sets."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from torchreid import data

import torchreid_snloss
from torchreid_snloss import IdentitySampler


def dataset(sizes: list[int], seed: int = 0) -> list[tuple[str, int, int]]:
    items = [(f"{pid}_{i}.jpg", pid, 0) for pid, size in enumerate(sizes) for i in range(size)]
    random.Random(seed).shuffle(items)
    return items


@pytest.mark.parametrize("trial", range(200))
def test_every_statement_of_the_docstring(trial: int) -> None:
    rng = random.Random(trial)
    instances, identities = rng.randint(1, 5), rng.randint(2, 8)
    sizes = [rng.choice([1, 2, 3, 8, 30, 300]) for _ in range(rng.randint(identities, 40))]
    items = dataset(sizes, trial)
    size = instances * identities
    sampler = IdentitySampler(items, size, instances, seed=trial)
    for _ in range(2):
        epoch = list(sampler)
        assert len(epoch) == len(sampler)
        assert len(epoch) % size == 0
        assert {items[i][1] for i in epoch} == set(range(len(sizes)))
        for start in range(0, len(epoch), size):
            batch = epoch[start : start + size]
            assert Counter(Counter(items[i][1] for i in batch).values()) == {instances: identities}
            for image, times in Counter(batch).items():
                available = min(sizes[items[image][1]], instances)
                assert times in (instances // available, -(-instances // available))


def test_every_image_is_used_once_if_the_numbers_fit() -> None:
    items = dataset([8] * 12)
    epoch = list(IdentitySampler(items, 16, 4, seed=1))
    assert sorted(epoch) == list(range(len(items)))


def test_as_many_batches_as_possible() -> None:
    # One identity has 100 groups of 2, three have 1. Each batch of two identities needs one of the three.
    assert len(IdentitySampler(dataset([200, 2, 2, 2]), 4, 2, seed=0)) == 3 * 4
    # 5 identities have one group each. Two batches of 4 identities use all of them, and three groups are drawn again.
    assert len(IdentitySampler(dataset([4] * 5), 16, 4, seed=0)) == 2 * 16


def test_an_epoch_depends_only_on_its_seed_and_number() -> None:
    items = dataset([5, 9, 1, 7, 4, 12])
    first, second = IdentitySampler(items, 6, 2, seed=3), IdentitySampler(items, 6, 2, seed=3)
    epochs = [list(first) for _ in range(3)]
    assert epochs[0] != epochs[1]
    random.seed(0)
    torch.manual_seed(0)
    second.set_epoch(2)
    assert list(second) == epochs[2]
    assert list(IdentitySampler(items, 6, 2, seed=4)) != epochs[0]


def test_the_default_seed_is_that_of_torch() -> None:
    items = dataset([5, 9, 1, 7, 4, 12])
    torch.manual_seed(7)
    first = list(IdentitySampler(items, 6, 2))
    torch.manual_seed(7)
    assert list(IdentitySampler(items, 6, 2)) == first
    torch.manual_seed(8)
    assert list(IdentitySampler(items, 6, 2)) != first


def test_batches_mix_identities_evenly() -> None:
    # With 40 identities, 4 groups each and 8 identities a batch, all pairs meet about equally often in many epochs.
    sampler = IdentitySampler(dataset([8] * 40), 16, 2, seed=0)
    meetings: Counter[tuple[int, int]] = Counter()
    items = dataset([8] * 40)
    for _ in range(200):
        epoch = list(sampler)
        for start in range(0, len(epoch), 16):
            pids = sorted({items[i][1] for i in epoch[start : start + 16]})
            meetings.update((a, b) for a in pids for b in pids if a < b)
    expected = sum(meetings.values()) / (40 * 39 / 2)
    assert len(meetings) == 40 * 39 / 2
    assert max(meetings.values()) < 1.4 * expected
    assert min(meetings.values()) > 0.6 * expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((10, 4), "batch_size must be a multiple of num_instances, got batch_size=10 and num_instances=4"),
        ((4, 4), "at least two identities, got batch_size=4 and num_instances=4"),
        ((16, 0), "num_instances=0"),
        ((64, 4), "holds 16 identities, but the training set has only 6"),
    ],
)
def test_bad_arguments(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        IdentitySampler(dataset([4] * 6), *arguments)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "RandomIdentitySampler",
            {"num_instances": 2},
            "a batch of batch_size=12 and num_instances=2 holds 6 identities, but the training set has only 5",
        ),
        ("RandomDomainSampler", {"num_cams": 4}, "of num_cams=4 needs 4 cameras, but the training set has only 3"),
        ("RandomDomainSampler", {"num_cams": 2}, "=2 holds 6 images of a camera, but one camera has only 4 in the"),
        (
            "RandomDomainSampler",
            {"num_cams": 3, "batch_size": 13},
            r"batch_size=13 .* multiple of 3, the cameras in a batch \(num_cams=3\)",
        ),
        (
            "RandomDomainSampler",
            {"num_cams": 0, "batch_size": 14},
            r"batch_size=14 .* multiple of 3, the cameras in a batch \(num_cams=0\)",
        ),
        (
            "RandomDatasetSampler",
            {"num_datasets": 3},
            "num_datasets=3 needs 3 data sets, but the training set has only 2",
        ),
        (
            "RandomDatasetSampler",
            {"num_datasets": 2},
            "=2 holds 6 images of a data set, but one data set has only 5 in",
        ),
    ],
)
def test_what_torchreids_samplers_lack_is_told(name: str, options: dict[str, int], words: str) -> None:
    torchreid_snloss.register()
    items = [(f"{index}", index % 5, min(index // 8, 2), int(index < 5)) for index in range(20)]
    with pytest.raises(ValueError, match=words):
        data.sampler.build_train_sampler(items, name, **{"batch_size": 12, **options})
    enough = {"batch_size": 6, "num_cams": 3, "num_datasets": 2, "num_instances": 2}
    assert len(list(data.sampler.build_train_sampler(items, name, **enough))) >= 6
