"""The inner loops of pruning on the CPU, each over one block of entries.

`torch_kernels` has the same functions in plain torch for every other device; both give the same
bits. A magnitude is compared as an integer: the float32 bits of |δ|, which grow with it.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from delta_analysis.philox import GROUP, LANES, Key, draw, fill, number_at, schedule
from delta_analysis.storage import entries, magnitude, narrow, widen

RANGE = 2**32
"""Random numbers are below this; an entry is dropped when its number is below round(p · RANGE)."""
HIGH, LOW = 2**15, 2**16
"""A magnitude's 31 bits in two digits: how many values the upper and the lower one have."""
_SIGN = np.uint32(2**31)
_SHORT_ROW = 1024
_STRIDE = 32
_MANY = 12
"""From so many ties among a group's numbers on, drawing the whole group is cheaper than one by one."""

_kernel = numba.njit(cache=True, nogil=True, error_model="numpy")


def _words(key: Key) -> tuple[np.uint64, np.uint64]:
    return np.uint64(key[0]), np.uint64(key[1])


def random_bits(key: Key, start: int, count: int, device: torch.device) -> torch.Tensor:
    """Numbers `start` to `start + count` of a stream, in int64."""
    bits = np.empty(count, dtype=np.uint32)
    fill(key, start, bits)
    return torch.from_numpy(bits.astype(np.int64))


def drop(
    values: torch.Tensor, p: float | torch.Tensor, factor: float | None, key: Key, start: int, out: torch.Tensor
) -> None:
    """Set `out` to 0 where the random number is below round(p · 2³²), to `values · factor` elsewhere.

    `p` is one probability or a float64 block of them; a factor of None is 1/(1-p) of each entry.
    """
    scale = np.float32(inverse_keep(p) if factor is None and isinstance(p, float) else factor or 0)
    if isinstance(p, torch.Tensor):
        _drop_each(entries(values), *_words(key), start, p.view(-1).numpy(), scale, factor is None, entries(out))
    elif round(p * RANGE) == RANGE:
        out.zero_()
    else:
        _drop_uniform(entries(values), *_words(key), start, np.uint32(round(p * RANGE)), scale, entries(out))


def inverse_keep(p: float) -> float:
    """1/(1-p); where everything is dropped there is nothing to rescale, and it is 1."""
    return 1.0 if p == 1 else 1 / (1 - p)


@_kernel
def _drop_uniform(values, k0, k1, start, threshold, factor, out):  # type: ignore[no-untyped-def]
    keys = schedule(k0, k1)
    words, numbers = np.empty((LANES, GROUP), dtype=np.uint32), np.empty(LANES * GROUP, dtype=np.uint32)
    position, end = start, start + values.size
    while position < end:
        first = position // LANES
        draw(first, keys, words, numbers)
        stop = min(end, (first + GROUP) * LANES)
        drawn, part = numbers[position % LANES :], slice(position - start, stop - start)
        source, target = values[part], out[part]
        for i in range(source.size):
            scaled = widen(source[i]) * factor
            target[i] = narrow(scaled if drawn[i] >= threshold else np.float32(0), source[i])
        position = stop


@_kernel
def _drop_each(values, k0, k1, start, p, factor, own_factor, out):  # type: ignore[no-untyped-def]
    keys = schedule(k0, k1)
    words, numbers = np.empty((LANES, GROUP), dtype=np.uint32), np.empty(LANES * GROUP, dtype=np.uint32)
    position, end = start, start + values.size
    while position < end:
        first = position // LANES
        draw(first, keys, words, numbers)
        stop = min(end, (first + GROUP) * LANES)
        drawn, part = numbers[position % LANES :], slice(position - start, stop - start)
        source, target, rates = values[part], out[part], p[part]
        for i in range(source.size):
            scaled = widen(source[i]) * (np.float32(1 / (1 - rates[i])) if own_factor else factor)
            # Processors convert signed integers: the number is moved down by half the range and back.
            number = np.float64(np.int32(drawn[i] ^ _SIGN)) + RANGE / 2
            kept = number >= np.rint(rates[i] * RANGE)
            target[i] = narrow(scaled if kept else np.float32(0), source[i])
        position = stop


