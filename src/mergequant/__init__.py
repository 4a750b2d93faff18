"""mergequant: accurate 4-bit static quantization of large language models (MergeQuant, arXiv 2503.07654).

    import mergequant

    mergequant.quantize("path/to/model", "mergequant-w4a8", data="my.txt", out="model-w4a8")
    model = mergequant.load("model-w4a8")

Importing the package registers its checkpoints with transformers, so that `AutoModelForCausalLM.from_pretrained` loads
them too, and has no other effect.
"""

__version__ = "0.1.0"

from mergequant import errors
from mergequant.comparison import Comparison, compare
from mergequant.errors import MergeQuantError
from mergequant.eval.evaluate import evaluate
from mergequant.integrations.compressed_tensors import export
from mergequant.integrations.transformers import load, register
from mergequant.pipeline import Quantized, plan, quantize
from mergequant.recipes import Recipe, get_recipe, list_recipes, register_recipe

__all__ = [
    "Comparison",
    "MergeQuantError",
    "Quantized",
    "Recipe",
    "compare",
    "errors",
    "evaluate",
    "export",
    "get_recipe",
    "list_recipes",
    "load",
    "plan",
    "quantize",
    "register_recipe",
]

register()
