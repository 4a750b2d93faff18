"""vLLM's quantization config of a checkpoint, and its linear method. Imports vLLM."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, RowParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.platforms import current_platform

from mergequant.checkpoint import QUANT_METHOD, Quantization, open_checkpoint
from mergequant.errors import UsageError
from mergequant.integrations.vllm import register
from mergequant.integrations.vllm.install import SERVED
from mergequant.integrations.vllm.report import Report
from mergequant.integrations.vllm.served import ServedLinear
from mergequant.integrations.vllm.shards import Share
from mergequant.integrations.vllm.sink import require_sink
from mergequant.integrations.vllm.versions import require_supported
from mergequant.nn import LinearSpec, Spec

__all__ = ["MergeQuantConfig", "MergeQuantLinearMethod"]

LEAST_CAPABILITY = 80  # of a GPU, for vLLM: tens are the major number
CACHE_NOTE = (
    "keys and values lie in vLLM's own cache (--kv-cache-dtype); this checkpoint's steps would serve 8 or 4 bits: "
    "--additional-config '{\"kv_bits\": 8}'"
)


class MergeQuantConfig(QuantizationConfig):
    """A checkpoint's description, as vLLM hands it to every layer."""

    _ignore_unexpected_suffixes: tuple[str, ...] = ()  # a tensor that nothing waits for is an error

    def __init__(self, data: dict[str, Any]) -> None:
        super().__init__()
        self.quantization = Quantization.from_dict(data)
        self.report = Report()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a worker process: the models come with the config, even where no entry point was found."""
        self.__dict__.update(state)
        register()

    def get_name(self) -> str:
        """The checkpoint's `quant_method`."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What the kernels write."""
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest GPU that the Triton kernels run on."""
        return LEAST_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: all is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MergeQuantConfig":
        """Parse, before anything is loaded.

        Raises:
            VersionError: vLLM, or the format, is of an unknown release.
            CheckpointError: a broken description.
            UsageError: a prefix that vLLM has no place for.
        """
        require_supported()
        made = cls(config)
        if made.quantization.prefix is not None:
            require_sink(made.quantization.prefix)
        return made

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Check all rules of the format on the files, where they are local already: a damaged checkpoint ends here."""
        if (folder := Path(model_name)).is_dir():
            open_checkpoint(folder).validate()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The linear method of quantized layers; vLLM's own for the rest.

        Raises:
            UsageError: a layer that is quantized in part, or is no linear layer.
        """
        names = self._parts(prefix)
        found = {name: self.quantization.layers[name] for name in names if name in self.quantization.layers}
        if not isinstance(layer, LinearBase):
            if found:
                raise UsageError(f"{prefix}: vLLM serves this {type(layer).__name__} in floating point only")
            return None
        if not found:
            return UnquantizedLinearMethod()
        if len(found) != len(names):
            raise UsageError(f"{prefix}: vLLM fuses {', '.join(names)}, and only {', '.join(found)} are quantized")
        self.report.expect()
        return MergeQuantLinearMethod(found, self.report)

    def _parts(self, prefix: str) -> list[str]:
        """Full names of the checkpoint's layers that vLLM fuses into this one."""
        parent, _, child = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(child, [child])
        return [f"{parent}.{part}" if parent else part for part in parts]


class MergeQuantLinearMethod(LinearMethodBase):
    """Gives the work of one of vLLM's linear layers to a `ServedLinear`."""

    def __init__(self, layers: Mapping[str, Spec], report: Report) -> None:
        self.layers, self.report = layers, report

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Attach the layer that is to be loaded.

        Raises:
            UsageError: sizes that are not the checkpoint's.
        """
        served = ServedLinear(
            self.layers,
            output_partition_sizes,
            Share(layer.tp_rank, layer.tp_size),  # type: ignore[arg-type]
            isinstance(layer, RowParallelLinear),
            params_dtype,
            tensor_model_parallel_all_gather,
        )
        for name, spec in self.layers.items():
            assert isinstance(spec, LinearSpec)  # ServedLinear takes no other
            if spec.input.kind != "codes" and spec.input.in_width != input_size:
                raise UsageError(f"{name}: reads {spec.input.in_width} channels, vLLM's layer {input_size}")
        layer.add_module(SERVED, served)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Tile the weights, and build the kernels that read them."""
        served: ServedLinear = getattr(layer, SERVED)
        served.finish()
        if current_platform.is_cuda():
            served.warm()
        layer.register_parameter("bias", None)  # the checkpoint's own, in float32, is inside
        self.report.add(served.kernel())

    def apply(self, layer: nn.Module, x: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Codes, codes with token scales, or floats, to floats (or to the codes of what follows)."""
        return getattr(layer, SERVED)(x)
