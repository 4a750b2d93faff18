"""Every recipe on every family: runs, accounts for each layer, reloads bit-equal, generates, costs what it claims."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import mergequant
from default_recipes import DEFAULT_RECIPES, REFUSED
from families import ENCODERS, FAMILIES, make_model
from mergequant.calibration import Chain, Chunk, StorePolicy
from mergequant.checkpoint import Checkpoint, count_bits, open_checkpoint
from mergequant.errors import StructureError
from mergequant.models import ModelShell
from mergequant.nn import CodebookSpec, LinearSpec, NormSpec, QuantLinear, QuantNorm, SparseSpec
from mergequant.pipeline import Quantized
from mergequant.pipeline.blocks import restore_block
from mergequant.pipeline.run import transform_model
from mergequant.recipes import get_recipe
from mergequant.steps import AllocateBits, LearningStep, MeasuringStep, ModelStep, SearchExponent

ANY_MODEL = (AllocateBits, SearchExponent)  # what these measure, every model has
CPU = StorePolicy(torch.device("cpu"))


def chain_logits(shell: ModelShell, checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    """Logits by the pipeline's own way: one block after the other, as the checkpoint holds them."""
    prefix = checkpoint.quantization.prefix
    chain = Chain(shell, [Chunk(tokens, "verify")], CPU, prefix and (list(prefix.tokens), prefix.replaces_bos))
    for index, name in enumerate(shell.block_names):
        if chain.prefix is not None:
            module = checkpoint.prefix_module
            chain.prefix.keys = checkpoint.get(f"{module}.keys")[index : index + 1]
            chain.prefix.values = checkpoint.get(f"{module}.values")[index : index + 1]
        layers = dict(checkpoint.quantization.layers)
        restore_block(shell, index, layers, checkpoint.tensors(f"{name}."))
        chain.advance()
        shell.release_block(index)
    return chain.logits(0)


