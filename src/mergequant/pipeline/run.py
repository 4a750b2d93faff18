"""quantize(): a model and a recipe become a checkpoint, one block in memory at a time.

model folder -> plan -> windows -> hidden states before block 0 -> for each block: load, steps of the recipe, run the
quantized block, write -> tail, config -> verify from disk.
"""

import hashlib
import json
import math
import os
import platform
import shutil
import time
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import InitVar, dataclass
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, cast

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import mergequant
from mergequant.calibration import BlockContext, Chain, Chunk, StorePolicy, chunked
from mergequant.checkpoint import (
    FORMAT_VERSION,
    PREFIX_MODULE,
    QUANT_METHOD,
    CheckpointWriter,
    Quantization,
    check_place,
    count_bits,
    model_card,
    open_checkpoint,
)
from mergequant.checkpoint.files import disk_errors
from mergequant.data import DataLike, DataSpec, Windows, as_data_spec, check_seqlen, draw_splits, sketch, sketch_to_json
from mergequant.errors import StructureError, UsageError
from mergequant.models import ModelShell
from mergequant.nn import PrefixSpec
from mergequant.pipeline.blocks import (
    block_layers,
    block_tensors,
    outside_tensors,
    quantize_block,
    restore_block,
    stored_as,
)
from mergequant.pipeline.clock import Clock
from mergequant.pipeline.heldout import FloatCompanion
from mergequant.pipeline.kv import KVRecord, beside_blocks, describe_kv, measure_kv, stack_kv
from mergequant.pipeline.plan import Plan, make_plan
from mergequant.pipeline.prefix import choose_prefix
from mergequant.pipeline.tokenizer import NoTokenizer, bos_of, find_tokenizer, tokenizer_files
from mergequant.pipeline.verify import verify_checkpoint
from mergequant.recipes import Recipe, load_recipe
from mergequant.steps import LearningStep, MeasuringStep, ModelStep

__all__ = ["Quantized", "Reporter", "Silent", "code_digest", "plan", "quantize"]

DEFAULT_SAMPLES = 128
DEFAULT_SEQLEN = 512
HELD_OUT_SHARE = 8  # one held-out window for every 8 calibration windows
VERIFY_WINDOWS = 2


class Reporter(Protocol):
    """What a front end may want to show while a run goes on."""

    def phase(self, text: str) -> None:
        """A new phase begins."""

    def progress(self, text: str) -> None:
        """How far a step is that takes long: within a block, so it may be shown and forgotten."""

    def block(self, index: int, total: int, name: str, figures: Mapping[str, float]) -> None:
        """A block is done."""


class Silent:
    """A reporter that shows nothing."""

    def phase(self, text: str) -> None:
        """Nothing."""

    def progress(self, text: str) -> None:
        """Nothing."""

    def block(self, index: int, total: int, name: str, figures: Mapping[str, float]) -> None:
        """Nothing."""


@dataclass
class Quantized:
    """A finished checkpoint.

    Attributes:
        folder: where it lies.
        figures: what was measured: sizes, time and errors per site.
    """

    folder: Path
    figures: dict[str, Any]
    _temporary: InitVar[ExitStack | None] = None

    def __post_init__(self, _temporary: ExitStack | None) -> None:
        if _temporary is not None:
            weakref.finalize(self, _temporary.close)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The quantized model, loaded from the checkpoint."""
        from mergequant.integrations.transformers import load

        return load(self.folder)

    def save(self, folder: str | Path) -> Path:
        """Copy the checkpoint to a folder that does not exist yet or is empty.

        Raises:
            UsageError: the folder holds something.
            CheckpointError: the disk refuses.
        """
        target = Path(folder)
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise UsageError(f"{target} is not empty; choose another folder")
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            # A name of its own: `<target>.partial` may belong to a run that was interrupted.
            with TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent) as beside:
                copied = shutil.copytree(self.folder, Path(beside) / "checkpoint")
                if target.exists():
                    target.rmdir()
                os.rename(copied, target)
        return target


def plan(
    model: str | Path | PreTrainedModel,
    recipe: str | Recipe,
    *,
    samples: int = DEFAULT_SAMPLES,
    seqlen: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Plan:
    """What `quantize` would do, without reading the blocks' weights or any data. Errors as `quantize`."""
    chosen = _recipe(recipe, settings)
    shell = ModelShell.open(model)
    _check_model(chosen, shell)
    transform_model(shell, chosen, seed=0)
    seqlen = _seqlen(seqlen, shell)
    return make_plan(shell, shell.structures, chosen, samples + _held_out(samples) + VERIFY_WINDOWS, seqlen)


