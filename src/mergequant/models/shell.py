"""A transformers causal LM or text encoder whose blocks hold no weights until they are asked for.

Only one block needs to be in memory at a time. What flows between the blocks, masks and position embeddings are
computed by the model's own forward: it is run with the blocks passing their input through, so that no family needs code
here.
"""

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from mergequant.errors import StructureError, UsageError, WeightsError
from mergequant.models.discover import discover, draw_parameters
from mergequant.models.probe import Run, all_double, identify_norm
from mergequant.models.roles import BlockStructure
from mergequant.models.skeleton import build_skeleton, check_config, local_folder, model_class, read_config
from mergequant.models.structure import find_blocks
from mergequant.models.transform import ModelTransform, OutsideParts, prove_transform
from mergequant.models.weights import SafetensorsSource, StateDictSource, WeightSource

__all__ = ["ModelShell"]

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}  # of BERTs saved long ago


class ModelShell:
    """A causal LM or an encoder, opened by `ModelShell.open`: weights outside the blocks in place, the blocks empty.

    model          the transformers model (eval mode, no gradients); its blocks are on meta until `load_block`
    config         its config (a copy)
    folder         where it came from, None for a model from memory
    blocks         the nn.ModuleList of its blocks
    block_names    full names of the blocks, e.g. "model.layers.0"
    source         where weights are read from
    device, dtype  where and in what dtype weights are put
    stored_dtype   dtype that holds most float weights in the source
    vocabulary     number of rows of the embedding
    max_positions  longest sequence that the config allows, or None
    final_norm_name, head_name   the norm after the last block and the output projection over the vocabulary, None for
                   a model without
    unused         names in the source that belong to no parameter
    transforms     what `apply` was given, in order; blocks go through them when they are loaded
    untied_parameters   how many parameters `apply` added by giving a tied head a weight of its own
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: WeightSource,
        folder: Path | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.model = model
        self.config: PreTrainedConfig = model.config
        self.config.dtype = dtype
        self.config.architectures = [type(model).__name__]
        self.folder, self.source, self.device, self.dtype = folder, source, device, dtype
        prefix, self.blocks = find_blocks(model)
        self.block_names = [f"{prefix}.{i}" for i in range(len(self.blocks))]
        self.vocabulary: int = model.get_input_embeddings().get_parameter("weight").shape[0]
        self.max_positions: int | None = getattr(self.config, "max_position_embeddings", None)
        # Released blocks are copies of these; the config is shared so that it stays one object in the whole model.
        self._empty = [self._copy(block) for block in self.blocks]
        self._stored = self._match_names()
        self.unused = sorted(
            name for name in source.names() - set(self._stored.values()) if not name.endswith("rotary_emb.inv_freq")
        )
        self.stored_dtype = self._most_common_dtype()
        self._materialise_outside()
        self.final_norm_name, self.head_name = self._find_tail()
        self.transforms: list[ModelTransform] = []
        self.untied_parameters = 0

    @classmethod
    def open(
        cls,
        model: "str | Path | PreTrainedModel",
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "ModelShell":
        """Open a model folder, a model of the hub (`org/name`), or a model in memory, which is never modified.

        All tensors are checked for presence and shape at once, those outside the blocks also for non-finite values.

        Raises ModelError (no such folder, unreadable config), WeightsError (missing, corrupt, misshapen, non-finite
        tensors), StructureError (no single stack of blocks), UsageError (already quantized, neither a decoder nor an
        encoder, `dtype` not a float).
        """
        if dtype not in FLOATS:
            raise UsageError(f"A model is opened in a float dtype, not in {dtype}.")
        source: WeightSource
        if isinstance(model, PreTrainedModel):
            folder = None
            check_config(model.config.to_dict(), f"The given {type(model).__name__}")
            skeleton = build_skeleton(type(model), model.config, None)
            if model.can_generate():
                skeleton.generation_config = copy.deepcopy(model.generation_config)
            source = StateDictSource(model.state_dict(), model.config.to_json_string())
        else:
            folder = local_folder(model)
            config = read_config(folder)
            skeleton = build_skeleton(model_class(config), config, folder)
            source = SafetensorsSource(folder)
        return cls(skeleton, source, folder, torch.device(device), dtype)

    # ---- weights -------------------------------------------------------------------------------------------------

    def load_block(self, index: int, *, transformed: bool = True) -> nn.Module:
        """Put a fresh block with its float weights at `blocks[index]` and return it.

        The weights go through `transforms` unless `transformed` is False (who replaces them all need not wait). Raises
        WeightsError.
        """
        block = self._copy(self._empty[index])
        for name, tensor in block.state_dict(keep_vars=True).items():
            _assign(block, name, self._read(f"{self.block_names[index]}.{name}", tensor))
        _move_buffers(block, self.device)
        self.blocks[index] = block
        if transformed:
            with torch.no_grad():
                for transform in self.transforms:
                    transform.block(index, block, self.structures[index])
        return block

    @torch.no_grad()
    def apply(self, transform: ModelTransform) -> float:
        """Put all weights through a transform, after a proof in float64 that it keeps the model's function.

        What surrounds the blocks is changed now, blocks when they are loaded. A tied head gets a weight of its own, and
        the config says so. Embedding and head are kept in the dtype they are stored in, as the float model's were.

        Returns the deviation of the proof. Raises StructureError (see `prove_transform`).
        """
        self._untie_head()
        deviation = prove_transform(self, transform)
        transform.outside(self.outside_parts())
        for name, parameter in self.model.named_parameters():
            if parameter is self.model.get_input_embeddings().weight or name == f"{self.head_name}.weight":
                parameter.copy_(parameter.to(self.source.dtype(self._stored[name])))
        self.transforms.append(transform)
        return deviation

    def outside_parts(self) -> OutsideParts:
        """Embedding, final norm and head. Raises StructureError where they are not what a transform can change."""
        if self.head_name is None:
            raise StructureError(
                f"{type(self.model).__name__} has no output projection over its vocabulary, so its residual stream "
                "cannot be transformed. Choose a recipe that leaves it as it is: smoothquant, or gptq"
            )
        embedding = self.model.get_input_embeddings()
        head = self.model.get_submodule(self.head_name)
        width = int(embedding.get_parameter("weight").shape[1])
        role = None
        if self.final_norm_name is not None:
            norm = self.model.get_submodule(self.final_norm_name)
            role = identify_norm(
                self.final_norm_name, copy.deepcopy(norm).double(), width, torch.Generator().manual_seed(0)
            )
        if role is None or not isinstance(head, nn.Linear) or head.in_features != width:
            raise StructureError(
                f"{type(self.model).__name__} has no plain norm of the embedding's width {width} and linear head after "
                "its blocks (a projected embedding, or another tail), so its residual stream cannot be transformed. "
                "Choose a recipe that leaves it as it is: mergequant-plus, or gptq"
            )
        return OutsideParts(embedding, norm, role, head)

    def _untie_head(self) -> None:
        parts = self.outside_parts()
        head, shared = parts.head, parts.embedding.get_parameter("weight")
        if head._parameters.get("weight") is shared:
            head._parameters["weight"] = nn.Parameter(shared.detach().clone(), requires_grad=False)
            self.untied_parameters += shared.numel()
            for config in (self.config, self.config.get_text_config()):
                config.tie_word_embeddings = False

    def release_block(self, index: int) -> None:
        """Put a fresh empty block at `blocks[index]`; the memory of the old one is free once nobody else holds it."""
        self.blocks[index] = self._copy(self._empty[index])

    def block_parameters(self, index: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters of a block, by their names relative to it, in the model's own order."""
        return {name: tuple(parameter.shape) for name, parameter in self._empty[index].named_parameters()}

    def _copy(self, block: nn.Module) -> nn.Module:
        return copy.deepcopy(block, {id(self.config): self.config})

    def _match_names(self) -> dict[str, str]:
        """For each tensor of the model the name under which it is stored, after a check of presence and shape."""
        held, prefix = self.source.names(), f"{self.model.base_model_prefix}."
        aliases: dict[int, list[str]] = {}
        tensors = self.model.state_dict(keep_vars=True)
        for name, tensor in tensors.items():
            aliases.setdefault(id(tensor), []).append(name)
        stored: dict[str, str] = {}
        for name, tensor in tensors.items():
            for alias in [name, *aliases[id(tensor)]]:
                spellings = [alias, alias.removeprefix(prefix), prefix + alias]
                for new, old in OLD_NAMES.items():
                    spellings += [name.replace(new, old) for name in spellings if name.endswith(new)]
                if found := next((spelling for spelling in spellings if spelling in held), None):
                    stored[name] = found
                    break
            else:
                raise WeightsError(
                    f"{name} is missing from {self.folder or 'the given model'} ({len(held)} tensors there). The "
                    f"weights are not complete, or belong to another config than {type(self.config).__name__}."
                )
            if self.source.shape(stored[name]) != tuple(tensor.shape):
                raise WeightsError(
                    f"{name} has shape {self.source.shape(stored[name])} in the weights and {tuple(tensor.shape)} by "
                    "the config. Weights and config.json do not belong together."
                )
        return stored

    def _most_common_dtype(self) -> torch.dtype:
        count: Counter[torch.dtype] = Counter()
        for name in set(self._stored.values()):
            if (dtype := self.source.dtype(name)) in FLOATS:
                count[dtype] += prod(self.source.shape(name))
        return count.most_common(1)[0][0] if count else torch.float32

    def _read(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A tensor of the model, checked. Parameters come in `self.dtype`, buffers in their own dtype."""
        value = self.source.get(self._stored[name])
        if not isinstance(like, nn.Parameter):
            return value.to(self.device, like.dtype, copy=True)
        if value.dtype not in FLOATS:
            raise WeightsError(
                f"{name} is stored as {value.dtype}. Only float16, bfloat16, float32 and float64 are read."
            )
        value = value.to(self.device, self.dtype, copy=True)
        if not bool(torch.isfinite(value).all()):
            first = tuple(torch.nonzero(~torch.isfinite(value))[0].tolist())
            raise WeightsError(
                f"{name} holds {value[first].item()} at index {first} ({self.source.dtype(self._stored[name])} read as "
                f"{self.dtype}). The weights are damaged, or too large for {self.dtype}: open the model in float32."
            )
        return nn.Parameter(value, requires_grad=False)

    def _materialise_outside(self) -> None:
        inside = tuple(f"{name}." for name in self.block_names)
        done: dict[int, tuple[str, torch.Tensor]] = {}
        skeleton = self.model.state_dict(keep_vars=True)
        for name, tensor in skeleton.items():
            if name.startswith(inside):
                continue
            if id(tensor) in done:  # tied
                first, value = done[id(tensor)]
                mine, other = self._stored[name], self._stored[first]
                if mine != other and not torch.equal(self.source.get(mine), self.source.get(other)):
                    raise WeightsError(
                        f"The config ties {name} to {first}, but the weights hold two different tensors for them. If "
                        "they are meant to differ, set tie_word_embeddings to false in config.json."
                    )
            else:
                value = self._read(name, tensor)
                done[id(tensor)] = name, value
            _assign(self.model, name, value)
        for name, module in self.model.named_modules():
            if not f"{name}.".startswith(inside):
                _move_buffers(module, self.device, recurse=False)

    # ---- running -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def block_kwargs(
        self, input_ids: torch.Tensor, *, cache: Cache | None = None
    ) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """What enters the blocks: hidden states (B, T, width) for block 0, and for each block its other arguments.

        input_ids is (B, T) int64. The model's own forward is run with blocks that return their input. With a `cache`,
        positions and masks continue after what it holds, and the arguments contain it, so that `run_block` fills it;
        the cache itself is not changed here. Raises UsageError when tokens do not fit the model.
        """
        return self._pass_through(input_ids, cache=cache)[1:]

    @torch.no_grad()
    def run_block(self, index: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Output hidden states (B, T, width) of block `index`, as it stands, for `hidden` of the same shape."""
        output = self.blocks[index](hidden, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def outputs(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model returns, by name, when the hidden states (B, T, width) leave its last block.

        The model's own code makes it, whatever it does after its blocks (norm, projection, pooling, soft caps).
        """
        return self._pass_through(input_ids, leaving=hidden)[0]

    def logits(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The output "logits": (B, T, vocabulary) of a language model. Raises StructureError for a model without."""
        found = self.outputs(input_ids, hidden)
        if "logits" not in found:
            raise StructureError(f"{type(self.model).__name__} returns {', '.join(found)}, but no logits.")
        return found["logits"]

    def loss_gradient(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Gradient (B, T, width) of the mean next-token cross entropy by the hidden states behind the last block."""
        with torch.enable_grad():
            leaving = hidden.detach().requires_grad_()
            logits = self._pass_through(input_ids, leaving=leaving)[0]["logits"][:, :-1].float()
            targets = input_ids[:, 1:].to(logits.device)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            return torch.autograd.grad(loss, leaving)[0]

    @torch.no_grad()
    def final_hidden(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What the module that owns the blocks returns (B, T, channels) when `hidden` leaves its last block.

        Raises StructureError when it returns no `last_hidden_state`.
        """
        owner = self.model.get_submodule(self.block_names[0].rpartition(".")[0].rpartition(".")[0])
        found: list[torch.Tensor | None] = []
        handle = owner.register_forward_hook(
            lambda _module, _args, output: found.append(getattr(output, "last_hidden_state", None))
        )
        try:
            self._pass_through(input_ids, leaving=hidden)
        finally:
            handle.remove()
        if not found or found[-1] is None:
            raise StructureError(
                f"{type(owner).__name__} returns no last_hidden_state, which a stored prefix needs; choose a recipe "
                "without a prefix (other=dynamic)."
            )
        return found[-1]

    def _pass_through(
        self, input_ids: torch.Tensor, *, cache: Cache | None = None, leaving: torch.Tensor | None = None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, list[dict[str, Any]]]:
        """Run the model with blocks that do nothing: (its outputs, what enters block 0, arguments of each block).

        `leaving` replaces what the last block returns; without it only the last token's logits are made.
        """
        self._check_tokens(input_ids, cache)
        outputs = self._outputs
        calls: list[dict[str, Any] | None] = [None] * len(self.blocks)
        entered: list[torch.Tensor] = []

        def stand_in(index: int, signature: inspect.Signature) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, calls[index] = _named_arguments(signature, args, kwargs)
                entered.append(hidden)
                if leaving is not None and index == len(self.blocks) - 1:
                    hidden = leaving
                return (hidden, *[None] * (outputs - 1)) if outputs else hidden

            return forward

        options: dict[str, Any] = {"use_cache": cache is not None, "past_key_values": cache}
        if leaving is None:
            options["logits_to_keep"] = 1
        with _forwards_replaced(self.blocks, stand_in):
            output = self._forward(input_ids, options)
        recorded = [call for call in calls if call is not None]
        if len(recorded) != len(self.blocks) or len(entered) != len(self.blocks):
            raise StructureError(
                f"{type(self.model).__name__} did not call each of its {len(self.blocks)} blocks once ({len(entered)} "
                "calls), so its blocks cannot be treated one after the other."
            )
        made = {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}
        return made, entered[0], recorded

    def _forward(self, input_ids: torch.Tensor, options: dict[str, Any]) -> Any:
        """The model's own forward, with those of the options that it knows."""
        known = inspect.signature(self.model.forward).parameters
        options = {name: value for name, value in options.items() if name in known}
        return self.model(input_ids.to(self.device), **options)

    def _check_tokens(self, input_ids: torch.Tensor, cache: Cache | None) -> None:
        if input_ids.dim() != 2 or input_ids.dtype != torch.int64 or input_ids.numel() == 0:
            raise UsageError(
                f"Tokens are (batch, tokens) int64 and not empty, got {tuple(input_ids.shape)} {input_ids.dtype}."
            )
        vocabulary = self.vocabulary
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= vocabulary:
            raise UsageError(
                f"Token {low if low < 0 else high} is outside the vocabulary of {vocabulary}: the tokens were made by "
                "another tokenizer than the model's."
            )
        length = input_ids.shape[1] + (int(cache.get_seq_length()) if cache is not None else 0)
        if self.max_positions is not None and length > self.max_positions:
            raise UsageError(
                f"{length} tokens are more than the model's {self.max_positions} positions. Use shorter windows."
            )

    # ---- structure -----------------------------------------------------------------------------------------------

    @cached_property
    def structures(self) -> list[BlockStructure]:
        """The proven structure of each block. Blocks with the same tree of modules and shapes share one.

        Found on float64 copies with random parameters from a fixed seed, so that it depends on the architecture alone;
        the masks and positions are the model's own. Raises StructureError (see `discover`).
        """
        generator = torch.Generator().manual_seed(0)
        hidden, calls = self._probe_inputs(generator)
        found: dict[tuple[Any, ...], BlockStructure] = {}
        structures = []
        for empty, kwargs, name in zip(self._empty, calls, self.block_names):
            tree = tuple(
                (n, type(m), tuple((k, p.shape) for k, p in m.named_parameters(recurse=False)))
                for n, m in empty.named_modules()
            )
            if tree not in found:
                block = draw_parameters(self._copy(empty), generator, self.device)
                try:
                    found[tree] = discover(block, hidden, _runner(kwargs), name=name)
                except RuntimeError as error:  # an operation without a float64 version, a kernel that wants a GPU, ...
                    raise StructureError(
                        f"{name} ({type(block).__name__}) cannot be run in float64 on {self.device}, which a proof of "
                        "its "
                        f"structure needs: {error}"
                    ) from error
            structures.append(found[tree])
        return structures

    @property
    def generates(self) -> bool:
        """Whether the model predicts the next token: a projection over the vocabulary behind blocks that see no later
        token."""
        return self.head_name is not None and all(structure.causal for structure in self.structures)

    def structure(self, index: int = 0) -> BlockStructure:
        """The proven structure of one block."""
        return self.structures[index]

    def random_block(self, index: int, generator: torch.Generator) -> tuple[nn.Module, Run, torch.Tensor]:
        """A copy of block `index` with random float64 parameters, what runs it, and hidden states (2, T, width)."""
        hidden, calls = self._probe_inputs(generator)
        block = draw_parameters(self._copy(self._empty[index]), generator, self.device)
        return block, _runner(calls[index]), hidden

    def _probe_inputs(self, generator: torch.Generator) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        tokens = min(16, self.max_positions or 16)
        ids = torch.randint(self.vocabulary, (2, tokens), generator=generator)
        entering, calls = self.block_kwargs(ids)
        return torch.randn(entering.shape, dtype=torch.float64, generator=generator).to(self.device), calls

    @cached_property
    def _outputs(self) -> int:
        """0 when the blocks return a tensor, else the length of the tuple that they return.

        Found once, by running block 0 on two tokens with zeros as its weights.
        """
        zeros = {
            name: torch.zeros(tensor.shape, dtype=self.dtype, device=self.device)
            for name, tensor in self._empty[0].named_parameters()
        }
        block = self._copy(self._empty[0])
        _move_buffers(block, self.device)
        found: list[int] = []

        class Found(Exception):  # noqa: N818  (leaves the model's forward; nothing after block 0 is needed)
            pass

        def first(index: int, signature: inspect.Signature) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                output = torch.func.functional_call(block, zeros, args, kwargs)
                found.append(len(output) if isinstance(output, tuple) else 0)
                raise Found

            return forward

        with _forwards_replaced(self.blocks, first):
            try:
                self._forward(torch.zeros(1, 2, dtype=torch.int64), {"use_cache": False})
            except Found:
                return found[0]
        raise StructureError(f"{type(self.model).__name__} does not run {self.block_names[0]} in its forward.")

    @torch.no_grad()
    def _find_tail(self) -> tuple[str | None, str | None]:
        """Names of the final norm and the head: the norm is the first module after the blocks with a 1-D weight."""
        after: list[str] = []
        inside = tuple(f"{name}." for name in self.block_names)
        handles = [
            module.register_forward_hook(lambda *_, name=name: after.append(name))
            for name, module in self.model.named_modules()
            if name in self.block_names or (not f"{name}.".startswith(inside) and not any(module.children()))
        ]
        try:
            self._pass_through(torch.zeros(1, 2, dtype=torch.int64))
        finally:
            for handle in handles:
                handle.remove()
        head = self.model.get_output_embeddings()
        head_name = next((name for name, module in self.model.named_modules() if module is head), None)
        tail = after[len(after) - after[::-1].index(self.block_names[-1]) :]
        gains = {name for name, parameter in self.model.named_parameters() if parameter.dim() == 1}
        norms = [name for name in tail if f"{name}.weight" in gains]
        return (norms[0] if norms else None), head_name


@contextmanager
def _forwards_replaced(
    blocks: nn.ModuleList, make: Callable[[int, inspect.Signature], Callable[..., Any]]
) -> Iterator[None]:
    """Give each block another `forward` for a while. The modules stay: a model may read their attributes."""
    blocks_now = list(blocks)
    own = [block.__dict__.get("forward") for block in blocks_now]
    try:
        for index, block in enumerate(blocks_now):
            block.forward = make(index, inspect.signature(block.forward))
        yield
    finally:
        for block, forward in zip(blocks_now, own):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward


def _named_arguments(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The first argument (the hidden states) and all others by name."""
    bound = dict(signature.bind(*args, **kwargs).arguments)
    hidden = bound.pop(next(iter(signature.parameters)))
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and name in bound:
            bound |= bound.pop(name)
    return hidden, bound


def _runner(kwargs: dict[str, Any]) -> Run:
    """What runs a block in float64 with its other arguments."""
    doubled = _doubled(kwargs)

    def run(block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), all_double():
            output = block(hidden, **doubled)
        return output[0] if isinstance(output, tuple) else output

    return run


def _doubled(value: Any) -> Any:
    """Float tensors in float64, wherever they are in tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _doubled(item) for name, item in value.items()}
    return type(value)(map(_doubled, value)) if type(value) in (tuple, list) else value


def _assign(root: nn.Module, name: str, value: torch.Tensor) -> None:
    """Set a parameter or buffer by its dotted name."""
    path, _, leaf = name.rpartition(".")
    module = root.get_submodule(path)
    if isinstance(value, nn.Parameter):
        module._parameters[leaf] = value
    else:
        module._buffers[leaf] = value


def _move_buffers(module: nn.Module, device: torch.device, recurse: bool = True) -> None:
    """Move buffers to a device in their own dtype (a rotary table stays float32)."""
    for part in module.modules() if recurse else [module]:
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(device)