def stored_bytes(spec: LinearSpec | NormSpec) -> int:
    """Bytes that a layer stores, from its description alone."""
    if isinstance(spec, NormSpec):
        return 4 * spec.width * (1 + spec.gathers + spec.shifts)
    if isinstance(spec, CodebookSpec):
        return stored_codebook_bytes(spec)
    if isinstance(spec, SparseSpec):
        return stored_sparse_bytes(spec)
    groups = math.prod(spec.scale_shape[1:]) / (spec.group_size if spec.across else 1)  # for one output
    groups = spec.groups if spec.levels == 2 else groups
    scales = 4 * groups if spec.levels == 1 else 4 + 2 * groups
    scales += {"none": 0, "integer": groups, "float": 2 * groups}[spec.zeros]
    bits = spec.weight_bits if spec.dense else 4 if spec.weight_bits <= 4 else 8
    weight = round(spec.outputs * (-(-spec.input.width * bits // 8) + scales + 4 * spec.bias))
    source = spec.input
    multipliers = source.width if source.per_channel else source.kind == "static"
    factors = source.left**2 + source.right**2
    gathered = (source.width + sum(source.merges)) * source.gathers
    return weight + 4 * (factors + multipliers + gathered + source.width * source.shifts)


def stored_codebook_bytes(spec: CodebookSpec) -> int:
    """As `stored_bytes`: indices, books of 16-bit values, order, and values of outliers with columns and pointers."""
    stored = 4 * spec.outputs * spec.bias + 2 * spec.input.width * spec.ordered
    for part in spec.parts:
        vectors = -(-spec.outputs // part.vector)
        stored += 4 * -(-vectors * part.columns * (part.bits + part.residual_bits) // 32)
        residual = 2**part.residual_bits if part.residual_bits else 0
        stored += 2 * part.groups * part.vector * (2**part.bits + residual)
    return stored + 4 * spec.outliers + 4 * (spec.outputs + 1) * (spec.outliers > 0)


def stored_sparse_bytes(spec: SparseSpec) -> int:
    """As `stored_bytes`: b + (b_s + b_z) / g + 64 / (g gg) + 32 r_o bits for a weight (SpQR), row pointers, order."""
    width, groups = spec.input.width, spec.groups
    coded = [width * spec.weight_bits, *2 * [groups * spec.statistic_bits * (spec.tile > 0)]]
    rows = sum(-(-bits // 8) for bits in coded) + (0 if spec.tile else 4 * groups) + 4 * spec.bias
    tiles = 8 * groups * -(-spec.outputs // spec.tile) if spec.tile else 0
    sparse = 4 * spec.outliers + 4 * (spec.outputs + 1) * (spec.outliers > 0)
    return spec.outputs * rows + tiles + sparse + 2 * width * spec.ordered


def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


def check_sites(model: PreTrainedModel, shell: ModelShell, emits_codes: bool) -> None:
    for name, structure in zip(shell.block_names, shell.structures):
        block = model.get_submodule(name)
        assert not structure.unserved
        assert not [path for path, module in block.named_modules() if isinstance(module, nn.Linear)]
        for site in structure.sites:
            assert all(isinstance(block.get_submodule(path), QuantLinear) for path in site.consumers)
            if site.norm is not None:
                norm = block.get_submodule(site.norm.name)
                assert (isinstance(norm, QuantNorm) and not norm.gives_floats) == emits_codes


def check_size(checkpoint: Checkpoint) -> None:
    claimed = count_bits(checkpoint.folder)
    payload = sum(stored_bytes(spec) for spec in checkpoint.quantization.layers.values())
    headers = sum(file.overhead for file in checkpoint.files)
    assert payload <= claimed["linear_bytes"] <= payload + headers
    assert claimed["bytes"] == sum(path.stat().st_size for path in checkpoint.folder.glob("*.safetensors"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("label", DEFAULT_RECIPES)
def test_recipe_on_family_survives_the_disk_bit_for_bit(
    label: str, family: str, tmp_path: Path, run: Callable[..., Quantized], windows: Callable[..., Tensor]
) -> None:
    name, settings = DEFAULT_RECIPES[label]
    model = make_model(family)
    if family in REFUSED.get(name, ()):
        with pytest.raises(StructureError, match="mergequant-plus"):
            run(model, name, tmp_path / "out", settings=settings)
        assert not list(tmp_path.iterdir())
        return
    run(model, name, tmp_path / "out", settings=settings)
    checkpoint, shell = open_checkpoint(tmp_path / "out"), ModelShell.open(model)
    checkpoint.validate()
    recipe = get_recipe(name).with_settings(settings)
    transform_model(shell, recipe, seed=0)
    if any(isinstance(step, LearningStep) for step in recipe.steps):
        held = [name for name, _ in shell.model.named_parameters() if name in checkpoint.entries]
        with torch.no_grad():  # what was learned is in the checkpoint alone
            for stored in held:
                shell.model.get_parameter(stored).copy_(checkpoint.get(stored))
    tokens = windows(model, 3, 17, seed=1)

    loaded = mergequant.load(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    given = logits(loaded, tokens)
    assert given.isfinite().all()
    assert torch.equal(logits(again, tokens), given)
    skipped = 1 if checkpoint.quantization.prefix and checkpoint.quantization.prefix.replaces_bos else 0
    assert torch.equal(given[:, skipped:], chain_logits(shell, checkpoint, tokens))
    assert not torch.equal(given, logits(model, tokens))

    check_sites(loaded, shell, emits_codes=any(step.name == "ranges" for step in get_recipe(name).steps))
    check_size(checkpoint)
    unties = any(isinstance(step, ModelStep) for step in recipe.steps)
    tied = model.config.tie_word_embeddings and not unties
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied
    assert not (tied and any(stored.startswith("lm_head") for stored in checkpoint.names()))

    written = loaded.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(written[:, :17], tokens)
    assert torch.equal(written[:, 17], given[:, -1].argmax(-1))


def outputs(model: PreTrainedModel, tokens: Tensor, **options: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(model(tokens, **options))


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("label", DEFAULT_RECIPES)
def test_recipe_on_encoder_survives_the_disk_bit_for_bit_or_is_refused(
    label: str, family: str, tmp_path: Path, run: Callable[..., Quantized], windows: Callable[..., Tensor]
) -> None:
    name, settings = DEFAULT_RECIPES[label]
    model = make_model(family)
    recipe = get_recipe(name).with_settings(settings)
    whole = [step for step in recipe.steps if isinstance(step, (MeasuringStep, ModelStep))]
    learns = any(not isinstance(step, ANY_MODEL) for step in whole)
    if recipe.prefix != "none" or learns:
        for attempt in (mergequant.plan, run):
            with pytest.raises(StructureError, match=r"smoothquant,? or gptq"):
                attempt(model, recipe, samples=4, seqlen=24)
        return
    made = run(model, recipe, tmp_path / "out")
    checkpoint, shell = open_checkpoint(tmp_path / "out"), ModelShell.open(model)
    checkpoint.validate()
    tokens = windows(model, 3, 17, seed=1)
    loaded = mergequant.load(tmp_path / "out")
    again = ENCODERS[family][0].from_pretrained(tmp_path / "out")
    given, exact = outputs(loaded, tokens), outputs(model, tokens)
    assert type(loaded) is type(again) is type(model)
    assert given.keys() == exact.keys()

    chain = Chain(shell, [Chunk(tokens, "verify")], CPU, None)
    for index, block in enumerate(shell.block_names):
        restore_block(shell, index, dict(checkpoint.quantization.layers), checkpoint.tensors(f"{block}."))
        chain.advance()
    by_blocks = chain.outputs(0)
    for part, value in outputs(again, tokens).items():
        assert value.isfinite().all()
        assert torch.equal(value, given[part])
        assert torch.equal(value, by_blocks[part])
        assert not torch.equal(value, exact[part])
    assert {f"{part}_error" for part in (*given, "hidden_states")} <= made.figures["held_out"].keys()
    assert 0 < made.figures["held_out"]["hidden_states_error"] < 0.4
    assert checkpoint.quantization.kv is None
    check_sites(loaded, shell, emits_codes=False)
    check_size(checkpoint)

    # Padding is masked, so a text gives the same alone and beside a longer one.
    short = tokens[:1, :9]
    mask = torch.zeros(1, 17, dtype=torch.int64)
    mask[:, :9] = 1
    padded = outputs(loaded, torch.where(mask.bool(), tokens[:1], torch.zeros_like(mask)), attention_mask=mask)
    for part, value in outputs(loaded, short).items():
        own = padded[part][:, :9] if value.dim() == 3 else padded[part]
        assert float((own - value).norm() / value.norm()) < 0.05  # a code on a rounding border may fall either way


def test_default_recipes_name_every_registered_recipe() -> None:
    """A recipe that is registered and not in the list would be in no matrix."""
    assert {name for name, _ in DEFAULT_RECIPES.values()} == set(mergequant.list_recipes())


def test_quantize_when_model_is_in_memory_leaves_it_alone(run: Callable[..., Quantized]) -> None:
    model = make_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(model, "mergequant-w4a8")
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert "quantization_config" not in model.config.to_dict()


def test_quantize_from_folder_equals_quantize_from_memory(
    tmp_path: Path, run: Callable[..., Quantized], windows: Callable[..., Tensor]
) -> None:
    model = make_model("qwen2")
    model.save_pretrained(tmp_path / "float")
    from_memory = run(model, "mergequant", tmp_path / "a")
    from_folder = run(tmp_path / "float", "mergequant", tmp_path / "b", data=windows(model))
    names = from_memory.folder / "model.safetensors", from_folder.folder / "model.safetensors"
    assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantize_when_weights_are_half_keeps_their_dtype(
    dtype: torch.dtype, tmp_path: Path, run: Callable[..., Quantized], windows: Callable[..., Tensor]
) -> None:
    model = make_model("llama", dtype=dtype)
    run(model, "mergequant-plus", tmp_path / "out", settings={"tile": 8})
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.get("model.embed_tokens.weight").dtype == dtype
    loaded = mergequant.load(tmp_path / "out")
    assert logits(loaded, windows(model)).dtype == dtype
    wide = mergequant.load(tmp_path / "out", dtype=torch.float32)
    tokens = windows(model, 3, 17)
    assert torch.equal(logits(wide, tokens)[:, 1:], chain_logits(ModelShell.open(model), checkpoint, tokens))
