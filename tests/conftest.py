"""Fixtures that every room's tests share."""

import os
from pathlib import Path

import pytest
import torch

# Triton decides when it is first imported whether a process interprets kernels; which test does that first is chance.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

NEIGHBOUR = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """pytest-xdist runs two workers on two cores: a thread each."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder with `models/` and `data/` for the tests that need more than the bundled model."""
    folder = Path(os.environ.get("MERGEQUANT_TEST_DATA", NEIGHBOUR))
    if not (folder / "models").is_dir():
        pytest.skip(f"no reference models under {folder}; set MERGEQUANT_TEST_DATA to the folder that holds them")
    return folder
