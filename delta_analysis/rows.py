"""Drop within rows: with probabilities that a row's entries decide, by their ranks, or the least of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from delta_analysis.blocks import kernels_for, map_blocks, new_tensor, row_length
from delta_analysis.cut import count_digit, count_high, count_low
from delta_analysis.kernels import HIGH, LOW, drop_at, positions_between, rank_sums
from delta_analysis.philox import Key
from delta_analysis.storage import NATIVE

Probability = Callable[[torch.Tensor], torch.Tensor]
"""From rows of entries, or from their sums of first and last rank, to drop probabilities in float64."""
ROWS_BLOCK = 2**17
"""Entries whose probabilities are held at a time by a thread; they stay in its cache."""
LONG_ROW = 2**20
PARTS = 96
"""A long row is ranked in about this many parts, so that ranks take a hundredth of its memory each."""


def drop_rows(tensor: torch.Tensor, row: int, probability: Probability, factor: float | None, key: Key) -> torch.Tensor:
    """Drop each entry with a probability that `probability` finds from whole rows of `row` float32 entries.

    A factor of None is 1/(1-p) for each entry.
    """
    kernels = kernels_for(tensor.device)

    def work(values: torch.Tensor, start: int, out: torch.Tensor) -> None:
        kernels.drop(values, probability(values.view(-1, row)), factor, key, start, out)

    return new_tensor(tensor, work, multiple=row, block=ROWS_BLOCK)


def drop_least(tensor: torch.Tensor, count: int, factor: float, key: Key) -> torch.Tensor:
    """Drop the `count` least entries of each row, ties broken by random number, then by position."""
    kernels, row = kernels_for(tensor.device), row_length(tensor)

    def work(values: torch.Tensor, start: int, out: torch.Tensor) -> None:
        numbers = kernels.random_bits(key, start, values.numel(), values.device)
        dropped = least_of_rows(values.view(-1, row), numbers.view(-1, row), count)
        out.copy_(torch.where(dropped.view(-1), 0.0, values * float(np.float32(factor))))

    return new_tensor(tensor, work, multiple=row, block=ROWS_BLOCK)


def least_of_rows(values: torch.Tensor, numbers: torch.Tensor, count: int) -> torch.Tensor:
    """True for the `count` least entries of each row in the order of (|δ|, random number, position)."""
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    order = (values.view(torch.int32).to(torch.int64) & 0x7FFFFFFF) << 32 | numbers
    last = order.kthvalue(count, dim=1, keepdim=True).values
    before, equal = order < last, order == last
    return before | (equal & (equal.cumsum(dim=1) <= count - before.sum(dim=1, keepdim=True)))


def shares_of_range(rows: torch.Tensor, name: str) -> torch.Tensor:
    """(|δ| - least) / (greatest - least) within each row, in float64; 1/2 where all are equal."""
    sizes = rows.abs().to(torch.float64)
    low, high = sizes.amin(dim=1, keepdim=True), sizes.amax(dim=1, keepdim=True)
    if not torch.isfinite(high).all():
        raise ValueError(f"tensor {name!r} has NaN or infinite entries, and rank='value' needs finite ones")
    return torch.where(high > low, (sizes - low) / (high - low), 0.5)


def drop_by_rank(
    tensor: torch.Tensor, row: int, probability: Probability, factor: float | None, key: Key
) -> torch.Tensor:
    """Drop each entry with a probability that follows from its rank among the `row` entries of its row."""
    if row > LONG_ROW and tensor.device.type == "cpu":
        return _drop_in_long_rows(tensor, row, probability, factor, key)
    kernels = kernels_for(tensor.device)
    return drop_rows(tensor, row, lambda rows: probability(kernels.rank_sums(rows)), factor, key)


def _drop_in_long_rows(
    tensor: torch.Tensor, row: int, probability: Probability, factor: float | None, key: Key
) -> torch.Tensor:
    """The same, for the entries of a few neighbouring magnitudes of a row at a time."""
    result = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
    flat, out = tensor.detach().reshape(-1), result.view(-1)
    for begin in range(0, flat.numel(), row):
        values = flat[begin : begin + row]
        for low, high, before, count in _parts(values, max(row // PARTS, LONG_ROW // 4)):
            found = map_blocks(
                values,
                lambda block, start: positions_between(block, low, high, start + begin),  # noqa: B023
                dtypes=NATIVE,
            )
            # Entries of one magnitude share a rank and need not be held together, however many.
            for positions in found if high - low == 1 else [torch.cat(found)]:
                chosen = flat[positions].to(torch.float32)
                inner = rank_sums(chosen[None])[0] if high - low > 1 else torch.full(chosen.shape, count + 1.0)
                p = probability(inner.to(torch.float64) + 2 * before)
                out[positions] = drop_at(chosen, p, factor, key, positions).to(out.dtype)
    return result


def _parts(values: torch.Tensor, size: int) -> Iterator[tuple[int, int, int, int]]:
    """Ranges `low ≤ magnitude < high` of at most `size` entries, or of one magnitude.

    Each with the number of entries before it and the number in it.
    """
    counts = count_digit(values, HIGH, count_high)
    for first, stop, before, count in _runs(counts, size):
        if count <= size:
            yield first * LOW, stop * LOW, before, count
            continue
        low = count_digit(values, LOW, count_low(first))
        for inner, end, less, inside in _runs(low, size):
            yield first * LOW + inner, first * LOW + end, before + less, inside


def _runs(counts: np.ndarray, size: int) -> Iterator[tuple[int, int, int, int]]:
    """Neighbouring buckets that hold at most `size` together, or one that holds more."""
    ends = np.cumsum(counts)
    first, before = 0, 0
    while before < ends[-1]:
        stop = max(int(np.searchsorted(ends, before + size, side="right")), first + 1)
        if ends[stop - 1] > before:
            yield first, stop, before, int(ends[stop - 1]) - before
        first, before = stop, int(ends[stop - 1])
