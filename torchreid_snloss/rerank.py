"""k-reciprocal re-ranking: distances made anew from the neighbours that two images have in common.

Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017. An image has a few dozen
neighbours among thousands of images, so its encoding V is kept sparse here; torchreid's has a column for every image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from torchreid_snloss.evaluation import in_threads

__all__ = ["re_ranking"]

_BLOCK = 64  # images whose distances to all others are looked at together, in each thread


def re_ranking(
    q_g_dist: ArrayLike,
    q_q_dist: ArrayLike,
    g_g_dist: ArrayLike,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
) -> NDArray[np.float32]:
    """Re-ranks, with the signature of ``torchreid.utils.re_ranking`` and its result but for rounding.

    Equal distances are taken in the images' order, queries first; torchreid's order is arbitrary. Where an image is at
    distance 0 from all others, as features that have collapsed are, torchreid gives NaN and this a number.

    Works in as many threads as torch does (``torch.get_num_threads()``).

    Args:
        q_g_dist: (Q, G) distances of queries to gallery images, an array or a tensor on the CPU; not changed.
        q_q_dist: (Q, Q) distances among queries.
        g_g_dist: (G, G) distances among gallery images.
        k1: nearest images, besides itself, among which an image's reciprocal neighbours are, >= 1.
        k2: nearest images, itself included, over which encodings are averaged, >= 1; 1: no averaging.
        lambda_value: weight of the given distances in the result, in [0, 1]; that of the Jaccard distances is the rest.

    Returns:
        float32 (Q, G), in [0, 1]; smaller is nearer.

    Raises:
        ValueError: if shapes do not fit, a parameter is out of range, or squared distances are not finite.
    """
    distances = _Distances(np.asarray(q_g_dist), np.asarray(q_q_dist), np.asarray(g_g_dist))
    if k1 < 1 or k2 < 1 or not 0 <= lambda_value <= 1:
        got = f"k1={k1}, k2={k2}, lambda_value={lambda_value}"
        raise ValueError(f"k1 and k2 must be at least 1 and lambda_value in [0, 1], got {got}")
    nearest = distances.nearest(max(k1 + 1, k2))

    # The paper's R: of an image's nearest those that have it among theirs. R*: with the R of k1 / 2 of those images
    # that have more than 2/3 of it in common with the image's.
    mutual = _mutual(nearest[:, : k1 + 1])
    half = _mutual(nearest[:, : round(k1 / 2) + 1])  # symmetric, its own transpose
    common = mutual.multiply(mutual @ half).tocoo()
    alike = 3 * common.data > 2 * half.sum(axis=1)[common.col]
    taken_in = _ones(common.row[alike], common.col[alike], distances.num_images)
    neighbors = (mutual + taken_in @ half).tocoo()

    # V: a row for each image, a weight for each of its neighbours, of sum 1.
    weights = np.exp(-distances.pairs(neighbors.row, neighbors.col))
    encoding = sparse.csr_array((weights, (neighbors.row, neighbors.col)), shape=neighbors.shape)
    encoding.data /= np.repeat(encoding.sum(axis=1), np.diff(encoding.indptr))
    if k2 > 1:
        averaged = nearest[:, :k2]
        rows = np.repeat(np.arange(distances.num_images), averaged.shape[1])
        encoding = _ones(rows, averaged.ravel(), distances.num_images).astype(np.float32) @ encoding
        encoding.data /= averaged.shape[1]

    return _jaccard_and_given(encoding.tocsr(), distances, lambda_value)


def _jaccard_and_given(encoding: Any, distances: _Distances, lambda_value: float) -> NDArray[np.float32]:
    """Queries' Jaccard distances to the gallery and the given ones, weighted.

    A Jaccard distance is 1 less the sum of minima over the sum of maxima of two images' rows of the encoding.
    """
    num_queries, num_gallery = distances.q_g.shape
    by_neighbor = encoding[num_queries:].tocsc()  # a neighbour's column: the gallery images that have it
    result = np.empty((num_queries, num_gallery), dtype=np.float32)

    def fill_row(query: int) -> None:
        own = slice(encoding.indptr[query], encoding.indptr[query + 1])
        shared = by_neighbor[:, encoding.indices[own]]
        minima = np.minimum(shared.data, np.repeat(encoding.data[own], np.diff(shared.indptr)))
        overlap = np.bincount(shared.indices, weights=minima, minlength=num_gallery)
        jaccard = 1 - overlap / (2 - overlap)  # both rows sum to 1, so their maxima to 2 less their minima
        result[query] = jaccard * (1 - lambda_value) + distances.to_gallery(query) * lambda_value

    for _ in in_threads(fill_row, num_queries, "re-ranking"):
        pass
    return result


class _Distances:
    """Squared distances from each image to all, queries first, divided by the image's largest: in [0, 1].

    Made a few rows at a time, for all rows are larger than the given matrices together. Like torchreid, it makes a row
    of a column of the given matrices; it would be the same of a row, but for rounding.

    Attributes:
        q_g: the given distances of queries to gallery images.
        num_images: queries and gallery images.
    """

    def __init__(self, q_g: NDArray[Any], q_q: NDArray[Any], g_g: NDArray[Any]) -> None:
        if q_g.ndim != 2 or 0 in q_g.shape or [q_q.shape, g_g.shape] != [(size, size) for size in q_g.shape]:
            raise ValueError(
                "q_g_dist, q_q_dist and g_g_dist must be of shapes (Q, G), (Q, Q) and (G, G), with at least one query "
                f"and one gallery image, got {q_g.shape}, {q_q.shape} and {g_g.shape}"
            )
        self.q_g = q_g
        self.num_images = sum(q_g.shape)
        self._parts = [[q_q, q_g], [q_g.T, g_g]]
        self._largest = np.empty(self.num_images, dtype=np.float32)

    def nearest(self, count: int) -> NDArray[np.intp]:
        """Each image's nearest images, itself included, nearest first: (images, at most count)."""
        count = min(count, self.num_images)
        result = np.empty((self.num_images, count), dtype=np.intp)

        def fill_block(block: int) -> None:
            start = block * _BLOCK
            for image, row in enumerate(self._rows(start), start):
                farthest = np.partition(row, count - 1)[count - 1]
                candidates = np.flatnonzero(row <= farthest)  # more than count where the farthest are equally far
                result[image] = candidates[np.argsort(row[candidates], kind="stable")[:count]]

        for _ in in_threads(fill_block, -(-self.num_images // _BLOCK), "neighbors", "block"):
            pass
        return result

    def _rows(self, start: int) -> NDArray[np.float32]:
        """The rows of a block of images, whose largest distances it notes."""
        in_gallery = slice(max(0, start - len(self.q_g)), max(0, start - len(self.q_g) + _BLOCK))
        columns = [[queries[:, start : start + _BLOCK], gallery[:, in_gallery]] for queries, gallery in self._parts]
        rows = _squared(np.block(columns).T.copy())
        largest = rows.max(axis=1)
        if not np.isfinite(largest).all():
            image = start + int(np.argmin(np.isfinite(largest)))
            raise ValueError(f"squared distances to image {image} of queries and gallery are not finite in float32")
        largest[largest == 0] = 1
        self._largest[start : start + _BLOCK] = largest
        rows /= largest[:, None]
        return rows

    def pairs(self, images: NDArray[Any], others: NDArray[Any]) -> NDArray[np.float32]:
        """Distances from each image to the other at its place, after :meth:`nearest` has seen all rows."""
        num_queries = len(self.q_g)
        squared = np.empty(len(images), dtype=np.float32)
        for i, parts in enumerate(self._parts):
            for j, part in enumerate(parts):
                here = ((others >= num_queries) == i) & ((images >= num_queries) == j)
                squared[here] = _squared(part[others[here] - i * num_queries, images[here] - j * num_queries])
        squared /= self._largest[images]
        return squared

    def to_gallery(self, query: int) -> NDArray[np.float32]:
        """Distances from a query to the gallery images, after :meth:`nearest` has seen all rows."""
        row: NDArray[np.float32] = _squared(self.q_g[query]) / self._largest[query]
        return row


def _squared(distances: NDArray[Any]) -> NDArray[np.float32]:
    squared: NDArray[Any] = np.square(distances, dtype=np.result_type(distances.dtype, np.float32))
    with np.errstate(over="ignore"):  # infinity is found by those who look for it
        return squared.astype(np.float32, copy=False)


def _mutual(nearest: NDArray[np.intp]) -> Any:
    """Sparse (images, images), 1 where two images are in each other's row of nearest ones."""
    rows = np.repeat(np.arange(len(nearest)), nearest.shape[1])
    has = _ones(rows, nearest.ravel(), len(nearest))
    return has.multiply(has.T).tocsr()


def _ones(rows: NDArray[Any], columns: NDArray[Any], size: int) -> Any:
    return sparse.csr_array((np.ones(len(rows), dtype=np.int32), (rows, columns)), shape=(size, size))
