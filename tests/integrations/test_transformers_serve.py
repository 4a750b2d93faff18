"""`model.generate` on the fast loop: the same tokens as transformers' way, and a reason wherever it is not used."""

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.generation import LogitsProcessorList, MinLengthLogitsProcessor

import mergequant
from families import make_model
from mergequant.assets import TINY
from mergequant.errors import InputError, UsageError
from mergequant.integrations.transformers import Server, load, serve
from mergequant.integrations.transformers.extract import extract
from mergequant.integrations.transformers.proof import prove, record
from mergequant.integrations.transformers.serve import SERVER

BOS, EOS = 1, 2
IDS = torch.tensor([[1, 5, 9, 33, 4, 12, 7], [1, 8, 8, 41, 50, 3, 22]])
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
COMBINATIONS = [
    ("llama", "rtn", {"weight_bits": 8, "activation_bits": 8, "clip": True}),
    ("llama", "rtn", {"activation_bits": 16, "group_size": 4}),
    ("llama", "mergequant", {"weight_bits": 8, "activation_bits": 8, "other_bits": 8}),
    ("llama_no_gqa", "mergequant", {"other": "static", "other_bits": 8, "stagger": True, "prefix": "bos"}),
    ("llama_tied_wide_heads", "mergequant-plus", {"tile": 8}),
    ("qwen2", "mergequant-w4a8", {"tile": 8}),
    ("qwen3", "mergequant-plus", {"tile": 8, "other": "static", "other_bits": 8, "prefix": (1, 5)}),
    ("llama", "prefixquant", {}),
    ("llama", "qserve", {"group_size": 8}),
    ("llama", "outliertune", {}),
    ("qwen3", "outlier-suppression-plus", {"shift": "all", "thresholds": 2, "prefix": "bos"}),
]  # fmt: skip


def padded() -> dict[str, Tensor]:
    """Rows of 7, 7, 4 and 1 tokens."""
    ids, mask = torch.zeros(4, 7, dtype=torch.long), torch.zeros(4, 7, dtype=torch.long)
    for row, tokens in enumerate([IDS[0], IDS[1], torch.tensor([1, 17, 30, 6]), torch.tensor([1])]):
        ids[row, 7 - len(tokens) :], mask[row, 7 - len(tokens) :] = tokens, 1
    return {"input_ids": ids, "attention_mask": mask}


def by_transformers(model: PreTrainedModel, **arguments: Any) -> Tensor:
    return type(model).generate(model, **arguments)


