"""k-means: weighted, in batches, and with the same result on every run.

Sums over clusters are kept in whole numbers of 64 bits, in which addition has no order: threads and atomic operations
of a GPU cannot change them.
"""

from typing import Literal

import torch
from torch import Tensor

from mergequant.errors import UsageError

__all__ = ["Start", "cluster_sums", "kmeans", "nearest"]

Start = Literal["random", "quantiles"]

SUM_BITS = 61  # of a whole sum; one more for rounding, one for the sign
AT_ONCE_CPU, AT_ONCE_GPU = 1 << 16, 1 << 28  # distances that are held at a time: what a cache holds; a gigabyte
LEAST_POINTS = 64


def nearest(points: Tensor, book: Tensor) -> Tensor:
    """Index of the nearest entry, Euclidean: points (batch, n, dim), book (batch, entries, dim) to int64 (batch, n)."""
    length = book.square().sum(-1)[:, None] / 2  # (batch, 1, entries)
    transposed = book.transpose(1, 2)
    batch, count, entries = points.shape[0], points.shape[1], book.shape[1]
    at_once = AT_ONCE_CPU if points.device.type == "cpu" else AT_ONCE_GPU
    step = max(at_once // (batch * entries), LEAST_POINTS)
    found = [
        _argmin(torch.baddbmm(length, points[:, start : start + step], transposed, alpha=-1))
        for start in range(0, count, step)
    ]
    return torch.cat(found, 1) if found else points.new_zeros((batch, 0), dtype=torch.int64)


def _argmin(distances: Tensor) -> Tensor:
    """Index of the least along the last axis; on a CPU by NumPy, in a seventh of torch's time for rows of 256."""
    if distances.device.type != "cpu":
        return distances.argmin(-1)
    return torch.from_numpy(distances.detach().numpy().argmin(-1))


def cluster_sums(values: Tensor, index: Tensor, clusters: int) -> Tensor:
    """Sums of the rows (n, dim) that belong to each cluster (index: int64 (n,)), float64 (clusters, dim)."""
    largest = values.abs().sum(0, dtype=torch.float64).clamp_min(1e-280)  # no sum of a column is larger
    scale = torch.exp2(SUM_BITS - 1 - torch.ceil(torch.log2(largest)))
    whole = (values.double() * scale).round_().to(torch.int64)
    sums = torch.zeros((clusters, values.shape[1]), dtype=torch.int64, device=values.device)
    return sums.index_add_(0, index, whole).double() / scale


def kmeans(
    points: Tensor,
    weight: Tensor,
    entries: int,
    *,
    iterations: int = 100,
    tolerance: float = 1e-5,
    start: Start = "random",
    seed: int = 0,
) -> Tensor:
    """Lloyd's iterations on several sets of points at once. A cluster that loses all its points keeps its centroid.

    Args:
        points: float (batch, n, dim).
        weight: (batch, n), not negative; a point of weight 0 sways nothing and is not drawn as a start if others do.
        entries: centroids of each set.
        iterations: most rounds.
        tolerance: rounds end when the centroids of all sets move by less, in square, than this share of the points'
            mean square.
        start: "random" points, or equally spaced "quantiles" of one-dimensional ones.
        seed: of random starts.

    Returns:
        float32 (batch, entries, dim).

    Raises:
        UsageError: more entries than points, or quantiles of vectors.
    """
    batch, count, dim = points.shape
    if entries > count:
        raise UsageError(
            f"a codebook of {entries} entries is to be found from {count} vectors; use fewer bits, shorter vectors or "
            "fewer groups"
        )
    points, weight = points.float(), weight.float()
    book = _quantiles(points, weight, entries) if start == "quantiles" else _drawn(points, weight, entries, seed)
    enough = tolerance * float(points.double().square().mean()) * dim
    first = torch.arange(batch, device=points.device)[:, None] * entries
    weighted = torch.cat([points * weight[..., None], weight[..., None]], -1).reshape(batch * count, dim + 1)
    for _ in range(iterations):
        index = (nearest(points, book) + first).reshape(-1)
        sums = cluster_sums(weighted, index, batch * entries)
        total = sums[:, dim:]
        mean = (sums[:, :dim] / total.clamp_min(1e-300)).float().reshape(book.shape)
        moved = torch.where((total > 0).reshape(batch, entries, 1), mean, book)
        shift = float((moved - book).square().sum(-1).mean())
        book = moved
        if shift <= enough:
            break
    return book


def _drawn(points: Tensor, weight: Tensor, entries: int, seed: int) -> Tensor:
    """Points of positive weight while there are any, in an order that a CPU draws."""
    generator = torch.Generator().manual_seed(seed)
    picked = []
    for own, mass in zip(points, weight):
        order = torch.randperm(own.shape[0], generator=generator).to(own.device)
        order = order[torch.argsort((mass[order] <= 0).to(torch.uint8), stable=True)]
        picked.append(own[order[:entries]])
    return torch.stack(picked)


def _quantiles(points: Tensor, weight: Tensor, entries: int) -> Tensor:
    if points.shape[2] != 1:
        raise UsageError(f"quantiles are for single values, not vectors of {points.shape[2]}; start at random points")
    alive = weight > 0
    alive |= ~alive.any(1, keepdim=True)  # a set without any weight starts from all of its points
    ordered = torch.where(alive, points[..., 0], torch.inf).sort(1).values
    share = (torch.arange(entries, device=points.device) + 0.5) / entries
    rank = (share * alive.sum(1, keepdim=True)).long()
    return ordered.gather(1, rank)[..., None]
