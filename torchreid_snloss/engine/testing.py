"""The evaluation of a model: features according to the options of a run, then CMC, mAP and mINP from the features."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchreid_snloss import device, distributed
from torchreid_snloss.data.validation import VALIDATION
from torchreid_snloss.engine.extraction import (
    SplitFeatures,
    check_comparable,
    extract,
    extract_batch,
    first_files,
    normalized,
)
from torchreid_snloss.engine.features_file import FeaturesFile, conditions, weights_digest
from torchreid_snloss.engine.multi_query import more_queries, pool_queries
from torchreid_snloss.engine.random_state import random_states, seed_generators, set_random_states
from torchreid_snloss.engine.ranked_lists import RankedLists
from torchreid_snloss.evaluation import FeatureRanker, Ranking

__all__ = ["Evaluated", "Testing", "selecting_map"]

_CURVE_LENGTH = 50  # torchreid's
_SPLITS = {"query": "query images", "gallery": "gallery images", "further query": "further query images"}


@dataclass(frozen=True, eq=False)
class Evaluated:
    """The result of an evaluation on one data set, the same on all processes.

    Attributes:
        ranking: CMC, mAP and mINP.
        query: the features of the queries as they were compared: pooled and normalised if the options say so.
        gallery: the features of the gallery.
    """

    ranking: Ranking
    query: SplitFeatures
    gallery: SplitFeatures


class Testing:
    """Evaluates the model of an engine. On several processes all do so together.

    Args:
        tested: the engine to evaluate; its `parse_data_for_eval`, `extract_features` and `options` are used.
        check_stop: called before each batch and between blocks of queries, on all processes together; raises an
            exception to end the run.
    """

    def __init__(self, tested: Any, check_stop: Callable[[], None]) -> None:
        self._tested, self._check_stop = tested, check_stop
        self._file: FeaturesFile | None = None
        self._lists = RankedLists()

    def start_run(
        self, max_epoch: int, test_only: bool = False, visrank: bool = False, rerank: bool = False, **_: Any
    ) -> None:
        """Starts a run with these arguments. One that trains draws the lists of its last evaluation, at its end."""
        self._file, self._lists = None, RankedLists(visrank and not test_only, rerank, max_epoch)

    def draw_lists(self) -> None:
        """Draws the ranked lists of a training run, if it is to have any."""
        self._lists.draw()

    @contextlib.contextmanager
    def using_file(self, settings: Mapping[str, Any] | None) -> Iterator[None]:
        """Within it features are read from the file of `options.features`, or left there; without one, it does nothing.

        Args:
            settings: the settings of the run by key; None for a run without a config.

        Raises:
            FeaturesError: if the file is damaged, or of other weights, options or images.
            WriteError: at the end, if features could not be written.
        """
        options = self._tested.options
        if not options.features:
            yield
            return
        loaders: dict[tuple[str, str], Any] = {}
        for name, splits in self._tested.test_loader.items():
            loaders |= {(name, split): loader for split, loader in splits.items()}
            if options.multi_query and name != VALIDATION:
                loaders[name, "further query"] = more_queries(splits["query"])
        loader = next(iter(loaders.values()))
        self._file = FeaturesFile(
            options.features,
            weights_digest(self._tested._models.values()) if distributed.rank() == 0 else "",
            conditions(settings, loader, options.flip, getattr(self._tested, "pooling_method", None)),
            {key: loader.dataset.data for key, loader in loaders.items()},
        )
        try:
            yield
            self._file.close()
        finally:
            self._file = None

    @torch.no_grad()
    def evaluate(
        self,
        dataset_name: str,
        query_loader: Any,
        gallery_loader: Any,
        dist_metric: str = "euclidean",
        normalize_feature: bool = False,
        visrank: bool = False,
        visrank_topk: int = 10,
        save_dir: str = "",
        use_metric_cuhk03: bool = False,
        ranks: Sequence[int] = (1, 5, 10, 20),
        rerank: bool = False,
    ) -> Evaluated:
        """Evaluates one data set, and prints the results as torchreid does.

        Args:
            dataset_name: the name of the data set.
            query_loader: the loader of its query images.
            gallery_loader: the loader of its gallery images.
            dist_metric: `"euclidean"` or `"cosine"`.
            normalize_feature: whether to compare features of length 1.
            visrank: whether to draw the ranked list of each query into `save_dir/visrank_DATASET`.
            visrank_topk: how many images a ranked list has.
            save_dir: the folder of the run.
            use_metric_cuhk03: whether to use the metric of CUHK03.
            ranks: the ranks of the CMC curve to print. Those that the gallery is too small for are left out.
            rerank: whether to re-rank, as the option `rerank` does for every evaluation.

        Raises:
            NonFiniteError: if the model's features are not finite numbers; it names the data set, the split and the
                first image.
            FeaturesError: if the file of features is damaged.
            ValueError: if there is no gallery image, or no query has a match.
        """
        query = self._features(dataset_name, "query", query_loader)
        if self._tested.options.multi_query and dataset_name != VALIDATION:
            more = more_queries(query_loader)
            if more.dataset.data:
                query = pool_queries(query, self._features(dataset_name, "further query", more))
        gallery = self._features(dataset_name, "gallery", gallery_loader)
        if normalize_feature:
            query, gallery = normalized(query), normalized(gallery)
        rerank = rerank or self._tested.options.rerank
        ranker = self._ranker(query, gallery, dist_metric, rerank)
        ranking = ranker.ranking(max([_CURVE_LENGTH, *ranks]), use_metric_cuhk03)
        if distributed.rank() == 0:
            _print_results(ranking, ranks)
        if visrank or self._lists.due(self._tested.epoch + 1):
            if self._lists.rerank and not rerank:
                ranker = self._ranker(query, gallery, dist_metric, rerank=True)
            indices, _ = ranker.nearest(visrank_topk)
            if distributed.rank() == 0:
                folder = Path(save_dir) / f"visrank_{dataset_name}"
                self._lists.add(folder, self._tested.datamanager, dataset_name, indices)
        return Evaluated(ranking, query, gallery)

    def _ranker(self, query: SplitFeatures, gallery: SplitFeatures, metric: str, rerank: bool) -> FeatureRanker:
        if rerank:
            print("Applying person re-ranking ...")
        return FeatureRanker(
            *(query.features, gallery.features, query.pids, gallery.pids, query.camids, gallery.camids),
            metric=metric,
            rerank=rerank,
            device=device.type_of(self._tested.use_gpu),
            check_stop=self._check_stop,
        )

    def _features(self, dataset: str, split: str, loader: Any) -> SplitFeatures:
        """The features of a split, from the file or the model."""
        images, found = f"{_SPLITS[split]} of {dataset}", None
        if self._file is not None:
            found = self._file.read(dataset, split, first_files(loader))
        if found is not None:
            check_comparable(found.features, found.paths, images)
        else:
            print(f"Extracting features from {split} set ...")
            with same_draws():
                found = extract(self._tested, loader, self._features_of, images, self._check_stop, f"{split} features")
            if self._file is not None:
                self._file.write(dataset, split, found)
        print("Done, obtained {}-by-{} matrix".format(*found.features.shape))
        return found

    def _features_of(self, images: Tensor) -> Tensor:
        return extract_batch(self._tested.extract_features, images, self._tested.options.flip)


@contextlib.contextmanager
def same_draws() -> Iterator[None]:
    """Within it random numbers, such as those of a tracklet's frames, are the same in every evaluation."""
    before = random_states()
    seed_generators(0)
    try:
        yield
    finally:
        set_random_states(before)


def _print_results(ranking: Ranking, ranks: Sequence[int]) -> None:
    print("** Results **")
    print(f"mAP: {ranking.mean_ap:.1%}")
    print("CMC curve")
    for rank in ranks:
        if rank <= len(ranking.cmc):
            print(f"Rank-{rank:<3}: {ranking.cmc[rank - 1]:.1%}")
    print(f"mINP: {ranking.mean_inp:.1%}")
    if any(rank > len(ranking.cmc) for rank in ranks):
        print(f"Note: the gallery has {len(ranking.cmc)} images, so the CMC curve ends at that rank")


def selecting_map(mean_aps: Mapping[str, float]) -> tuple[float, str]:
    """The mAP by which the best checkpoint is chosen, and a description of the data it was measured on.

    This is the mAP on the held-out identities, or if there are none, on the test set that was evaluated last.

    Args:
        mean_aps: mAP in [0, 1] by data set.

    Returns:
        the mAP, or -1 if nothing has been evaluated yet, and the description.
    """
    if VALIDATION in mean_aps:
        return mean_aps[VALIDATION], "held-out identities"
    name = next(reversed(list(mean_aps)), "")
    return mean_aps.get(name, -1.0), f"the test set {name}"