def server_of(model: PreTrainedModel) -> Server:
    return model.__dict__[SERVER]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in W4A8: fused SwiGLU, codes out of attention, scales of a quantized cache."""
    out = tmp_path_factory.mktemp("tiny") / "w4a8"
    mergequant.quantize(TINY, "mergequant-w4a8", out=out, samples=4, seqlen=48)
    return out


@pytest.fixture
def served(quantized: Callable[..., Any]) -> Callable[..., PreTrainedModel]:
    """served(...): a model of integers on the fast loop."""

    def make(**options: Any) -> PreTrainedModel:
        model, _ = quantized("llama", **options)
        serve(model)
        return model

    return make


@pytest.mark.parametrize(("family", "recipe", "settings"), COMBINATIONS)
def test_serve_when_recipe_and_family_are_known_writes_the_same_tokens(
    family: str, recipe: str, settings: dict[str, Any]
) -> None:
    windows = torch.randint(3, 97, (6, 24), generator=torch.Generator().manual_seed(7))
    windows[:, 0] = BOS
    model: Any = mergequant.quantize(
        make_model(family), recipe, data=windows, samples=4, seqlen=24, settings=settings
    ).model
    want = by_transformers(model, **padded(), max_new_tokens=30, **GREEDY)
    proof = serve(model).proof
    assert proof.exact < 1e-3
    assert proof.prompt < 1e-3
    assert torch.equal(model.generate(**padded(), max_new_tokens=30, **GREEDY), want)
    assert not server_of(model).reasons
    assert torch.equal(by_transformers(model, **padded(), max_new_tokens=30, **GREEDY), want)  # by the tiles, too


@pytest.mark.parametrize("prefix", [None, (1,), (1, 8, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_when_prefix_is_stored_equals_transformers(
    prefix: tuple[int, ...] | None, dtype: torch.dtype, quantized: Callable[..., Any]
) -> None:
    model, _ = quantized("llama", prefix=prefix)
    model = model.to(dtype)
    want = by_transformers(model, **padded(), max_new_tokens=12, **GREEDY)
    serve(model)
    got = model.generate(**padded(), max_new_tokens=12, **GREEDY)
    assert got.shape == want.shape
    if dtype == torch.float32:
        assert torch.equal(got, want)
    assert not server_of(model).reasons


def test_generate_when_prefix_stands_before_bos_equals_transformers(quantized: Callable[..., Any]) -> None:
    model, _ = quantized("llama", prefix=(8, 3), replaces_bos=False)
    want = by_transformers(model, **padded(), max_new_tokens=12, **GREEDY)
    serve(model)
    assert torch.equal(model.generate(**padded(), max_new_tokens=12, **GREEDY), want)


def test_tiny_when_served_writes_the_same_64_tokens(tiny: Path) -> None:
    model = load(tiny, dtype=torch.float32, serve=True)
    prompt = {"input_ids": torch.tensor([[1, 300, 301, 302]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    want = by_transformers(model, **prompt, max_new_tokens=64, **GREEDY)
    assert torch.equal(model.generate(**prompt, max_new_tokens=64, **GREEDY), want)
    assert len(set(want[0].tolist())) > 10


@pytest.mark.parametrize(("kv_bits", "limit"), [(8, 0.05), (4, 0.3)])
def test_tiny_when_cache_is_quantized_stays_close(tiny: Path, kv_bits: int, limit: float) -> None:
    model = load(tiny, dtype=torch.float32, kv_bits=kv_bits)
    proof = server_of(model).proof
    assert 0 < proof.steps < limit
    assert proof.exact < 1e-3
    assert model.generate(torch.tensor([[1, 300, 301]]), max_new_tokens=20, **GREEDY).shape == (1, 23)
    serve(model, 16)
    assert server_of(model).proof.steps < 1e-3
    assert server_of(model).decoder.kv.bits == 16


def test_load_when_device_is_cpu_leaves_generate_alone(tiny: Path) -> None:
    assert SERVER not in load(tiny).__dict__
    assert SERVER not in load(tiny, serve=False, kv_bits=8).__dict__


def _mutations() -> dict[str, Callable[[Any], Any]]:
    def attention(decoder: Any, **changes: Any) -> Any:
        layers = list(decoder.layers)
        layers[1] = replace(layers[1], attention=replace(layers[1].attention, **changes))
        return replace(decoder, layers=tuple(layers))

    def norm(decoder: Any, **changes: Any) -> Any:
        layers = list(decoder.layers)
        layers[0] = replace(layers[0], mlp_norm=replace(layers[0].mlp_norm, **changes))
        return replace(decoder, layers=tuple(layers))

    return {
        "rotation by one position": lambda d: replace(d, cos=d.cos.roll(1, 0), sin=d.sin.roll(1, 0)),
        "scale of attention": lambda d: attention(d, scale=d.layers[1].attention.scale * 1.2),
        "a foreign projection": lambda d: attention(d, output=d.layers[0].attention.output),
        "a scaled norm": lambda d: norm(d, multiplier=d.layers[0].mlp_norm.multiplier * 1.05),
        "a scaled embedding": lambda d: replace(d, embedding=d.embedding * 1.05),
        "a foreign head": lambda d: replace(d, head=d.embedding),
        "nothing finite": lambda d: replace(d, cos=d.cos * float("nan")),
    }


@pytest.mark.parametrize("mutation", _mutations())
def test_prove_when_decoder_is_wrong_refuses(mutation: str, quantized: Callable[..., Any]) -> None:
    model, _ = quantized("llama")
    recordings = record(model, True), record(model, False)
    decoder = extract(model)
    prove(decoder, model, *recordings)
    with pytest.raises(UsageError, match="deviates from the model"):
        prove(_mutations()[mutation](decoder), model, *recordings)


def test_record_leaves_parameters_as_they_were(quantized: Callable[..., Any]) -> None:
    model, _ = quantized("llama")
    model = model.to(torch.bfloat16)
    before = [(parameter, parameter.data.clone()) for parameter in model.parameters()]
    assert record(model, True).logits.dtype == torch.float32
    assert all(now is was and torch.equal(now, data) for now, (was, data) in zip(model.parameters(), before))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert record(model, False).logits.dtype == torch.bfloat16


def test_serve_when_model_is_of_another_kind_says_so(quantized: Callable[..., Any]) -> None:
    model, _ = quantized("opt")
    with pytest.raises(UsageError, match="'opt'"):
        serve(model)
    assert SERVER not in model.__dict__


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: setattr(model.config, "hidden_act", "gelu"), "'gelu'"),
        (lambda model: setattr(model.config, "rope_parameters", {"rope_type": "dynamic"}), "'dynamic'"),
        (lambda model: setattr(model.config, "sliding_window", 16), "tokens see 16"),
        (lambda model: setattr(model, "lm_head", nn.Linear(32, 61)), "head"),
        (lambda model: model.model.layers[0].mlp.add_module("gate_scale", nn.Linear(1, 1)), "'gate_scale'"),
    ],
)
def test_serve_when_model_has_something_unknown_says_so(
    change: Callable[[Any], None], words: str, quantized: Callable[..., Any]
) -> None:
    model, _ = quantized("llama")
    change(model)
    with pytest.raises(UsageError, match=words):
        serve(model)


@pytest.mark.parametrize("kv_bits", [8, 4])
def test_serve_when_scales_are_missing_asks_for_quantizing_again(kv_bits: int, quantized: Callable[..., Any]) -> None:
    model, _ = quantized("llama")
    with pytest.raises(UsageError, match="quantize the model again"):
        serve(model, kv_bits)
    with pytest.raises(UsageError, match="choose one of"):
        serve(model, 5)


OTHER = {
    "beams": {"num_beams": 2},
    "penalty": {"repetition_penalty": 1.3},
    "processor": {"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(3, EOS)])},
    "outputs": {"return_dict_in_generate": True, "output_scores": True},
    "cache": {"use_cache": False},
    "sequences": {"num_return_sequences": 2, "do_sample": True},
    "length": {"max_new_tokens": 80},
    "holes": {"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1]] * 2)},
    "right padding": {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 0]] * 2)},
    "positions": {"position_ids": torch.arange(7)[None].expand(2, 7)},
}


@pytest.mark.parametrize("name", OTHER)
def test_generate_when_request_is_not_covered_runs_on_transformers_and_says_so_once(
    name: str, served: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = served()
    arguments = {"input_ids": IDS, "max_new_tokens": 4, **GREEDY, **OTHER[name]}
    with caplog.at_level(logging.WARNING, "mergequant"):
        results = []
        for call in (model.generate, model.generate, lambda **given: by_transformers(model, **given)):
            torch.manual_seed(0)
            results.append(call(**arguments))
    tokens = [result if isinstance(result, Tensor) else result.sequences for result in results]
    assert torch.equal(tokens[0], tokens[2])
    assert torch.equal(tokens[1], tokens[2])
    assert sum("runs on transformers" in line.message for line in caplog.records) == 1


def test_generate_when_padding_has_no_mask_runs_on_transformers(served: Callable[..., Any]) -> None:
    model = served()
    ids = IDS.clone()
    ids[0, 0] = 0
    want = by_transformers(model, input_ids=ids, max_new_tokens=4, **GREEDY)
    assert torch.equal(model.generate(ids, max_new_tokens=4, **GREEDY), want)
    assert server_of(model).reasons == {"padding without an attention_mask"}


def test_generate_when_prompt_lacks_bos_says_so_as_transformers_does(served: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="instead of BOS"):
        served(prefix=(1,)).generate(IDS[:, 1:], max_new_tokens=4, **GREEDY)


def test_generate_when_rows_end_fills_them_with_padding(served: Callable[..., Any]) -> None:
    model = served()
    free = by_transformers(model, **padded(), max_new_tokens=12, **GREEDY)[:, 7:]
    arguments = {**padded(), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for end in (int(free[0, 3]), [int(free[1, 2]), int(free[2, 5])], torch.tensor(int(free[3, 0]))):
        want = by_transformers(model, **arguments, eos_token_id=end)
        assert torch.equal(model.generate(**arguments, eos_token_id=end), want)
    assert not server_of(model).reasons


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
@pytest.mark.parametrize(
    "length",
    [{"max_length": 12}, {}, {"generation_config": GenerationConfig(max_new_tokens=5, do_sample=False)}],
)
def test_generate_when_length_is_given_in_other_ways_equals_transformers(
    length: dict[str, Any], served: Callable[..., Any]
) -> None:
    model = served()
    options = {} if "generation_config" in length else GREEDY
    want = by_transformers(model, inputs=IDS, **options, **length)
    assert torch.equal(model.generate(IDS, **options, **length), want)
    assert not server_of(model).reasons


def test_generate_when_static_cache_is_asked_for_runs_on_the_loop(served: Callable[..., Any]) -> None:
    model = served()
    want = by_transformers(model, inputs=IDS, max_new_tokens=6, **GREEDY)
    assert torch.equal(model.generate(IDS, max_new_tokens=6, cache_implementation="static", **GREEDY), want)
    cache = StaticCache(config=model.config, max_cache_len=20)
    assert torch.equal(model.generate(IDS, max_new_tokens=6, past_key_values=cache, **GREEDY), want)
    assert not server_of(model).reasons


def test_generate_when_cache_is_special_or_filled_runs_on_transformers(served: Callable[..., Any]) -> None:
    model = served()
    special = type("SpecialCache", (DynamicCache,), {})(config=model.config)
    filled = DynamicCache(config=model.config)
    model(IDS[:, :3], past_key_values=filled)
    want = by_transformers(model, inputs=IDS, max_new_tokens=6, **GREEDY)
    for cache in (special, filled):
        assert torch.equal(model.generate(IDS, max_new_tokens=6, past_key_values=cache, **GREEDY), want)
    assert server_of(model).reasons == {"a cache of the kind SpecialCache", "a cache that is already filled"}


class Streamer:
    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        assert not self.ended
        self.pieces.append(value)

    def end(self) -> None:
        self.ended = True


def test_generate_when_streamed_puts_prompt_and_tokens_in_order(served: Callable[..., Any]) -> None:
    model, streamer = served(), Streamer()
    out = model.generate(IDS[:1], max_new_tokens=20, streamer=streamer, **GREEDY)
    assert streamer.ended
    assert torch.equal(streamer.pieces[0], IDS[:1])
    assert torch.cat(streamer.pieces[1:]).tolist() == out[0, 7:].tolist()


def test_generate_when_sampling_follows_the_seed_of_torch(served: Callable[..., Any]) -> None:
    model = served()
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(model.generate(IDS, do_sample=True, temperature=1.5, top_k=20, top_p=0.9, max_new_tokens=12))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    assert not server_of(model).reasons


def test_generate_when_model_was_cast_or_copied_is_right(served: Callable[..., Any]) -> None:
    model = served(prefix=(1,))
    want = model.generate(IDS, max_new_tokens=6, **GREEDY)
    twin = copy.deepcopy(model)
    model.lm_head.weight.data.zero_()
    model.model.layers[0].input_layernorm.multiplier.zero_()
    assert torch.equal(twin.generate(IDS, max_new_tokens=6, **GREEDY), want)
    assert not server_of(twin).reasons
    twin.to(torch.bfloat16)
    twin.generate(IDS, max_new_tokens=6, **GREEDY)
    assert any("moved or cast" in reason for reason in server_of(twin).reasons)
    serve(twin)
    twin.generate(IDS, max_new_tokens=6, **GREEDY)
    assert not server_of(twin).reasons


def test_save_pretrained_when_served_gives_equal_checkpoint(tiny: Path, tmp_path: Path) -> None:
    model = load(tiny, serve=True)
    model.save_pretrained(tmp_path / "again")
    first, again = (mergequant.checkpoint.open_checkpoint(folder) for folder in (tiny, tmp_path / "again"))
    again.validate()
    assert all(torch.equal(first.get(name), again.get(name)) for name in first.names())
