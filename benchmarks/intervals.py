"""`python -m benchmarks.intervals`: how often a 95 % interval of a comparison contains the true difference.

Each experiment compares a variant with a control, of three seeds each unless it says otherwise, whose true difference
is 0. What an interval takes as given varies as well, the splits or the gallery; and in the last cases, the numbers of
queries are very uneven, or each seed shifts all queries of a variant that is otherwise like the control.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from torchreid_snloss.compare.bootstrap import Difference, Evaluation, difference
from torchreid_snloss.evaluation import rank_features

_SEEDS = 3
# Standard deviations of average precision, with which three splits have intervals as wide as those on people.
_OF_SEED, _OF_IDENTITY, _OF_QUERY = 0.01, 0.08, 0.15

Generator = np.random.Generator
Experiment = Callable[[Generator], Difference]


def splits_vary(deviation: float) -> Experiment:
    """Three splits of 20 identities with 8 queries each, whose true differences have a standard deviation."""

    def experiment(rng: Generator) -> Difference:
        runs = []
        for split in range(3):
            pids = np.repeat(np.arange(20), 8) + 100 * split
            runs += _runs(rng, pids, rng.normal(0, deviation), str(split))
        return _compare(runs)

    return experiment


def uneven_queries(rng: Generator) -> Difference:
    """20 identities, of which one has 40 queries and the others two, and which differ alike with each seed."""
    pids = np.repeat(np.arange(20), [40, *[2] * 19])
    return _compare(_runs(rng, pids, by_seed=0.0))


def seeds_shift(deviation: float, seeds: int) -> Experiment:
    """60 identities with 8 queries each, without a difference but by the seed, with a standard deviation."""

    def experiment(rng: Generator) -> Difference:
        runs = _runs(rng, np.repeat(np.arange(60), 8), seeds=seeds, of_identity=0.0, of_seed=deviation)
        return _compare(runs)

    return experiment


def galleries_vary(identities: int) -> Experiment:
    """Identities with four queries and four gallery images, whose features have as much noise from both methods."""

    def experiment(rng: Generator) -> Difference:
        pids = np.repeat(np.arange(identities), 4)
        cameras = np.zeros_like(pids)
        people, offsets = rng.normal(size=(identities, 8)), rng.normal(size=(2, len(pids), 8))
        runs = []
        for seed in range(_SEEDS):
            both = []
            for _ in range(2):
                sides = [people[pids] + 0.8 * offset + 0.5 * rng.normal(size=offset.shape) for offset in offsets]
                ranking = rank_features(*sides, pids, pids, cameras, cameras + 1)
                both.append(Evaluation(seed, pids, ranking.average_precisions))
            runs.append((both[0], both[1]))
        return _compare(runs)

    return experiment


def _runs(
    rng: Generator,
    pids: NDArray[np.int64],
    truth: float = 0.0,
    split: str = "",
    *,
    seeds: int = _SEEDS,
    of_seed: float = _OF_SEED,
    of_identity: float = _OF_IDENTITY,
    by_seed: float = _OF_IDENTITY,
) -> list[tuple[Evaluation, Evaluation]]:
    """A pair of runs for each seed, whose average precisions differ by the identity, the seed and the query.

    Args:
        rng: the random numbers.
        pids: (queries,), the identities of the queries.
        truth: the true difference.
        split: the name of the split.
        seeds: the number of seeds.
        of_seed: the standard deviation of what a seed adds.
        of_identity: the standard deviation of what an identity adds.
        by_seed: the standard deviation of what an identity adds with one seed alone.
    """
    _, of_query = np.unique(pids, return_inverse=True)
    number = of_query.max() + 1
    common = truth + rng.normal(0, of_identity, number)
    runs = []
    for seed in range(seeds):
        own = common + rng.normal(0, of_seed) + rng.normal(0, by_seed, number)
        control = rng.random(len(pids))
        variant = control + own[of_query] + rng.normal(0, _OF_QUERY, len(pids))
        runs.append((Evaluation(seed, pids, variant, split), Evaluation(seed, pids, control, split)))
    return runs


def _compare(runs: list[tuple[Evaluation, Evaluation]]) -> Difference:
    variant, control = zip(*runs)
    return difference(variant, control, resamples=500)


def main() -> None:
    """Prints the share of experiments for each case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.intervals", description=__doc__)
    parser.add_argument("--experiments", type=int, default=500, metavar="N")
    number = parser.parse_args().experiments
    cases = {
        "splits whose true differences vary by 0 points": splits_vary(0.0),
        "splits whose true differences vary by 1 point": splits_vary(0.01),
        "splits whose true differences vary by 2 points": splits_vary(0.02),
        "splits whose true differences vary by 3 points": splits_vary(0.03),
        "another gallery each time, 20 identities": galleries_vary(20),
        "another gallery each time, 60 identities": galleries_vary(60),
        "20 identities, of which one has 40 queries and the others two": uneven_queries,
        "seeds that shift all queries by 1 point": seeds_shift(0.01, 3),
        "seeds that shift all queries by 2 points": seeds_shift(0.02, 3),
        "seeds that shift all queries by 3 points": seeds_shift(0.03, 3),
        "two seeds that shift all queries by 2 points": seeds_shift(0.02, 2),
        "five seeds that shift all queries by 2 points": seeds_shift(0.02, 5),
    }
    for name, experiment in cases.items():
        rng = np.random.default_rng(0)
        found = [experiment(rng) for _ in range(number)]
        contained = np.mean([one.holds_zero for one in found])
        width = np.mean([one.high - one.low for one in found])
        print(f"{contained:.0%} of {number} intervals, ± {50 * width:.1f} on average, contain 0: {name}", flush=True)


if __name__ == "__main__":
    main()
