"""A stand-in for vLLM's Llama: the same names, fused layers and calling conventions, in plain torch, on one sequence.

Several of them in threads play the GPUs of a tensor-parallel group.
"""

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mergequant.checkpoint import Checkpoint, Quantization
from mergequant.integrations.vllm.install import SERVED, OwnCache, install
from mergequant.integrations.vllm.pages import LayerPages, Step
from mergequant.integrations.vllm.placement import Placement
from mergequant.integrations.vllm.served import ServedLinear
from mergequant.integrations.vllm.shards import Share
from mergequant.integrations.vllm.sink import Sink

PAGE = 64  # tokens
PAGES = 12  # of a stand-in's cache
LONGEST = 256  # tokens of a sequence
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Group:
    """Threads that exchange tensors."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.slots = size, threading.Barrier(size, timeout=60), [torch.empty(0)] * size

    def exchange(self, rank: int, value: Tensor) -> list[Tensor]:
        self.slots[rank] = value
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """work(rank) of every rank, at the same time."""
        results: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            try:
                results[rank] = work(rank)
            except Exception as error:
                results[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, threading.BrokenBarrierError):
                raise result
        return results


class Linear(nn.Module):
    """vLLM's linear layers: fused, or cut by rows or columns, quantized or not."""

    def __init__(self, model: "StandIn", name: str, sizes: list[int], width: int, copies: int = 1) -> None:
        super().__init__()
        parent, _, child = name.rpartition(".")
        names = [f"{parent}.{part}" for part in FUSED.get(child, (child,))]
        self.share, self.group = model.share, model.group
        self.sums = child in ("o_proj", "down_proj")
        size = self.share.size
        local = (
            sizes if self.sums else [part // size if n == 0 else part * copies // size for n, part in enumerate(sizes)]
        )
        if len(sizes) == 2:
            local = [part // size for part in sizes]
        described = {part: model.quantization.layers[part] for part in names if part in model.quantization.layers}
        if described:
            gather = (lambda x: torch.cat(self.group.exchange(self.share.rank, x), -1)) if size > 1 else None
            self.add_module(SERVED, ServedLinear(described, local, self.share, self.sums, torch.float32, gather))
        else:
            assert size == 1
            self.weight = nn.Parameter(torch.zeros(sum(local), width), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        y = getattr(self, SERVED)(x) if hasattr(self, SERVED) else nn.functional.linear(x, self.weight)
        if self.sums and self.share.size > 1:
            y = torch.stack(self.group.exchange(self.share.rank, y)).sum(0)
        return y, None


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width), requires_grad=False), eps

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Any:
        total = hidden if residual is None else hidden + residual
        normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + self.eps) * self.weight
        return normed if residual is None else (normed, total)


class Rotary(nn.Module):
    def __init__(self, width: int, base: float) -> None:
        super().__init__()
        self.width, self.base = width, base

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        half = self.width // 2
        angle = positions[:, None].float() * self.base ** (-torch.arange(half).float() / half)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]

        def turn(x: Tensor) -> Tensor:
            first, second = x.view(x.shape[0], -1, 2, half).unbind(2)
            return torch.stack((first * cos - second * sin, second * cos + first * sin), 2).flatten(1)

        return turn(query), turn(key)


