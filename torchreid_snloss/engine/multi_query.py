"""Several images for each query: the multiple-query protocol of Market-1501."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchreid_snloss.data.batches import loader_like
from torchreid_snloss.engine.extraction import SplitFeatures

__all__ = ["find_more_queries", "more_queries", "pool_queries"]

_NAME = re.compile(r"(\d+)_c(\d+)")


def find_more_queries(dataset: Any) -> list[tuple[Any, ...]]:
    """The images in the folder `gt_bbox` (hand-drawn boxes) that show the person of a query from the query's camera.

    Args:
        dataset: a data set of queries; only those in Market-1501 layout have such a folder, beside their `query`.

    Returns:
        items like those of the data set, in the order of their names.
    """
    queries = getattr(dataset, "query_dir", None)
    wanted = {(pid, camid) for _, pid, camid, *_ in dataset.data}
    found = []
    for path in sorted((Path(queries).parent / "gt_bbox").glob("*.jpg")) if queries else []:
        name = _NAME.match(path.name)
        if name is not None and (key := (int(name[1]), int(name[2]) - 1)) in wanted:
            found.append((str(path), *key, *dataset.data[0][3:]))
    return found


def more_queries(loader: Any) -> Any:
    """A loader of what `find_more_queries` finds.

    Args:
        loader: the query loader of a data set in Market-1501 layout.
    """
    dataset = copy.copy(loader.dataset)
    dataset.data = find_more_queries(dataset)
    return loader_like(loader, dataset, batch_size=loader.batch_size)


def pool_queries(queries: SplitFeatures, more: SplitFeatures) -> SplitFeatures:
    """Replaces each query's feature with the mean feature of its person from its camera (Zheng et al., ICCV 2015).

    Args:
        queries: the features of the queries, which are not modified.
        more: the features of the images of `more_queries`. A query without further images keeps its feature.
    """
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, key in enumerate(zip(more.pids.tolist(), more.camids.tolist())):
        groups[key].append(row)
    pooled = queries.features.clone()
    for row, key in enumerate(zip(queries.pids.tolist(), queries.camids.tolist())):
        if key in groups:
            pooled[row] = more.features[groups[key]].mean(dim=0)
    return replace(queries, features=pooled)
