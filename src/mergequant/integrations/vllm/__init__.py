"""mergequant inside vLLM: a plugin of the group `vllm.general_plugins`; `vllm serve DIR` needs no flag.

This package can be imported without vLLM; `register` cannot.
"""

import logging

from mergequant.checkpoint import QUANT_METHOD
from mergequant.errors import VersionError
from mergequant.integrations.vllm.versions import SUPPORTED, require_supported

__all__ = ["ARCHITECTURES", "SUPPORTED", "register", "require_supported"]

LOG = logging.getLogger("mergequant")
MODELS = f"{__name__}.models"
ARCHITECTURES = {  # of config.json: the class that serves it
    "LlamaForCausalLM": "ServedLlama",
    "MistralForCausalLM": "ServedMistral",
    "Qwen2ForCausalLM": "ServedQwen2",
    "Qwen3ForCausalLM": "ServedQwen3",
}


def register() -> None:
    """Make vLLM know the quantization method "mergequant" and the models that it serves. May be repeated.

    An unknown release of vLLM is left alone, with a warning: it can go on to serve other checkpoints.
    """
    try:
        require_supported()
    except VersionError as error:
        LOG.warning("checkpoints of mergequant cannot be served: %s", error)
        return
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from mergequant.integrations.vllm.config import MergeQuantConfig
    from mergequant.integrations.vllm.graphs import CaptureSizes

    register_quantization_config(QUANT_METHOD)(MergeQuantConfig)
    for architecture, name in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, f"{MODELS}:{name}")
        MODELS_CONFIG_MAP.setdefault(architecture, CaptureSizes)
