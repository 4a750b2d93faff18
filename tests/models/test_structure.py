from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from families import ENCODERS, FAMILIES, make_model
from mergequant.assets import TINY
from mergequant.errors import StructureError
from mergequant.models import BlockStructure, ModelShell, Producer
from mergequant.models.probe import TOLERANCE
from mergequant.models.structure import find_blocks

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
Row = tuple[str, str, tuple[str, ...], tuple[str, int, int] | None]


def llama_like(values: int, ffn: int = 52, ffn_norm: str = "post_attention_layernorm") -> list[Row]:
    return [
        ("input_layernorm", "norm", QKV, None),
        ("self_attn.o_proj", "attention_output", ("self_attn.o_proj",), ("self_attn.v_proj", 0, values)),
        (ffn_norm, "norm", ("mlp.gate_proj", "mlp.up_proj"), None),
        ("mlp.down_proj", "mlp_output", ("mlp.down_proj",), ("mlp.up_proj", 0, ffn)),
    ]


def bert_like(intermediate: tuple[str, int, int] | None) -> list[Row]:
    qkv = tuple(f"attention.self.{name}" for name in ("query", "key", "value"))
    dense = "attention.output.dense"
    return [
        (qkv[0], "stream", qkv, None),
        (dense, "attention_output", (dense,), (qkv[2], 0, 40)),
        ("intermediate.dense", "stream", ("intermediate.dense",), None),
        ("output.dense", "mlp_output", ("output.dense",), intermediate),
    ]


def opt_like(fc1: tuple[str, int, int] | None) -> list[Row]:
    return [
        ("self_attn_layer_norm", "norm", QKV, None),
        ("self_attn.out_proj", "attention_output", ("self_attn.out_proj",), ("self_attn.v_proj", 0, 40)),
        ("final_layer_norm", "norm", ("fc1",), None),
        ("fc2", "mlp_output", ("fc2",), fc1),
    ]


EXPECTED: dict[str, list[Row]] = {
    "llama": llama_like(20),
    "llama_tied_wide_heads": llama_like(28),
    "llama_no_gqa": llama_like(40),
    "mistral": llama_like(20),
    "qwen2": llama_like(20),
    "qwen3": llama_like(24),
    "gemma": llama_like(12),
    "gemma2": llama_like(24, ffn_norm="pre_feedforward_layernorm"),
    "phi3": [
        ("input_layernorm", "norm", ("self_attn.qkv_proj",), None),
        ("self_attn.o_proj", "attention_output", ("self_attn.o_proj",), ("self_attn.qkv_proj", 60, 80)),
        ("post_attention_layernorm", "norm", ("mlp.gate_up_proj",), None),
        ("mlp.down_proj", "mlp_output", ("mlp.down_proj",), ("mlp.gate_up_proj", 52, 104)),
    ],
    "opt": opt_like(("fc1", 0, 52)),  # relu(x / s) * s == relu(x) for s > 0
    "opt_gelu_projected": opt_like(None),
    "bert": bert_like(None),
    "bert_classifier": bert_like(("intermediate.dense", 0, 52)),
}


def rows(structure: BlockStructure) -> list[Row]:
    def of(producer: Producer | None) -> tuple[str, int, int] | None:
        return (producer.rows.linear, producer.rows.start, producer.rows.stop) if producer else None

    return [(site.name, site.kind, site.consumers, of(site.producer)) for site in structure.sites]


@pytest.mark.parametrize("family", [*FAMILIES, *ENCODERS])
def test_structure_of_each_family_is_found_and_proven(family: str) -> None:
    shell = ModelShell.open(make_model(family))
    structure = shell.structure()
    assert rows(structure) == EXPECTED[family]
    assert shell.structures == [structure] * len(shell.blocks)
    assert structure.unserved == ()
    assert structure.causal == shell.generates == (family in FAMILIES)
    linears = {name for name, module in shell.blocks[0].named_modules() if isinstance(module, nn.Linear)}
    assert set(structure.linears) == linears
    for site in structure.sites:
        assert 0 < site.deviation < TOLERANCE  # rounding, not skipped
        assert site.begins_module == (site.kind in ("norm", "stream"))
        assert site.width == shell.blocks[0].get_submodule(site.consumers[0]).in_features


def test_structure_of_the_bundled_model_has_four_proven_sites() -> None:
    assert rows(ModelShell.open(TINY).structure()) == llama_like(128, 704)


@pytest.mark.parametrize(("name", "values", "ffn"), [("stories260K", 32, 172), ("tinystories-656k", 64, 384)])
def test_structure_of_a_reference_model_has_four_proven_sites(
    name: str, values: int, ffn: int, test_data: Path
) -> None:
    assert rows(ModelShell.open(test_data / "models" / name).structure()) == llama_like(values, ffn)


def test_structure_does_not_depend_on_the_weights() -> None:
    assert ModelShell.open(make_model("llama", 0)).structure() == ModelShell.open(make_model("llama", 1)).structure()


def test_channels_with_grouped_heads_repeat_each_value_head() -> None:
    site = ModelShell.open(make_model("llama")).structure().sites[1]
    assert site.producer is not None
    head = torch.arange(10)  # four query heads of 10 share two value heads
    assert site.producer.channel == tuple(torch.cat([head, head, head + 10, head + 10]).tolist())


