"""Drop at random within rows, with probabilities that a row's entries decide, or their ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from delta_analysis._kernels import (
    HIGH,
    LOW,
    NATIVE,
    Key,
    count_high,
    count_low,
    drop_at,
    drop_randomly,
    map_blocks,
    new_tensor,
    positions_between,
    rank_sums,
)
from delta_analysis.pruning.threshold import count_digit

Probability = Callable[[torch.Tensor], torch.Tensor]
"""From rows of entries, or from their sums of first and last rank, to drop probabilities in float64."""
ROWS_BLOCK = 2**16
"""Entries whose probabilities are held at a time by a thread; they stay in its cache."""
LONG_ROW = 2**20
PARTS = 160
"""A long row is ranked in about this many parts, so that it takes less than a tenth of the row and its result."""


def drop_rows(tensor: torch.Tensor, row: int, probability: Probability, factor: float | None, key: Key) -> torch.Tensor:
    """Drop each entry with a probability that `probability` finds from whole rows of `row` float32 entries.

    A factor of None is 1/(1-p) for each entry.
    """

    def work(values: torch.Tensor, start: int, out: torch.Tensor) -> None:
        drop_randomly(values, probability(values.view(-1, row)), factor, key, start, out)

    return new_tensor(tensor, work, multiple=row, block=ROWS_BLOCK)


def drop_by_rank(
    tensor: torch.Tensor, row: int, probability: Probability, factor: float | None, key: Key
) -> torch.Tensor:
    """Drop each entry with a probability that follows from its rank among the `row` entries of its row."""
    if row > LONG_ROW:
        values = tensor.detach().cpu()
        result = torch.zeros_like(values, memory_format=torch.contiguous_format)
        flat, out = values.reshape(-1), result.view(-1)
        drop_in_row = _drop_half_width if tensor.dtype == torch.bfloat16 else _drop_by_parts
        for begin in range(0, flat.numel(), row):
            drop_in_row(flat[begin : begin + row], begin, probability, factor, key, out[begin : begin + row])
        return result.to(tensor.device)
    return drop_rows(tensor, row, lambda rows: probability(rank_sums(rows)), factor, key)


def _drop_half_width(
    values: torch.Tensor, begin: int, probability: Probability, factor: float | None, key: Key, out: torch.Tensor
) -> None:
    """Drop within one long row of bfloat16: so few magnitudes that a table holds the rank of each."""
    counts = torch.from_numpy(count_digit(values, HIGH, count_high))
    table = probability((2 * counts.cumsum(0) - counts + 1).to(torch.float64))

    def work(block: torch.Tensor, start: int) -> None:
        p = table[block.view(torch.int16).to(torch.int64) & (HIGH - 1)]
        drop_randomly(block, p, factor, key, begin + start, out[start : start + block.numel()])

    map_blocks(values, work, block=ROWS_BLOCK // 4, dtypes=NATIVE)


def _drop_by_parts(
    values: torch.Tensor, begin: int, probability: Probability, factor: float | None, key: Key, out: torch.Tensor
) -> None:
    """Drop within one long row, the entries of a few neighbouring magnitudes at a time."""

    def drop_part(positions: torch.Tensor, sums: float | None, before: int) -> None:
        chosen = values[positions].to(torch.float32)
        if sums is None:
            ranks = rank_sums(chosen[None])[0].add_(2 * before)
        else:
            ranks = torch.full(chosen.shape, sums, dtype=torch.float64)
        kept = drop_at(chosen, probability(ranks), factor, key, positions + begin)
        out[positions] = kept.to(out.dtype)

    for low, high, before, count in _parts(values, max(values.numel() // PARTS, LONG_ROW // 8)):
        find = partial(positions_between, low=low, high=high)
        if high - low == 1:
            # Entries of one magnitude share a rank and need not be held together, however many.
            drop_shared = partial(drop_part, sums=2.0 * before + count + 1, before=before)
            map_blocks(values, lambda block, start: drop_shared(find(block, start=start)), dtypes=NATIVE)  # noqa: B023
        else:
            found = map_blocks(values, lambda block, start: find(block, start=start), dtypes=NATIVE)  # noqa: B023
            drop_part(torch.cat(found), None, before)


def _parts(values: torch.Tensor, size: int) -> Iterator[tuple[int, int, int, int]]:
    """Ranges `low ≤ magnitude < high` of at most `size` entries, or of one magnitude.

    Each with the number of entries before it and the number in it.
    """
    counts = count_digit(values, HIGH, count_high)
    for first, stop, before, count in _runs(counts, size):
        if count <= size:
            yield first * LOW, stop * LOW, before, count
            continue
        low = count_digit(values, LOW, partial(count_low, high=first))
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
