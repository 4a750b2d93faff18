"""What changes on an NVIDIA GPU: integer results stay equal bit for bit, the pipeline and generation run there."""

from pathlib import Path

import pytest
import torch

import mergequant
from mergequant import ops
from mergequant.assets import TINY
from mergequant.grids import pack_codes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with CUDA"),
]


@pytest.mark.parametrize("rows", [1, 3, 17, 129, 2049])
@pytest.mark.parametrize(("outputs", "width"), [(8, 16), (130, 172), (513, 1408), (65, 64)])
def test_int_linear_on_cuda_equals_int64(rows: int, outputs: int, width: int) -> None:
    generator = torch.Generator().manual_seed(rows * width)
    codes = torch.randint(-128, 128, (rows, width), generator=generator, dtype=torch.int8)
    weight = torch.randint(-8, 8, (outputs, width), generator=generator, dtype=torch.int8)
    codes[0, 0], weight[0, 0] = -128, -8
    exact = codes.long() @ weight.long().t()
    ones = torch.ones(outputs, device="cuda")
    for result in (
        ops.int8_linear(codes.cuda(), weight.cuda(), ones, None, None, torch.float64),
        ops.int4_linear(codes.cuda(), pack_codes(weight, 4).cuda(), ones, None, None, torch.float64),
    ):
        assert torch.equal(result.cpu().long(), exact)


def test_norm_codes_on_cuda_equal_cpu_except_at_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(257, 512, generator=generator)
    multiplier = torch.rand(576, generator=generator) * 4 + 1
    index = torch.randint(0, 512, (576,), generator=generator, dtype=torch.int32)
    shift = torch.rand(576, generator=generator) - 0.5
    arguments = (multiplier, index, shift)
    on_cpu = ops.rmsnorm_quant(x, *arguments, 1e-5, 4)
    on_gpu = ops.rmsnorm_quant(x.cuda(), *(tensor.cuda() for tensor in arguments), 1e-5, 4).cpu()
    differs = on_cpu != on_gpu
    assert int(on_cpu.unique().numel()) == 16
    assert float(differs.float().mean()) < 1e-4
    assert int((on_cpu.int() - on_gpu.int()).abs().max()) <= 1


@pytest.mark.parametrize("recipe", ["mergequant", "mergequant-plus", "mergequant-w4a8", "gptq"])
def test_quantize_on_cuda_verifies_and_generates(recipe: str, tmp_path: Path) -> None:
    done = mergequant.quantize(TINY, recipe, data="self", out=tmp_path / "q", samples=8, seqlen=64, device="cuda")
    on_gpu = mergequant.load(done.folder, dtype=torch.float32, device="cuda")
    on_cpu = mergequant.load(done.folder, dtype=torch.float32)
    prompt = torch.tensor([[1, 300, 301, 302]])
    with torch.no_grad():
        difference = (on_gpu(prompt.cuda()).logits.cpu() - on_cpu(prompt).logits).abs().max()
        spread = on_cpu(prompt).logits.std()
    assert float(difference) < 0.2 * float(spread)
    for cache in ("dynamic", "static"):
        options = {"cache_implementation": "static"} if cache == "static" else {}
        tokens = on_gpu.generate(prompt.cuda(), max_new_tokens=8, do_sample=False, **options)
        assert tokens.shape == (1, 12)
