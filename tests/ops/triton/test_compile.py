"""Triton compiles for sm_90 without a GPU: no spilled registers, and the rotation on Hopper's tensor cores.

In a process of its own, because this one interprets kernels. The tools that read the result come with Triton.
"""

import json
import os
import subprocess
import sys

import pytest

MOST_SHARED = 227 * 1024  # of a program on sm_90
SCRIPT = r"""
import json, pathlib, re, subprocess, sys, tempfile
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mergequant.ops.triton import dynamic_quant, hadamard_quant, norm_quant, static_quant

DUMP = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
CODES = dict(LOW=-128.0, HIGH=127.0, PACKED=False, OVERLAP=True)
STEPS = dict(MULTIPLIER_STEP=1, SHIFT_STEP=1)

def compile(label, kernel, types, warps, stages=1, **constants):
    names = kernel.arg_names
    constants = {name: None for name in names if name not in types} | constants
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "").startswith("*")},
    )
    options = dict(num_warps=warps, num_stages=stages, enable_fp_fusion=False, launch_pdl=True)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run([DUMP, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    ptx = built.asm["ptx"]
    print(json.dumps({
        "label": label,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": built.metadata.shared,
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "wait": ptx.count("griddepcontrol.wait"),
        "fused": len(re.findall(r"fma\.rn\.f32", ptx)),
    }))

pointers = dict(x="*bf16", out="*i8", multiplier="*fp32")
for width, block, warps in ((4096, 4096, 8), (14336, 16384, 16)):
    for add in (False, True):
        compile(
            f"norm {width} add {add}", norm_quant._norm,
            pointers | {"eps": "fp32"} | ({"residual": "*bf16"} if add else {}), warps,
            CHANNELS=width, WIDTH=width, BLOCK=block, OUT_BLOCK=block, ADD=add, CENTRE=False, QUANTIZE=True,
            **CODES, **STEPS,
        )
    for gated in (False, True):
        compile(
            f"static {width} gated {gated}", static_quant._static, pointers | {"shift": "*fp32"}, 8, CHANNELS=width,
            WIDTH=width, BLOCK=4096, GATED=gated, QUANTIZE=True, **CODES, **STEPS,
        )
        types = dict(x="*bf16", out="*i8", scales="*fp32", share="fp32", smallest="fp32")
        compile(
            f"dynamic {width} gated {gated}", dynamic_quant._dynamic, types, warps, WIDTH=width, BLOCK=block,
            GATED=gated, **CODES,
        )
for width, rows, dynamic in json.loads(sys.argv[1]):
    cut = hadamard_quant.plan(width, rows, dynamic, 132)
    types = dict(x="*bf16", inner="*bf16", outer="*bf16", out="*i8", rows="i32")
    types |= dict(scale="fp32", share="fp32", smallest="fp32")
    types |= {"scales": "*fp32"} if dynamic else {"multiplier": "*fp32"}
    if dynamic and cut.slice < cut.inner:
        types["scratch"] = "*fp32"
    compile(
        f"hadamard {width} rows {rows} dynamic {dynamic}", hadamard_quant._rotate, types, cut.warps, cut.stages,
        A=cut.a, B=cut.b, OUTER=cut.outer, INNER=cut.inner, SLICE=cut.slice, CHUNK=min(hadamard_quant.CHUNK, cut.outer),
        PIECE=hadamard_quant.PIECE, SPLIT=False, FIRST=tl.bfloat16, SECOND=tl.bfloat16, QUANTIZE=True,
        MULTIPLIER_STEP=0, SHIFT_STEP=1, **CODES,
    )
"""


def compiled(cases: list[tuple[int, int, bool]]) -> list[dict[str, int | str]]:
    """Compile the elementwise kernels and these rotations (width, rows, dynamic); a report each."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(cases)], capture_output=True, text=True, check=False, env=environment
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.slow
def test_kernels_when_compiled_for_hopper_expect_no_spills_and_tensor_cores() -> None:
    kinds = ((128, False), (128, True), (1, False))
    cases = [(width, *kind) for width in (4096, 11008, 14336, 28672) for kind in kinds]
    reports = compiled([*cases, (28672, 1, True)])
    assert len(reports) == 12 + len(cases) + 1
    for report in reports:
        label = str(report["label"])
        assert report["stack"] == 0, report
        assert int(report["shared"]) <= MOST_SHARED, report
        assert report["wait"] == 1, report
        if label.startswith("hadamard"):
            assert (int(report["wgmma"]) > 0) == ("rows 1 dynamic False" not in label), report  # few lines: mma.sync
        elif not label.startswith("dynamic"):  # there only in `quotient`
            assert report["fused"] == 0, report
