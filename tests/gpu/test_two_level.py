"""Two-level weights on a GPU: the tiles' product equals the CPU's bit for bit, and recipes run there."""

import pytest
import torch

import mergequant
from families import make_model
from mergequant.grids import TwoLevelQuantizer, pack_codes
from mergequant.nn import InputSpec, LinearSpec, QuantLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with CUDA"),
]


@pytest.mark.parametrize("width", [128, 192, 1024])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_two_level_layer_on_a_gpu_expect_the_bits_of_the_cpu(width: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    made = TwoLevelQuantizer(64).encode(torch.randn(200, width, generator=generator))
    layer = QuantLinear(LinearSpec(200, InputSpec("codes", width, width, 8), group_size=64, levels=2))
    assert layer.group_scale is not None
    assert layer.group_zero is not None
    layer.weight_codes.copy_(pack_codes(made.codes, 4))
    layer.weight_scale.copy_(made.scale[:, 0])
    layer.group_scale.copy_(made.group_scale)
    layer.group_zero.copy_(made.group_zero)
    codes = torch.randint(-128, 128, (tokens, width), generator=generator, dtype=torch.int8)
    for dtype in (torch.bfloat16, torch.float32):
        layer.out_dtype = dtype
        expected = layer.cpu()(codes)
        assert torch.equal(layer.cuda()(codes.cuda()).cpu(), expected)


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [("qserve", {"group_size": 8, "prefix": "bos"}), ("prefixquant", {}), ("prefixquant", {"fine_tune": 2})],
)
def test_recipe_on_a_gpu_expect_a_checkpoint_that_both_devices_run(recipe: str, settings: dict[str, object]) -> None:
    model = make_model("llama")
    tokens = torch.randint(3, 97, (6, 24), generator=torch.Generator().manual_seed(7))
    tokens[:, 0] = 1
    made = mergequant.quantize(model, recipe, data=tokens, samples=4, seqlen=24, settings=settings, device="cuda")
    loaded = mergequant.load(made.folder)
    with torch.no_grad():
        by_cpu = loaded(tokens).logits[:, 1:]
        by_gpu = loaded.cuda()(tokens.cuda()).logits[:, 1:].cpu()
    assert float((by_gpu - by_cpu).norm() / by_cpu.norm()) < 0.1
