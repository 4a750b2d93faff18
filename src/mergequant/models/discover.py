"""Find the sites of a block by running it with hooks, and prove each. No name of a family or its classes is used.

What feeds a linear is seen by the identity of its input tensor. Which rows of an earlier linear feed which columns is
measured: rows are multiplied by distinct random factors, and the factor by which a column changes tells the row (shared
value heads, fused projections included). Whatever is found is then proven by `probe`.

In a block whose norms come last (BERT), linears and the residual connection read the same tensor: the block's input, or
what a norm gives. That nothing else reads it is proven, too: a disturbance of it that is kept from the linears arrives
unchanged at the next norm, at the block's output or at both, and nowhere else.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from mergequant.errors import StructureError
from mergequant.models.probe import TOLERANCE, Run, identify_norm, inputs_edited, probe, relative_difference
from mergequant.models.roles import BlockStructure, NormRole, Producer, RowSlice, Site, SiteKind

__all__ = ["discover", "draw_parameters"]

OutputEdit = Callable[[torch.Tensor], torch.Tensor]
BLOCK_INPUT = ""  # in the place of a norm's name


@dataclass(frozen=True)
class _Call:
    """One linear or norm that ran: what went in and what came out."""

    name: str
    entered: torch.Tensor
    left: torch.Tensor


def draw_parameters(block: nn.Module, generator: torch.Generator, device: torch.device) -> nn.Module:
    """Give a block (on meta) random float64 parameters of sensible size, and float64 buffers. Returns the block.

    Matrices keep the size of what they multiply; vectors scatter around 1 (gains), those called bias around 0. They are
    random so that no structure is found or missed by the accident of trained values.
    """
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            if parameter.dim() > 1:
                value *= parameter.shape[-1] ** -0.5
            else:
                value = 0.2 * value if name.endswith("bias") else 1 + 0.2 * value
            setattr(module, name, nn.Parameter(value.to(device), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device, torch.float64 if buffer.is_floating_point() else buffer.dtype)
    return block


@torch.no_grad()
def discover(block: nn.Module, hidden: torch.Tensor, run: Run, *, name: str = "block", seed: int = 0) -> BlockStructure:
    """The proven structure of a block with random float64 parameters (see `draw_parameters`).

    hidden is (B, T, width) float64 with T > 1, `run(block, hidden)` gives the block's output, all in float64. The block
    is as before afterwards. `name` is its full name, for messages.

    Raises StructureError when a norm feeds linears and something else besides them and the residual stream, so that
    scaling does not keep the block's function, and when no site is found at all.
    """
    generator = torch.Generator().manual_seed(seed)
    width = hidden.shape[-1]
    linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    norms = {
        n: role
        for n, m in block.named_modules()
        if n not in linears and (role := identify_norm(n, m, width, generator))
    }
    calls = _record(block, hidden, run, [*norms, *linears])
    order = [call.name for call in calls if call.name in linears]
    sites: list[Site] = []
    served: set[str] = set()
    for feeding, consumers in _groups(calls, norms, linears, hidden):
        names = tuple(call.name for call in consumers)
        if any(order.count(n) > 1 for n in names):
            continue  # a linear that runs twice has no single input
        site: Site | None
        if feeding is not None:
            site = _stream_site(block, feeding, names, norms, run, hidden, generator, name)
        else:
            site = _inner_site(block, names, sites, calls, run, hidden, generator)
        if site is not None:
            sites.append(site)
            served.update(names)
    if not sites:
        raise StructureError(
            f"{name} has no site that could be proven: none of its {len(linears)} linears is fed by an RMSNorm or a "
            "LayerNorm with a gain. There is nowhere to move quantization steps to."
        )
    ordered = tuple(dict.fromkeys([*order, *linears]))
    causal = _is_causal(block, run, hidden, generator)
    return BlockStructure(tuple(sites), ordered, tuple(n for n in ordered if n not in served), causal)


def _groups(
    calls: list[_Call], norms: dict[str, NormRole], linears: dict[str, nn.Linear], hidden: torch.Tensor
) -> list[tuple[str | None, list[_Call]]]:
    """Linears by the tensor that they read, in forward order, each group with the norm that made it, `BLOCK_INPUT`
    where the block itself was given it, or None.

    The recorded tensors are all still held, so that one storage cannot have been used twice.
    """
    made_by = {_identity(hidden): BLOCK_INPUT}
    made_by |= {_identity(call.left): call.name for call in calls if call.name in norms}
    groups: dict[tuple[int, int], list[_Call]] = {}
    for call in calls:
        if call.name in linears:
            groups.setdefault(_identity(call.entered), []).append(call)
    return [(made_by.get(identity), consumers) for identity, consumers in groups.items()]


def _stream_site(
    block: nn.Module,
    feeding: str,
    names: tuple[str, ...],
    norms: dict[str, NormRole],
    run: Run,
    hidden: torch.Tensor,
    generator: torch.Generator,
    name: str,
) -> Site:
    """The site of linears that read a norm or the block's input; "stream" if the residual connection reads it too."""
    alone = 0.0
    if feeding != BLOCK_INPUT:
        site = Site(feeding, "norm", names, hidden.shape[-1], norms[feeding], None, 0.0)
        alone = probe(block, site, run, hidden, generator)
        if alone < TOLERANCE:
            return replace(site, deviation=alone)
    if not _only_residual_reads(block, feeding, names, list(norms), run, hidden, generator):
        raise StructureError(
            f"{name}.{feeding} feeds {', '.join(names)}, but scaling it and scaling them back changes the block's "
            f"output by {alone:.1e} (rounding would be below {TOLERANCE:.0e}): something else reads this norm too, and "
            "not the residual connection alone. Nothing can be moved across it, so this block cannot be quantized."
            if feeding
            else f"{name}: {', '.join(names)} read the block's input without a norm, and so does something besides the "
            "residual connection. Nothing can be moved across it, so this block cannot be quantized."
        )
    return _proven_held(
        block, Site(names[0], "stream", names, hidden.shape[-1], None, None, 0.0), run, hidden, generator
    )


