"""k-means: weighted, batched, exactly repeatable."""

import pytest
import torch

from mergequant.errors import UsageError
from mergequant.solvers import cluster_sums, kmeans, nearest


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loss(points: torch.Tensor, weight: torch.Tensor, book: torch.Tensor) -> float:
    index = nearest(points, book)
    chosen = book.gather(1, index[..., None].expand(-1, -1, points.shape[2]))
    return float(((points - chosen).square().sum(-1) * weight).sum())


def test_kmeans_when_clusters_are_apart_expect_their_weighted_means() -> None:
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = (centers[:, None] + 0.1 * draw(3, 50, 2)).reshape(1, 150, 2)
    weight = draw(1, 150, seed=1).abs()
    books = [kmeans(points, weight, 3, seed=seed) for seed in range(8)]  # a random start may miss a cluster
    book = min(books, key=lambda book: loss(points, weight, book))[0]
    for number in range(3):
        own, mass = points[0, 50 * number : 50 * number + 50], weight[0, 50 * number : 50 * number + 50, None]
        mean = (own * mass).sum(0) / mass.sum()
        assert float((book - mean).norm(dim=1).min()) < 1e-5


def test_kmeans_when_run_in_a_batch_expect_each_set_as_alone() -> None:
    points, weight = draw(4, 200, 1), torch.ones(4, 200)
    together = kmeans(points, weight, 8, start="quantiles", iterations=5, tolerance=0)
    for number in range(4):
        own = slice(number, number + 1)
        alone = kmeans(points[own], weight[own], 8, start="quantiles", iterations=5, tolerance=0)
        torch.testing.assert_close(together[own], alone, rtol=1e-6, atol=1e-7)


def test_kmeans_when_points_have_no_weight_expect_them_to_sway_nothing() -> None:
    points = torch.cat([draw(1, 64, 2), 1e3 + draw(1, 40, 2)], 1)
    weight = torch.cat([torch.ones(1, 64), torch.zeros(1, 40)], 1)
    assert float(kmeans(points, weight, 8).abs().max()) < 10
    line, mass = points[..., :1], weight
    assert float(kmeans(line, mass, 8, start="quantiles").abs().max()) < 10
    assert kmeans(line, torch.zeros_like(mass), 4, start="quantiles").isfinite().all()


def test_kmeans_when_threads_differ_expect_the_same_bits() -> None:
    points, weight = draw(2, 3000, 4), draw(2, 3000, seed=1).abs()
    before = torch.get_num_threads()
    books = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            books.append(kmeans(points, weight, 32, iterations=6))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*books)
    assert loss(points, weight, books[0]) < 0.8 * loss(points, weight, kmeans(points, weight, 32, iterations=0))


def test_sums_when_order_changes_expect_the_same_bits() -> None:
    values, index = draw(5000, 3) * torch.tensor([1e-6, 1.0, 1e6]), torch.arange(5000) % 7
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(2))
    sums = cluster_sums(values, index, 7)
    assert torch.equal(sums, cluster_sums(values[order], index[order], 7))
    exact = torch.stack([values[index == number].double().sum(0) for number in range(7)])
    torch.testing.assert_close(sums, exact, rtol=1e-9, atol=1e-9)


def test_kmeans_when_entries_are_too_many_or_quantiles_are_of_vectors_expect_error() -> None:
    with pytest.raises(UsageError, match="16 entries is to be found from 9 vectors"):
        kmeans(draw(1, 9, 2), torch.ones(1, 9), 16)
    with pytest.raises(UsageError, match="vectors of 2"):
        kmeans(draw(1, 9, 2), torch.ones(1, 9), 4, start="quantiles")
    few = kmeans(torch.tensor([[[0.0], [0.0], [1.0], [1.0]]]), torch.ones(1, 4), 4, start="quantiles")
    assert set(few.flatten().tolist()) == {0.0, 1.0}  # fewer values than entries
