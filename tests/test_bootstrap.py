"""The interval of a difference of mAP, where the answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, run
from numpy.typing import NDArray

from torchreid_snloss.compare.bootstrap import Difference, Evaluation, difference

PIDS = np.repeat(np.arange(40), np.arange(40) % 5 + 1)  # 40 identities with 1 to 5 queries
T = {2: 4.302653, 4: 2.776445, 39: 2.022691, 99: 1.984217}  # 97.5 % quantiles of Student's t, by degrees of freedom


def pair(
    *differences: NDArray[np.float64] | float, pids: Any = PIDS, split: str = "", seed: int = 0
) -> tuple[list[Evaluation], list[Evaluation]]:
    """Makes a variant and a control with a run for each of the differences, which are by query or one for all."""
    rng = np.random.default_rng(seed)
    control = [Evaluation(number, pids, rng.random(len(pids)), split) for number in range(len(differences))]
    variant = [replace(run, average_precisions=run.average_precisions + own) for run, own in zip(control, differences)]
    return variant, control


def half_width(found: Difference) -> float:
    assert found.high - found.mean == pytest.approx(found.mean - found.low)
    return (found.high - found.low) / 2


def test_equal_runs_do_not_differ() -> None:
    _, control = pair(0, 0, 0)
    found = difference(control, control)
    assert (found.mean, found.low, found.high, found.seeds) == (0, 0, 0, 3)
    assert found.holds_zero
    assert (str(found), found.verdict) == ("+0.0 [+0.0, +0.0]", "no difference shown")


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(("shift", "verdict"), [(0.05, "ahead"), (-0.05, "behind")])
def test_a_constant_difference_is_certain(shift: float, verdict: str, seeds: int) -> None:
    found = difference(*pair(*[shift] * seeds))
    np.testing.assert_allclose((found.mean, found.low, found.high), shift, atol=1e-12)
    assert not found.holds_zero
    assert found.verdict.startswith(verdict)
    assert ("one seed: the interval covers the choice of identities only" in found.verdict) == (seeds == 1)


def test_if_only_seeds_differ_the_interval_is_students() -> None:
    found = difference(*pair(0.01, 0.02, 0.06))
    assert found.mean == pytest.approx(0.03)
    assert half_width(found) == pytest.approx(T[2] * math.sqrt(0.0007 / 3), rel=1e-5)  # variance 0.0014 / 2


def test_runs_are_compared_within_their_split() -> None:
    splits = [pair(0.01, 0.02, 0.06, split="a"), pair(0.41, 0.42, 0.46, split="b", pids=PIDS + 100)]
    variant, control = ([run for split in splits for run in split[side]] for side in (0, 1))
    found = difference(variant, control[::-1])  # in any order
    assert found.seeds == 3
    assert found.mean == pytest.approx(0.23)
    # The splits differ by 0.4, but both are kept; only how often the identities are drawn varies, and that is nothing.
    assert half_width(found) == pytest.approx(T[4] * math.sqrt(0.0007 / 6), rel=1e-5)


@pytest.mark.parametrize("seeds", [1, 3])
def test_if_only_identities_differ_seeds_change_nothing(seeds: int) -> None:
    pids = np.repeat(np.arange(100), 3)
    of_identity = np.random.default_rng(1).normal(0, 0.1, 100)
    found = difference(*pair(*[of_identity[pids]] * seeds, pids=pids))
    assert found.mean == pytest.approx(of_identity.mean())
    expected = T[99] * of_identity.std(ddof=1) / 10
    assert half_width(found) == pytest.approx(expected, rel=0.03)  # 10,000 resamples


def test_identities_of_any_size_as_the_delta_method_has_it() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(0, 0.1, 40)[PIDS] + rng.normal(0, 0.1, len(PIDS))
    residuals = np.array([(values[pid == PIDS] - values.mean()).sum() for pid in range(40)]) / len(PIDS)
    found = difference(*pair(values))
    assert half_width(found) == pytest.approx(T[39] * math.sqrt(40 / 39 * (residuals**2).sum()), rel=0.03)


def test_identities_are_the_same_in_all_splits() -> None:
    of_identity = np.random.default_rng(1).normal(0, 0.1, 40)[PIDS]
    both = [[*a, *b] for a, b in zip(pair(of_identity, split="a"), pair(of_identity, split="b"))]
    apart = [[*a, *b] for a, b in zip(pair(of_identity, split="a"), pair(of_identity, pids=PIDS + 40, split="b"))]
    one = half_width(difference(*pair(of_identity)))
    assert half_width(difference(*both)) == pytest.approx(one, rel=1e-6)  # twice the same says nothing new
    assert half_width(difference(*apart)) == pytest.approx(one / math.sqrt(2), rel=0.05)


def test_what_both_find_hard_drops_out() -> None:
    noise = np.random.default_rng(3).normal(0, 0.01, (3, len(PIDS)))
    hard = np.random.default_rng(4).normal(0, 10, 40)[PIDS]
    plain = pair(*noise)
    shifted = [[replace(run, average_precisions=run.average_precisions + hard) for run in side] for side in plain]
    found, expected = difference(*shifted), difference(*plain)
    np.testing.assert_allclose((found.mean, found.low, found.high), (expected.mean, expected.low, expected.high))
    assert half_width(found) < 0.01


def test_a_query_without_a_match_is_left_out_of_both() -> None:
    values = np.random.default_rng(5).normal(0, 0.1, (2, len(PIDS)))
    variant, control = pair(*values)
    for evaluation, row in ((variant[0], 3), (control[1], 7)):
        evaluation.average_precisions[row] = np.nan
    found = difference(variant, control)
    assert found.mean == pytest.approx(np.mean([np.delete(values[0], 3).mean(), np.delete(values[1], 7).mean()]))
    # The same as if it had not been asked in either run.
    variant, control = (
        [
            replace(run, pids=np.delete(run.pids, row), average_precisions=np.delete(run.average_precisions, row))
            for run, row in zip(side, (3, 7))
        ]
        for side in pair(*values)
    )
    assert difference(variant, control) == found


def test_the_seed_of_the_resampling_decides() -> None:
    runs = pair(*np.random.default_rng(6).normal(0, 0.1, (3, len(PIDS))))
    first = difference(*runs)
    assert difference(*runs) == first
    assert half_width(difference(*runs, seed=1)) != half_width(first)
    assert half_width(difference(*runs, seed=1)) == pytest.approx(half_width(first), rel=0.03)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = pair(*np.random.default_rng(6).normal(0, 0.1, (3, len(PIDS))))
    whole = difference(*runs, resamples=999)
    monkeypatch.setattr("torchreid_snloss.compare.bootstrap._BLOCK_SIZE", 4100)
    assert half_width(difference(*runs, resamples=999)) == pytest.approx(half_width(whole), rel=1e-9)


@pytest.mark.parametrize(
    ("of_seed", "of_identity", "of_both", "of_query"),
    [(0.02, 0.02, 0.02, 0.02), (0.0, 0.1, 0.02, 0.05), (0.0, 0.0, 0.1, 0.1), (0.015, 0.08, 0.08, 0.1)],
    ids=["seeds differ", "identities differ", "neither differs", "both differ"],
)
def test_the_interval_contains_the_truth_in_95_percent_of_experiments(
    of_seed: float, of_identity: float, of_both: float, of_query: float
) -> None:
    """With three seeds and 60 identities. A plain bootstrap of both is at 84 % if seeds differ, at 99 % if neither."""
    rng = np.random.default_rng(7)
    contained = 0
    for _ in range(400):
        pids = np.repeat(np.arange(60), rng.integers(1, 7, 60))
        common = rng.normal(0, of_identity, 60)[pids] + rng.normal(0, of_query, len(pids))
        runs = pair(
            *(
                common + rng.normal(0, of_seed) + rng.normal(0, of_both, 60)[pids] + rng.normal(0, of_query, len(pids))
                for _ in range(3)
            ),
            pids=pids,
        )
        contained += difference(*runs, resamples=200).holds_zero
    assert 0.93 <= contained / 400 <= 0.98


def test_as_text() -> None:
    assert str(Difference(0.0131, -0.0042, 0.0288, 3)) == "+1.3 [-0.4, +2.9]"
    assert str(Difference(-0.0001, -0.1, 0.0001, 3)) == "+0.0 [-10.0, +0.0]"
    assert [Difference(0, low, high, 3).verdict for low, high in ((-1, 0), (0, 1), (0.1, 1), (-1, -0.1))] == [
        "no difference shown", "no difference shown", "ahead", "behind",
    ]  # fmt: skip


Runs = tuple[list[Evaluation], list[Evaluation]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v, c: (v, [c[0], replace(c[1], pids=PIDS[::-1])]), "tested on different queries with seed 1"),
        (lambda v, c: (v, [c[0], replace(c[1], pids=PIDS[1:])]), "tested on different queries with seed 1"),
        (
            lambda v, c: ([v[0], replace(v[1], average_precisions=np.ones(3))], c),
            r"average_precisions must be of shape \(\d+,\), one for each query, with seed 1; got \(3,\)",
        ),
        (lambda v, c: (v, c[:1]), r"the same splits and seeds, .*; got \[\('', 0\), \('', 1\)\] and \[\('', 0\)\]"),
        (lambda v, c: (v, [c[0], replace(c[1], seed=2)]), "the same splits and seeds"),
        (lambda v, c: (v, [replace(run, split="a") for run in c]), "the same splits and seeds"),
        (lambda v, c: ([], []), r"the same splits and seeds, at least one; got \[\] and \[\]"),
        (lambda v, c: (v, [*c, c[0]]), "the control has several evaluations of the same split and seed"),
        (
            lambda v, c: ([*v, replace(v[0], split="a")], [*c, replace(c[0], split="a")]),
            "every split must have the same number of seeds, got {'': 2, 'a': 1}",
        ),
        (
            lambda v, c: pair(np.where(PIDS == 2, 0.1, np.nan)),
            "queries of at least two identities must have a match with seed 0, got 1",
        ),
        (
            lambda v, c: tuple(
                [
                    run
                    for name in "abcdefghi"
                    for run in pair(0.1, pids=np.array([ord(name), -ord(name)]), split=name)[i]
                ]
                for i in (0, 1)
            ),
            "too few identities to resample, 18 in 9 splits",
        ),
    ],
)
def test_runs_that_can_not_be_compared(change: Callable[..., Runs], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        difference(*change(*pair(0.1, 0.2)))


def test_one_resample_is_too_few() -> None:
    with pytest.raises(ValueError, match="resamples must be at least 2, got 1"):
        difference(*pair(0.1), resamples=1)


def test_the_simulations_of_the_documentation_run() -> None:
    done = run("-m", "benchmarks.intervals", "--experiments", "2", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of 2 intervals, ± ") == 12
