"""reassemble: gathered channels, and sums for the slots in front."""

import pytest
import torch

from mergequant import ops


def test_reassemble_when_index_carries_rounds_expect_sums_in_the_slots_in_front() -> None:
    x = torch.tensor([[1.0, 2, 4, 8, 16, 32], [3.0, 5, 7, 11, 13, 17]])
    index = torch.tensor([3, 1, 5, 5, 0, 2, 4], dtype=torch.int32)  # 4 slots, then 2 and 1 more
    assert ops.reassemble(x, index, (2, 1)).tolist() == [[8 + 1 + 16, 2 + 4, 32, 32], [11 + 3 + 13, 5 + 7, 17, 17]]


@pytest.mark.parametrize(
    ("given", "wanted"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2]
)
def test_reassemble_when_input_is_of_some_dtype_expect_at_least_float32(
    given: torch.dtype, wanted: torch.dtype
) -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).to(given)
    slots = ops.reassemble(x, torch.arange(8), ())
    assert slots.dtype == wanted
    assert torch.equal(slots, x.to(wanted))


def test_reassemble_when_gradients_flow_expect_each_channel_to_get_its_slots() -> None:
    x = torch.ones(1, 4, requires_grad=True)
    slots = ops.reassemble(x, torch.tensor([0, 1, 1, 3]), (1,))
    (slots * torch.tensor([2.0, 3, 5])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[2, 8, 0, 2]]