def rank_sums(rows: torch.Tensor) -> torch.Tensor:
    """First plus last rank of each float32 entry's magnitude within its row, equal ones sharing both.

    Ranks count from 1, so half of it is the mean rank; float64 of the shape of `rows`.
    """
    out = np.empty(tuple(rows.shape))
    _rank_sums(rows.numpy(), out)
    return torch.from_numpy(out)


@_kernel
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


@_kernel
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


@_kernel
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
@_kernel
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


@_kernel
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


@_kernel
def _count_high(values, counts):  # type: ignore[no-untyped-def]
    for i in range(values.size):
        counts[magnitude(values[i]) >> np.uint32(16)] += 1


def count_low(values: torch.Tensor, high: int) -> np.ndarray:
    """How many of the entries with this upper digit have each value of the lower one."""
    counts = np.zeros(LOW, dtype=np.int64)
    _count_low(entries(values), np.uint32(high), counts)
    return counts


@_kernel
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
    below, inside = _tied(entries(values), np.uint32(size), *window, *_words(key), start, numbers, positions)
    return below, numbers[:inside].copy(), positions[:inside].copy()


@_kernel
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


@numba.njit(cache=True)
def _count_of(values, size):  # type: ignore[no-untyped-def]
    """How many of a few entries have this magnitude."""
    found = 0
    for i in range(values.size):
        found += magnitude(values[i]) == size
    return found


def drop_below(
    values: torch.Tensor, cut: tuple[int, int, int], factor: float, key: Key, start: int, out: torch.Tensor
) -> None:
    """Set `out` to 0 where (magnitude, number, position) < `cut`, to `values · factor` elsewhere."""
    size, number, position = cut
    if size >= HIGH * LOW:
        out.zero_()
        return
    arguments = np.uint32(size), number, position, np.float32(factor), *_words(key), start
    _drop_below(entries(values), *arguments, entries(out))


@_kernel
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


@_kernel
def _count_between(values, low, span):  # type: ignore[no-untyped-def]
    count = 0
    for i in range(values.size):
        count += np.uint32(magnitude(values[i]) - low) < span
    return count


@_kernel
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


def drop_at(
    values: torch.Tensor, p: torch.Tensor, factor: float | None, key: Key, positions: torch.Tensor
) -> torch.Tensor:
    """What `drop` makes of float32 entries that stand at scattered positions of the tensor."""
    out = torch.empty_like(values)
    arguments = positions.numpy(), p.numpy(), np.float32(factor or 0), factor is None
    _drop_at(values.numpy(), *_words(key), *arguments, out.numpy())
    return out


@_kernel
def _drop_at(values, k0, k1, positions, p, factor, own_factor, out):  # type: ignore[no-untyped-def]
    keys = schedule(k0, k1)
    for i in range(values.size):
        number = number_at(positions[i], keys)
        scaled = values[i] * (np.float32(1 / (1 - p[i])) if own_factor else factor)
        out[i] = scaled if np.float64(number) >= np.rint(p[i] * RANGE) else np.float32(0)


def drop_least(
    values: torch.Tensor, row: int, count: int, factor: float, key: Key, start: int, out: torch.Tensor
) -> None:
    """Set `out` to 0 for the `count` least of each row of float32 entries, to `values · factor` elsewhere.

    The order is (magnitude, number, position).
    """
    _drop_least(values.numpy(), row, count, np.float32(factor), *_words(key), start, out.numpy())


@_kernel
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


@_kernel
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


def power_sums(values: torch.Tensor, power: int) -> torch.Tensor:
    """Exact sums of |x|^power by exponent: integers of shape (2, 256), a low and a high part.

    A float32 is an integer below 2²⁴ times a power of two. The sums are of these integers; of their
    squares, the low part has the lower 24 bits, the high part the rest.
    """
    sums = np.zeros((2, 256), dtype=np.int64)
    _power_sums(entries(values), power, sums)
    return torch.from_numpy(sums)


@_kernel
def _power_sums(values, power, sums):  # type: ignore[no-untyped-def]
    low, high = sums[0], sums[1]
    for i in range(values.size):
        size = np.int64(magnitude(values[i]))
        exponent = size >> 23
        integer = (size & 0x7FFFFF) | (np.int64(exponent > 0) << 23)
        if power == 2:
            term = integer * integer
            low[exponent] += term & 0xFFFFFF
            high[exponent] += term >> 24
        else:
            low[exponent] += integer
