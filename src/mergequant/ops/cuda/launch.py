"""Loads compiled kernels and launches them on torch's streams, through the driver API.

A launch from Python costs several microseconds of processor time; inside a captured CUDA graph it costs none.
`docs/results.md` has the measured overhead.
"""

import ctypes
import logging
import struct
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mergequant.errors import KernelError
from mergequant.ops.cuda import compiler, disk_cache
from mergequant.ops.cuda.compiler import Unit

__all__ = ["Kernel", "Long", "TensorMap", "architecture", "kernel", "multiprocessors", "prepare", "tensor_map"]

LOG = logging.getLogger("mergequant")
TENSOR_MAP_BYTES = 128
TENSOR_MAP_ALIGNMENT = 64
POINTER, MAP = "Q", f"{TENSOR_MAP_BYTES}s"  # kinds of arguments, as `struct` has them
KEPT_TENSOR_MAPS = 4096
COMPILING_THREADS = 16
DEFAULT_SHARED_BYTES = 48 * 1024  # a kernel that wants more must say so once
HOPPER = (9, 0)


@dataclass(frozen=True)
class Long:
    """A 64-bit integer argument; plain ints are passed as 32 bits."""

    value: int


@dataclass(frozen=True, eq=False)
class TensorMap:
    """A tensor map of the copy engine: 128 opaque bytes, passed by value. It keeps its tensor's memory in use."""

    data: bytes
    storage: Any


Argument = Tensor | TensorMap | Long | int | float | None


class Kernel:
    """One kernel function on one device."""

    def __init__(self, unit: Unit, name: str, device: torch.device, cubin: bytes) -> None:
        driver = _driver()
        self.name, self.unit, self._device = name, unit, device
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # makes torch's context current
            self._module = _call(driver.cuModuleLoadData(cubin), f"{unit}: the driver refuses the machine code")
            self._function = _call(
                driver.cuModuleGetFunction(self._module, name.encode()), f"{unit} holds no kernel {name!r}"
            )
        self._shared = DEFAULT_SHARED_BYTES
        self._configurations: dict[tuple[Any, ...], Any] = {}

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        args: Sequence[Argument],
        *,
        shared: int = 0,
        cluster: tuple[int, int, int] = (1, 1, 1),
        overlap: bool = False,
    ) -> None:
        """Launch on torch's current stream of the kernel's device.

        Args:
            grid: blocks in x, y, z.
            threads: threads of a block.
            args: tensors become pointers, None a null pointer, ints int32, floats float32.
            shared: dynamic shared memory in bytes.
            cluster: blocks of a cluster.
            overlap: programmatic dependent launch: the kernel may start before the kernel ahead of it has ended, and
                waits by itself where it needs that kernel's results.

        Raises:
            KernelError: the driver refuses the launch.
        """
        driver = _driver()
        if shared > self._shared:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _call(
                driver.cuFuncSetAttribute(self._function, attribute, shared),
                f"{self.unit}: {shared} bytes of shared memory",
            )
            self._shared = shared
        shape = (grid, threads, shared, cluster, overlap)
        key = (*shape, threading.get_ident())  # the stream is written into it
        configuration = self._configurations.get(key)
        if configuration is None:
            configuration = self._configurations[key] = _configuration(*shape)
        configuration.hStream = torch.cuda.current_stream(self._device).cuda_stream
        status = driver.cuLaunchKernelEx(configuration, self._function, _arguments(args), 0)  # which copies arguments
        if int(status[0]) != 0:
            _call(status, f"{self.unit}: launching {self.name!r} on grid {grid} failed")


def architecture(device: torch.device) -> str:
    """Target that kernels for a device are compiled for: "sm_90a" on Hopper, else "sm_80" and so on."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if (major, minor) == HOPPER else "")


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


_kernels: dict[tuple[Unit, str, int], Kernel] = {}
_kernels_lock = threading.RLock()


def kernel(unit: Unit, name: str, device: torch.device) -> Kernel:
    """The kernel of a unit, compiled or read from the disk at the first call, then kept.

    Raises:
        KernelError: it does not compile, or the driver refuses it; the message holds the compiler's log.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    found = _kernels.get((unit, name, index))
    if found is None:
        with _kernels_lock:
            found = _kernels.get((unit, name, index))
            if found is None:
                place = torch.device("cuda", index)
                found = _kernels[unit, name, index] = Kernel(unit, name, place, _cubin(unit, architecture(place)))
    return found


