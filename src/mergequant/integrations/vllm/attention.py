"""vLLM's side of this project's caches: spec, backend, metadata, and the attention layer. Imports vLLM.

Nothing of vLLM is patched. An `Attention` layer takes its backend as an argument, and says by itself how many bytes a
page has; the manager of the pages is found by the spec's base class.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from vllm.config import CacheConfig, VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from mergequant.errors import UsageError
from mergequant.integrations.vllm.pages import OPTION, PAGE, WAY_OUT, LayerPages, Step, plan_step
from mergequant.integrations.vllm.report import LOG, cache_summary
from mergequant.ops.kv_layout import cache_width

__all__ = ["PagedAttention", "require_engine"]


@dataclass(frozen=True, kw_only=True)
class PageSpec(FullAttentionSpec):
    """Pages whose keys and values have `bits` bits."""

    bits: int = 8

    @property
    def real_page_size_bytes(self) -> int:
        """Of a page of one layer."""
        return self.block_size * self.num_kv_heads * (self.head_size + self.head_size_v) * self.bits // 8

    @classmethod
    def merge(cls, specs: list["PageSpec"]) -> "PageSpec":
        """The spec of layers that share one table of pages."""
        assert all(spec.bits == specs[0].bits for spec in specs)  # an engine has one kind of cache
        return replace(super().merge(specs), bits=specs[0].bits)


@dataclass
class PageMetadata(AttentionMetadata):
    """A step, as all layers see it."""

    step: Step


class PageMetadataBuilder(AttentionMetadataBuilder[PageMetadata]):
    """Makes steps of what the scheduler decided. Graphs hold decoding steps whole."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, spec: PageSpec, layer_names: list[str], config: VllmConfig, device: torch.device) -> None:
        super().__init__(spec, layer_names, config, device)
        self._init_reorder_batch_threshold(1)
        layer = config.compilation_config.static_forward_context[layer_names[0]]
        self.room = layer.pages.steps.room
        told = cache_summary(len(layer_names), spec.bits, spec.block_size, spec.page_size_bytes, device)
        LOG.info("mergequant serves %s", told)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PageMetadata:
        """The step of a batch whose rows of one token stand in front."""
        common = common_attn_metadata
        decodes, prompts, _, _ = split_decodes_and_prefills(common, decode_threshold=1)
        lengths = common.seq_lens_cpu_upper_bound if prompts else None
        if prompts and lengths is None:
            lengths = common.seq_lens.cpu()
        step = plan_step(
            common.slot_mapping,
            common.block_table_tensor,
            common.seq_lens,
            common.query_start_loc,
            common.query_start_loc_cpu.tolist() if prompts else [0],
            [] if lengths is None else lengths.tolist(),
            decodes,
            common.max_seq_len,
            self.room,
            self._send,
        )
        return PageMetadata(step)

    def _send(self, numbers: list[int]) -> Tensor:
        """To the device, without waiting for it."""
        return torch.tensor(numbers, dtype=torch.int32, pin_memory=True).to(self.device, non_blocking=True)


class PageImpl(AttentionImpl[PageMetadata]):
    """Attention of a layer over its pages."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        *,
        pages: LayerPages,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.pages = pages
        self.version = get_flash_attn_version(head_size=head_size)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """The stored token in its dtype; kernels are built once for all layers."""
        self.pages.finish(act_dtype)
        if self.pages.layer == 0 and current_platform.is_cuda():
            self.pages.warm(self.num_heads, act_dtype)

    def forward(
        self,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: PageMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query and output (tokens, heads, width), key and value (tokens, kv_heads, width)."""
        if attn_metadata is None:  # vLLM measures memory
            return output.fill_(0)
        self.pages.attend(query, key, value, kv_cache, attn_metadata.step, output, self.scale, self._flash)
        return output

    def _flash(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        queries: Tensor,
        keys: Tensor,
        most_queries: int,
        most_keys: int,
        scale: float,
    ) -> None:
        flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            out=out,
            cu_seqlens_q=queries,
            cu_seqlens_k=keys,
            max_seqlen_q=most_queries,
            max_seqlen_k=most_keys,
            softmax_scale=scale,
            causal=True,
            fa_version=self.version,
        )


class PageBackend(AttentionBackend):
    """Names what belongs together. vLLM asks a class for the shape of the cache, so there is one for each width."""

    bits: ClassVar[int]
    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        """Tokens of a page."""
        return [MultipleOf(PAGE)]

    @staticmethod
    def get_name() -> str:
        """vLLM's name for backends that are not its own."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[PageImpl]:
        """The attention."""
        return PageImpl

    @staticmethod
    def get_builder_cls() -> type[PageMetadataBuilder]:
        """The metadata."""
        return PageMetadataBuilder

    @classmethod
    def get_kv_cache_shape(
        cls, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """Of a layer's pages: `ops.kv_pages`."""
        return num_blocks, 2, num_kv_heads, block_size, cache_width(head_size, cls.bits)


class PageBackend8(PageBackend):
    """Codes of 8 bits."""

    bits = 8


class PageBackend4(PageBackend):
    """Codes of 4 bits."""

    bits = 4


BACKENDS: dict[int, type[PageBackend]] = {backend.bits: backend for backend in (PageBackend8, PageBackend4)}


class PagedAttention(Attention):
    """A layer's attention, in the place of vLLM's, whose arguments it has."""

    def __init__(self, inner: Attention, pages: LayerPages, cache_config: CacheConfig) -> None:
        if inner.sliding_window is not None:
            raise UsageError(f"{inner.layer_name} has a sliding window, which {OPTION} does not know; {WAY_OUT}")
        if inner.attn_type != AttentionType.DECODER or inner.kv_sharing_target_layer_name is not None:
            raise UsageError(f"{inner.layer_name} is no plain decoder attention, which {OPTION} wants; {WAY_OUT}")
        # The new layer takes the old one's name.
        get_current_vllm_config().compilation_config.static_forward_context.pop(inner.layer_name)
        super().__init__(
            inner.num_heads,
            inner.head_size,
            inner.impl.scale,
            num_kv_heads=inner.num_kv_heads,
            cache_config=cache_config,
            quant_config=inner.quant_config,
            prefix=inner.layer_name,
            attn_backend=BACKENDS[pages.bits],
            pages=pages,
        )
        self.pages = pages

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """Bytes of this layer's pages."""
        return PageSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            head_size_v=self.head_size,
            dtype=torch.uint8,
            bits=self.pages.bits,
        )


def require_engine(config: VllmConfig) -> None:
    """Raise UsageError for what the engine is asked for beside this project's caches, and cannot have."""
    cache, parallel = config.cache_config, config.parallel_config
    faults: list[str] = []
    if cache.user_specified_block_size and cache.block_size % PAGE:
        faults.append(f"--block-size {cache.block_size} is no multiple of {PAGE}")
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        faults.append("contexts are not cut (--decode-context-parallel-size)")
    if parallel.enable_dbo:
        faults.append("steps are not run in halves (--enable-dbo)")
    if cache.kv_cache_dtype_skip_layers:
        faults.append("all layers have the same cache (--kv-cache-dtype-skip-layers)")
    if faults:
        raise UsageError(f"{OPTION}: {'; '.join(faults)}; {WAY_OUT}")
