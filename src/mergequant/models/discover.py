"""Find the sites of a block by running it with hooks, and prove each. No name of a family or its classes is used.

What feeds a linear is seen by the identity of its input tensor. Which rows of an earlier linear feed which columns is
measured: rows are multiplied by distinct random factors, and the factor by which a column changes tells the row (shared
value heads, fused projections included). Whatever is found is then proven by `probe`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from mergequant.errors import StructureError
from mergequant.models.probe import TOLERANCE, Run, identify_norm, probe
from mergequant.models.roles import BlockStructure, NormRole, Producer, RowSlice, Site, SiteKind

__all__ = ["discover", "draw_parameters"]

OutputEdit = Callable[[torch.Tensor], torch.Tensor]


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

    Raises StructureError when a norm feeds linears and something else besides them, so that scaling does not keep the
    block's function, and when no site is found at all.
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
    for feeding, consumers in _groups(calls, norms, linears):
        names = tuple(call.name for call in consumers)
        if any(order.count(n) > 1 for n in names):
            continue  # a linear that runs twice has no single input
        site: Site | None
        if feeding is not None:
            site = Site(feeding, "norm", names, width, norms[feeding], None, 0.0)
            site = _proven_norm(block, site, run, hidden, generator, name)
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
    return BlockStructure(tuple(sites), ordered, tuple(n for n in ordered if n not in served))


def _groups(
    calls: list[_Call], norms: dict[str, NormRole], linears: dict[str, nn.Linear]
) -> list[tuple[str | None, list[_Call]]]:
    """Linears by the tensor that they read, in forward order, each group with the norm that made it (or None).

    The recorded tensors are all still held, so that one storage cannot have been used twice.
    """
    made_by = {_identity(call.left): call.name for call in calls if call.name in norms}
    groups: dict[tuple[int, int], list[_Call]] = {}
    for call in calls:
        if call.name in linears:
            groups.setdefault(_identity(call.entered), []).append(call)
    return [(made_by.get(identity), consumers) for identity, consumers in groups.items()]


def _proven_norm(
    block: nn.Module, site: Site, run: Run, hidden: torch.Tensor, generator: torch.Generator, name: str
) -> Site:
    deviation = probe(block, site, run, hidden, generator)
    if deviation >= TOLERANCE:
        raise StructureError(
            f"{name}.{site.name} feeds {', '.join(site.consumers)}, but scaling it and scaling them back changes the "
            f"block's output by {deviation:.1e} (rounding would be below {TOLERANCE:.0e}): something else reads this "
            "norm too. This block cannot be quantized with static steps in its norms."
        )
    return replace(site, deviation=deviation)


def _inner_site(
    block: nn.Module,
    names: tuple[str, ...],
    sites: list[Site],
    calls: list[_Call],
    run: Run,
    hidden: torch.Tensor,
    generator: torch.Generator,
) -> Site | None:
    """The site of linears that no norm feeds; None unless they come after a norm site and give the hidden width."""
    first = block.get_submodule(names[0])
    norm_sites = [site for site in sites if site.norm is not None]
    if not isinstance(first, nn.Linear) or first.out_features != hidden.shape[-1] or not norm_sites:
        return None
    feeding = norm_sites[-1]  # the norm site that ran last before these linears
    mixes = _mixes_tokens(block, names[0], feeding.name, run, hidden, generator)
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
    return site


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
    block: nn.Module, linear: str, norm: str, run: Run, hidden: torch.Tensor, generator: torch.Generator
) -> bool:
    """Whether the linear's input at the last token changes when the norm's output changes at all earlier tokens."""
    batch, tokens, width = hidden.shape
    noise = torch.randn(batch, tokens, width, dtype=torch.float64, generator=generator).to(hidden)
    noise[:, -1] = 0

    def disturb(output: torch.Tensor) -> torch.Tensor:
        return output + noise.view(output.shape)

    before = _input_of(block, linear, run, hidden)
    with _outputs_edited(block, norm, disturb):
        after = _input_of(block, linear, run, hidden)
    last = slice(tokens - 1, None, tokens)  # inputs may come as (B, T, C) or (B * T, C)
    return not torch.allclose(
        before.reshape(batch * tokens, -1)[last], after.reshape(batch * tokens, -1)[last], rtol=1e-9, atol=1e-12
    )


def _record(block: nn.Module, hidden: torch.Tensor, run: Run, names: list[str]) -> list[_Call]:
    calls: list[_Call] = []

    def hook(name: str) -> Callable[..., None]:
        def keep(
            module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], output: torch.Tensor
        ) -> None:
            calls.append(_Call(name, [*args, *kwargs.values()][0], output))

        return keep

    handles = [block.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in names]
    try:
        run(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return calls


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
