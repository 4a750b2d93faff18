"""vLLM's models, able to hold a checkpoint of this project. For any other checkpoint they are vLLM's, unchanged.

The changes are made from outside, once a model is built (`install`): nothing of vLLM's is copied or patched.
"""

import logging
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.platforms import current_platform

from mergequant.errors import UsageError
from mergequant.integrations.vllm.config import CACHE_NOTE, MergeQuantConfig
from mergequant.integrations.vllm.install import OwnCache, install
from mergequant.integrations.vllm.pages import FLOAT_BITS, chosen_bits
from mergequant.integrations.vllm.placement import Placement
from mergequant.integrations.vllm.served import ServedNorm
from mergequant.integrations.vllm.shards import Share
from mergequant.integrations.vllm.sink import Sink

__all__ = ["ServedLlama", "ServedMistral", "ServedQwen2", "ServedQwen3"]

LOG = logging.getLogger("vllm.mergequant")


class _Served:
    """What the four classes add to vLLM's."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **options: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **options)  # type: ignore[call-arg]
        self._placement: Placement | None = None
        self._sink: tuple[Sink, ...] = ()
        self._dtype = vllm_config.model_config.dtype
        config = vllm_config.quant_config
        if not isinstance(config, MergeQuantConfig):
            return
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise UsageError("quantized models are not cut by blocks: use --tensor-parallel-size, not pipeline stages")
        share = Share(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
        most, cache = vllm_config.scheduler_config.max_num_batched_tokens, _own_cache(vllm_config)
        self._placement, sink = install(self, config.quantization, share, most, cache)  # type: ignore[arg-type]
        self._sink = () if sink is None else (sink,)
        if sink is not None:
            LOG.info(
                "mergequant: the keys and values of token %d are stored. Every prompt must begin with it, as the "
                "checkpoint's tokenizer does it; one that does not is served less accurately",
                sink.spec.tokens[0],
            )
        if cache is None and config.quantization.kv is not None:
            LOG.info("mergequant: %s", CACHE_NOTE)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Quantized tensors to their places, the rest by vLLM's loader."""
        if self._placement is None:
            return super().load_weights(weights)  # type: ignore[misc]
        loaded = super().load_weights(self._placement.take(weights))  # type: ignore[misc]
        self._placement.require_all()
        for module in self.modules() if current_platform.is_cuda() else ():  # type: ignore[attr-defined]
            if isinstance(module, ServedNorm):
                module.warm(self._dtype)
        return loaded | self._placement.filled

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """As vLLM's; the stored first token's row is marked before, and gets its hidden state after."""
        if not self._sink:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)  # type: ignore[misc]
        sink = self._sink[0]
        rows = sink.find(input_ids, positions)
        marked = sink.mark(rows, positions)
        hidden = super().forward(input_ids, marked, intermediate_tensors, inputs_embeds)  # type: ignore[misc]
        return sink.put(rows, hidden) if isinstance(hidden, torch.Tensor) else hidden


def _own_cache(config: VllmConfig) -> OwnCache | None:
    """The cache of 8 or 4 bits that is asked for; None: vLLM's own."""
    bits = chosen_bits(config.additional_config, config.cache_config.cache_dtype)
    if bits == FLOAT_BITS:
        return None
    from mergequant.integrations.vllm.attention import PagedAttention, require_engine  # needs vLLM's FlashAttention

    require_engine(config)
    attention = partial(PagedAttention, cache_config=config.cache_config)
    return OwnCache(bits, config.model_config.dtype, config.model_config.max_model_len, attention)


class ServedLlama(_Served, LlamaForCausalLM):
    """LlamaForCausalLM."""


class ServedMistral(_Served, MistralForCausalLM):
    """MistralForCausalLM."""


class ServedQwen2(_Served, Qwen2ForCausalLM):
    """Qwen2ForCausalLM."""


class ServedQwen3(_Served, Qwen3ForCausalLM):
    """Qwen3ForCausalLM."""
