"""The order of magnitudes: ranks, counts, ties and thresholds over one block of entries.

A magnitude is compared as an integer, the float32 bits of |δ|, in two digits: the upper 15 bits and
the lower 16.
"""

from __future__ import annotations

import numpy as np
import torch

from delta_analysis._kernels.drop import key_words
from delta_analysis._kernels.floats import HIGH, LOW, compiled, entries, magnitude, narrow, widen
from delta_analysis._kernels.philox import GROUP, LANES, Key, draw, number_at, schedule

_SHORT_ROW = 1024
_STRIDE = 32
_MANY = 12
"""From so many ties among a group's numbers on, drawing the whole group is cheaper than one by one."""


def rank_sums(rows: torch.Tensor) -> torch.Tensor:
    """First plus last rank of each float32 entry's magnitude within its row, equal ones sharing both.

    Ranks count from 1, so half of it is the mean rank; float64 of the shape of `rows`.
    """
    out = np.empty(tuple(rows.shape))
    _rank_sums(rows.numpy(), out)
    return torch.from_numpy(out)


@compiled
def _rank_sums(rows, out):  # type: ignore[no-untyped-def]
    n = rows.shape[1]
    pairs, other = np.empty(n, dtype=np.uint64), np.empty(n, dtype=np.uint64)
    tables = np.zeros((4, 2**11), dtype=np.uint32)
    counts = np.zeros(HIGH, dtype=np.uint32)
    for row in range(rows.shape[0]):
        union = np.uint32(0)
        for i in range(n):
            union |= magnitude(rows[row, i])
        # Half-width weights leave the lower digit empty.
        if n > _SHORT_ROW and union & np.uint32(0xFFFF) == 0:
            _rank_by_counting(rows[row], counts, out[row])
        else:
            _rank_by_sorting(rows[row], tables, pairs, other, out[row])


@compiled
def _rank_by_counting(source, counts, out):  # type: ignore[no-untyped-def]
    """Ranks of magnitudes that differ in their upper digit alone; `counts` holds zeros, before and after."""
    low, high = np.uint32(HIGH), np.uint32(0)
    for i in range(len(source)):
        digit = magnitude(source[i]) >> np.uint32(16)
        counts[digit] += np.uint32(1)
        low, high = min(low, digit), max(high, digit)
    before = np.uint32(0)
    for digit in range(low, high + 1):
        # First plus last rank.
        count = counts[digit]
        counts[digit] = before + before + count + np.uint32(1)
        before += count
    for i in range(len(source)):
        out[i] = counts[magnitude(source[i]) >> np.uint32(16)]
    counts[low : high + 1] = 0


@compiled
def _rank_by_sorting(source, tables, pairs, other, out):  # type: ignore[no-untyped-def]
    """Radix sort of (magnitude, position), least digit first, then a walk over ties."""
    # Three digits of 10, 10 and 11 bits, or four of 8 where a row is too short for large tables.
    n, half, one = len(source), np.uint64(32), np.uint32(1)
    bits, passes = np.uint64(8 if n < _SHORT_ROW else 10), 4 if n < _SHORT_ROW else 3
    mask, everything = np.uint64((1 << bits) - 1), np.uint64(0xFFFFFFFF)
    values = 2**8 if n < _SHORT_ROW else 2**11
    tables[:passes, :values] = 0
    digit0, digit1, digit2, digit3 = tables[0], tables[1], tables[2], tables[3]
    for i in range(n):
        size = np.uint64(magnitude(source[i]))
        pairs[i] = (size << half) | np.uint64(i)
        digit0[size & mask] += one
        digit1[(size >> bits) & mask] += one
        if passes == 3:
            digit2[size >> (bits + bits)] += one
        else:
            digit2[(size >> (bits + bits)) & mask] += one
            digit3[size >> (bits + bits + bits)] += one
    for k in range(passes):
        _scatter(pairs, other, tables[k, :values], half + np.uint64(k) * bits, everything if k == passes - 1 else mask)
        pairs, other = other, pairs
    _share_ranks(pairs, out)


# Functions of their own, since the compiler then knows that their arrays do not overlap.
@compiled
def _scatter(pairs, other, places, shift, mask):  # type: ignore[no-untyped-def]
    """One pass of the sort: pairs go to `other` by one digit, whose counts `places` holds."""
    total, one = np.uint32(0), np.uint32(1)
    for value in range(len(places)):
        count = places[value]
        places[value] = total
        total += count
    for i in range(len(pairs)):
        pair = pairs[i]
        digit = (pair >> shift) & mask
        place = places[digit]
        other[place] = pair
        places[digit] = place + one


