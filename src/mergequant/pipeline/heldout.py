"""What quantizing cost, measured on the way: the float model runs beside the quantized one on the held-out windows.

Each block holds its float weights for a moment before it is quantized; the held-out windows pass through it then. The
recipe has seen these windows in its choices, so the figures are a little optimistic; `mergequant eval` on other text is
the honest measure.
"""

import torch

from mergequant.calibration import Chain, StorePolicy, chunked
from mergequant.models import ModelShell

__all__ = ["FloatCompanion"]


class FloatCompanion:
    """The held-out windows on their way through the float model."""

    def __init__(self, shell: ModelShell, tokens: torch.Tensor, policy: StorePolicy) -> None:
        self._chain = Chain(shell, list(chunked(tokens, "held_out")), policy, None)

    def advance(self) -> None:
        """Run the next block, which must hold its float weights now."""
        self._chain.advance()

    def compare(self, chain: Chain) -> dict[str, float]:
        """Figures of the quantized chain against the float model.

        Returns:
            Of a language model, over the tokens that both predict: float_nll, nll_increase, kl_mean (nats per token),
            top1_agreement and predicted_tokens. Of another model: `<output>_error` for each of its outputs and for its
            hidden states, the norm of the difference relative to the float model's; kl_mean and top1_agreement of the
            predictions, if it gives logits of several classes; windows.
        """
        return self._compare_tokens(chain) if chain.shell.generates else self._compare_outputs(chain)

    @torch.no_grad()
    def _compare_outputs(self, chain: Chain) -> dict[str, float]:
        squares: dict[str, list[float]] = {}
        kl = 0.0
        agreements = windows = predictions = 0
        for own, number in enumerate(chain.numbers("held_out")):
            exact, coded = self._chain.outputs(own), chain.outputs(number)
            windows += self._chain.chunks[own].tokens.shape[0]
            for name, value in exact.items():
                sums = squares.setdefault(name, [0.0, 0.0])
                sums[0] += float((coded[name] - value).double().square().sum())
                sums[1] += float(value.double().square().sum())
            if "logits" in exact and exact["logits"].shape[-1] > 1:
                exact_log, coded_log = (found["logits"].float().log_softmax(-1) for found in (exact, coded))
                kl += float((exact_log.exp() * (exact_log - coded_log)).sum(dtype=torch.float64))
                agreements += int((exact_log.argmax(-1) == coded_log.argmax(-1)).sum())
                predictions += exact_log.shape[:-1].numel()
        figures = {f"{name}_error": (error / max(size, 1e-300)) ** 0.5 for name, (error, size) in squares.items()}
        if predictions:
            figures |= {"kl_mean": kl / predictions, "top1_agreement": agreements / predictions}
        return {**figures, "windows": windows}

    @torch.no_grad()
    def _compare_tokens(self, chain: Chain) -> dict[str, float]:
        float_nll = nll = kl = 0.0
        agreements = tokens = 0
        for own, number in enumerate(chain.numbers("held_out")):
            windows = self._chain.chunks[own].tokens
            for row in range(windows.shape[0]):  # one by one: logits of a chunk would be the largest tensor of the run
                exact = self._chain.logits(own, slice(row, row + 1))[0]
                coded = chain.logits(number, slice(row, row + 1))[0]
                skipped = exact.shape[0] - coded.shape[0]  # a BOS that the prefix stands for is not run
                exact_log = exact[skipped:-1].float().log_softmax(-1)
                coded_log = coded[:-1].float().log_softmax(-1)
                picked = windows[row, skipped + 1 :, None].to(exact.device)
                tokens += picked.numel()
                float_nll -= float(exact_log.gather(-1, picked).sum(dtype=torch.float64))
                nll -= float(coded_log.gather(-1, picked).sum(dtype=torch.float64))
                kl += float((exact_log.exp() * (exact_log - coded_log)).sum(dtype=torch.float64))
                agreements += int((exact_log.argmax(-1) == coded_log.argmax(-1)).sum())
        return {
            "float_nll": float_nll / tokens,
            "nll_increase": (nll - float_nll) / tokens,
            "kl_mean": kl / tokens,
            "top1_agreement": agreements / tokens,
            "predicted_tokens": tokens,
        }

    def close(self) -> None:
        """Free the hidden states."""
        self._chain.close()
