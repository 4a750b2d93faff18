"""The least time a phase can take on the ceilings measured in the same run, and what `percent_of_ceiling` means.

    percent_of_ceiling = 100 * floor / measured time

- **decode**, one token for each of B sequences at context T: bytes that must be read (quantized weights, the bf16 LM
  head, keys and values of T positions) at the read rate of large transfers; or, if that takes longer, the products at
  the scheme's rate.
- **prefill** of B x S tokens: 2 * B * S * (parameters of linear layers) operations at the scheme's sustained rate, plus
  causal attention, 2 * B * S^2 * heads * head_width per layer, at the bf16 rate, for attention is computed in bf16 in
  every scheme; plus the LM head on the last tokens. No norm, no activation, no launch counts: 100 % cannot be reached.
- **e2e**: the floor of its prefill and those of its decode steps, context growing.
- **gemm**: the longer of bytes (weights, inputs, outputs) at the read rate and 2MNK operations at the scheme's rate;
  burst rate for bursts and cold calls, sustained rate for sustained ones.
- **memory**: none.

The scheme's rate is the bare int8 `wgmma` rate for integer schemes, an upper bound that no GEMM reaches, and the best
cuBLAS GEMM for bf16 and fp8, a rate that was reached: the latter's percentages flatter them.
"""

from dataclasses import dataclass

from mergequant.bench.shapes import cache_bytes, head_parameters, linear_parameters
from mergequant.runtime import DecoderShape

__all__ = ["Ceilings", "Rate", "decode_bytes", "decode_floor", "e2e_floor", "gemm_floor", "prefill_floor"]

HEAD_BYTES = 2  # per parameter: embedding and LM head stay bf16 in every scheme


@dataclass(frozen=True)
class Rate:
    """Operations per second in TOPS (10^12; a multiply-add is two): in the first milliseconds, and when hot."""

    burst: float
    sustained: float


@dataclass(frozen=True)
class Ceilings:
    """What the machine did in this run.

    Attributes:
        read: TB/s (10^12 bytes) when several GB are read.
        read_by_size: the same for one kernel that reads that many MB, cold.
        launch: microseconds of an all but empty kernel inside a CUDA graph.
        rates: by kind of number, "int8" (bare wgmma), "bf16" and "fp8" (cuBLAS).
    """

    read: float
    read_by_size: dict[int, float]
    launch: float
    rates: dict[str, Rate]

    def to_dict(self) -> dict[str, object]:
        """JSON-able; the unit is part of each key."""
        found: dict[str, object] = {"read_tb_s": round(self.read, 3), "launch_us": round(self.launch, 2)}
        found["read_tb_s_by_mb"] = {str(size): round(rate, 3) for size, rate in self.read_by_size.items()}
        for kind, rate in self.rates.items():
            found[f"{kind}_burst_tops"] = round(rate.burst, 1)
            found[f"{kind}_sustained_tops"] = round(rate.sustained, 1)
        return found


def decode_bytes(shape: DecoderShape, batch: int, context: int, weight_bits: int, kv: int) -> int:
    """Bytes that one step must read."""
    weights = linear_parameters(shape) * weight_bits // 8 + head_parameters(shape) * HEAD_BYTES
    return weights + cache_bytes(shape, batch, context, kv)


def decode_floor(
    ceilings: Ceilings, shape: DecoderShape, batch: int, context: int, weight_bits: int, kv: int, kind: str
) -> float:
    """Milliseconds of one step."""
    moved = decode_bytes(shape, batch, context, weight_bits, kv) / (ceilings.read * 1e9)
    operations = 2 * batch * linear_parameters(shape) / (ceilings.rates[kind].sustained * 1e9)
    return max(moved, operations)


def prefill_floor(ceilings: Ceilings, shape: DecoderShape, batch: int, length: int, kind: str) -> float:
    """Milliseconds of a prefill."""
    products = 2 * batch * length * linear_parameters(shape)
    attention = 2 * batch * length**2 * shape.heads * shape.head_width * shape.layers  # causal: half of 4 B S^2
    head = 2 * batch * head_parameters(shape)
    in_bf16 = (attention + head) / (ceilings.rates["bf16"].sustained * 1e9)
    return products / (ceilings.rates[kind].sustained * 1e9) + in_bf16


def e2e_floor(
    ceilings: Ceilings, shape: DecoderShape, batch: int, prompt: int, new: int, weight_bits: int, kv: int, kind: str
) -> float:
    """Milliseconds of a prefill and the steps for the `new` - 1 tokens after the one that the prefill gives."""
    steps = [decode_floor(ceilings, shape, batch, prompt + step, weight_bits, kv, kind) for step in range(1, new)]
    return prefill_floor(ceilings, shape, batch, prompt, kind) + sum(steps)


def gemm_floor(ceilings: Ceilings, tokens: int, outputs: int, width: int, bits: tuple[int, int], rate: float) -> float:
    """Milliseconds of one product; `bits` of weights and of inputs, `rate` in TOPS; outputs are bf16."""
    weight_bits, input_bits = bits
    moved = outputs * width * weight_bits / 8 + tokens * width * input_bits / 8 + 2 * tokens * outputs
    return max(moved / (ceilings.read * 1e9), 2 * tokens * outputs * width / (rate * 1e9))
