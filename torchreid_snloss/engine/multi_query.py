"""Several images for each query: the multiple-query protocol of Market-1501."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

__all__ = ["find_more_queries", "more_queries", "pool_queries"]

_NAME = re.compile(r"(\d+)_c(\d+)")

Batches = Sequence[dict[str, Any]]


def find_more_queries(dataset: Any) -> list[Path]:
    """The images in the folder `gt_bbox` (hand-drawn boxes) beside a data set's `query` folder, if there is one."""
    queries = getattr(dataset, "query_dir", None)
    return sorted((Path(queries).parent / "gt_bbox").glob("*.jpg")) if queries else []


def more_queries(loader: Any) -> Any:
    """A loader of the images in `gt_bbox` that show the person of a query from the query's camera.

    Args:
        loader: the query loader of a data set in Market-1501 layout.
    """
    dataset = copy.copy(loader.dataset)
    wanted = {(pid, camid) for _, pid, camid, *_ in dataset.data}
    rest = dataset.data[0][3:]
    data = []
    for path in find_more_queries(dataset):
        found = _NAME.match(path.name)
        if found is not None and (key := (int(found[1]), int(found[2]) - 1)) in wanted:
            data.append((str(path), *key, *rest))
    dataset.data = data
    return DataLoader(
        dataset, batch_size=loader.batch_size, num_workers=loader.num_workers, worker_init_fn=loader.worker_init_fn
    )


def pool_queries(queries: Batches, more: Batches) -> list[dict[str, Any]]:
    """Replaces each query's feature with the mean feature of its person from its camera (Zheng et al., ICCV 2015).

    Args:
        queries: batches with features in `img`, and with `pid` and `camid`.
        more: batches of the same form, with the features of the images of `more_queries`. A query without further
            images keeps its feature.
    """
    groups: dict[tuple[int, int], list[Tensor]] = {}
    for batch in more:
        for feature, key in _rows(batch):
            groups.setdefault(key, []).append(feature)
    means = {key: torch.stack(features).mean(dim=0) for key, features in groups.items()}
    return [
        {**batch, "img": torch.stack([means.get(key, feature) for feature, key in _rows(batch)])} for batch in queries
    ]


def _rows(batch: dict[str, Any]) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """The features of a batch, each with its person and camera."""
    return zip(batch["img"], zip(batch["pid"].tolist(), batch["camid"].tolist()))
