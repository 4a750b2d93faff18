"""Weights onto codebooks: nearest entries, or the second-order sweep with vectors along the outputs of one column.

"VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models", arXiv 2409.17066, section 3. All
entries of a vector lie in one column and share that column's element of the Hessian, so the nearest centroid is the
best one, and the error of every column is fed back before the next is coded ("channel-independent").
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from mergequant.errors import UsageError
from mergequant.grids import CodebookTensor, CodedColumns, Outliers
from mergequant.grids.codebook import vectors_for
from mergequant.solvers.kmeans import Start, cluster_sums, kmeans, nearest
from mergequant.solvers.sweep import InverseFactor, sweep

__all__ = ["CodebookSolution", "Section", "code_columns", "find_books", "tune_books", "vector_gptq"]

Tuning = Literal["none", "adam", "least_squares"]


@dataclass(frozen=True)
class CodebookSolution:
    """A weight in codebooks and what it took; as `Solution`."""

    quantized: CodebookTensor
    damping: float = 0.0
    attempts: int = 0


@dataclass(frozen=True)
class Section:
    """Consecutive columns, in sweep or stored order, that are coded alike.

    Attributes:
        columns: how many.
        vector: outputs that share an index; the outputs are padded to a multiple with zeros.
        bits, residual_bits: widths of the indices; residual_bits 0 = no second codebook.
        groups: codebooks, each for an equal run of columns.
    """

    columns: int
    vector: int
    bits: int
    residual_bits: int = 0
    groups: int = 1

    def vectors(self, values: Tensor) -> Tensor:
        """Columns (outputs, columns) as sets of vectors (groups, columns / groups * vectors, vector), one by one."""
        columns = pad(values.t(), (0, -values.shape[0] % self.vector))
        return columns.reshape(self.groups, -1, self.vector)

    def check(self, outputs: int) -> None:
        """Raises UsageError, with sizes that work, where groups do not divide the columns or hold too few vectors."""
        if self.columns % self.groups:
            known = [size for size in range(1, self.groups + 1) if self.columns % size == 0]
            raise UsageError(f"{self.groups} groups do not divide {self.columns} columns; use one of {known}")
        count = self.columns // self.groups * vectors_for(outputs, self.vector)
        if count < 1 << max(self.bits, self.residual_bits):
            raise UsageError(
                f"a codebook of {1 << max(self.bits, self.residual_bits)} entries serves only {count} vectors of "
                f"{self.vector} ({outputs} outputs, {self.columns // self.groups} columns); use at most "
                f"{count.bit_length() - 1} bits"
            )


def find_books(
    weight: Tensor,
    energy: Tensor,
    order: Tensor,
    sections: Sequence[Section],
    *,
    iterations: int = 100,
    mask: Tensor | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Codebooks of the sections, without residual entries: k-means of their vectors, weighted by their columns' energy.

    Args:
        weight: float (outputs, width), natural order.
        energy: (width,), diagonal of the Hessian.
        order: int64 (width,), original column of each position.
        sections: they hold all positions.
        iterations, seed: of `kmeans`; single values start at quantiles.
        mask: optional bool (outputs, width), values that are kept elsewhere and sway no codebook of single values.

    Returns:
        float16 (groups, 2^bits, vector) for each.

    Raises:
        UsageError: groups that do not divide columns, more entries than vectors, or weights beyond float16.
    """
    books, first = [], 0
    for section in sections:
        section.check(weight.shape[0])
        own = order[first : first + section.columns]
        first += section.columns
        mass = energy[own].float()[None].expand(weight.shape[0], -1)
        if section.vector == 1 and section.groups == section.columns:
            mass = torch.ones_like(mass)  # the energy of a column is the same for all of its values
        if mask is not None and section.vector == 1:
            mass = torch.where(mask[:, own], torch.zeros_like(mass), mass)
        points = section.vectors(weight[:, own].float())
        start: Start = "quantiles" if section.vector == 1 else "random"
        found = kmeans(
            points, section.vectors(mass).amax(-1), 1 << section.bits, iterations=iterations, start=start, seed=seed
        )
        books.append(_stored(found))
    return books