@pytest.mark.parametrize(
    ("family", "kind", "offset", "eps"),
    [("llama", "rms", False, 1e-6), ("gemma", "rms", True, 1e-6), ("opt", "layer", False, 1e-5)],
)
def test_norm_role_gives_the_gain_that_is_applied(family: str, kind: str, offset: bool, eps: float) -> None:
    shell = ModelShell.open(make_model(family), dtype=torch.bfloat16)
    role = shell.structure().sites[0].norm
    assert role is not None
    assert (role.kind, role.unit_offset, role.eps, role.width) == (kind, offset, eps, 40)
    norm = shell.load_block(0).get_submodule(role.name)
    gain = role.gain(norm)
    assert gain.dtype == torch.float32
    assert torch.equal(gain, norm.weight.float() + offset)
    role.set_gain(norm, torch.full((40,), 2.0))
    assert torch.equal(role.gain(norm), torch.full((40,), 2.0))
    assert (role.bias(norm) is None) == (family != "opt")


# ---- what must be refused ----------------------------------------------------------------------------------------


class SharedNormLayer(LlamaDecoderLayer):
    """Its second norm also goes into the residual, so that its gain cannot be moved into the linears."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        normed = self.post_attention_layernorm(hidden_states + attended)
        return normed + self.mlp(normed)


class LeakyLayer(SharedNormLayer):
    """Half of its second norm goes into the residual: what is disturbed there does not arrive as it was."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        normed = self.post_attention_layernorm(hidden_states + attended)
        return hidden_states + normed / 2 + self.mlp(normed)


class LateNormLayer(LlamaDecoderLayer):
    """Norms come last; one reader of the block's input too many: it also decides how loud the MLP is."""

    loud = True

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
        middle = self.input_layernorm(hidden_states + attended)
        volume = hidden_states.mean(-1, keepdim=True).tanh() if self.loud else 1.0
        return self.post_attention_layernorm(middle + volume * self.mlp(middle))


class QuietNormLayer(LateNormLayer):
    """As it should be."""

    loud = False


class IdleLayer(LlamaDecoderLayer):
    """Its feed-forward part is computed and thrown away."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + attended


class OwnMatrixLayer(LlamaDecoderLayer):
    """Multiplies its norm's output by a matrix that is no nn.Linear: nothing that hooks on linears could see it."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, **kwargs)
        return hidden_states + attended + normed @ self.mlp.down_proj.weight @ self.mlp.down_proj.weight.T


def with_layers(layer: type[LlamaDecoderLayer]) -> LlamaForCausalLM:
    class Changed(LlamaForCausalLM):
        def __init__(self, config: object) -> None:
            super().__init__(config)
            for block in self.model.layers:
                block.__class__ = layer

    return Changed(FAMILIES["llama"]())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LeakyLayer, r"model\.layers\.0\.post_attention_layernorm feeds mlp\.gate_proj.*something else reads"),
        (IdleLayer, r"mlp\.gate_proj, mlp\.up_proj changes the block's output by only 0\.0e\+00"),
        (OwnMatrixLayer, r"model\.layers\.0\.input_layernorm feeds.*something else reads"),
        (LateNormLayer, r"self_attn\.q_proj.*read the block's input.*something besides the residual connection"),
    ],
)
def test_block_whose_norm_cannot_be_rescaled_is_refused(layer: type[LlamaDecoderLayer], message: str) -> None:
    with pytest.raises(StructureError, match=message):
        ModelShell.open(with_layers(layer)).structure()


def opt(**options: bool) -> OPTForCausalLM:
    return OPTForCausalLM(OPTConfig(**{**FAMILIES["opt"]().to_diff_dict(), **options}))


def test_opt_with_norms_that_absorb_nothing_is_refused() -> None:
    with pytest.raises(StructureError, match="no site that could be proven"):
        ModelShell.open(opt(layer_norm_elementwise_affine=False)).structure()


def test_norms_that_the_residual_reads_too_make_stream_sites() -> None:
    def kinds(model: LlamaForCausalLM | OPTForCausalLM) -> list[str]:
        return [site.kind for site in ModelShell.open(model).structure().sites]

    late = ["stream", "attention_output", "stream", "mlp_output"]
    assert kinds(with_layers(SharedNormLayer)) == ["norm", *late[1:]]
    assert kinds(with_layers(QuietNormLayer)) == late
    assert kinds(opt(do_layer_norm_before=False)) == late


# ---- finding blocks ----------------------------------------------------------------------------------------------


def stack(count: int, width: int = 8) -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(nn.Linear(width, width)) for _ in range(count))


def test_find_blocks_takes_the_outermost_and_ignores_small_lists() -> None:
    model = nn.Module()
    model.heads = stack(1, 4)
    model.layers = nn.ModuleList(nn.ModuleDict({"experts": stack(4), "one": nn.Linear(8, 8)}) for _ in range(3))
    model.mixed = nn.ModuleList([nn.Linear(99, 99), nn.Bilinear(9, 9, 9)])
    name, blocks = find_blocks(model)
    assert name == "layers"
    assert blocks is model.layers


def test_find_blocks_with_two_stacks_lists_both() -> None:
    model = nn.Module()
    model.encoder, model.decoder = stack(3), stack(4)
    with pytest.raises(StructureError, match=r"decoder \(4 x Sequential, 256 weights\), encoder \(3 x"):
        find_blocks(model)


def test_find_blocks_without_any_says_so() -> None:
    with pytest.raises(StructureError, match="no list of equal blocks"):
        find_blocks(nn.Linear(3, 3))
