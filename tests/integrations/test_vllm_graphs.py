"""Sizes of captured graphs: vLLM's own, then longer ones, and never against the user."""

from types import SimpleNamespace
from typing import Any

import pytest

from mergequant.integrations.vllm.graphs import CaptureSizes, capture_sizes


def config(method: str | None, sizes: list[int] | None = None, most: int | None = None) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(quantization=method),
        scheduler_config=SimpleNamespace(max_num_seqs=256),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=most),
    )


@pytest.mark.parametrize("sequences", [1, 3, 64, 256, 1024])
def test_sizes_rise_to_2048_and_begin_as_vllm_s(sequences: int) -> None:
    sizes = capture_sizes(sequences)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, 2048)
    if sequences >= 256:
        assert sizes[:51] == [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]


def test_own_checkpoints_get_longer_graphs() -> None:
    own = config("mergequant")
    CaptureSizes.verify_and_update_config(own)
    assert own.compilation_config.cudagraph_capture_sizes == capture_sizes(256)


@pytest.mark.parametrize("other", [config("fp8"), config(None), config("mergequant", most=128)])
def test_others_and_chosen_sizes_are_left_alone(other: Any) -> None:
    CaptureSizes.verify_and_update_config(other)
    assert other.compilation_config.cudagraph_capture_sizes is None
    chosen = config("mergequant", [1, 2])
    CaptureSizes.verify_and_update_config(chosen)
    assert chosen.compilation_config.cudagraph_capture_sizes == [1, 2]