def code_columns(
    weight: Tensor,
    inverse: InverseFactor | None,
    order: Tensor,
    sections: Sequence[Section],
    books: Sequence[Tensor],
    kept: Tensor | None = None,
) -> tuple[CodebookTensor, Tensor]:
    """Code a weight with given books: each column by itself, or with error feedback where a Hessian is given.

    Args:
        weight: float (outputs, width), natural order.
        inverse: factored inverse Hessian, whose own order the sweep follows; None = no feedback.
        order: int64 (width,), original column of each stored position.
        sections: of the stored positions.
        books: float16 (groups, entries, vector) of each section, residual entries behind the others.
        kept: optional bool (outputs, width), values that stay as they are (compensated): outliers of the result, not to
            be combined with residual entries.

    Returns:
        The coded weight, and what the base entries left of each compensated column (outputs, width), natural order.
    """
    outputs, width = weight.shape
    symbols = [
        torch.empty((own.columns, vectors_for(outputs, own.vector)), dtype=torch.int64, device=weight.device)
        for own in sections
    ]
    wide = [book.float() for book in books]
    places = {}
    numbers = iter(order.tolist())
    for index, section in enumerate(sections):
        places.update({next(numbers): (index, local) for local in range(section.columns)})
    left = torch.empty((width, outputs), device=weight.device)

    def quantize_column(column: int, values: Tensor) -> Tensor:
        index, local = places[column]
        section = sections[index]
        book = wide[index][local // (section.columns // section.groups)]
        points = replace(section, columns=1, groups=1).vectors(values[:, None])
        base = nearest(points, book[None, : 1 << section.bits])
        found = book[base]
        left[column] = (points - found).reshape(-1)[:outputs]
        if section.residual_bits:
            second = nearest(points - found, book[None, 1 << section.bits :])
            found = found + book[second + (1 << section.bits)]
            base = base | second << section.bits
        symbols[index][local] = base[0]
        coded = found.reshape(-1)[:outputs]
        return coded if kept is None else torch.where(kept[:, column], values, coded)

    if inverse is not None:
        sweep(weight, inverse, quantize_column)
    else:
        for column in range(width):
            quantize_column(column, weight[:, column].float())
    parts = tuple(
        CodedColumns(own.t().contiguous(), book, section.bits, section.residual_bits)
        for own, book, section in zip(symbols, books, sections)
    )
    natural = torch.equal(order, torch.arange(width, device=order.device))
    outliers = None if kept is None or not bool(kept.any()) else Outliers.single(left.t(), kept)
    return CodebookTensor(parts, outputs, None if natural else order, outliers), left.t()


def vector_gptq(
    weight: Tensor,
    inverse: InverseFactor,
    energy: Tensor,
    sections: Sequence[Section],
    *,
    iterations: int = 100,
    seed: int = 0,
) -> CodebookSolution:
    """VPTQ: weighted k-means, sweep; with residual codebooks, k-means of what is left, and the sweep anew.

    Sections are taken in the order of the sweep, so with activation order the first one holds the strongest columns. A
    single codebook serves columns in any order, and then they are stored in their natural one.

    Args:
        weight: float (outputs, width).
        inverse: factored inverse of the damped Hessian.
        energy: (width,), the Hessian's own diagonal: dead columns are 0 there and sway no codebook.
        sections: they hold all columns.
        iterations, seed: of `kmeans`.

    Raises:
        UsageError: as `find_books`.
    """
    weight = torch.where(inverse.dead, torch.zeros_like(weight), weight).float()
    order = inverse.order
    if len(sections) == 1 and sections[0].groups == 1:
        order = torch.arange(weight.shape[1], device=weight.device)
    books = find_books(weight, energy, order, sections, iterations=iterations, seed=seed)
    plain = [replace(section, residual_bits=0) for section in sections]
    made, left = code_columns(weight, inverse, order, plain, books)
    if any(section.residual_bits for section in sections):
        again = [replace(own, bits=own.residual_bits or own.bits, residual_bits=0) for own in sections]
        second = find_books(left, energy, order, again, iterations=iterations, seed=seed)
        books = [
            torch.cat([book, more], 1) if section.residual_bits else book
            for book, more, section in zip(books, second, sections)
        ]
        made, _ = code_columns(weight, inverse, order, sections, books)
    return CodebookSolution(made, inverse.damping, inverse.attempts)


def tune_books(
    made: CodebookTensor, weight: Tensor, hessian: Tensor, method: Tuning, steps: int = 100, rate: float = 1e-4
) -> CodebookTensor:
    """Move the centroids, codes as they are, so that the layer's output error falls: tr((Q - W) H (Q - W)^T).

    Args:
        made: coded weight.
        weight: float (outputs, width).
        hessian: raw sum (width, width), undamped.
        method: "adam", the paper's, with steps of `rate` falling to zero; or "least_squares": the error is quadratic in
            the centroids, and conjugate gradients need no rate.
        steps: iterations.
        rate: of Adam.

    Returns:
        The weight with the better books, rounded to float16: the old ones where tuning has not helped.
    """
    if method == "none" or steps < 1:
        return made
    target, hessian = weight.float(), (hessian / hessian.diagonal().mean()).float()
    books = [part.book.float() for part in made.parts]

    def decode(values: Sequence[Tensor]) -> Tensor:
        return _with_books(made, values).decode()

    def gradient(difference: Tensor) -> list[Tensor]:
        return _gather(made, difference @ hessian)

    def error(values: Sequence[Tensor]) -> float:
        difference = decode(values) - target
        return float(((difference @ hessian) * difference).sum(dtype=torch.float64))

    tuned = _adam(books, decode, gradient, target, steps, rate) if method == "adam" else books
    if method == "least_squares":
        tuned = _conjugate_gradients(books, decode, gradient, target, steps)
    stored = [_stored(book) for book in tuned]
    return _with_books(made, stored) if error([book.float() for book in stored]) < error(books) else made


Gradient = Callable[[Tensor], list[Tensor]]
Decode = Callable[[Sequence[Tensor]], Tensor]


def _adam(
    books: list[Tensor], decode: Decode, gradient: Gradient, target: Tensor, steps: int, rate: float
) -> list[Tensor]:
    tuned = [book.clone().requires_grad_() for book in books]
    optimizer = torch.optim.Adam(tuned, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        with torch.no_grad():
            for book, slope in zip(tuned, gradient(decode(tuned) - target)):
                book.grad = slope
        optimizer.step()
        schedule.step()
    return [book.detach() for book in tuned]


def _conjugate_gradients(
    books: list[Tensor], decode: Decode, gradient: Gradient, target: Tensor, steps: int
) -> list[Tensor]:
    def inner(left: list[Tensor], right: list[Tensor]) -> float:
        return sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right))

    tuned = [book.clone() for book in books]
    left = [-slope for slope in gradient(decode(tuned) - target)]
    direction, size = left, inner(left, left)
    enough = 1e-12 * size
    for _ in range(steps):
        moved = gradient(decode(direction))
        curvature = inner(direction, moved)
        if size <= enough or curvature <= 0:
            break
        step = size / curvature
        tuned = [book + step * way for book, way in zip(tuned, direction)]
        left = [rest - step * change for rest, change in zip(left, moved)]
        before, size = size, inner(left, left)
        direction = [rest + size / before * way for rest, way in zip(left, direction)]
    return tuned


