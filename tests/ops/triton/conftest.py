"""Triton kernels on a CPU: its interpreter runs them with numpy, statement by statement.

What the interpreter does otherwise than a GPU: it cuts float32 off to bfloat16 instead of rounding, does not multiply
matrices of bfloat16, and rounds between the two operations of a fused multiply-add. Tests here allow for that; those in
`tests/gpu` ask the same of the compiled kernels without allowance. A process either interprets or compiles
(`tests/conftest.py` says which), so on a machine with a GPU these are skipped.
"""

from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("this process compiles Triton kernels: tests/gpu runs them on the GPU")
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        # Triton 3.6 calls int() on an array of one element, which numpy 2.4 refuses.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
