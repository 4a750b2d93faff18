"""Launch of `gemm_s4.cu`: W4A4 on the int4 tensor cores of sm_80, sm_86 and sm_89."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from mergequant.ops.cuda.compiler import Unit
from mergequant.ops.cuda.launch import kernel

__all__ = ["CONFIGURATIONS", "Configuration", "choose", "linear", "unit"]

CHUNK_BYTES = 16  # of a row, copied at once: rows are padded to whole chunks


@dataclass(frozen=True)
class Configuration:
    """Warps side by side over tokens and outputs, tiles of 16 tokens and of 8 outputs of each, shared-memory stages."""

    warps_m: int
    warps_n: int
    tiles_m: int
    tiles_n: int
    stages: int

    @property
    def tokens(self) -> int:
        """Tokens of a block."""
        return 16 * self.warps_m * self.tiles_m

    @property
    def outputs(self) -> int:
        """Outputs of a block."""
        return 8 * self.warps_n * self.tiles_n


# 128 x 128: 48 KiB of shared memory and 128 registers, two blocks of a multiprocessor on all three architectures.
# 16 x 64: for a few tokens, where blocks enough to keep the memory busy matter more than the tensor cores.
MANY = Configuration(warps_m=2, warps_n=4, tiles_m=4, tiles_n=4, stages=3)
FEW = Configuration(warps_m=1, warps_n=4, tiles_m=1, tiles_n=2, stages=4)
CONFIGURATIONS = (FEW, MANY)


def choose(rows: int) -> Configuration:
    """Configuration for a number of tokens."""
    return FEW if rows <= FEW.tokens else MANY


@cache
def unit(configuration: Configuration, half: bool) -> Unit:
    """What is compiled for a configuration; `half`: results are float16, else bfloat16."""
    return Unit(
        "gemm_s4.cu",
        (
            ("MQ_WARPS_M", configuration.warps_m),
            ("MQ_WARPS_N", configuration.warps_n),
            ("MQ_TILES_M", configuration.tiles_m),
            ("MQ_TILES_N", configuration.tiles_n),
            ("MQ_STAGES", configuration.stages),
            ("MQ_HALF", int(half)),
        ),
    )


def linear(
    packed_codes: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    configuration: Configuration | None = None,
) -> Tensor:
    """`int4x4_linear` of checked arguments.

    Args:
        packed_codes: uint8 (rows, width / 2), contiguous.
        packed_weight: uint8 (outputs, width / 2), contiguous. Rows of whole multiples of 16 bytes (width % 32 == 0) are
            used as they lie; others are padded at every call.
        weight_scale: float32 (outputs,).
        token_scale: optional float32 (rows,).
        bias: optional float32 (outputs,).
        out_dtype: bfloat16 or float16.
        configuration: None for the one that `choose` takes.

    Returns:
        (rows, outputs).

    Raises:
        KernelError: the kernel cannot be compiled or launched.
    """
    packed_codes, packed_weight = _copyable(packed_codes), _copyable(packed_weight)
    (rows, size), outputs = packed_codes.shape, packed_weight.shape[0]
    configuration = configuration or choose(rows)
    result = torch.empty((rows, outputs), dtype=out_dtype, device=packed_codes.device)
    kernel(unit(configuration, out_dtype == torch.float16), "gemm_s4", packed_codes.device).launch(
        (-(-outputs // configuration.outputs), -(-rows // configuration.tokens), 1),
        32 * configuration.warps_m * configuration.warps_n,
        (packed_codes, packed_weight, weight_scale, token_scale, bias, result, rows, outputs, size),
    )
    return result


def _copyable(packed: Tensor) -> Tensor:
    """Rows that start at multiples of 16 bytes; zero codes at their end change nothing."""
    fill = -packed.shape[1] % CHUNK_BYTES
    if fill:
        return pad(packed, (0, fill))
    return packed.clone() if packed.data_ptr() % CHUNK_BYTES else packed