def _gather(made: CodebookTensor, values: Tensor) -> list[Tensor]:
    """Transpose of decoding: what of values (outputs, width) falls to each entry of each book."""
    ordered = values if made.order is None else values[:, made.order]
    sums, first = [], 0
    for part in made.parts:
        groups, entries, vector = part.book.shape
        section = Section(part.columns, vector, part.bits, part.residual_bits, groups)
        rows = section.vectors(ordered[:, first : first + part.columns]).reshape(-1, vector)
        first += part.columns
        symbols = part.symbols.t()  # (columns, vectors), as the rows are
        group = torch.arange(part.columns, device=values.device)[:, None] // (part.columns // groups) * entries
        total = cluster_sums(rows, ((symbols & (1 << part.bits) - 1) + group).reshape(-1), groups * entries)
        if part.residual_bits:
            second = (symbols >> part.bits) + group + (1 << part.bits)
            total = total + cluster_sums(rows, second.reshape(-1), groups * entries)
        sums.append(total.float().reshape(groups, entries, vector))
    return sums


def _with_books(made: CodebookTensor, books: Sequence[Tensor]) -> CodebookTensor:
    return replace(made, parts=tuple(replace(part, book=book) for part, book in zip(made.parts, books)))


def _stored(book: Tensor) -> Tensor:
    """As a checkpoint holds it: the sweep must see the very centroids that a server will."""
    narrow = book.half()
    if not bool(narrow.isfinite().all()):
        raise UsageError(f"centroids reach {float(book.abs().max()):.3g}, beyond float16; are the weights finite?")
    return narrow
