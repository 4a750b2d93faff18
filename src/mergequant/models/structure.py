"""Find the blocks of a model and the sites of a block, by what they do and not by what they are called."""

from torch import nn

from mergequant.errors import StructureError

__all__ = ["find_blocks"]


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of transformer blocks of a model, with its name (for Llama "model.layers").

    It is the outermost `nn.ModuleList` whose members are of one class and hold linears, and which holds more weights in
    linears than any other such list. Raises StructureError when there is none, or when a second one is at least half as
    large (an encoder and a decoder, say), and lists what there is.
    """
    candidates: dict[str, tuple[int, nn.ModuleList]] = {}
    for name, module in model.named_modules():
        inside_another = any(name.startswith(f"{outer}.") for outer in candidates)
        if inside_another or not isinstance(module, nn.ModuleList) or len({type(member) for member in module}) != 1:
            continue
        sizes = [sum(m.weight.numel() for m in member.modules() if isinstance(m, nn.Linear)) for member in module]
        if all(sizes):
            candidates[name] = (sum(sizes), module)
    ranked = sorted(candidates, key=lambda name: -candidates[name][0])
    listed = ", ".join(
        f"{name} ({len(candidates[name][1])} x {type(candidates[name][1][0]).__name__}, {candidates[name][0]:,} "
        "weights)"
        for name in ranked
    )
    if not ranked:
        raise StructureError(
            f"{type(model).__name__} has no list of equal blocks that hold nn.Linear layers, so there is nothing to "
            "quantize block by block. Decoder models such as Llama, Mistral, Qwen, Gemma, Phi-3 and OPT have one."
        )
    if len(ranked) > 1 and 2 * candidates[ranked[1]][0] >= candidates[ranked[0]][0]:
        raise StructureError(
            f"{type(model).__name__} has several lists that could be its blocks: {listed}. Only models with a single "
            "stack of decoder blocks are supported."
        )
    return ranked[0], candidates[ranked[0]][1]
