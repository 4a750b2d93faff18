"""mergequant inside transformers: `AutoModelForCausalLM.from_pretrained` loads checkpoints after `register()`."""

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from mergequant.checkpoint import QUANT_METHOD
from mergequant.data.tokenizer import set_bos_in_tokenizer
from mergequant.integrations.transformers.config import MergeQuantConfig
from mergequant.integrations.transformers.kv_cache import QuantizedCache
from mergequant.integrations.transformers.load import load
from mergequant.integrations.transformers.prefix import install_prefix
from mergequant.integrations.transformers.quantizer import MergeQuantQuantizer, quantize_skeleton
from mergequant.integrations.transformers.serve import Server, serve

__all__ = [
    "MergeQuantConfig",
    "MergeQuantQuantizer",
    "QuantizedCache",
    "Server",
    "install_prefix",
    "load",
    "quantize_skeleton",
    "register",
    "serve",
    "set_bos_in_tokenizer",
]


def register() -> None:
    """Make transformers know the quantization method "mergequant". May be repeated."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = MergeQuantConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = MergeQuantQuantizer
