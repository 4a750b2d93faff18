"""The fast loop on a GPU: proven against the model, equal with and without a graph, and by kernels and references."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mergequant
from mergequant import ops
from mergequant.assets import TINY
from mergequant.integrations.transformers.serve import SERVER
from mergequant.ops.backends import use_backend
from mergequant.runtime import Decoder, DecoderShape, Sampling, Steppers, generate, prefill, random_decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with CUDA"),
]

RECIPES = ("rtn", "mergequant", "mergequant-plus", "mergequant-w4a8")
PROMPTS = [[1, 300, 301, 302, 17, 2000, 45], [1, 77, 91], [1]]
# How far two tokens' logits may lie apart (of the logits' spread) where kernels and references choose differently:
# codes on a rounding border flip with the order of a sum, and coarse codes flip further ones.
TIES = {"rtn": 1.5, "mergequant": 1.0, "mergequant-plus": 1.0, "mergequant-w4a8": 0.3}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """checkpoint(recipe): the bundled model, quantized once per recipe."""
    folder, known = tmp_path_factory.mktemp("tiny"), {}

    def make(recipe: str) -> Path:
        if recipe not in known:
            out = folder / recipe
            mergequant.quantize(TINY, recipe, out=out, samples=8, seqlen=64, device="cuda")
            known[recipe] = out
        return known[recipe]

    return make


def decoder_of(model: Any) -> Decoder:
    return model.__dict__[SERVER].decoder


def logits_after(decoder: Decoder, text: list[int]) -> torch.Tensor:
    """Logits of what follows a text, by one prefill."""
    strip = decoder.prefix is not None and decoder.prefix.spec.replaces_bos
    own = text[1:] if strip else text
    return prefill(decoder, [own], decoder.new_cache(1, decoder.prefix_tokens + len(own)))[0].float()


def compare(name: str, decoder: Decoder, got: list[list[int]], want: list[list[int]], tie: float) -> None:
    """Equal tokens, or a first difference between two that the references find about equally likely."""
    for row, (mine, theirs) in enumerate(zip(got, want)):
        first = next((n for n, (a, b) in enumerate(zip(mine, theirs)) if a != b), None)
        if first is None:
            print(f"{name} row {row}: {len(mine)} tokens are equal")
            assert len(mine) == len(theirs)
            continue
        with use_backend("torch"):
            logits = logits_after(decoder, [*PROMPTS[row], *theirs[:first]])
        gap = float((logits[theirs[first]] - logits[mine[first]]).abs() / logits.std())
        print(f"{name} row {row}: token {first} differs, {mine[first]} for {theirs[first]}, {gap:.4f} deviations apart")
        assert gap < tie, f"{name} row {row}: no tie at token {first}"


@pytest.mark.parametrize("kv_bits", [16, 8, 4])
@pytest.mark.parametrize("recipe", RECIPES)
def test_generate_writes_what_the_references_write(
    recipe: str, kv_bits: int, checkpoint: Callable[[str], Path]
) -> None:
    model = mergequant.load(checkpoint(recipe), dtype=torch.bfloat16, device="cuda", kv_bits=kv_bits)
    proof = model.__dict__[SERVER].proof
    print(f"{recipe} kv{kv_bits}: {proof}")
    decoder = decoder_of(model)
    got = generate(decoder, PROMPTS, 64)
    assert len({token for row in got for token in row}) > 5
    with use_backend("torch"):
        want = generate(decoder, PROMPTS, 64, graph=False)
    compare(f"{recipe} kv{kv_bits} kernels for references", decoder, got, want, TIES[recipe])


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, seed=3), Sampling(1.0, 40, 0.9, seed=3)])
@pytest.mark.parametrize("kv_bits", [16, 8, 4])
def test_generate_writes_the_same_with_and_without_graph(
    kv_bits: int, sampling: Sampling, checkpoint: Callable[[str], Path]
) -> None:
    model = mergequant.load(checkpoint("mergequant-w4a8"), dtype=torch.bfloat16, device="cuda", kv_bits=kv_bits)
    decoder = decoder_of(model)
    captured, eager = (generate(decoder, PROMPTS, 70, sampling=sampling, graph=graph) for graph in (True, False))
    compare(f"kv{kv_bits} {sampling} graph for eager", decoder, captured, eager, 0.05 if sampling.kind.greedy else 9.0)
    if sampling.kind.greedy:
        assert captured[0] == eager[0], "one graph and the same kernels must give the same tokens"
    steppers = Steppers(decoder)
    twice = [generate(decoder, PROMPTS, 70, sampling=sampling, steppers=steppers) for _ in range(2)]
    assert twice[0] == twice[1]


@pytest.mark.parametrize("recipe", ["mergequant-plus", "mergequant-w4a8"])
def test_model_generate_runs_on_the_loop_and_agrees_with_transformers(
    recipe: str, checkpoint: Callable[[str], Path]
) -> None:
    model = mergequant.load(checkpoint(recipe), dtype=torch.bfloat16, device="cuda")
    ids = torch.zeros(3, 7, dtype=torch.long, device="cuda")
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(PROMPTS):
        ids[row, 7 - len(prompt) :] = torch.tensor(prompt)
        mask[row, 7 - len(prompt) :] = 1
    options = {
        "input_ids": ids, "attention_mask": mask, "max_new_tokens": 64, "do_sample": False, "eos_token_id": None,
        "pad_token_id": 0, "cache_implementation": "static",
    }  # fmt: skip
    got = model.generate(**options)
    assert not model.__dict__[SERVER].reasons
    assert got.device == ids.device
    del options["cache_implementation"]
    want = type(model).generate(model, **options)
    compare(recipe, decoder_of(model), got[:, 7:].tolist(), want[:, 7:].tolist(), TIES[recipe])


def test_generate_when_row_ends_stops_and_drops_the_rest(checkpoint: Callable[[str], Path]) -> None:
    decoder = decoder_of(mergequant.load(checkpoint("mergequant-w4a8"), dtype=torch.bfloat16, device="cuda"))
    free = generate(decoder, PROMPTS, 100)
    seen: list[list[int | None]] = []
    end = free[0][20]
    ended = generate(decoder, PROMPTS, 100, eos=[end], on_tokens=seen.append)
    for row, whole in zip(ended, free):
        assert row == whole[: whole.index(end) + 1 if end in whole else 100]
    assert [step[0] for step in seen if step[0] is not None] == ended[0]


@pytest.mark.parametrize("head_width", [64, 128])
@pytest.mark.parametrize("kv_bits", [16, 8, 4])
@pytest.mark.parametrize("changes", [{}, {"kv_heads": 8}, {"kv_heads": 1, "qk_norm": True}])
def test_random_decoder_steps_like_one_prefill(head_width: int, kv_bits: int, changes: dict[str, Any]) -> None:
    shape = DecoderShape(
        layers=3, channels=1024, heads=8, kv_heads=2, head_width=head_width, ffn=2816, vocabulary=1000, positions=1024
    )
    decoder = random_decoder(replace(shape, **changes), "cuda", kv_bits=kv_bits)
    tokens = torch.randint(0, 1000, (5, 200), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    cache = decoder.new_cache(5, 256)
    decoder.prefill(tokens[:, :190], cache)
    steps = torch.stack([decoder.step(tokens[:, place], cache) for place in range(190, 200)]).float()
    whole = torch.stack(
        [decoder.prefill(tokens[:, : place + 1], decoder.new_cache(5, 256)) for place in range(190, 200)]
    ).float()
    deviation = float((steps - whole).norm() / (whole - whole.mean(-1, keepdim=True)).norm())
    print(
        f"heads {head_width} kv{kv_bits} {changes}: steps deviate by {deviation:.4f}, spread {float(whole.std()):.3f}"
    )
    assert bool(torch.isfinite(steps).all())
    assert deviation < {16: 0.1, 8: 0.3, 4: 0.7}[kv_bits]


@pytest.mark.parametrize("kv_bits", [16, 8, 4])
def test_prefill_in_pieces_is_close_to_one(kv_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    shape = DecoderShape(
        layers=2, channels=512, heads=8, kv_heads=2, head_width=64, ffn=1408, vocabulary=500, positions=2048
    )
    decoder = random_decoder(shape, "cuda", kv_bits=kv_bits)
    rows = torch.randint(0, 500, (3, 700), generator=torch.Generator().manual_seed(0)).tolist()
    rows[1] = rows[1][:130]
    whole = prefill(decoder, rows, decoder.new_cache(3, 768)).float()
    monkeypatch.setattr(sys.modules["mergequant.runtime.generate"], "PREFILL_TOKENS", 256)
    pieces = prefill(decoder, rows, decoder.new_cache(3, 768)).float()
    deviation = float((pieces - whole).norm() / (whole - whole.mean(-1, keepdim=True)).norm())
    print(f"kv{kv_bits}: prefill in pieces deviates by {deviation:.4f}")
    assert deviation < {16: 0.1, 8: 0.3, 4: 0.7}[kv_bits]


def test_load_on_a_gpu_serves_by_itself_and_refuses_with_a_reason(
    checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("mergequant-w4a8")
    assert SERVER in mergequant.load(folder, device="cuda").__dict__
    assert SERVER not in mergequant.load(folder, device="cuda", serve=False).__dict__
    monkeypatch.setattr("mergequant.integrations.transformers.extract.MODEL_TYPES", ("other",))
    assert SERVER not in mergequant.load(folder, device="cuda").__dict__
    assert any("stays on transformers" in line.message for line in caplog.records)


def test_weights_are_on_the_device_once(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("mergequant-w4a8")
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    plain = mergequant.load(folder, device="cuda", serve=False)
    alone = torch.cuda.memory_allocated() - before
    del plain
    gc.collect()
    before = torch.cuda.memory_allocated()
    served = mergequant.load(folder, device="cuda", serve=True)
    both = torch.cuda.memory_allocated() - before
    print(f"plain {alone} bytes, served {both} bytes")
    layer = served.model.layers[0].mlp.down_proj
    size = ops.tile_weight(torch.zeros(256, 704, dtype=torch.int8), 4).numel()
    assert decoder_of(served).layers[0].mlp.down.branches[0].linear.tiles.numel() == size
    assert layer(torch.randn(1, 704, device="cuda", dtype=served.dtype)).shape == (1, 256)
    # Rotary table and padded tiles come on top; a second copy of the linear layers' codes would add a third.
    assert both < 1.25 * alone
