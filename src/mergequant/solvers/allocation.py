"""Bits for each of many parts under a budget for their sum, by what every width is measured to cost."""

from collections.abc import Sequence

from mergequant.errors import UsageError

__all__ = ["allocate"]


def allocate(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], budget: float) -> list[int]:
    """Choose one form for every part: greedy, always the step that saves most cost for what it adds to the size.

    A step may skip forms, so that one that saves nothing does not hide a better one behind it; when the best step does
    not fit any more, others that fit are taken.

    Args:
        costs: of each part, of each of its forms.
        sizes: likewise; rising.
        budget: largest sum of sizes.

    Returns:
        Number of the form of each part.

    Raises:
        UsageError: the smallest forms together are larger than the budget.
    """
    chosen = [0] * len(costs)
    total = sum(own[0] for own in sizes)
    if total > budget:
        raise UsageError(f"the smallest forms take {total:.0f}, the budget is {budget:.0f}")
    while True:
        best, rate = None, 0.0
        for part, form in enumerate(chosen):
            for larger in range(form + 1, len(sizes[part])):
                added = sizes[part][larger] - sizes[part][form]
                saved = costs[part][form] - costs[part][larger]
                if total + added <= budget and saved / added > rate:
                    best, rate = (part, larger), saved / added
        if best is None:
            return chosen
        part, larger = best
        total += sizes[part][larger] - sizes[part][chosen[part]]
        chosen[part] = larger
