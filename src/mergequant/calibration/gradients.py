"""Gradients of the language-model loss by the weights, one block in memory at a time.

Forwards, the hidden states that enter every block are kept (`StorePolicy` says where). Backwards, a block is loaded,
run again on them, and given the gradient of its output; what its input gets is the next one's. So memory holds one
block, its gradients, and hidden states, whatever the size of the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mergequant.calibration.chain import Chain, Chunk
from mergequant.calibration.store import ActivationStore, StorePolicy
from mergequant.errors import NumericsError, StructureError
from mergequant.models import ModelShell

__all__ = ["block_gradients"]


def block_gradients(
    shell: ModelShell,
    windows: Tensor,
    policy: StorePolicy,
    linears: Sequence[Sequence[str]],
    *,
    signed: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
    """Size of the gradient of each weight, from the last block to the first.

    Each window is a backward pass of its own, its loss the mean next-token cross entropy. Windows are joined by the
    root of the sum of squares: at a trained optimum gradients sum to nothing, squares to Fisher's information.

    Args:
        shell: the float model; blocks are empty again afterwards.
        windows: int64 (windows, tokens).
        policy: where hidden states may lie.
        linears: names of the linears of each block.
        signed: the magnitude of the sum of gradients instead (a negative control).
        progress: told which block is done.

    Yields:
        The number of a block, which is still loaded, and float32 (outputs, width) by linear.

    Raises:
        StructureError: a weight that the loss gives no gradient.
        NumericsError: a gradient that is not finite.
    """
    count, total = windows.shape[0], len(shell.blocks)
    chain = Chain(shell, [Chunk(window[None], "calibration") for window in windows], policy, None)
    entering, leaving = ActivationStore(policy), ActivationStore(policy)
    try:
        for index in range(total):
            shell.load_block(index)
            for number in range(count):
                entering.append(chain.hidden[number])
            chain.advance()
            shell.release_block(index)
        for number in range(count):
            leaving.append(shell.loss_gradient(windows[number : number + 1], chain.hidden[number]))
        for index in reversed(range(total)):
            block = shell.load_block(index)
            chain.position = index
            weights = {name: block.get_submodule(name).get_parameter("weight") for name in linears[index]}
            sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
            for weight in weights.values():
                weight.requires_grad_(True)
            for number in range(count):
                with torch.enable_grad():
                    x = entering[index * count + number].detach().requires_grad_(True)
                    output = block(x, **chain.arguments(x))
                    output = output[0] if isinstance(output, tuple) else output
                    found = torch.autograd.grad(
                        output, [x, *weights.values()], leaving[number].to(output), allow_unused=True
                    )
                if found[0] is not None:
                    leaving.replace(number, found[0])
                for (name, own), gradient in zip(sums.items(), found[1:], strict=True):
                    _add(own, gradient, signed, f"{shell.block_names[index]}.{name}")
            for weight in weights.values():
                weight.requires_grad_(False)
            progress(f"gradients of block {index + 1} of {total}")
            yield index, {name: own.abs_() if signed else own.sqrt_() for name, own in sums.items()}
            shell.release_block(index)
    finally:
        entering.close()
        leaving.close()
        chain.close()


def _add(total: Tensor, gradient: Tensor | None, signed: bool, name: str) -> None:
    if gradient is None:
        raise StructureError(f"{name}: the loss gives it no gradient; choose scores that need none (score=magnitude)")
    if not bool(torch.isfinite(gradient).all()):
        raise NumericsError(f"{name}: its gradient is not finite; check the float model's own loss on this data")
    wide = gradient.float()
    total += wide if signed else wide.square()