@compiled
def _share_ranks(pairs, out):  # type: ignore[no-untyped-def]
    """First plus last rank of each run of equal magnitudes in the sorted pairs."""
    n, half, position = len(pairs), np.uint64(32), np.uint64(0xFFFFFFFF)
    ties = 0
    for i in range(n - 1):
        ties += pairs[i] >> half == pairs[i + 1] >> half
    if ties == 0:
        for i in range(n):
            out[pairs[i] & position] = 2 * i + 2
        return
    first = 0
    while first < n:
        equal, after = pairs[first] >> half, first + 1
        while after < n and pairs[after] >> half == equal:
            after += 1
        for i in range(first, after):
            out[pairs[i] & position] = first + 1 + after
        first = after


def count_high(values: torch.Tensor) -> np.ndarray:
    """How many entries have each value of the magnitude's upper digit."""
    counts = np.zeros(HIGH, dtype=np.int64)
    _count_high(entries(values), counts)
    return counts


@compiled
def _count_high(values, counts):  # type: ignore[no-untyped-def]
    for i in range(values.size):
        counts[magnitude(values[i]) >> np.uint32(16)] += 1


def count_low(values: torch.Tensor, high: int) -> np.ndarray:
    """How many of the entries with this upper digit have each value of the lower one."""
    counts = np.zeros(LOW, dtype=np.int64)
    _count_low(entries(values), np.uint32(high), counts)
    return counts


@compiled
def _count_low(values, high, counts):  # type: ignore[no-untyped-def]
    for i in range(values.size):
        size = magnitude(values[i])
        if size >> np.uint32(16) == high:
            counts[size & np.uint32(0xFFFF)] += 1


def tied(
    values: torch.Tensor, start: int, *, size: int, window: tuple[int, int], key: Key
) -> tuple[int, np.ndarray, np.ndarray]:
    """Of the entries of one magnitude: how many have numbers below the window, and those inside it.

    Returns the count, and the numbers and positions (counted from the tensor's start) of those with
    `window[0] ≤ number < window[1]`.
    """
    numbers, positions = np.empty(values.numel(), dtype=np.int64), np.empty(values.numel(), dtype=np.int64)
    below, inside = _tied(entries(values), np.uint32(size), *window, *key_words(key), start, numbers, positions)
    return below, numbers[:inside].copy(), positions[:inside].copy()


@compiled
def _tied(values, size, low, high, k0, k1, start, numbers, positions):  # type: ignore[no-untyped-def]
    keys = schedule(k0, k1)
    words, group = np.empty((LANES, GROUP), dtype=np.uint32), np.empty(LANES * GROUP, dtype=np.uint32)
    position, end, below, inside = start, start + values.size, 0, 0
    while position < end:
        first = position // LANES
        stop = min(end, (first + GROUP) * LANES)
        source, drawn = values[position - start : stop - start], group[position % LANES :]
        ties = _count_of(source, size)
        if ties > _MANY:
            draw(first, keys, words, group)
        if ties:
            for i in range(source.size):
                if magnitude(source[i]) == size:
                    u = drawn[i] if ties > _MANY else np.uint32(number_at(position + i, keys))
                    below += u < low
                    if low <= u < high:
                        numbers[inside], positions[inside] = u, position + i
                        inside += 1
        position = stop
    return below, inside


@compiled
def _count_of(values, size):  # type: ignore[no-untyped-def]
    """How many of a few entries have this magnitude."""
    found = 0
    for i in range(values.size):
        found += magnitude(values[i]) == size
    return found


def drop_below(
    values: torch.Tensor, threshold: tuple[int, int, int], factor: float, key: Key, start: int, out: torch.Tensor
) -> None:
    """Set `out` to 0 where (magnitude, number, position) < `threshold`, to `values · factor` elsewhere."""
    size, number, position = threshold
    if size >= HIGH * LOW:
        out.zero_()
        return
    arguments = np.uint32(size), number, position, np.float32(factor), *key_words(key), start
    _drop_below(entries(values), *arguments, entries(out))


