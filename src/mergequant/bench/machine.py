"""What ran the benchmark: device, clocks, versions."""

import platform
import subprocess
from importlib import metadata
from typing import Any

import torch

__all__ = ["clocks", "describe_device", "versions"]

QUERY = {  # key of the result: field of nvidia-smi
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "watts": "power.draw",
    "celsius": "temperature.gpu",
}
PACKAGES = ("mergequant", "torch", "triton", "transformers", "cuda-bindings")


def clocks(device: torch.device) -> dict[str, float | None] | None:
    """Clocks in MHz, power and temperature of a GPU now; None where they cannot be asked."""
    line = _nvidia_smi(device, ",".join(QUERY.values()))
    return None if line is None else {key: _number(word) for key, word in zip(QUERY, line.split(","))}


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name and size of a device."""
    if device.type != "cuda":
        return {"name": platform.processor() or platform.machine(), "type": "cpu", "threads": torch.get_num_threads()}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "type": "cuda",
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gb": round(found.total_memory / 1e9, 1),
        "power_limit_watts": _number(_nvidia_smi(device, "power.limit")),
    }


def versions(device: torch.device) -> dict[str, str | None]:
    """Of what takes part in the figures."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = torch.__version__  # with the build's suffix
    if device.type == "cuda":
        from mergequant.ops.cuda import compiler

        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())
        found["driver"] = _nvidia_smi(device, "driver_version")
        found["nvrtc"] = None if compiler.unavailable() else compiler.compiler_version()
    return found


def _nvidia_smi(device: torch.device, query: str) -> str | None:
    if device.type != "cuda":
        return None
    # By its own number: CUDA_VISIBLE_DEVICES renumbers devices for torch, not for nvidia-smi.
    identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "-i", identity]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _number(word: str | None) -> float | None:
    try:
        return float(word) if word is not None else None
    except ValueError:  # "[N/A]"
        return None
