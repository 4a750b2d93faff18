"""Activations that wait: in memory, and on disk when there are too many."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergequant.calibration import ActivationStore, StorePolicy

CPU = torch.device("cpu")


Opener = Callable[[int], ActivationStore]


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Opener]:
    """Opens a store with so many bytes of memory, and closes it after the test."""
    stores: list[ActivationStore] = []

    def build(memory: int) -> ActivationStore:
        stores.append(ActivationStore(StorePolicy(CPU, memory_bytes=memory, folder=tmp_path)))
        return stores[-1]

    yield build
    for store in stores:
        store.close()


def values(count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 6, generator=generator) for _ in range(count)]


def spilled(folder: Path) -> int:
    return sum(1 for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("memory", "on_disk"), [(0, 5), (2 * 96, 3), (2 * 96 + 95, 3), (5 * 96, 0)])
def test_store_when_memory_is_bounded_expect_the_rest_on_disk_and_the_same_bits_back(
    open_store: Opener, tmp_path: Path, memory: int, on_disk: int
) -> None:
    store = open_store(memory)
    for value in values():
        store.append(value)
    assert spilled(tmp_path) == on_disk
    assert len(store) == 5
    assert all(torch.equal(one, other) for one, other in zip(store, values(), strict=True))
    assert torch.equal(store[3], values()[3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8])
def test_store_when_any_dtype_or_layout_is_spilled_expect_it_back(open_store: Opener, dtype: torch.dtype) -> None:
    store = open_store(0)
    value = (torch.randn(7, 5) * 9).to(dtype).t()[1:]
    store.append(value)
    assert store[0].dtype == dtype
    assert torch.equal(store[0], value)


def test_store_when_values_are_special_expect_the_same_bits(open_store: Opener) -> None:
    store = open_store(0)
    value = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    store.append(value)
    assert torch.equal(store[0].view(torch.int32), value.view(torch.int32))


@pytest.mark.parametrize("memory", [0, 2 * 96, 1 << 20])
def test_replace_when_entries_lie_anywhere_expect_new_values_there_and_no_further_file(
    open_store: Opener, tmp_path: Path, memory: int
) -> None:
    store = open_store(memory)
    for value in values():
        store.append(value)
    files, held = spilled(tmp_path), store[4]
    store.replace(0, values()[0] + 1)
    store.replace(4, values()[4] + 2)
    expected = [values()[0] + 1, *values()[1:4], values()[4] + 2]
    assert all(torch.equal(one, other) for one, other in zip(store, expected, strict=True))
    assert spilled(tmp_path) == files
    assert torch.equal(held, values()[4])  # what was read before keeps its values


def test_close_when_entries_were_spilled_expect_files_gone_and_store_empty(open_store: Opener, tmp_path: Path) -> None:
    store = open_store(0)
    for value in values():
        store.append(value)
    assert spilled(tmp_path) == 5
    store.close()
    assert len(store) == 0
    assert list(tmp_path.iterdir()) == []
    store.close()  # twice is harmless


def test_append_when_value_needs_gradients_expect_it_detached() -> None:
    store = ActivationStore(StorePolicy(CPU))
    store.append(torch.ones(2, requires_grad=True))
    assert not store[0].requires_grad
