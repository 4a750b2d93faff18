"""One block of a small random model, ready for steps."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergequant.calibration import BlockContext, Chain, Chunk, StorePolicy
from mergequant.models import ModelShell

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture
def open_block() -> Callable[..., BlockContext]:
    """Block 0 of a family; some channels of the embedding are outliers, `outlier` times as strong as they were."""
    from families import make_model  # importable only after the line above

    def build(family: str = "llama", prefix: tuple[list[int], bool] | None = None, outlier: float = 20) -> BlockContext:
        model = make_model(family)
        with torch.no_grad():
            model.get_input_embeddings().weight[:, [3, 21]] *= outlier
        shell = ModelShell.open(model)
        windows: Tensor = torch.randint(3, 97, (14, 32), generator=torch.Generator().manual_seed(2))
        windows[:, 0] = 1
        chunks = [Chunk(windows[:8], "calibration"), Chunk(windows[8:12], "held_out"), Chunk(windows[12:], "verify")]
        chain = Chain(shell, chunks, StorePolicy(torch.device("cpu")), prefix)
        shell.load_block(0)
        chain.begin_block()
        return BlockContext(chain, shell.structures[0], torch.Generator().manual_seed(0))

    return build
