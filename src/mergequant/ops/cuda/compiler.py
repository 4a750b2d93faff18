"""Compiles the package's CUDA sources with NVRTC, without a toolkit and without a GPU.

NVRTC and its bindings come with torch's CUDA wheels. The sources include no CUDA or C++ headers, so that nothing but
the compiler itself has to be found. A `Unit` is one source with its compile-time parameters; it becomes one cubin for
one architecture.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mergequant.errors import KernelError

__all__ = ["Compiled", "Unit", "compile_unit", "compiler_version", "fingerprint", "unavailable"]

SOURCES = Path(__file__).parent
FLAGS = ("--std=c++17", "--ptxas-options=-v", "-lineinfo")


@dataclass(frozen=True)
class Unit:
    """One CUDA source and its compile-time parameters.

    Attributes:
        source: file name in this folder.
        defines: macro names and values.
        headers: names and texts of generated headers; the folder's own `.cuh` files are always visible.
    """

    source: str
    defines: tuple[tuple[str, int | str], ...] = ()
    headers: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in self.defines)
        return f"{self.source} ({values})" if values else self.source


@dataclass(frozen=True)
class Compiled:
    """What NVRTC made of a unit: machine code, its PTX, and the assembler's report (registers, spills, warnings)."""

    cubin: bytes
    ptx: str
    log: str


@cache
def unavailable() -> str | None:
    """Why CUDA sources cannot be compiled here; None if they can."""
    try:
        _bindings().nvrtcVersion()
    except Exception as error:  # the bindings raise their own kinds where a library is missing
        return f"NVRTC or its Python bindings cannot be used ({error}); install `cuda-bindings` and `nvidia-cuda-nvrtc`"
    return None


@cache
def compiler_version() -> str:
    """Version of NVRTC, as "13.0"."""
    _, major, minor = _bindings().nvrtcVersion()
    return f"{major}.{minor}"


def fingerprint(unit: Unit, architecture: str) -> str:
    """Sha256 over everything that decides the machine code: sources, headers, flags, architecture, compiler."""
    digest = hashlib.sha256()
    parts = [architecture, compiler_version(), *FLAGS, _text(unit)]
    parts += [f"{name}={value}" for name, value in unit.defines]
    parts += [part for name, text in _headers(unit) for part in (name, text)]
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def compile_unit(unit: Unit, architecture: str) -> Compiled:
    """Compile a unit for one architecture, such as "sm_90a".

    Raises:
        KernelError: NVRTC is not there, or refuses the source; the message ends with the compiler's log.
    """
    reason = unavailable()
    if reason:
        raise KernelError(f"{unit} cannot be compiled: {reason}")
    nvrtc = _bindings()
    headers = _headers(unit)
    text = _text(unit).encode()
    names = [name.encode() for name, _ in headers]
    status, program = nvrtc.nvrtcCreateProgram(
        text, unit.source.encode(), len(headers), [body.encode() for _, body in headers], names
    )
    _check(status, f"{unit}: NVRTC cannot start")
    try:
        options = [f"--gpu-architecture={architecture}".encode(), *(flag.encode() for flag in FLAGS)]
        options += [f"-D{name}={value}".encode() for name, value in unit.defines]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = _bytes(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace")
        if int(status) != 0:
            raise KernelError(f"{unit} does not compile for {architecture} with NVRTC {compiler_version()}:\n{log}")
        cubin = _bytes(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
        ptx = _bytes(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program).decode(errors="replace")
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Compiled(cubin, ptx.rstrip("\0"), log.rstrip("\0"))


def _text(unit: Unit) -> str:
    path = SOURCES / unit.source
    if not path.is_file():
        raise KernelError(f"{unit.source}: the package has no such CUDA source; install it again")
    return path.read_text()


def _headers(unit: Unit) -> list[tuple[str, str]]:
    own = [(path.name, path.read_text()) for path in sorted(SOURCES.glob("*.cuh"))]
    return own + list(unit.headers)


def _bindings() -> Any:
    from cuda.bindings import nvrtc

    return nvrtc


def _bytes(size: Any, read: Any, program: Any) -> bytes:
    status, count = size(program)
    _check(status, "NVRTC gives no result")
    # The bindings write into it. Never into `bytes`: those of one byte (an empty log) are shared by the whole process.
    buffer = bytearray(count)
    _check(read(program, buffer)[0], "NVRTC gives no result")
    return bytes(buffer)


def _check(status: Any, what: str) -> None:
    if int(status) != 0:
        raise KernelError(f"{what}: {status!r}")