def prepare(units: Iterable[tuple[Unit, str]], device: torch.device) -> None:
    """Compile many units side by side (what `kernel` would do one by one), with a line of progress.

    Raises:
        KernelError: as `kernel`.
    """
    target = architecture(device)
    wanted = list(dict.fromkeys(unit for unit, _ in units))
    missing = [unit for unit in wanted if disk_cache.read(_key(unit, target)) is None]
    if missing:
        with ThreadPoolExecutor(COMPILING_THREADS) as pool:
            for done, _ in enumerate(pool.map(lambda unit: _cubin(unit, target, quiet=True), missing), 1):
                _progress(f"compiling CUDA kernels for {target}, once: {done} of {len(missing)}", done == len(missing))
    for unit, name in units:
        kernel(unit, name, device)


def tensor_map(tensor: Tensor, box: tuple[int, int], swizzle: bool) -> TensorMap:
    """Tensor map of a row-major 2-D tensor, for the copy engine of sm_90.

    Args:
        tensor: (outer, inner), rows 16-byte aligned; 1- or 2-byte elements.
        box: (outer, inner) elements of one copy.
        swizzle: 128-byte swizzle of shared memory (the box's rows are 128 bytes).

    Elements outside the tensor read as zero and are not written.

    Raises:
        KernelError: a tensor that the copy engine cannot address.
    """
    key = (tensor.data_ptr(), tensor.shape, tensor.stride(0), tensor.dtype, box, swizzle, tensor.device.index)
    with _maps_lock:
        found = _maps.get(key)
        if found is not None:
            _maps.move_to_end(key)
            return TensorMap(found, tensor)
        data = _encode(tensor, box, swizzle)
        _maps[key] = data
        if len(_maps) > KEPT_TENSOR_MAPS:
            _maps.popitem(last=False)
    return TensorMap(data, tensor)


_maps: OrderedDict[tuple[Any, ...], bytes] = OrderedDict()
_maps_lock = threading.Lock()


