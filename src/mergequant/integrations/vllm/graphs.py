"""CUDA graphs of longer prompts: more sizes are captured than vLLM captures by itself.

vLLM captures steps of up to 512 tokens. A longer step is launched from Python, kernel by kernel, which takes longer
than integer kernels run for a prompt of 2048 tokens of a 7B model (docs/results.md, "Inside vLLM"). Imports nothing of
vLLM.
"""

from typing import Any

from mergequant.checkpoint import QUANT_METHOD

__all__ = ["CaptureSizes", "capture_sizes"]

VLLM_MOST = 512  # tokens of vLLM's largest graph, by itself
LONGER = (192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)  # a step is padded to the next one


def capture_sizes(sequences: int) -> list[int]:
    """Tokens of the steps that are captured: vLLM's own choice for so many sequences at a time, and longer ones."""
    most = min(2 * sequences, VLLM_MOST)
    own = [*(size for size in (1, 2, 4) if size <= most), *range(8, min(most + 1, 256), 8), *range(256, most + 1, 16)]
    return [*own, *(size for size in LONGER if size > own[-1])]


class CaptureSizes:
    """An entry of vLLM's table of adjustments by architecture (`MODELS_CONFIG_MAP`), made before sizes are chosen."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Choose sizes for a checkpoint of this project, unless the user has chosen some."""
        compilation = vllm_config.compilation_config
        chosen = compilation.cudagraph_capture_sizes is not None or compilation.max_cudagraph_capture_size is not None
        if vllm_config.model_config.quantization == QUANT_METHOD and not chosen:
            compilation.cudagraph_capture_sizes = capture_sizes(vllm_config.scheduler_config.max_num_seqs)

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing."""