def _proven_held(block: nn.Module, site: Site, run: Run, hidden: torch.Tensor, generator: torch.Generator) -> Site:
    """A site in front of which nothing takes a scale up: its consumers' own inputs do, which is proven here."""
    deviation = probe(block, site, run, hidden, generator)
    if deviation >= TOLERANCE:
        raise StructureError(
            f"{', '.join(site.consumers)}: dividing what they read and scaling their columns back changes the block's "
            f"output by {deviation:.1e} (rounding would be below {TOLERANCE:.0e}): something else uses their weights."
        )
    return replace(site, deviation=deviation)


def _only_residual_reads(
    block: nn.Module,
    feeding: str,
    consumers: tuple[str, ...],
    norms: list[str],
    run: Run,
    hidden: torch.Tensor,
    generator: torch.Generator,
) -> bool:
    """Whether a disturbance kept from the consumers is added, as it is, to what the next norm or the output sees.

    With that norm's input held too, the block's output must not change at all, or by the disturbance as it is where the
    norm is only another reader of the stream: nothing else reads what was disturbed.
    """
    noise = torch.randn(hidden.shape, dtype=torch.float64, generator=generator).to(hidden)
    before = run(block, hidden)
    calls = _record(block, hidden, run, [*norms, *consumers])
    last = max(number for number, call in enumerate(calls) if call.name in consumers)
    seen = {call.name: call.entered for call in calls}

    def disturbed(held: list[str]) -> tuple[list[_Call], torch.Tensor]:
        with ExitStack() as stack:
            for name in held:
                stack.enter_context(inputs_edited(block, [name], lambda x, name=name: seen[name]))  # type: ignore[misc]
            if feeding == BLOCK_INPUT:
                return _record_with_output(block, hidden + noise, run, norms)
            stack.enter_context(_outputs_edited(block, feeding, lambda x: x + noise.view(x.shape)))
            return _record_with_output(block, hidden, run, norms)

    again, output = disturbed(list(consumers))
    later = [call.name for call in calls[last + 1 :]]
    entered = {call.name: call.entered for call in again}
    for name in later:
        if not torch.equal(entered[name], seen[name]):
            change = entered[name] - seen[name]
            if relative_difference(change, noise.view(change.shape)) >= TOLERANCE:
                return False
            output = disturbed([*consumers, name])[1]
            if relative_difference(output, before) < TOLERANCE:
                return True
            break
    return relative_difference(output - before, noise) < TOLERANCE


def _is_causal(block: nn.Module, run: Run, hidden: torch.Tensor, generator: torch.Generator) -> bool:
    """Whether the earlier tokens' outputs stay what they are when the last token changes."""
    changed = hidden.clone()
    changed[:, -1] = torch.randn(changed[:, -1].shape, dtype=torch.float64, generator=generator).to(hidden)
    return relative_difference(run(block, changed)[:, :-1], run(block, hidden)[:, :-1]) < TOLERANCE


def _inner_site(
    block: nn.Module,
    names: tuple[str, ...],
    sites: list[Site],
    calls: list[_Call],
    run: Run,
    hidden: torch.Tensor,
    generator: torch.Generator,
) -> Site | None:
    """The site of linears inside a module; None unless they come after the site that begins it and give the hidden
    width."""
    first = block.get_submodule(names[0])
    beginnings = [site for site in sites if site.begins_module]
    if not isinstance(first, nn.Linear) or first.out_features != hidden.shape[-1] or not beginnings:
        return None
    feeding = beginnings[-1]  # the one that ran last before these linears
    mixes = _mixes_tokens(block, names[0], feeding.consumers, run, hidden, generator)
    kind: SiteKind = "attention_output" if mixes else "mlp_output"
    site = Site(names[0], kind, names, first.in_features, None, None, 0.0)
    positions = [call.name for call in calls]
    earlier = positions[positions.index(feeding.name) : positions.index(names[0])]
    for candidate in reversed([n for n in earlier if n in feeding.consumers]):
        for rows in _slices(block.get_submodule(candidate), candidate, site.width):
            channel = _channel_map(block, site, rows, run, hidden, generator)
            if channel is not None:
                with_producer = replace(site, producer=Producer(rows, channel))
                deviation = probe(block, with_producer, run, hidden, generator)
                if deviation < TOLERANCE:
                    return replace(with_producer, deviation=deviation)
    return _proven_held(block, site, run, hidden, generator)


