"""Inside vLLM's workers: random weights for folders that hold none, and GPU times of steps. Imports vLLM.

`Probe` is named as `worker_extension_cls`, so that it becomes part of every worker; importing this module registers the
load format `mean-zero`. vLLM's own dummy loader leaves integers uninitialised.
"""

from typing import Any

import torch
from schemes import CODE_SPREAD, SPREAD, random_codes
from torch import Tensor, nn
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

LOAD_FORMAT = "mean-zero"
KEPT = ("weight_shape", "q_scale", "k_scale", "v_scale", "prob_scale")  # set by whoever made them
INPUT_STEP = 0.04
TIMES: dict[str, Any] = {"on": False, "graphs": [], "steps": []}


@register_model_loader(LOAD_FORMAT)
class MeanZeroLoader(BaseModelLoader):
    """Fills every parameter with numbers of a trained model's spread."""

    def download_model(self, model_config: Any) -> None:
        """There is nothing to fetch."""

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Fill in place, with the same seed for every scheme."""
        generators: dict[torch.device, torch.Generator] = {}
        for module in model.modules():
            own = dict(module.named_parameters(recurse=False))
            bits = 4 if any(parameter.dtype == torch.int32 for parameter in own.values()) else 8
            for name, parameter in own.items():
                device = parameter.device
                if device not in generators:
                    generators[device] = torch.Generator(device).manual_seed(0)
                fill(name, parameter.data, bits, generators[device])


def fill(name: str, data: Tensor, bits: int, generator: torch.Generator) -> None:
    """Random content for a parameter of a layer whose codes have `bits` bits, by its name and its dtype."""
    if name in KEPT or "zero_point" in name or not data.numel():
        return
    if "input_scale" in name:
        data.fill_(INPUT_STEP)
    elif "scale" in name:
        wide = torch.rand(data.shape, device=data.device, generator=generator) + 0.5
        data.copy_(wide * (SPREAD / CODE_SPREAD[bits]))
    elif data.dtype == torch.int32:  # eight 4-bit codes with an offset of 8
        words = torch.zeros(data.shape, dtype=torch.int64, device=data.device)
        for place in range(8):
            words |= (random_codes(tuple(data.shape), 4, generator).to(torch.int64) + 8) << (4 * place)
        data.copy_(torch.where(words >= 1 << 31, words - (1 << 32), words))
    elif data.dtype == torch.int8:
        data.copy_(random_codes(tuple(data.shape), 8, generator))
    elif data.dtype == torch.float8_e4m3fn:
        data.copy_(torch.randn(data.shape, device=data.device, generator=generator) * CODE_SPREAD[8])
    elif data.dim() >= 2:
        data.normal_(0, SPREAD, generator=generator)
    elif "cos_sin" not in name:
        data.fill_(1.0)


def _timed(call: Any, kind: str) -> Any:
    def timed(*args: Any, **options: Any) -> Any:
        if not TIMES["on"]:
            return call(*args, **options)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        result = call(*args, **options)
        end.record()
        TIMES[kind].append((start, end))
        return result

    return timed


torch.cuda.CUDAGraph.replay = _timed(torch.cuda.CUDAGraph.replay, "graphs")  # type: ignore[method-assign]


class Probe:
    """Methods that `collective_rpc` calls by name on every worker."""

    def probe_start(self: Any) -> None:
        """Keep the GPU times of model steps and of replayed graphs from now on."""
        if not TIMES.get("wrapped"):
            self.execute_model, TIMES["wrapped"] = _timed(self.execute_model, "steps"), True
        TIMES.update(on=True, graphs=[], steps=[])

    def probe_stop(self) -> dict[str, list[float]]:
        """Milliseconds of each, in order."""
        TIMES["on"] = False
        torch.cuda.synchronize()
        return {kind: [start.elapsed_time(end) for start, end in TIMES[kind]] for kind in ("graphs", "steps")}

    def probe_model(self: Any) -> dict[str, Any]:
        """Bytes of weights on this worker, kernels that serve the linear layers with their number, and memory."""
        kernels: dict[str, int] = {}
        tensors: dict[int, Tensor] = {}
        for module in self.model_runner.model.modules():
            scheme = getattr(module, "scheme", None)
            kernel = getattr(scheme, "kernel", None) or getattr(scheme, "fp8_linear", None)
            parts = [type(part).__name__ for part in (getattr(module, "quant_method", None), scheme, kernel) if part]
            if parts and hasattr(module, "weight_loader"):
                where = type(getattr(module, "quant_method", None)).__module__
                label = "/".join(parts) + (" of mergequant" if where.startswith("mergequant") else "")
                kernels[label] = kernels.get(label, 0) + 1
            plain = [value for key, value in vars(module).items() if "kv_cache" not in key]
            held = [*module.parameters(recurse=False), *module.buffers(recurse=False), *plain]
            tensors.update({t.data_ptr(): t for t in held if isinstance(t, Tensor) and t.is_cuda})
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        return {
            "weight_gib": size / 2**30,
            "kernels": kernels,
            "allocated_gib": torch.cuda.memory_allocated() / 2**30,
            "device": torch.cuda.get_device_name(),
        }
