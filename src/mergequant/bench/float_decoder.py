"""A decoder in bf16 or fp8: its weights, and the passes over them. See `baselines.py` for what makes it fast."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from mergequant.bench.shapes import layer_linears
from mergequant.runtime import DecoderShape

__all__ = ["FP8_ROWS", "Attend", "FloatDecoder", "Linear", "State", "library_attention"]

FP8_ROWS = 16  # torch._scaled_mm takes multiples
WEIGHT_STD = 0.02
# The first that takes the shape; on Hopper cuDNN's takes half of flash's time. The last two are for CPUs.
PREFILL_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""Queries (B, H, D), keys and values (B, KV heads, capacity, D), attended slots; gives (B, H * D)."""


def kernels_for(device: torch.device) -> ModuleType:
    """Triton kernels on a GPU, plain torch elsewhere."""
    if device.type == "cuda":
        from mergequant.bench import kernels

        return kernels
    from mergequant.bench import plain

    return plain


class Linear:
    """One product y = x W^T (+ bias), W random (outputs, width), in bf16 or fp8.

    Attributes:
        weight: (outputs, width).
        scale: float32 (1, outputs) of fp8 weights, else None.
    """

    def __init__(self, outputs: int, width: int, fp8: bool, bias: bool, device: torch.device) -> None:
        values = torch.randn(outputs, width, device=device, dtype=torch.bfloat16)
        self.scale: Tensor | None = None
        if fp8:  # unit variance uses the type's range, the scale brings it back
            self.weight = values.to(torch.float8_e4m3fn)
            self.scale = torch.full((1, outputs), WEIGHT_STD, device=device)
        else:
            self.weight = values.mul_(WEIGHT_STD)
        self.bias = torch.zeros(outputs, device=device, dtype=torch.bfloat16) if bias else None

    def __call__(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """(rows, outputs) bf16 of x (rows, width), bf16, or fp8 with `scale` (rows, 1)."""
        if self.scale is None:
            product = self.weight.t()
            return torch.mm(x, product) if self.bias is None else torch.addmm(self.bias, x, product)
        if scale is None:
            raise ValueError("fp8 inputs need their scales")
        if x.device.type != "cuda":  # no such product there: the same numbers in float32
            y = (x.float() * scale) @ (self.weight.float() * self.scale.t()).t()
            return (y if self.bias is None else y + self.bias).bfloat16()
        return torch._scaled_mm(
            x,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    @property
    def tensors(self) -> list[Tensor]:
        """What it keeps on the device."""
        return [tensor for tensor in (self.weight, self.scale, self.bias) if tensor is not None]


@dataclass
class State:
    """What a cell works on: token ids of the step (B,), cached positions of each sequence (B,), the cache."""

    tokens: Tensor
    lengths: Tensor
    cache: Tensor
    attend: Attend
    context: int  # positions attended in decode


class FloatDecoder:
    """Random weights of a shape in bf16 or fp8, and the passes over them.

    Args:
        shape: of the decoder.
        fp8: whether linear layers multiply fp8 numbers.
        device: where.
        positions: capacity of the rotary tables.
        kernels: functions of `plain` or `kernels`.
    """

    def __init__(
        self, shape: DecoderShape, fp8: bool, device: torch.device, positions: int, kernels: ModuleType | None = None
    ) -> None:
        self.shape, self.fp8, self.device = shape, fp8, device
        self.kernels = kernels or kernels_for(device)
        self.layers = [
            {
                name: Linear(outputs, width, fp8, shape.qkv_bias and name == "qkv", device)
                for name, (outputs, width) in layer_linears(shape).items()
            }
            for _ in range(shape.layers)
        ]
        table = (shape.vocabulary, shape.channels)
        self.embedding = torch.randn(table, device=device, dtype=torch.bfloat16).mul_(WEIGHT_STD)
        self.head = torch.randn(table, device=device, dtype=torch.bfloat16).mul_(WEIGHT_STD)
        self.norm = torch.ones(shape.channels, device=device, dtype=torch.bfloat16)
        head_norm = torch.ones(shape.head_width, device=device)
        self.head_norms = (head_norm, head_norm) if shape.qk_norm else None
        half = torch.arange(0, shape.head_width, 2, device=device).float() / shape.head_width
        angles = torch.arange(positions, device=device).float()[:, None] * shape.rope_theta**-half
        self.cos, self.sin = angles.cos().contiguous(), angles.sin().contiguous()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        linears = [linear for layer in self.layers for linear in layer.values()]
        tensors = [tensor for linear in linears for tensor in linear.tensors]
        return sum(tensor.nbytes for tensor in (*tensors, self.embedding, self.head))

    def prefill(self, tokens: Tensor, state: State) -> Tensor:
        """Logits (B, vocabulary) of the last of tokens (B, S); fills the cache from slot 0."""
        batch, length = tokens.shape
        state.lengths.zero_()
        residual = functional.embedding(tokens.reshape(-1), self.embedding)
        update = self._layers(residual, state, batch, length)
        last = [x.view(batch, length, -1)[:, -1].contiguous() for x in (update, residual)]
        return self._logits(*last)

    def step(self, state: State) -> Tensor:
        """Logits (B, vocabulary) after `state.tokens`, whose keys and values go to slot `state.lengths`."""
        residual = functional.embedding(state.tokens, self.embedding)
        return self._logits(self._layers(residual, state, state.tokens.shape[0], 1), residual)

    def _layers(self, residual: Tensor, state: State, batch: int, length: int) -> Tensor:
        """All layers over residual (B * S, C), which is changed in place; the last update is left to be added."""
        run, shape = self.kernels, self.shape
        tokens = residual.shape[0]
        update: Tensor | None = None
        for layer, (keys, values) in zip(self.layers, state.cache.unbind(0)):
            x, scale = self._inputs(tokens, shape.channels)
            run.add_norm(update, residual, self.norm, shape.eps, x, scale)
            qkv = layer["qkv"](x, scale)[:tokens]
            queries = run.rope_append(
                qkv, self.cos, self.sin, state.lengths, self.head_norms, shape.eps, keys, values, shape.heads
            )
            if length > 1:
                out = self._prefill_attention(queries, keys, values, batch, length)
            else:
                out = state.attend(queries, keys, values, state.context)
            x, scale = self._quantized(out)
            update = layer["o"](x, scale)[:tokens]
            x, scale = self._inputs(tokens, shape.channels)
            run.add_norm(update, residual, self.norm, shape.eps, x, scale)
            gate_up = layer["gate_up"](x, scale)[:tokens]
            x, scale = self._inputs(tokens, shape.ffn)
            run.silu_mul(gate_up, x, scale)
            update = layer["down"](x, scale)[:tokens]
        if update is None:
            raise ValueError("a decoder has one layer at least")
        return update

    def _inputs(self, tokens: int, width: int) -> tuple[Tensor, Tensor | None]:
        """Where a fused kernel puts the inputs of a product, and the scales of fp8 ones."""
        if not self.fp8:
            return torch.empty(tokens, width, device=self.device, dtype=torch.bfloat16), None
        rows = -(-tokens // FP8_ROWS) * FP8_ROWS
        # The rows of padding are multiplied and dropped; their content costs nothing and decides nothing.
        x = torch.empty(rows, width, device=self.device, dtype=torch.float8_e4m3fn)
        return x, torch.empty(rows, 1, device=self.device)

    def _quantized(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The attention's output as inputs of the next product."""
        if not self.fp8:
            return x, None
        out, scale = self._inputs(*x.shape)
        if scale is not None:
            self.kernels.quantize_rows(x, out, scale)
        return out, scale

    def _prefill_attention(self, queries: Tensor, keys: Tensor, values: Tensor, batch: int, length: int) -> Tensor:
        """Causal attention (B * S, H * D) over the slots just written."""
        shape = self.shape
        q = queries.view(batch, length, shape.heads, shape.head_width).transpose(1, 2)
        k, v = keys[:, :, :length], values[:, :, :length]
        grouped = shape.heads != shape.kv_heads
        with sdpa_kernel(PREFILL_BACKENDS, set_priority=True):
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return out.transpose(1, 2).reshape(batch * length, -1)

    def _logits(self, update: Tensor, residual: Tensor) -> Tensor:
        x = torch.empty_like(residual)
        self.kernels.add_norm(update, residual, self.norm, self.shape.eps, x, None)
        return torch.mm(x, self.head.t())


def library_attention(backend: SDPBackend) -> Attend:
    """Decode attention by torch.

    Query heads of one key head stand as queries of one sequence, so that the cache is read once for all of them and no
    backend needs to know of groups.
    """

    def attend(queries: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
        batch, heads, width = queries.shape
        grouped = queries.view(batch, keys.shape[1], -1, width)
        with sdpa_kernel(backend):
            out = functional.scaled_dot_product_attention(grouped, keys[:, :, :length], values[:, :, :length])
        return out.reshape(batch, heads * width)

    return attend