def _slices(linear: nn.Module, name: str, width: int) -> Iterator[RowSlice]:
    """Rows that could feed `width` columns: all, the values of a fused query-key-value, half of a fused pair."""
    rows = int(linear.get_parameter("weight").shape[0])
    if width % rows == 0:
        yield RowSlice(name, 0, rows)
        return
    shared, odd = divmod(rows - width, 2)  # width rows of queries, then as many rows of keys as of values
    if shared > 0 and not odd and width % shared == 0:
        yield RowSlice(name, rows - shared, rows)
    if rows == 2 * width:
        yield RowSlice(name, width, rows)
        yield RowSlice(name, 0, width)


def _channel_map(
    block: nn.Module, site: Site, rows: RowSlice, run: Run, hidden: torch.Tensor, generator: torch.Generator
) -> tuple[int, ...] | None:
    """The row of the slice that feeds each input column of a site; None unless each is proportional to just one."""
    count = rows.stop - rows.start
    # Distinct, and far enough from each other to be told apart after rounding.
    factors = (1 + (torch.randperm(count, generator=generator) + 1) / count).to(hidden)

    def scale(output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[..., rows.start : rows.stop] *= factors
        return output

    before = _input_of(block, site.consumers[0], run, hidden)
    with _outputs_edited(block, rows.linear, scale):
        after = _input_of(block, site.consumers[0], run, hidden)
    before, after = before.flatten(0, -2), after.flatten(0, -2)  # (tokens, columns)
    ratio = (after * before).sum(0) / before.square().sum(0)
    channel = _nearest(ratio, factors)
    error = (after - before * factors[channel]).abs().amax(0) / before.abs().amax(0)
    return tuple(channel.tolist()) if bool((error < TOLERANCE).all()) else None  # NaN (a dead column) is no proof


def _nearest(values: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Index in `among` of the element nearest to each value."""
    ordered, index = among.sort()
    right = torch.searchsorted(ordered, values.contiguous()).clamp(1, len(ordered) - 1)
    nearer_left = (values - ordered[right - 1]).abs() < (values - ordered[right]).abs()
    return index[right - nearer_left.long()]


def _mixes_tokens(
    block: nn.Module,
    linear: str,
    earlier: tuple[str, ...],
    run: Run,
    hidden: torch.Tensor,
    generator: torch.Generator,
) -> bool:
    """Whether the linear's input at the last token changes when what earlier linears read changes at all tokens
    before it."""
    batch, tokens, width = hidden.shape
    noise = torch.randn(batch, tokens, width, dtype=torch.float64, generator=generator).to(hidden)
    noise[:, -1] = 0

    before = _input_of(block, linear, run, hidden)
    with inputs_edited(block, earlier, lambda x: x + noise.view(x.shape)):
        after = _input_of(block, linear, run, hidden)
    last = slice(tokens - 1, None, tokens)  # inputs may come as (B, T, C) or (B * T, C)
    return not torch.allclose(
        before.reshape(batch * tokens, -1)[last], after.reshape(batch * tokens, -1)[last], rtol=1e-9, atol=1e-12
    )


def _record(block: nn.Module, hidden: torch.Tensor, run: Run, names: list[str]) -> list[_Call]:
    return _record_with_output(block, hidden, run, names)[0]


def _record_with_output(
    block: nn.Module, hidden: torch.Tensor, run: Run, names: list[str]
) -> tuple[list[_Call], torch.Tensor]:
    """Calls of some modules while the block runs, in order, and the block's output."""
    calls: list[_Call] = []

    def hook(name: str) -> Callable[..., None]:
        def keep(
            module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], output: torch.Tensor
        ) -> None:
            calls.append(_Call(name, [*args, *kwargs.values()][0], output))

        return keep

    handles = [block.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in names]
    try:
        output = run(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return calls, output


def _input_of(block: nn.Module, linear: str, run: Run, hidden: torch.Tensor) -> torch.Tensor:
    return _record(block, hidden, run, [linear])[0].entered


@contextmanager
def _outputs_edited(block: nn.Module, name: str, edit: OutputEdit) -> Iterator[None]:
    handle = block.get_submodule(name).register_forward_hook(lambda module, args, output: edit(output))
    try:
        yield
    finally:
        handle.remove()


def _identity(tensor: torch.Tensor) -> tuple[int, int]:
    """Equal for views of the same elements, whatever their shape."""
    return tensor.data_ptr(), tensor.numel()
