"""k-reciprocal re-ranking: new distances based on the neighbours that two images have in common.

Source: Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017. An image has a few
dozen neighbours among thousands of images, so the encoding V is a sparse matrix here. It is dense in torchreid.
"""

from __future__ import annotations

import operator
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from torchreid_snloss.threads import in_threads

__all__ = ["Distances", "Encoding", "re_ranking", "smallest", "squared"]

_BLOCK_SIZE = 64  # images; each thread holds their distances to all images


def re_ranking(
    q_g_dist: ArrayLike,
    q_q_dist: ArrayLike,
    g_g_dist: ArrayLike,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
) -> NDArray[np.float32]:
    """Re-ranks with the signature of `torchreid.utils.re_ranking` and the same result up to rounding.

    Images at equal distances are taken in their order, queries first; in torchreid this order is arbitrary. If an image
    is at distance 0 from all others, as with collapsed features, torchreid returns NaN, and this function a number.

    The work is done in as many threads as torch uses (`torch.get_num_threads()`).

    Args:
        q_g_dist: (Q, G), the distances from queries to gallery images, an array or a CPU tensor. It is not modified.
        q_q_dist: (Q, Q), the distances among queries.
        g_g_dist: (G, G), the distances among gallery images.
        k1: The number of nearest images, besides the image itself, among which its reciprocal neighbours are searched,
            >= 1.
        k2: The number of nearest images, including the image itself, over which encodings are averaged, >= 1. There is
            no averaging with 1.
        lambda_value: The weight of the given distances in the result, in [0, 1]. The Jaccard distances have the weight
            `1 - lambda_value`.

    Returns:
        (Q, G), float32 in [0, 1]; smaller is nearer.

    Raises:
        ValueError: If shapes do not fit, a parameter is out of range, or a squared distance is not finite.
        TypeError: If distances are not real numbers, or `k1` or `k2` is not an integer.
    """
    distances = _Distances(np.asarray(q_g_dist), np.asarray(q_q_dist), np.asarray(g_g_dist))
    encoding = Encoding(distances, k1, k2, lambda_value)
    result = np.empty(distances.q_g.shape, dtype=np.float32)

    def fill_row(query: int) -> None:
        result[query] = encoding.final_distances(query, distances.q_g[query])

    for _ in in_threads(fill_row, len(result), "re-ranking"):
        pass
    return result


class Distances(Protocol):
    """The squared distances from each image to all images, queries first, divided by the largest of the image.

    Attributes:
        num_queries: The number of queries.
        num_images: The number of queries and gallery images.
        largest: (images,), the largest squared distance of each image. It is known after a call of `nearest`.
    """

    num_queries: int
    num_images: int
    largest: NDArray[np.float32]

    def nearest(self, count: int) -> NDArray[np.intp]:
        """The nearest images of each image, including itself, nearest first: (images, at most `count`)."""

    def pairs(self, images: NDArray[Any], others: NDArray[Any]) -> NDArray[np.float32]:
        """The squared distance, not divided, from each of `images` to the image in the same place of `others`."""


class Encoding:
    """The k-reciprocal encoding of queries and gallery images."""

    def __init__(self, distances: Distances, k1: int = 20, k2: int = 6, lambda_value: float = 0.3) -> None:
        """Encodes all images. The arguments after the first are those of `re_ranking`."""
        if operator.index(k1) < 1 or operator.index(k2) < 1 or not 0 <= lambda_value <= 1:
            got = f"k1={k1}, k2={k2}, lambda_value={lambda_value}"
            raise ValueError(f"k1 and k2 must be at least 1 and lambda_value in [0, 1], got {got}")
        nearest = distances.nearest(max(k1 + 1, k2))
        self._largest, self._lambda = distances.largest, lambda_value

        # The k-reciprocal neighbours R(p, k1): the nearest images of p that have p among their own nearest images. R*
        # adds R(q, k1 / 2) for each q in R(p, k1) if more than 2/3 of R(q, k1 / 2) is in R(p, k1).
        mutual = _mutual(nearest[:, : k1 + 1])
        half = _mutual(nearest[:, : round(k1 / 2) + 1])  # symmetric, its own transpose
        common = mutual.multiply(mutual @ half).tocoo()
        is_expanded = 3 * common.data > 2 * half.sum(axis=1)[common.col]
        expanded = _ones(common.row[is_expanded], common.col[is_expanded], distances.num_images)
        neighbors = (mutual + expanded @ half).tocoo()

        # The encoding V: a row for each image with a weight for each of its neighbours. A row sums to 1.
        weights = np.exp(-distances.pairs(neighbors.row, neighbors.col) / self._largest[neighbors.row])
        encoding = sparse.csr_array((weights, (neighbors.row, neighbors.col)), shape=neighbors.shape)
        encoding.data /= np.repeat(encoding.sum(axis=1), np.diff(encoding.indptr))
        if k2 > 1:
            averaged = nearest[:, :k2]
            rows = np.repeat(np.arange(distances.num_images), averaged.shape[1])
            encoding = _ones(rows, averaged.ravel(), distances.num_images).astype(np.float32) @ encoding
            encoding.data /= averaged.shape[1]
        num_queries = distances.num_queries
        self._queries = encoding.tocsr()[:num_queries]
        self._by_neighbor = encoding[num_queries:].tocsc()  # a column: the gallery images that have this neighbour

    def final_distances(self, query: int, distances: NDArray[Any]) -> NDArray[np.float32]:
        """The weighted sum of the Jaccard distances from a query to the gallery images and the given distances.

        The Jaccard distance of two images is 1 minus the sum of the minima of their rows of the encoding divided by the
        sum of the maxima.

        Args:
            query: The index of the query.
            distances: (gallery,), the given distances of the query.
        """
        own = slice(self._queries.indptr[query], self._queries.indptr[query + 1])
        shared = self._by_neighbor[:, self._queries.indices[own]]
        minima = np.minimum(shared.data, np.repeat(self._queries.data[own], np.diff(shared.indptr)))
        overlap = np.bincount(shared.indices, weights=minima, minlength=len(distances))
        jaccard = 1 - overlap / (2 - overlap)  # both rows sum to 1, so minima and maxima sum to 2
        result: NDArray[Any] = jaccard * (1 - self._lambda) + squared(distances) / self._largest[query] * self._lambda
        return result.astype(np.float32)


