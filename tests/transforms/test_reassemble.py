"""QLLM's disassembly is exact, its assembly costs what the paper's equation says."""

import pytest
import torch
from torch import Tensor

from mergequant.errors import UsageError
from mergequant.transforms import Reassembly, disassemblies, merge_distance, merge_groups

CHANNELS = 30


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Float64 tokens whose channels differ by two orders of magnitude, and a weight with ordinary columns."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, CHANNELS, generator=generator, dtype=torch.float64)
    x *= torch.logspace(-1, 1, CHANNELS, dtype=torch.float64)[torch.randperm(CHANNELS, generator=generator)]
    return x, torch.randn(7, CHANNELS, generator=generator, dtype=torch.float64)


def product(choice: Reassembly, x: Tensor, weight: Tensor) -> Tensor:
    """Outputs with nothing rounded: what feeds the site divides, the columns are multiplied."""
    scheme = choice.scheme(4)
    return scheme.exact_values(x / choice.divisor) @ scheme.fold(weight * choice.divisor).t()


def test_disassembly_when_nothing_is_rounded_expect_the_product_kept_exactly() -> None:
    x, weight = data()
    found = disassemblies(x.abs().amax(0), 12)
    assert len(found) > 4
    for threshold, copies in found.items():
        choice = Reassembly.apart(copies)
        target = x @ weight.t()
        assert float((product(choice, x, weight) - target).abs().max() / target.abs().max()) < 1e-10
        slots = choice.scheme(4).exact_values(x / choice.divisor)
        assert slots.shape[1] == int(copies.sum())
        assert float(slots.abs().max()) <= threshold * (1 + 1e-6)


def test_disassembly_when_a_channel_is_split_expect_copies_with_the_whole_column_each() -> None:
    x, weight = data()
    copies = torch.ones(CHANNELS, dtype=torch.int64)
    copies[[4, 9]] = torch.tensor([3, 2])
    choice = Reassembly.apart(copies)
    scheme = choice.scheme(4)
    columns = scheme.fold(weight * choice.divisor)
    for channel, count in ((4, 3), (9, 2), (5, 1)):
        slots = (scheme.index == channel).nonzero().flatten()
        assert slots.numel() == count
        for slot in slots:
            torch.testing.assert_close(columns[:, slot], weight[:, channel])
            torch.testing.assert_close(scheme.exact_values(x / choice.divisor)[:, slot], x[:, channel] / count)


def test_disassemblies_when_thresholds_fall_expect_growing_numbers_within_the_limit() -> None:
    strength = data()[0].abs().amax(0)
    found = disassemblies(strength, 9)
    extras = [int(copies.sum()) - CHANNELS for copies in found.values()]
    assert extras[0] == 0
    assert extras == sorted(set(extras))
    assert extras[-1] <= 9
    assert list(found) == sorted(found, reverse=True)
    for threshold, copies in found.items():
        assert torch.equal(copies, torch.ceil(strength / threshold - 1e-9).clamp_min(1).long())