def quantize(
    model: str | Path | PreTrainedModel,
    recipe: str | Recipe = "mergequant-w4a8",
    *,
    data: DataLike = "self",
    out: str | Path | None = None,
    samples: int = DEFAULT_SAMPLES,
    seqlen: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    settings: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    bos: bool | None = None,
    resume: bool = True,
    reporter: Reporter | None = None,
    policy: StorePolicy | None = None,
) -> Quantized:
    """Quantize a model and write a checkpoint.

    Args:
        model: a folder with a float transformers model, or a model in memory (which is not changed).
        recipe: a registered name, a path to a YAML file, or a `Recipe`.
        data: "self" (sequences sampled from the float model), a text file or folder, "hf:NAME", a mix, or tokens.
        out: folder of the checkpoint; None = a temporary one that lives as long as the result (`.save(DIR)` keeps it).
        samples, seqlen: calibration windows and their length in tokens (default 512, or the model's limit).
        seed: of the data and of everything random in the recipe.
        device: what computes.
        settings: changes to the recipe, {"split": 0} or {"clip.mode": "none"}.
        tokenizer: needed for a model in memory unless `data` holds tokens.
        bos: whether windows begin with BOS; None = if the tokenizer has one.
        resume: go on with a run of the same fingerprint that was interrupted.
        reporter: shown the progress.
        policy: where activations may lie.

    Raises:
        MergeQuantError: see `mergequant.errors`; nothing half-written is left looking whole.
    """
    reporter = reporter or Silent()
    started = time.perf_counter()
    chosen = _recipe(recipe, settings)
    if out is not None:
        check_place(Path(out))  # drawing data may take long
    reporter.phase("opening the model")
    shell = ModelShell.open(model, device=device)
    structures = shell.structures
    _check_model(chosen, shell)
    transform_model(shell, chosen, seed)
    seqlen = _seqlen(seqlen, shell)
    if samples < 1:
        raise UsageError(f"--samples {samples}: calibration needs at least one window")
    spec = as_data_spec(data)
    if spec.needs_model and not shell.generates:
        raise UsageError(
            f"data {spec}: {type(shell.model).__name__} writes no text to be sampled; give some: --data FILE.txt"
        )
    words = tokenizer if tokenizer is not None else find_tokenizer(shell, spec)
    reporter.phase("drawing calibration data")
    windows, held_out = _draw(spec, model, shell, words, samples, seqlen, seed, bos)
    policy = policy or StorePolicy(torch.device(device))
    reporter.phase("looking for the prefix" if chosen.prefix == "auto" else "preparing")
    prefix = choose_prefix(chosen.prefix, shell, structures, windows.tokens, bos_of(words, windows), policy)
    clock = Clock()
    job = _Job(shell, chosen, windows, held_out, words, prefix, seed, policy, reporter, clock)
    with ExitStack() as stack:
        if out is None:
            out = Path(stack.enter_context(TemporaryDirectory(prefix="mergequant-"))) / "checkpoint"
        with CheckpointWriter(Path(out), job.fingerprint, resume=resume) as writer:
            if not writer.finished:
                _make(job, writer)
        checkpoint = open_checkpoint(out)
        checkpoint.validate()
        figures = {**checkpoint.quantization.figures, **count_bits(checkpoint.folder)}
        # Not in the checkpoint, which must come out the same whether or not the run was interrupted.
        figures["seconds"] = round(time.perf_counter() - started, 1)
        figures["seconds_by_step"] = clock.seconds()
        return Quantized(Path(out), figures, stack.pop_all())


