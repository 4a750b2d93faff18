"""W4A4 on a GPU: bit-equal to the exact product. On sm_90 the instruction is emulated; that is enough to check it."""

import itertools

import pytest
import torch

from mergequant import ops
from mergequant.grids import pack_codes
from mergequant.ops.backends import use_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() not in ((8, 0), (8, 6), (8, 9), (9, 0)),
        reason="needs a GPU that has or emulates the s4 instruction",
    ),
]

ROWS = (1, 3, 16, 17, 128, 129, 300)
OUTPUTS = (1, 8, 33, 64, 200, 513)
WIDTHS = (2, 32, 64, 130, 192, 1040, 4096)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_linear_when_any_configuration_runs_expect_the_exact_product_bit_for_bit(outputs: int, width: int) -> None:
    from mergequant.ops.cuda import gemm_s4

    generator = torch.Generator("cuda").manual_seed(outputs * 1000 + width)
    draw = {"generator": generator, "device": "cuda"}
    codes = torch.randint(-8, 8, (max(ROWS), width), dtype=torch.int8, **draw)
    weight = torch.randint(-8, 8, (outputs, width), dtype=torch.int8, **draw)
    codes[0], weight[0] = -8, -8  # the largest sum there is
    exact = codes.double() @ weight.double().t()
    scale = (torch.rand(outputs, **draw) + 0.5) * 0.4 / width**0.5
    token_scale, bias = torch.rand(max(ROWS), **draw) + 0.5, torch.randn(outputs, **draw)
    packed, packed_weight = pack_codes(codes, 4), pack_codes(weight, 4)
    failures = []
    for rows, extras, dtype in itertools.product(ROWS, (False, True), (torch.bfloat16, torch.float16)):
        expected = exact[:rows].float() * scale
        expected = (expected * token_scale[:rows, None] + bias if extras else expected).to(dtype)
        for configuration in gemm_s4.CONFIGURATIONS:
            torch.full((rows, outputs), torch.nan, dtype=dtype, device="cuda")  # what the result is likely to lie on
            arguments = (token_scale[:rows], bias) if extras else (None, None)
            result = gemm_s4.linear(packed[:rows], packed_weight, scale, *arguments, dtype, configuration=configuration)
            if not torch.equal(result, expected):
                wrong = result.ne(expected)
                m, n = (int(i) for i in wrong.nonzero()[0])
                failures.append(
                    f"rows {rows} {configuration} extras {extras} {dtype}: {int(wrong.sum())} of {wrong.numel()} "
                    f"wrong, first at ({m}, {n}): {result[m, n].item()} is not {expected[m, n].item()}"
                )
    assert not failures, f"{len(failures)} wrong:\n" + "\n".join(failures[:12])


def test_op_when_the_cuda_backend_is_asked_for_expect_the_reference() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    draw = {"generator": generator, "device": "cuda"}
    codes = pack_codes(torch.randint(-8, 8, (2, 9, 256), dtype=torch.int8, **draw), 4)
    weight = pack_codes(torch.randint(-8, 8, (72, 256), dtype=torch.int8, **draw), 4)
    scale, token_scale = torch.rand(72, **draw), torch.rand((2, 9, 1), **draw)
    bias = torch.randn(72, **draw).bfloat16()
    arguments = (codes, weight, scale, token_scale, bias, torch.bfloat16)
    with use_backend("cuda"):
        result = ops.int4x4_linear(*arguments)
    with use_backend("torch"):
        expected = ops.int4x4_linear(*arguments)
    assert result.float().std() > 1
    assert torch.equal(result, expected)