def test_merge_distance_when_compared_with_the_triple_sum_expect_the_same() -> None:
    x, weight = data()
    distance = merge_distance(x.t() @ x, weight)
    for i in range(0, CHANNELS, 2):
        for j in range(1, CHANNELS, 2):
            change = torch.outer(x[:, i] - x[:, j], weight[:, i] - weight[:, j]) / 2
            assert float(distance[i // 2, j // 2]) == pytest.approx(float(change.square().sum()), rel=1e-9)


def test_merge_distance_when_sums_are_asked_for_expect_the_reference_codes_figure() -> None:
    x, weight = data()
    distance = merge_distance(x.t() @ x, weight, "sums")
    expected = ((x[:, 4] - x[:, 7]).norm() * (weight[:, 4] + weight[:, 7]).sum()).square()
    assert float(distance[2, 3]) == pytest.approx(float(expected), rel=1e-9)


def test_assembly_when_one_pair_is_merged_expect_exactly_its_distance_as_squared_error() -> None:
    x, weight = data()
    distance = merge_distance(x.t() @ x, weight)
    group = merge_groups(distance, torch.zeros(CHANNELS, dtype=torch.bool), 1)
    choice = Reassembly(torch.ones(CHANNELS, dtype=torch.int64), group)
    error = float((product(choice, x, weight) - x @ weight.t()).square().sum())
    assert choice.scheme(4).width == CHANNELS - 1
    assert error == pytest.approx(float(distance.min()), rel=1e-8)


def test_assembly_when_channels_are_equal_expect_them_merged_for_nothing() -> None:
    x, weight = data()
    x[:, 8] = x[:, 13]
    distance = merge_distance(x.t() @ x, weight)
    assert float(distance[4, 6]) < 1e-20 * float(distance.max())
    group = merge_groups(distance, torch.zeros(CHANNELS, dtype=torch.bool), 1)
    assert int(group[8]) == 13
    target = x @ weight.t()
    kept = product(Reassembly(torch.ones(CHANNELS, dtype=torch.int64), group), x, weight)
    assert float((kept - target).abs().max() / target.abs().max()) < 1e-10


def test_assembly_when_several_join_one_expect_their_mean_and_the_sum_of_their_columns() -> None:
    x, weight = data()
    group = torch.arange(CHANNELS)
    group[[0, 2, 10]] = 5
    group[[4, 6]] = 7
    choice = Reassembly(torch.ones(CHANNELS, dtype=torch.int64), group)
    scheme = choice.scheme(4)
    assert scheme.merges == (2, 2, 1)
    assert scheme.width == CHANNELS - 5
    slots = scheme.exact_values(x / choice.divisor)
    columns = scheme.fold(weight * choice.divisor)
    for slot, members in enumerate(([5, 0, 2, 10], [7, 4, 6])):
        torch.testing.assert_close(slots[:, slot], x[:, members].mean(1))
        torch.testing.assert_close(columns[:, slot], weight[:, members].sum(1))


def test_assembly_when_many_pairs_are_merged_expect_error_near_their_sum_and_far_below_random_pairs() -> None:
    x, weight = data()
    distance = merge_distance(x.t() @ x, weight)
    group = merge_groups(distance, torch.zeros(CHANNELS, dtype=torch.bool), 6)

    def error(group: Tensor) -> float:
        choice = Reassembly(torch.ones(CHANNELS, dtype=torch.int64), group)
        return float((product(choice, x, weight) - x @ weight.t()).square().sum())

    joined = (group != torch.arange(CHANNELS)).nonzero().flatten()
    total = sum(float(distance[i // 2, group[i] // 2]) for i in joined)
    chosen = error(group)
    assert chosen < 2.5 * total
    others = []
    for seed in range(10):
        picks = torch.randperm(CHANNELS // 2, generator=torch.Generator().manual_seed(seed))[:6]
        other = torch.arange(CHANNELS)
        other[2 * picks] = 2 * picks.flip(0) + 1
        others.append(error(other))
    assert chosen < min(others) / 10


def test_reassembly_when_channels_are_tagged_expect_every_slot_to_read_what_it_should() -> None:
    """Split and merged at once; an index that is off by one would go unseen in an error."""
    x, weight = data()
    strength = x.abs().amax(0)
    copies = disassemblies(strength, 5).popitem()[1]
    split = copies > 1
    extra = int(copies.sum()) - CHANNELS
    group = merge_groups(merge_distance(x.t() @ x, weight), split, extra)
    choice = Reassembly(copies, group)
    scheme = choice.scheme(4)
    assert scheme.width == CHANNELS
    tags = torch.eye(CHANNELS, dtype=torch.float64)
    read = scheme.exact_values(tags / choice.divisor)  # (channel, slot)
    for channel in range(CHANNELS):
        if split[channel]:
            expected = [1 / float(copies[channel])] * int(copies[channel])
        else:
            expected = [1 / int((group == group[channel]).sum())]
        torch.testing.assert_close(read[channel][read[channel] > 0].tolist(), expected)
    assert not bool(split[group != torch.arange(CHANNELS)].any())


def test_merge_groups_when_too_many_channels_are_split_expect_error_with_the_number_left() -> None:
    x, weight = data()
    split = torch.zeros(CHANNELS, dtype=torch.bool)
    split[0:24:2] = True
    with pytest.raises(UsageError, match="only 3 can be"):
        merge_groups(merge_distance(x.t() @ x, weight), split, 4)
    split[1::2] = True
    with pytest.raises(UsageError, match="only 0 can be"):
        merge_groups(merge_distance(x.t() @ x, weight), split, 1)
