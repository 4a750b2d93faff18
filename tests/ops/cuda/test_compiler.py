"""NVRTC without a GPU: sources become machine code, errors carry the log, fingerprints follow every input."""

import pytest

from mergequant.errors import KernelError
from mergequant.ops.cuda import compiler
from mergequant.ops.cuda.compiler import Unit, compile_unit, fingerprint

pytestmark = pytest.mark.skipif(compiler.unavailable() is not None, reason=str(compiler.unavailable()))


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A folder of CUDA sources of its own."""
    monkeypatch.setattr(compiler, "SOURCES", tmp_path)
    (tmp_path / "own.cuh").write_text("#define OWN 3\n")
    (tmp_path / "k.cu").write_text(
        '#include "own.cuh"\n#include "made.cuh"\n'
        'extern "C" __global__ void k(int* o) { o[threadIdx.x] = OWN * MADE * MQ_N; }\n'
    )
    return tmp_path


def unit(n: int = 5, made: str = "#define MADE 7\n") -> Unit:
    return Unit("k.cu", (("MQ_N", n),), (("made.cuh", made),))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_compile_when_headers_and_macros_are_given_expect_their_values_in_the_code(sources, architecture) -> None:
    compiled = compile_unit(unit(), architecture)
    assert compiled.cubin[:4] == b"\x7fELF"
    assert f".target {architecture}" in compiled.ptx
    assert ", 105;" in compiled.ptx  # 3 * 7 * 5
    assert "0 bytes spill stores" in compiled.log


def test_compile_when_the_source_is_wrong_expect_the_log_with_the_line(sources) -> None:
    (sources / "k.cu").write_text("extern int nonsense(;\n")
    with pytest.raises(KernelError, match=r"k\.cu \(MQ_N=5\) does not compile for sm_90a[\s\S]*k\.cu\(1\): error"):
        compile_unit(unit(), "sm_90a")


def test_compile_when_the_source_is_missing_expect_its_name(sources) -> None:
    with pytest.raises(KernelError, match=r"gone\.cu"):
        compile_unit(Unit("gone.cu"), "sm_90a")


def test_compile_when_nvrtc_is_missing_expect_what_to_install(sources, monkeypatch) -> None:
    monkeypatch.setattr(compiler, "unavailable", lambda: "no NVRTC; install `cuda-bindings`")
    with pytest.raises(KernelError, match="install `cuda-bindings`"):
        compile_unit(unit(), "sm_90a")


def test_fingerprint_when_anything_changes_expect_another_one(sources) -> None:
    first = fingerprint(unit(), "sm_90a")
    assert first == fingerprint(unit(), "sm_90a")
    others = {fingerprint(unit(), "sm_80"), fingerprint(unit(6), "sm_90a"), fingerprint(unit(made="\n"), "sm_90a")}
    (sources / "own.cuh").write_text("#define OWN 4\n")
    others.add(fingerprint(unit(), "sm_90a"))
    assert len(others) == 4
    assert first not in others


def test_bytes_when_a_result_is_one_byte_expect_no_object_that_others_share_written_to() -> None:
    """Python keeps one object for each `bytes` of length 1; writing into it would change it for everybody."""

    def read(program: object, buffer: bytearray) -> tuple[int]:
        buffer[0] = 0
        return (0,)

    assert compiler._bytes(lambda program: (0, 1), read, None) == b"\0"
    assert bytes([32]) * 3 == b"   "