def _encode(tensor: Tensor, box: tuple[int, int], swizzle: bool) -> bytes:
    size = tensor.element_size()
    if tensor.dim() != 2 or tensor.stride(1) != 1 or size not in (1, 2):
        raise KernelError(f"tensor map: {tuple(tensor.shape)} {tensor.dtype} is not a row-major matrix of 1 or 2 bytes")
    if tensor.stride(0) * size % 16 or tensor.data_ptr() % 16:
        raise KernelError(f"tensor map: rows of {tensor.stride(0) * size} bytes are not 16-byte aligned")
    driver = _driver()
    kinds = driver.CUtensorMapDataType
    kind = kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8 if size == 1 else kinds.CU_TENSOR_MAP_DATA_TYPE_UINT16
    swizzles = driver.CUtensorMapSwizzle
    encoded = _call(
        driver.cuTensorMapEncodeTiled(
            kind,
            2,
            tensor.data_ptr(),
            [driver.cuuint64_t(tensor.shape[1]), driver.cuuint64_t(tensor.shape[0])],
            [driver.cuuint64_t(tensor.stride(0) * size)],
            [driver.cuuint32_t(box[1]), driver.cuuint32_t(box[0])],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzles.CU_TENSOR_MAP_SWIZZLE_128B if swizzle else swizzles.CU_TENSOR_MAP_SWIZZLE_NONE,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        f"tensor map of {tuple(tensor.shape)} with box {box}",
    )
    return ctypes.string_at(encoded.getPtr(), TENSOR_MAP_BYTES)


class _Frame:
    """Memory for the arguments of a launch, of a fixed sequence of kinds, and the addresses that the driver wants."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        form, offsets, size = "<", [], 0
        for kind in kinds:
            alignment = TENSOR_MAP_ALIGNMENT if kind == MAP else struct.calcsize(kind)
            gap = -size % alignment
            offsets.append(size + gap)
            form += f"{gap}x{kind}"
            size = offsets[-1] + struct.calcsize(kind)
        self._form = struct.Struct(form)
        self._memory = ctypes.create_string_buffer(size + TENSOR_MAP_ALIGNMENT)
        self._start = -ctypes.addressof(self._memory) % TENSOR_MAP_ALIGNMENT
        first = ctypes.addressof(self._memory) + self._start
        self._pointers = (ctypes.c_void_p * max(len(kinds), 1))(*(first + offset for offset in offsets))
        self.address = ctypes.addressof(self._pointers)

    def fill(self, values: Sequence[int | float | bytes]) -> None:
        """Put values in, each of its kind."""
        self._form.pack_into(self._memory, self._start, *values)


class _Frames(threading.local):
    """Frames of a thread: one is filled anew at each launch, while the driver may still read another thread's."""

    def __init__(self) -> None:
        self.by_kinds: dict[tuple[str, ...], _Frame] = {}


_frames = _Frames()


def _arguments(args: Sequence[Argument]) -> int:
    """Values in memory; the address of the array of their addresses, good until this thread's next call."""
    kinds: list[str] = []
    values: list[int | float | bytes] = []
    for value in args:
        if isinstance(value, Tensor):
            kinds.append(POINTER)
            values.append(value.data_ptr())
        elif value is None:
            kinds.append(POINTER)
            values.append(0)
        elif isinstance(value, TensorMap):
            kinds.append(MAP)
            values.append(value.data)
        elif isinstance(value, Long):
            kinds.append("q")
            values.append(value.value)
        else:
            kinds.append("f" if isinstance(value, float) else "i")
            values.append(value)
    key = tuple(kinds)
    frame = _frames.by_kinds.get(key)
    if frame is None:
        frame = _frames.by_kinds[key] = _Frame(key)
    frame.fill(values)
    return frame.address


def _configuration(
    grid: tuple[int, int, int], threads: int, shared: int, cluster: tuple[int, int, int], overlap: bool
) -> Any:
    driver = _driver()
    configuration = driver.CUlaunchConfig()
    configuration.gridDimX, configuration.gridDimY, configuration.gridDimZ = grid
    configuration.blockDimX, configuration.blockDimY, configuration.blockDimZ = threads, 1, 1
    configuration.sharedMemBytes = shared
    attributes = []
    kinds = driver.CUlaunchAttributeID
    if cluster != (1, 1, 1):
        attribute = driver.CUlaunchAttribute()
        attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = cluster
        attributes.append(attribute)
    if overlap:
        attribute = driver.CUlaunchAttribute()
        attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    configuration.attrs = attributes
    configuration.numAttrs = len(attributes)
    return configuration


def _cubin(unit: Unit, target: str, quiet: bool = False) -> bytes:
    key = _key(unit, target)
    known = disk_cache.read(key)
    if known is not None:
        return known
    with disk_cache.locked(key):
        known = disk_cache.read(key)  # another process may have compiled it while this one waited
        if known is not None:
            return known
        if not quiet:
            _progress(f"compiling {unit} for {target}, once", True)
        cubin = compiler.compile_unit(unit, target).cubin
        disk_cache.write(key, cubin)
    return cubin


def _key(unit: Unit, target: str) -> str:
    version = _call(_driver().cuDriverGetVersion(), "the driver gives no version")
    return f"{compiler.fingerprint(unit, target)}-{version}"


def _progress(text: str, last: bool) -> None:
    """One line that grows on a terminal; elsewhere the log has the last one."""
    if sys.stderr.isatty():
        print(f"\r{text}", end="\n" if last else "", file=sys.stderr, flush=True)
    elif last:
        LOG.info(text)


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _call(result: Any, what: str) -> Any:
    """Result of a driver call; the bindings return (status,) or (status, value)."""
    status = result[0]
    if int(status) != 0:
        raise KernelError(f"{what}: {status.name}")
    return result[1] if len(result) > 1 else None