class Core(nn.Module):
    """Causal attention."""

    def __init__(self, heads: int, kv_heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = heads, kv_heads, width

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        count = query.shape[0]
        q = query.view(count, self.heads, self.width).transpose(0, 1)
        k, v = (x.reshape(count, self.kv_heads, self.width).transpose(0, 1) for x in (key, value))
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, 0) for x in (k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(count, -1)


class Pages:
    """What an engine keeps for attention in pages: layers' pages, made at their first use, and the step at hand."""

    step: Step

    def __init__(self, count: int) -> None:
        self.count, self.layers = count, dict[int, Tensor]()

    def of(self, pages: LayerPages) -> Tensor:
        heads, width = pages.scales[0].shape
        shape = (self.count, 2, heads, PAGE, width * pages.bits // 8)
        return self.layers.setdefault(pages.layer, torch.zeros(shape, dtype=torch.uint8))


class PagedCore(nn.Module):
    """Attention on pages."""

    def __init__(self, core: Core, pages: LayerPages, own: Pages) -> None:
        super().__init__()
        self.core, self.pages, self.own = core, pages, own

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.pages.finish(torch.float32)  # a real engine does it once, when all is loaded
        q, k, v = (x.unflatten(-1, (-1, self.core.width)) for x in (query, key, value))
        out = torch.full_like(q, float("nan"))
        self.pages.attend(q, k, v, self.own.of(self.pages), self.own.step, out, self.core.width**-0.5, plain_flash)
        return out.flatten(1)


def plain_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    queries: Tensor,
    keys: Tensor,
    most: int,
    longest: int,
    scale: float,
) -> None:
    """Causal attention of rows that stand one behind the other, for the calling convention of FlashAttention."""
    for row in range(queries.shape[0] - 1):
        own, all_keys = (slice(*starts[row : row + 2].tolist()) for starts in (queries, keys))
        q, k, v = query[own], key[all_keys], value[all_keys]
        assert q.shape[0] <= most
        assert k.shape[0] <= longest
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        hidden = torch.ones(q.shape[0], k.shape[0]).tril(k.shape[0] - q.shape[0]) == 0
        score = torch.einsum("qhd,khd->hqk", q, k) * scale
        out[own] = torch.einsum("hqk,khd->qhd", score.masked_fill(hidden, float("-inf")).softmax(-1), v)


class Attention(nn.Module):
    def __init__(self, model: "StandIn", name: str) -> None:
        super().__init__()
        config, size = model.config, model.share.size
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        copies = max(1, size // config.num_key_value_heads)
        self.num_kv_heads = config.num_key_value_heads * copies // size
        heads = config.num_attention_heads // size
        sizes = [config.num_attention_heads * width] + [config.num_key_value_heads * width] * 2
        self.qkv_proj = Linear(model, f"{name}.qkv_proj", sizes, config.hidden_size, copies)
        self.o_proj = Linear(model, f"{name}.o_proj", [config.hidden_size], sizes[0])
        self.rotary_emb = Rotary(width, config.rope_parameters["rope_theta"])
        self.num_heads, self.head_dim = heads, width
        self.attn = Core(heads, self.num_kv_heads, width)
        self.sizes = [heads * width, self.num_kv_heads * width, self.num_kv_heads * width]

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden)
        q, k, v = qkv.split(self.sizes, -1)
        q, k = self.rotary_emb(positions, q, k)
        out, _ = self.o_proj(self.attn(q, k, v))
        return out


class SiluAndMul(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return nn.functional.silu(gate) * up


class MLP(nn.Module):
    def __init__(self, model: "StandIn", name: str) -> None:
        super().__init__()
        config = model.config
        self.gate_up_proj = Linear(model, f"{name}.gate_up_proj", [config.intermediate_size] * 2, config.hidden_size)
        self.down_proj = Linear(model, f"{name}.down_proj", [config.hidden_size], config.intermediate_size)
        self.act_fn = SiluAndMul()

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.gate_up_proj(x)
        x, _ = self.down_proj(self.act_fn(x))
        return x


class Layer(nn.Module):
    def __init__(self, model: "StandIn", name: str) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(model, f"{name}.self_attn"), MLP(model, f"{name}.mlp")
        eps = model.config.rms_norm_eps
        self.input_layernorm, self.post_attention_layernorm = (Norm(model.config.hidden_size, eps) for _ in range(2))

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual, hidden = hidden, self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden, residual = self.post_attention_layernorm(self.self_attn(positions, hidden), residual)
        return self.mlp(hidden), residual


class StandIn(nn.Module):
    """A causal model on one GPU of a group; `load_weights` and `forward` as the plugin's own classes have them."""

    placement: Placement
    sink: Sink | None

    def __init__(self, config: Any, quantization: Quantization, share: Share, group: Group, bits: int = 16) -> None:
        super().__init__()
        self.config, self.quantization, self.share, self.group = config, quantization, share, group
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(self, f"model.layers.{n}") for n in range(config.num_hidden_layers))
        self.model.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.pages = Pages(PAGES)
        cache = OwnCache(bits, torch.float32, LONGEST, lambda core, pages: PagedCore(core, pages, self.pages))
        self.placement, self.sink = install(self, quantization, share, 512, cache if bits < 16 else None)
        self.requires_grad_(False)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        own = self.state_dict()
        for name, value in self.placement.take(weights):
            own[name].copy_(value)
        self.placement.require_all()
        for module in self.modules():
            if isinstance(module, ServedLinear):
                module.finish()

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Token ids (tokens,) to logits (tokens, vocabulary)."""
        positions, residual = torch.arange(ids.shape[0]) if positions is None else positions, None
        rows = None if self.sink is None else self.sink.find(ids, positions)
        if self.sink is not None:
            positions = self.sink.mark(rows, positions)
        hidden = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            hidden, residual = layer(positions, hidden, residual)
        hidden, _ = self.model.norm(hidden, residual)
        return self.lm_head(hidden if self.sink is None else self.sink.put(rows, hidden))


def stand_ins(checkpoint: Checkpoint, config: Any, size: int, bits: int = 16) -> tuple[Group, list[StandIn]]:
    """The loaded models of a group; with fewer bits than 16 on this project's own pages."""
    group = Group(size)
    models = [StandIn(config, checkpoint.quantization, Share(rank, size), group, bits) for rank in range(size)]
    for model in models:
        model.load_weights(checkpoint.tensors().items())
    return group, models


@torch.no_grad()
def logits(group: Group, models: list[StandIn], ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """Logits (tokens, vocabulary), which all ranks agree on."""

    def work(rank: int) -> Tensor:
        with torch.no_grad():
            return models[rank](ids, positions)

    found = group.run(work)
    assert all(torch.equal(found[0], other) for other in found[1:])
    return found[0]
