"""Inputs, float64 definitions and comparisons for the elementwise ops, shared by the CPU, interpreter and GPU tests."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant import ops

EPS = 1e-5
KERNELS = (
    *("static_quant", "rmsnorm_quant", "layernorm_quant", "add_rmsnorm_quant", "silu_mul_quant"),
    *("dynamic_quant", "silu_mul_dynamic_quant"),
)
DYNAMIC = ("dynamic_quant", "silu_mul_dynamic_quant", "hadamard_dynamic_quant", "silu_mul_hadamard_dynamic_quant")
CLIP = 0.9


@dataclass(frozen=True)
class Case:
    """Arguments of one call: `x` is (rows, channels), the other vectors have the width of the codes."""

    x: Tensor
    residual: Tensor
    multiplier: Tensor
    index: Tensor | None
    shift: Tensor | None
    bits: int
    packed: bool = False

    def to(self, device: str) -> "Case":
        """The same on a device."""
        tensors = (self.x, self.residual, self.multiplier, self.index, self.shift)
        return Case(*(None if t is None else t.to(device) for t in tensors), self.bits, self.packed)  # type: ignore[arg-type]

    @property
    def gate_up(self) -> Tensor:
        """Gates and ups for the ops that multiply them."""
        return torch.cat((self.x, 2 * self.residual), -1)


def draw(
    rows: int,
    channels: int,
    bits: int = 8,
    dtype: torch.dtype = torch.float32,
    width: int | None = None,
    shifted: bool = False,
    one: bool = False,
    packed: bool = False,
) -> Case:
    """Values whose codes are spread over the grid and go beyond both of its ends; `width` gathers."""
    generator = torch.Generator().manual_seed(rows * channels + bits)
    x = (torch.randn(rows, channels, generator=generator) * 2).to(dtype)
    residual = torch.randn(rows, channels, generator=generator).to(dtype)
    outputs = channels if width is None else width
    multiplier = (torch.rand(1 if one else outputs, generator=generator) + 0.5) * 2 ** (bits - 1) / 3
    index = None if width is None else torch.randint(0, channels, (width,), generator=generator, dtype=torch.int32)
    shift = torch.rand(outputs, generator=generator) - 0.5 if shifted else None
    return Case(x, residual, multiplier, index, shift, bits, packed)


def run(name: str, case: Case) -> tuple[Tensor, ...]:
    """All results of an op, the updated residual included."""
    vectors = (case.multiplier, case.index, case.shift)
    if name == "static_quant":
        return (ops.static_quant(case.x, *vectors, case.bits, case.packed),)
    if name in ("rmsnorm_quant", "layernorm_quant"):
        return (getattr(ops, name)(case.x, *vectors, EPS, case.bits, case.packed),)
    if name == "add_rmsnorm_quant":
        residual = case.residual.clone()
        return ops.add_rmsnorm_quant(case.x, residual, *vectors, EPS, case.bits), residual
    if name == "silu_mul_quant":
        return (ops.silu_mul_quant(case.gate_up, *vectors, case.bits),)
    if name == "hadamard_quant":
        return (ops.hadamard_quant(case.x, *vectors, case.bits),)
    if name == "silu_mul_hadamard_quant":
        return (ops.silu_mul_hadamard_quant(case.gate_up, *vectors, case.bits),)
    if name == "silu_mul_hadamard_dynamic_quant":
        return ops.silu_mul_hadamard_dynamic_quant(case.gate_up, CLIP, case.bits)
    if name == "dynamic_quant":
        return ops.dynamic_quant(case.x, CLIP, case.bits, case.packed)
    if name == "silu_mul_dynamic_quant":
        return ops.silu_mul_dynamic_quant(case.gate_up, CLIP, case.bits)
    return ops.hadamard_dynamic_quant(case.x, CLIP, case.bits)


def unrounded(name: str, case: Case) -> Tensor:
    """What the op rounds, in float64, written out a second time."""
    x = case.x.double()
    if name == "add_rmsnorm_quant":
        x = (case.x + case.residual).double()
    if "rmsnorm" in name:
        x = x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    if name == "layernorm_quant":
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
    if "silu" in name:
        gate, up = case.gate_up.double().chunk(2, -1)
        x = gate * torch.sigmoid(gate) * up
    if "hadamard" in name:
        x = x.to(case.x.dtype).double() if "silu" in name else x
        turn = ops.rotation(x.shape[-1])
        left, right = turn.left.to(x), turn.right.to(x)
        x = (left.t() @ (x.reshape(-1, len(left), len(right)) @ right)).reshape(x.shape)
    if name in DYNAMIC:
        return x / (x.abs().amax(-1, keepdim=True) * CLIP / (2 ** (case.bits - 1) - 1))
    if case.index is not None:
        x = x[:, case.index.long()]
    x = x * case.multiplier.double()
    return x if case.shift is None else x + case.shift.double()


def unpack(codes: Tensor, case: Case) -> Tensor:
    """Codes as int32, one a column, whatever their storage."""
    if not case.packed:
        return codes.int()
    assert codes.dtype == torch.uint8
    pairs = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).int()
    return pairs - 16 * (pairs > 7).int()


def assert_near_exact(name: str, case: Case, codes: Tensor, share: float, near: float = 1e-3) -> None:
    """Codes are the rounded float64 values but for a share of them, which is off by one and near a tie.

    The failure names the case, the number of codes that differ, the first place, and both values there.
    """
    exact = unrounded(name, case)
    low, high = -(2 ** (case.bits - 1)), 2 ** (case.bits - 1) - 1
    got, expected = unpack(codes, case), exact.round().clamp(low, high).int()
    label = f"{name} {tuple(case.x.shape)} {case.x.dtype} bits {case.bits}"
    assert got.shape == expected.shape, f"{label}: shape {tuple(got.shape)}, not {tuple(expected.shape)}"
    if got.numel() > 4000:
        spread = (got > low) & (got < high)
        assert spread.float().mean() > 0.2, f"{label}: codes are stuck at the ends"
        kinds = got.unique().numel()  # one row alone reaches fewer of the outer codes
        assert kinds > (0.7 if len(got) > 1 else 0.5) * 2**case.bits, f"{label}: only {kinds} different codes"
    different = (got != expected).nonzero()
    if len(different) == 0:
        return
    row, column = different[0].tolist()
    report = (
        f"{label}: {len(different)} of {got.numel()} codes differ, first at ({row}, {column}): got {got[row, column]}, "
        f"expected {expected[row, column]} from {exact[row, column]:.6f}"
    )
    assert len(different) <= share * got.numel() + 1, report
    distance = ((exact - exact.floor()) - 0.5).abs()[got != expected]
    assert int((got - expected).abs().max()) <= 1, report
    assert float(distance.max()) < near, f"{report}; {float(distance.max())} from a tie"
