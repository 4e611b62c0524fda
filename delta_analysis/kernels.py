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
    """Radix sort of (magnitude, position), least digit first, then a walk over ties."""
    n = rows.shape[1]
    pairs, other = np.empty(n, dtype=np.uint64), np.empty(n, dtype=np.uint64)
    tables = np.empty((4, 2**11), dtype=np.uint32)
    half, one = np.uint64(32), np.uint32(1)
    for row in range(rows.shape[0]):
        source, target = rows[row], out[row]
        # Low bits that are 0 in all entries, as in half-width weights, sort nothing.
        union = np.uint32(0)
        for i in range(n):
            union |= magnitude(source[i])
        unused = 0
        while unused < 30 and union >> np.uint32(unused) & one == 0:
            unused += 1
        digit = 8 if n < _SHORT_ROW or unused > 14 else 11
        passes = max((31 - unused + digit - 1) // digit, 2)
        counts = tables[:, : 1 << digit]
        counts[:] = 0
        digit0, digit1, digit2, digit3 = counts[0], counts[1], counts[2], counts[3]
        base, width, mask = np.uint64(unused), np.uint64(digit), np.uint64((1 << digit) - 1)
        for i in range(n):
            size = np.uint64(magnitude(source[i])) >> base
            pairs[i] = (size << half) | np.uint64(i)
            digit0[size & mask] += one
            digit1[(size >> width) & mask] += one
            if passes > 2:
                digit2[(size >> (width + width)) & mask] += one
            if passes > 3:
                digit3[(size >> (width + width + width)) & mask] += one
        for k in range(passes):
            places, shift = counts[k], half + np.uint64(k) * width
            if n == 0 or places[(pairs[0] >> shift) & mask] == n:
                continue
            total = np.uint32(0)
            for value in range(len(places)):
                count = places[value]
                places[value] = total
                total += count
            for i in range(n):
                pair = pairs[i]
                bucket = (pair >> shift) & mask
                place = places[bucket]
                other[place] = pair
                places[bucket] = place + one
            pairs, other = other, pairs
        first = 0
        while first < n:
            equal, last = pairs[first] >> half, first + 1
            while last < n and pairs[last] >> half == equal:
                last += 1
            for i in range(first, last):
                target[pairs[i] & np.uint64(0xFFFFFFFF)] = first + 1 + last
            first = last


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
        if _holds(source, size):
            draw(first, keys, words, group)
            for i in range(source.size):
                if magnitude(source[i]) == size:
                    below += drawn[i] < low
                    if low <= drawn[i] < high:
                        numbers[inside], positions[inside] = drawn[i], position + i
                        inside += 1
        position = stop
    return below, inside


@numba.njit(cache=True)
def _holds(values, size):  # type: ignore[no-untyped-def]
    """Whether any of a few entries has this magnitude."""
    found = 0
    for i in range(values.size):
        found += magnitude(values[i]) == size
    return found > 0


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
        if breaks_ties and _holds(source, size):
            draw(first, keys, words, group)
            for i in range(source.size):
                below = drawn[i] < number or (drawn[i] == number and position + i < place)
                if below and magnitude(source[i]) == size:
                    target[i] = narrow(np.float32(0), source[i])
        position = stop


def positions_between(values: torch.Tensor, low: int, high: int, start: int) -> torch.Tensor:
    """Positions, counted from the tensor's start, of the entries with `low ≤ magnitude < high`."""
    positions = np.empty(values.numel(), dtype=np.int64)
    count = _positions_between(entries(values), low, high, start, positions)
    return torch.from_numpy(positions[:count].copy())


@_kernel
def _positions_between(values, low, high, start, positions):  # type: ignore[no-untyped-def]
    count = 0
    for i in range(values.size):
        size = np.int64(magnitude(values[i]))
        if low <= size < high:
            positions[count] = start + i
            count += 1
    return count


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
