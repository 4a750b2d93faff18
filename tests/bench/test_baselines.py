"""The float baselines compute what transformers computes: a baseline that is wrong may also be too fast or too slow."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from mergequant.bench import plain
from mergequant.bench.baselines import CachePool, FloatScheme
from mergequant.bench.float_decoder import FloatDecoder, Linear, State
from mergequant.runtime import DecoderShape


def _decoder(shape: DecoderShape, fp8: bool, device: torch.device) -> FloatDecoder:
    """With weights that spread attention and logits."""
    torch.manual_seed(0)
    decoder = FloatDecoder(shape, fp8, device, shape.positions)
    if not fp8:
        for layer in decoder.layers:
            for linear in layer.values():
                linear.weight.mul_(6)
    decoder.embedding.mul_(50)
    decoder.head.mul_(6)
    return decoder


def _state(shape: DecoderShape, batch: int, capacity: int, device: torch.device) -> State:
    cache = CachePool().get(shape, batch, capacity, device)
    lengths = torch.zeros(batch, dtype=torch.int32)
    return State(torch.zeros(batch, dtype=torch.long), lengths, cache, plain.decode_attention, capacity)


def _of_transformers(decoder: FloatDecoder, shape: DecoderShape) -> torch.nn.Module:
    kind, config = (Qwen3ForCausalLM, Qwen3Config) if shape.qk_norm else (LlamaForCausalLM, LlamaConfig)
    model = kind(
        config(
            hidden_size=shape.channels, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads, head_dim=shape.head_width, intermediate_size=shape.ffn,
            vocab_size=shape.vocabulary, rms_norm_eps=shape.eps, max_position_embeddings=shape.positions,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta}, tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip
    model.model.embed_tokens.weight.data = decoder.embedding.float()
    model.lm_head.weight.data = decoder.head.float()
    width = shape.head_width
    for block, layer in zip(model.model.layers, decoder.layers, strict=True):
        sizes = [shape.heads * width, shape.kv_heads * width, shape.kv_heads * width]
        for name, part in zip("qkv", layer["qkv"].weight.float().split(sizes)):
            getattr(block.self_attn, f"{name}_proj").weight.data = part.contiguous()
        block.self_attn.o_proj.weight.data = layer["o"].weight.float()
        gate, up = layer["gate_up"].weight.float().chunk(2)
        block.mlp.gate_proj.weight.data, block.mlp.up_proj.weight.data = gate.contiguous(), up.contiguous()
        block.mlp.down_proj.weight.data = layer["down"].weight.float()
    return model


def _distance(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_bf16_prefill_and_steps_are_those_of_transformers(
    shape: DecoderShape, cpu: torch.device, qk_norm: bool
) -> None:
    shape = replace(shape, qk_norm=qk_norm)
    decoder = _decoder(shape, False, cpu)
    tokens = torch.randint(shape.vocabulary, (3, 20))
    wanted = _of_transformers(decoder, shape)(tokens).logits
    assert float(wanted.std()) > 0.3
    state = _state(shape, 3, 32, cpu)
    assert _distance(decoder.prefill(tokens[:, :17], state), wanted[:, 16]) < 0.02
    for place in (17, 18, 19):
        state.tokens.copy_(tokens[:, place])
        state.lengths.fill_(place)
        state.context = place + 1
        assert _distance(decoder.step(state), wanted[:, place]) < 0.02


@torch.no_grad()
def test_fp8_is_close_to_the_same_decoder_with_its_weights_decoded(shape: DecoderShape, cpu: torch.device) -> None:
    quantized, exact = _decoder(shape, True, cpu), _decoder(shape, False, cpu)
    exact.embedding, exact.head = quantized.embedding, quantized.head
    for layer, other in zip(quantized.layers, exact.layers, strict=True):
        for name, linear in layer.items():
            assert linear.scale is not None
            linear.scale.mul_(6)
            other[name].weight = (linear.weight.float() * linear.scale.t()).bfloat16()
    tokens = torch.randint(shape.vocabulary, (2, 9))
    got = quantized.prefill(tokens, _state(shape, 2, 16, cpu))
    wanted = exact.prefill(tokens, _state(shape, 2, 16, cpu))
    assert 1e-4 < _distance(got, wanted) < 0.2


def test_linear_with_bias_adds_it(cpu: torch.device) -> None:
    for fp8 in (False, True):
        linear = Linear(24, 32, fp8, True, cpu)
        assert linear.bias is not None
        linear.bias.fill_(3)
        x = torch.zeros(16, 32, dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16)
        assert torch.equal(linear(x, torch.ones(16, 1) if fp8 else None), torch.full((16, 24), 3.0).bfloat16())


def test_cache_is_shared_while_it_is_held_and_dropped_afterwards(shape: DecoderShape, cpu: torch.device) -> None:
    pool = CachePool()
    first = pool.get(shape, 2, 64, cpu)
    assert pool.get(shape, 2, 64, cpu) is first
    assert pool.get(shape, 2, 128, cpu) is not first
    assert first.shape == (2, 2, 2, 2, 64, 32)
    del first
    assert not pool._kept


@pytest.mark.parametrize("fp8", [False, True])
@torch.no_grad()
def test_jobs_of_a_scheme_run_again_and_again(shape: DecoderShape, cpu: torch.device, fp8: bool) -> None:
    scheme = FloatScheme(shape, fp8, cpu, 256, CachePool())
    assert scheme.name == ("fp8" if fp8 else "bf16")
    for capacity, job in (
        (16, scheme.prefill(2, 16, 16)),
        (64, scheme.decode(2, 64, 16)),
        (86, scheme.generate(2, 16, 70, 16)),
    ):
        job.run()
        job.run()
        assert job.kernels
        assert job.cache_bytes == 2 * 2 * 2 * 2 * capacity * 32 * 2


def test_weight_bytes(shape: DecoderShape, cpu: torch.device) -> None:
    rows = 256 + 64 + 192 + 64
    linear = 256 * 64 + 64 * 128 + 192 * 64 + 64 * 96
    tables = 2 * 128 * 64 * 2
    bf16, fp8 = (FloatDecoder(shape, fp8, cpu, 8).weight_bytes for fp8 in (False, True))
    assert bf16 == 2 * 2 * linear + tables
    assert fp8 == 2 * (linear + 4 * rows) + tables