class _Distances:
    """`Distances` from matrices.

    They are computed a few rows at a time, because all rows would take more memory than the given matrices together. As
    in torchreid, a row is computed from a column of the given matrices, which are symmetric up to rounding.

    Attributes:
        q_g: The given distances from queries to gallery images.
    """

    def __init__(self, q_g: NDArray[Any], q_q: NDArray[Any], g_g: NDArray[Any]) -> None:
        if q_g.ndim != 2 or 0 in q_g.shape or [q_q.shape, g_g.shape] != [(size, size) for size in q_g.shape]:
            raise ValueError(
                "q_g_dist, q_q_dist and g_g_dist must be of shapes (Q, G), (Q, Q) and (G, G), with at least one query "
                f"and one gallery image, got {q_g.shape}, {q_q.shape} and {g_g.shape}"
            )
        for name, distances in (("q_g_dist", q_g), ("q_q_dist", q_q), ("g_g_dist", g_g)):
            if distances.dtype.kind not in "biuf":
                raise TypeError(f"{name} must hold real numbers, got {distances.dtype}")
        self.q_g = q_g
        self.num_queries, self.num_images = len(q_g), sum(q_g.shape)
        self._parts = [[q_q, q_g], [q_g.T, g_g]]
        self.largest = np.empty(self.num_images, dtype=np.float32)

    def nearest(self, count: int) -> NDArray[np.intp]:
        count = min(count, self.num_images)
        result = np.empty((self.num_images, count), dtype=np.intp)

        def fill_block(block: int) -> None:
            start = block * _BLOCK_SIZE
            for image, row in enumerate(self._rows(start), start):
                result[image] = smallest(row, count)

        for _ in in_threads(fill_block, -(-self.num_images // _BLOCK_SIZE), "neighbors", "block"):
            pass
        return result

    def _rows(self, start: int) -> NDArray[np.float32]:
        """The rows of the block of images from `start` on. Stores the largest distance of each of these images."""
        block = slice(start, start + _BLOCK_SIZE)
        in_gallery = slice(max(0, block.start - len(self.q_g)), max(0, block.stop - len(self.q_g)))
        columns = [[queries[:, block], gallery[:, in_gallery]] for queries, gallery in self._parts]
        rows = squared(np.block(columns).T.copy())
        largest = rows.max(axis=1)
        if not np.isfinite(largest).all():
            image = start + int(np.argmin(np.isfinite(largest)))
            raise ValueError(f"squared distances to image {image} of queries and gallery are not finite in float32")
        largest[largest == 0] = 1
        self.largest[block] = largest
        rows /= largest[:, None]
        return rows

    def pairs(self, images: NDArray[Any], others: NDArray[Any]) -> NDArray[np.float32]:
        num_queries = len(self.q_g)
        result = np.empty(len(images), dtype=np.float32)
        for i, parts in enumerate(self._parts):
            for j, part in enumerate(parts):
                in_part = ((others >= num_queries) == i) & ((images >= num_queries) == j)
                result[in_part] = squared(part[others[in_part] - i * num_queries, images[in_part] - j * num_queries])
        return result


def smallest(row: NDArray[Any], count: int) -> NDArray[np.intp]:
    """The indices of the `count` smallest values in ascending order, equal values in the order of their indices."""
    largest = np.partition(row, count - 1)[count - 1]
    candidates = np.flatnonzero(row <= largest)  # more than count if several values are equal
    result: NDArray[np.intp] = candidates[np.argsort(row[candidates], kind="stable")[:count]]
    return result


def squared(distances: NDArray[Any]) -> NDArray[np.float32]:
    """The squares in float32, infinite where they are too large for it."""
    squares: NDArray[Any] = np.square(distances, dtype=np.result_type(distances.dtype, np.float32))
    with np.errstate(over="ignore"):
        return squares.astype(np.float32, copy=False)


def _mutual(nearest: NDArray[np.intp]) -> Any:
    """A sparse matrix (images, images) with 1 where each image is among the nearest images of the other."""
    rows = np.repeat(np.arange(len(nearest)), nearest.shape[1])
    is_near = _ones(rows, nearest.ravel(), len(nearest))
    return is_near.multiply(is_near.T).tocsr()


def _ones(rows: NDArray[Any], columns: NDArray[Any], size: int) -> Any:
    return sparse.csr_array((np.ones(len(rows), dtype=np.int32), (rows, columns)), shape=(size, size))
