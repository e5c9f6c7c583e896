"""torchreid's evaluation, with features that are extracted according to the options of a run: flip, multi-query."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchreid import engine

from torchreid_snloss import distributed
from torchreid_snloss.data.shards import own_test_batches
from torchreid_snloss.data.validation import VALIDATION
from torchreid_snloss.data.workers import batches_of
from torchreid_snloss.device import to_device
from torchreid_snloss.engine.multi_query import more_queries, pool_queries
from torchreid_snloss.engine.options import NonFiniteError, TrainOptions
from torchreid_snloss.engine.ranked_lists import named_drawing_failures
from torchreid_snloss.evaluation import Ranking, capture_rankings
from torchreid_snloss.progress import progress

__all__ = ["Evaluated", "Testing", "selecting_map"]


@dataclass(frozen=True, eq=False)
class Evaluated:
    """The result of an evaluation on one data set.

    Attributes:
        rank1: rank-1 in [0, 1].
        mean_ap: mAP in [0, 1].
        ranking: mINP and the whole CMC curve; None if `register` was not called.
        splits: the batches of `query` and `gallery`. If the features were extracted beforehand, the batches hold
            features in place of images.
    """

    rank1: float
    mean_ap: float
    ranking: Ranking | None
    splits: Mapping[str, Any]


class Testing(engine.Engine):
    """An engine that evaluates the model of another engine with torchreid's own code.

    Args:
        tested: the engine to evaluate; its `parse_data_for_eval` and `extract_features` are used.
        options: the options of the run.
        check_stop: called before each batch, on all processes together; raises an exception to end the run.
    """

    def __init__(self, tested: Any, options: TrainOptions, check_stop: Callable[[], None]) -> None:
        super().__init__(tested.datamanager, tested.use_gpu)
        self._tested, self._options, self._check_stop = tested, options, check_stop
        self._images = ""  # what the images are called whose features torchreid extracts

    def evaluate(self, dataset_name: str, query_loader: Any, gallery_loader: Any, **kwargs: Any) -> Evaluated | None:
        """Evaluates one data set, and prints the results.

        Args:
            dataset_name: the name of the data set.
            query_loader: the loader of its query images.
            gallery_loader: the loader of its gallery images.
            **kwargs: the arguments of torchreid's `Engine._evaluate`.

        Returns:
            the result on rank 0, None on the other processes.

        Raises:
            NonFiniteError: if the model's features are not finite numbers; it names the data set and the split.
        """
        splits = {"query": query_loader, "gallery": gallery_loader}
        if self._options.multi_query and dataset_name != VALIDATION:
            more = self._extract(more_queries(query_loader), f"further query images of {dataset_name}")
            splits["query"] = pool_queries(self._extract(query_loader, f"query images of {dataset_name}"), more)
        if distributed.world_size() > 1 or self._options.record:  # all extract features, rank 0 evaluates
            splits = {
                split: x if isinstance(x, list) else self._extract(x, f"{split} images of {dataset_name}")
                for split, x in splits.items()
            }
        if distributed.rank() > 0:
            return None
        kwargs["rerank"] = kwargs.get("rerank", False) or self._options.rerank
        loaders = {
            f"{split}_loader": progress(
                f"{split} features", self._noting(f"{split} images of {dataset_name}", x), "batch", len(x)
            )
            for split, x in splits.items()
        }
        with capture_rankings() as rankings, self._drawing(dataset_name, **kwargs):
            rank1, mean_ap = self._evaluate(dataset_name, **loaders, **kwargs)
        if rankings:
            print(f"mINP: {rankings[-1].mean_inp:.1%}")
        return Evaluated(float(rank1), float(mean_ap), rankings[-1] if rankings else None, splits)

    def _noting(self, images: str, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of a loader; while one is in use, `_images` says what it holds."""
        for batch in batches_of(loader):
            self._images = images
            yield batch

    def _drawing(
        self, dataset_name: str, visrank: bool = False, save_dir: str = "", **_: Any
    ) -> contextlib.AbstractContextManager[None]:
        if not visrank:
            return contextlib.nullcontext()
        query, gallery = self.datamanager.fetch_test_loaders(dataset_name)
        return named_drawing_failures(os.path.join(save_dir, f"visrank_{dataset_name}"), query, gallery)

    def parse_data_for_eval(self, data: Any) -> Any:
        """Called by torchreid with a batch of images, or of features that were extracted beforehand."""
        if _has_features(data):
            return super().parse_data_for_eval(data)
        self._check_stop()
        return self._tested.parse_data_for_eval(data)

    def extract_features(self, images: Tensor) -> Tensor:
        """Called by torchreid with the images or features that `parse_data_for_eval` returned."""
        if images.dim() == 2:
            return images
        features = self._features_of(images)
        if not _comparable(features):
            raise _not_comparable(self._images)
        return features

    def _features_of(self, images: Tensor) -> Tensor:
        features: Tensor = self._tested.extract_features(images)
        if self._options.flip:
            features = (features + self._tested.extract_features(images.flip(-1))) / 2
        return features

    @torch.no_grad()
    def _extract(self, loader: Any, name: str) -> list[dict[str, Any]]:
        """Extracts features in parallel and returns all batches, with features in place of images, on rank 0.

        Batches are not split, so that the features are the same as with one process.
        """
        own: list[dict[str, Any]] = []
        broken = False
        batches = batches_of(own_test_batches(loader))
        turns = -(-len(loader) // distributed.world_size())  # the same number on all processes
        for _ in progress("features", range(turns), "batch", turns):
            self._check_stop()
            data = next(batches, None)
            if data is not None:
                images, pids, camids = self._tested.parse_data_for_eval(data)
                features = self._features_of(to_device(images, self.use_gpu))
                broken |= not _comparable(features)
                own.append({"img": features.cpu(), "pid": pids, "camid": camids})
        if distributed.all_reduce_max(int(broken)):  # on all processes, so that none waits for another
            raise _not_comparable(name)
        parts = distributed.gather_objects(own)
        return [batch for turn in itertools.zip_longest(*parts) for batch in turn if batch is not None]


def _has_features(data: Mapping[str, Any]) -> bool:
    """Whether a batch holds (batch, dimension) features in place of images."""
    return bool(data["img"].dim() == 2)


def _comparable(features: Tensor) -> bool:
    """Whether the squared distances between features are finite, as far as their lengths tell."""
    return bool(torch.isfinite(8 * features.float().square().sum(dim=-1)).all())


def _not_comparable(images: str) -> NonFiniteError:
    return NonFiniteError(
        f"the model's features of {images} are NaN, infinite or too large to compare: its weights or the images hold "
        "numbers that are out of range"
    )


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
