import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("interpreted_kernels.py")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_triton_kernels_compute_what_plain_torch_does() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    differences = {name: float(value) for name, value in (line.split(": ") for line in done.stdout.splitlines())}
    assert len(differences) > 40
    assert not {name: value for name, value in differences.items() if not value < 2e-6}