@compiled
def _drop_below(values, size, number, place, factor, k0, k1, start, out):  # type: ignore[no-untyped-def]
    keys = schedule(k0, k1)
    words, group = np.empty((LANES, GROUP), dtype=np.uint32), np.empty(LANES * GROUP, dtype=np.uint32)
    position, end = start, start + values.size
    breaks_ties = number > 0 or place > 0
    while position < end:
        first = position // LANES
        stop = min(end, (first + GROUP) * LANES)
        part = slice(position - start, stop - start)
        source, target, drawn = values[part], out[part], group[position % LANES :]
        for i in range(source.size):
            scaled = widen(source[i]) * factor
            target[i] = narrow(scaled if magnitude(source[i]) >= size else np.float32(0), source[i])
        ties = _count_of(source, size) if breaks_ties else 0
        if ties > _MANY:
            draw(first, keys, words, group)
        if ties:
            for i in range(source.size):
                if magnitude(source[i]) == size:
                    u = drawn[i] if ties > _MANY else np.uint32(number_at(position + i, keys))
                    if u < number or (u == number and position + i < place):
                        target[i] = narrow(np.float32(0), source[i])
        position = stop


def positions_between(values: torch.Tensor, low: int, high: int, start: int) -> torch.Tensor:
    """Positions, counted from the tensor's start, of the entries with `low ≤ magnitude < high`."""
    words, span = entries(values), np.uint32(high - low)
    positions = np.empty(_count_between(words, np.uint32(low), span), dtype=np.int64)
    _positions_between(words, np.uint32(low), span, start, positions)
    return torch.from_numpy(positions)


@compiled
def _count_between(values, low, span):  # type: ignore[no-untyped-def]
    count = 0
    for i in range(values.size):
        count += np.uint32(magnitude(values[i]) - low) < span
    return count


@compiled
def _positions_between(values, low, span, start, positions):  # type: ignore[no-untyped-def]
    found = 0
    for begin in range(0, values.size, _STRIDE):
        part = values[begin : begin + _STRIDE]
        # Most strides hold none, and that is seen many entries at a time.
        if _count_between(part, low, span):
            for i in range(part.size):
                if np.uint32(magnitude(part[i]) - low) < span:
                    positions[found] = start + begin + i
                    found += 1


def drop_least(
    values: torch.Tensor, row: int, count: int, factor: float, key: Key, start: int, out: torch.Tensor
) -> None:
    """Set `out` to 0 for the `count` least of each row of float32 entries, to `values · factor` elsewhere.

    The order is (magnitude, number, position).
    """
    _drop_least(values.numpy(), row, count, np.float32(factor), *key_words(key), start, out.numpy())


@compiled
def _drop_least(values, row, count, factor, k0, k1, start, out):  # type: ignore[no-untyped-def]
    keys = schedule(k0, k1)
    table, ties = np.empty(2**11, dtype=np.int64), np.empty(row, dtype=np.uint64)
    for begin in range(0, values.size, row):
        source, target = values[begin : begin + row], out[begin : begin + row]
        size, dropped = _least(source, count, table)
        for i in range(row):
            scaled = source[i] * factor
            target[i] = scaled if magnitude(source[i]) >= size else np.float32(0)
        if dropped == 0:
            continue
        tied = 0
        for i in range(row):
            if magnitude(source[i]) == size:
                ties[tied] = (number_at(start + begin + i, keys) << np.uint64(32)) | np.uint64(i)
                tied += 1
        in_order = np.sort(ties[:tied]) if dropped < tied else ties[:tied]
        for i in range(dropped):
            target[in_order[i] & np.uint64(0xFFFFFFFF)] = 0


@compiled
def _least(values, count, table):  # type: ignore[no-untyped-def]
    """The magnitude of rank `count` (from 1), and how many entries of it are among the `count` least."""
    if count == 0:
        return np.uint32(0), 0
    prefix, remaining = np.uint32(0), count
    for shift, bits in ((20, 11), (10, 10), (0, 10)):
        low, width = np.uint32(shift), np.uint32(bits)
        table[:] = 0
        for i in range(values.size):
            digits = magnitude(values[i]) >> low
            if digits >> width == prefix:
                table[digits & np.uint32((1 << width) - 1)] += 1
        digit = 0
        while table[digit] < remaining:
            remaining -= table[digit]
            digit += 1
        prefix = (prefix << width) | np.uint32(digit)
    return prefix, remaining