@dataclass(frozen=True)
class _Job:
    """All that a run is made of."""

    shell: ModelShell
    recipe: Recipe
    windows: Windows
    held_out: Windows
    tokenizer: PreTrainedTokenizerBase | NoTokenizer
    prefix: tuple[list[int], bool] | None
    seed: int
    policy: StorePolicy
    reporter: Reporter
    clock: Clock

    @cached_property
    def fingerprint(self) -> str:
        """The same fingerprint gives the same checkpoint."""
        parts = {
            "model": self.shell.source.fingerprint(),
            "recipe": self.recipe.to_dict(),
            "calibration": self.windows.fingerprint,
            "held_out": self.held_out.fingerprint,
            "seed": self.seed,
            "device": self.shell.device.type,
            "code": code_digest(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _make(job: _Job, writer: CheckpointWriter) -> None:
    """Blocks, tail, config; the result is verified before it appears."""
    shell = job.shell
    measured = _learn(job, writer)
    kept_apart = Chunk(job.held_out.tokens[:VERIFY_WINDOWS], "verify")
    chunks = [*chunked(job.windows.tokens, "calibration"), *chunked(job.held_out.tokens, "held_out"), kept_apart]
    chain = Chain(shell, chunks, job.policy, job.prefix)
    companion = FloatCompanion(shell, job.held_out.tokens, job.policy)
    collected = _run_blocks(job, writer, chain, companion, measured)
    collected["held_out"] = companion.compare(chain)
    companion.close()
    expected = chain.outputs(len(chunks) - 1)
    tail = {name: stored_as(tensor, shell.stored_dtype) for name, tensor in outside_tensors(shell).items()}
    quantization = _describe(job, collected)
    kv, steps = stack_kv(collected["kv"])
    if kv is not None:
        tail |= {f"{beside_blocks(shell)}.{name}": tensor for name, tensor in steps.items()}
        quantization["kv"] = kv.to_dict()
    if job.prefix is not None:
        tail |= _prefix_tail(chain, collected)
        quantization["prefix"] = _prefix_spec(chain, tail, job.prefix).to_dict()
    chain.close()
    config = {**shell.config.to_dict(), "quantization_config": quantization}
    config["dtype"] = str(shell.stored_dtype).removeprefix("torch.")
    files = tokenizer_files(job.tokenizer, shell, job.prefix)
    results = {"held-out windows of the calibration data": collected["held_out"]}
    described = Quantization.from_dict(quantization)
    card = model_card(writer.out.name, described, base=_base_name(shell), results=results, generates=shell.generates)

    def verify(folder: Path) -> None:
        job.reporter.phase("verifying")
        with job.clock.measure("verify"):
            own = Chain(shell, [kept_apart], job.policy, job.prefix)
            verify_checkpoint(open_checkpoint(folder), own, expected, steps)
            own.close()

    job.reporter.phase("writing")
    writer.finish(tail=tail, config=config, files={**files, "README.md": card}, verify=verify)


def _run_blocks(
    job: _Job, writer: CheckpointWriter, chain: Chain, companion: FloatCompanion, measured: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Quantize and write all blocks that are not written yet; run those that are."""
    shell = job.shell
    layers: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    prefix_states: list[tuple[Tensor, Tensor]] = []
    kv: list[KVRecord | None] = []
    for index, name in enumerate(shell.block_names):
        shell.load_block(index)
        chain.begin_block()
        with job.clock.measure("float model on held-out windows"):
            companion.advance()
        if index < writer.done:
            record = writer.block_record(index)
            if chain.prefix is not None:
                chain.prefix.keys, chain.prefix.values = (
                    torch.tensor(record["prefix"][part], device=shell.device) for part in ("keys", "values")
                )
            restore_block(shell, index, record["layers"], writer.block_tensors(index))
        else:
            generator = torch.Generator().manual_seed(job.seed * 1_000_003 + index)
            context = BlockContext(
                chain, shell.structures[index], generator, progress=job.reporter.progress, measured=measured
            )
            quantize_block(context, job.recipe, job.clock)
            specs = {full: spec.to_dict() for full, spec in block_layers(name, shell.blocks[index]).items()}
            with job.clock.measure("steps of a quantized cache"):
                steps = measure_kv(context)
            record = {"layers": specs, "figures": context.figures, "kv": steps}
            if chain.prefix is not None:
                # Kept in the record, since a step may have scaled them together with the value projection; a Python
                # float holds a float32 exactly, and JSON writes it so that it reads back the same.
                record["prefix"] = {"keys": chain.prefix.keys.tolist(), "values": chain.prefix.values.tolist()}
            writer.write_block(index, block_tensors(name, shell.blocks[index], shell.stored_dtype), record)
        if chain.prefix is not None:
            prefix_states.append((chain.prefix.keys.float().cpu(), chain.prefix.values.float().cpu()))
        kv.append(record["kv"])
        layers |= record["layers"]
        figures[name] = record["figures"]
        with job.clock.measure("running quantized blocks"):
            chain.advance()
        shell.release_block(index)
        job.reporter.block(index + 1, len(shell.block_names), name, _mean_figures(record["figures"]))
    return {"layers": layers, "sites": figures, "prefix": prefix_states, "kv": kv}


def _learn(job: _Job, writer: CheckpointWriter) -> dict[str, Tensor]:
    """Refine the model's transforms by what calibration windows teach, or taught before the run was interrupted.

    Returns what they tell about the float model besides.
    """
    kinds = (LearningStep, MeasuringStep)
    learning = {str(number): step for number, step in enumerate(job.recipe.steps) if isinstance(step, kinds)}
    if not learning:
        return {}
    known = writer.learned()
    found: dict[str, Tensor] = {}
    measured: dict[str, Tensor] = {}
    for number, step in learning.items():
        if known is not None:
            own = {name.partition(".")[2]: value for name, value in known.items() if name.startswith(f"{number}.")}
        else:
            job.reporter.phase(f"{'learning' if isinstance(step, LearningStep) else 'measuring'} ({step.name})")
            with job.clock.measure(step.name):
                windows, progress = job.windows.tokens, job.reporter.progress
                if isinstance(step, LearningStep):
                    own = step.learn(job.shell, windows, job.seed, progress)
                else:
                    own = step.measure(job.shell, windows, job.policy, progress)
            found |= {f"{number}.{name}": tensor for name, tensor in own.items()}
        if isinstance(step, LearningStep):
            job.shell.apply(step.refine(job.shell, own))
        else:
            measured |= own
    if known is None:
        writer.write_learned(found)
    return measured


def transform_model(shell: ModelShell, recipe: Recipe, seed: int) -> None:
    """Apply the recipe's changes of the whole model, each proven in float64 first. Raises StructureError."""
    for step in recipe.steps:
        if isinstance(step, ModelStep):
            shell.apply(step.transform(shell, seed))


def _recipe(recipe: str | Recipe, settings: Mapping[str, Any] | None) -> Recipe:
    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    return chosen.with_settings(settings) if settings else chosen


def _seqlen(seqlen: int | None, shell: ModelShell) -> int:
    chosen = min(DEFAULT_SEQLEN, shell.max_positions or DEFAULT_SEQLEN) if seqlen is None else seqlen
    check_seqlen(chosen, shell.max_positions)
    return chosen


def _held_out(samples: int) -> int:
    return max(math.ceil(samples / HELD_OUT_SHARE), VERIFY_WINDOWS)


def _check_model(recipe: Recipe, shell: ModelShell) -> None:
    """Refuse, before anything is computed, a recipe that acts on no site of some block, that wants a cache where none
    can be, or measures what the model does not have."""
    for step in recipe.steps:
        step.check(shell)
    for name, structure in zip(shell.block_names, shell.structures):
        kinds = {site.kind for site in structure.sites}
        wanted = {kind for step in recipe.steps for kind in getattr(step, "sites", ())}
        if wanted and not kinds & wanted:
            raise StructureError(
                f"{name}: recipe {recipe.name!r} acts on sites of kind {', '.join(sorted(wanted))}; this block has "
                f"{', '.join(sorted(kinds)) or 'none'}. Choose a recipe for these (`mergequant recipes`)"
            )
        if recipe.prefix != "none" and not structure.causal:
            raise StructureError(
                f"{name}: every token sees the whole text, so nothing can be cached, and a prefix (recipe "
                f"{recipe.name!r} with prefix={recipe.prefix}) has no keys and values to be. Choose a recipe without a "
                "prefix: mergequant, smoothquant or gptq"
            )


def _draw(
    spec: DataSpec,
    model: str | Path | PreTrainedModel,
    shell: ModelShell,
    tokenizer: PreTrainedTokenizerBase | NoTokenizer,
    samples: int,
    seqlen: int,
    seed: int,
    bos: bool | None,
) -> tuple[Windows, Windows]:
    """Calibration and held-out windows; the float model is loaded whole only if the data are sampled from it."""
    sampler: PreTrainedModel | None = None
    if spec.needs_model:
        if isinstance(model, PreTrainedModel):
            sampler = model
        else:
            loaded = AutoModelForCausalLM.from_pretrained(str(shell.folder), dtype=torch.float32, local_files_only=True)
            loaded.to(shell.device)  # type: ignore[arg-type]  # wrapped without its signature
            sampler = loaded.eval()
    return draw_splits(
        spec,
        cast(PreTrainedTokenizerBase, tokenizer),  # ready tokens ask it for its BOS id only
        samples=samples,
        held_out=_held_out(samples),
        seqlen=seqlen,
        seed=seed,
        bos="auto" if bos is None else bos,
        model=sampler,
    )


@cache
def code_digest() -> str:
    """sha256 (hex) of the package's own sources, as they were when a process first asked."""
    root = Path(mergequant.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _describe(job: _Job, collected: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's `quantization_config`."""
    shell, windows, held_out = job.shell, job.windows, job.held_out
    planned = make_plan(shell, shell.structures, job.recipe, len(windows), windows.seqlen)
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "recipe": job.recipe.to_dict(),
        "layers": collected["layers"],
        "provenance": {
            "fingerprint": job.fingerprint,
            "base_model": _base_name(shell),
            "seed": job.seed,
            "calibration": windows.provenance(),
            "held_out": held_out.provenance(),
            "calibration_sketch": sketch_to_json(sketch(windows.tokens)),
            "held_out_sketch": sketch_to_json(sketch(held_out.tokens)),
            "device": shell.device.type,
            "versions": {
                "mergequant": mergequant.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        },
        "figures": {
            "parameters": planned.parameters,
            "linear_parameters": planned.linear_parameters,
            "kept_float": planned.kept,
            "held_out": collected["held_out"],
            "kv_cache": describe_kv(collected["kv"], shell.block_names),
            "sites": collected["sites"],
        },
    }


def _base_name(shell: ModelShell) -> str:
    return shell.folder.resolve().name if shell.folder is not None else type(shell.model).__name__


def _prefix_tail(chain: Chain, collected: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of the prefix, in the decoder that owns the blocks."""
    name = beside_blocks(chain.shell, PREFIX_MODULE)
    return {
        f"{name}.keys": torch.cat([keys for keys, _ in collected["prefix"]]).contiguous(),
        f"{name}.values": torch.cat([values for _, values in collected["prefix"]]).contiguous(),
        f"{name}.hidden": chain.prefix_output().float().cpu().contiguous(),
    }


def _prefix_spec(chain: Chain, tail: Mapping[str, Tensor], prefix: tuple[list[int], bool]) -> PrefixSpec:
    keys, values, hidden = (
        next(tensor for name, tensor in tail.items() if name.endswith(f"{PREFIX_MODULE}.{part}"))
        for part in ("keys", "values", "hidden")
    )
    layers, heads = keys.shape[:2]
    return PrefixSpec(tuple(prefix[0]), prefix[1], layers, heads, keys.shape[3], values.shape[3], hidden.shape[1])


def _mean_figures(sites: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    errors = [figures["output_error"] for figures in sites.values() if "output_error" in figures]
    return {"output_error": sum(errors) / len(errors)} if errors else {}
