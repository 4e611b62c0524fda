"""The inner loop of value ranges: read entries once, count and add up all that a table needs."""

from __future__ import annotations

import numpy as np

from delta_analysis._kernels.floats import compiled, widen

LANES = 64
"""Sums and extremes are kept in this many lanes, so that each step works on neighbours and needs no other order."""
RUN = 4096
"""Entries whose float32 differences stay in the innermost cache while they are counted and added."""
BUCKETS = 2**16
"""One bucket for each value of a float32's upper 16 bits: sign, exponent, 7 bits of mantissa."""
SUBTRACT, BESIDE, ALONE = range(3)
"""What the base's entries are for: to be subtracted, for their size only, or for nothing (there are none)."""
FINITE = 0x7F800000
"""The magnitude bits of infinity."""


@compiled
def tally_piece(finetuned, base, use, limits, counts, extremes, sums, histogram):  # type: ignore[no-untyped-def]
    """Add a piece of entries to the tally of its block of the grid.

    `counts` has first the entries that are not finite on either side, which stand in nothing else, then those
    of |δ| below each of `limits`, which are magnitude bits; `extremes` the least and greatest δ; `sums` the
    number of finite entries, Σ δ, Σ (δ - mean)² and Σ base²; `histogram` entries by the upper 16 bits of δ.
    """
    delta, start = np.empty(RUN, np.float32), np.zeros(RUN, np.float32)
    bits, start_bits = delta.view(np.uint32), start.view(np.uint32)
    low, high = np.full(LANES, extremes[0]), np.full(LANES, extremes[1])
    lanes, base_lanes = np.empty(LANES), np.empty(LANES)
    for first in range(0, len(finetuned), RUN):
        last = min(first + RUN, len(finetuned))
        n = last - first
        if use == SUBTRACT:
            _subtract(finetuned[first:last], base[first:last], delta, start)
        else:
            _copy(finetuned[first:last], delta)
            if use == BESIDE:
                _copy(base[first:last], start)
        finite = _count_below(bits[:n], np.uint32(FINITE))
        if use == BESIDE:
            # What is subtracted shows in the difference, what stands beside it does not.
            finite = min(finite, _count_below(start_bits[:n], np.uint32(FINITE)))
        if finite < n:
            finite = _pack_finite(bits[:n], start_bits, delta, start)
            counts[0] += n - finite
            n = finite
        if n == 0:
            continue
        for t in range(len(limits)):
            counts[1 + t] += _count_below(bits[:n], limits[t])
        _widen_range(delta[:n], low, high)
        _count_buckets(bits[:n], histogram)
        lanes[:], base_lanes[:] = 0.0, 0.0
        _add(delta[:n], lanes)
        _add_squares(start[:n], 0.0, base_lanes)
        total = _total(lanes)
        lanes[:] = 0.0
        _add_squares(delta[:n], total / n, lanes)
        _merge(sums, n, total, _total(lanes), _total(base_lanes))
    extremes[0], extremes[1] = low.min(), high.max()


@compiled
def _subtract(finetuned, base, delta, start):  # type: ignore[no-untyped-def]
    for i in range(len(finetuned)):
        value = widen(base[i])
        start[i] = value
        delta[i] = widen(finetuned[i]) - value


@compiled
def _copy(entries, out):  # type: ignore[no-untyped-def]
    for i in range(len(entries)):
        out[i] = widen(entries[i])


@compiled
def _count_below(bits, limit):  # type: ignore[no-untyped-def]
    count = np.uint32(0)
    for i in range(len(bits)):
        count = np.uint32(count + np.uint32((bits[i] & np.uint32(0x7FFFFFFF)) < limit))
    return np.int64(count)


@compiled
def _pack_finite(bits, start_bits, delta, start):  # type: ignore[no-untyped-def]
    """Move the entries that are finite on both sides to the front, in their order; how many there are."""
    n = 0
    for i in range(len(bits)):
        largest = max(bits[i] & np.uint32(0x7FFFFFFF), start_bits[i] & np.uint32(0x7FFFFFFF))
        if largest < np.uint32(FINITE):
            delta[n], start[n] = delta[i], start[i]
            n += 1
    return n


@compiled
def _count_buckets(bits, histogram):  # type: ignore[no-untyped-def]
    for i in range(len(bits)):
        histogram[bits[i] >> np.uint32(16)] += np.uint32(1)


@compiled
def _widen_range(values, low, high):  # type: ignore[no-untyped-def]
    rows = len(values) // LANES
    for row in range(rows):
        for lane in range(LANES):
            value = values[row * LANES + lane]
            low[lane] = value if value < low[lane] else low[lane]
            high[lane] = value if value > high[lane] else high[lane]
    for lane in range(len(values) - rows * LANES):
        value = values[rows * LANES + lane]
        low[lane] = value if value < low[lane] else low[lane]
        high[lane] = value if value > high[lane] else high[lane]


@compiled
def _add(values, lanes):  # type: ignore[no-untyped-def]
    rows = len(values) // LANES
    for row in range(rows):
        for lane in range(LANES):
            lanes[lane] += np.float64(values[row * LANES + lane])
    for lane in range(len(values) - rows * LANES):
        lanes[lane] += np.float64(values[rows * LANES + lane])


@compiled
def _add_squares(values, centre, lanes):  # type: ignore[no-untyped-def]
    rows = len(values) // LANES
    for row in range(rows):
        for lane in range(LANES):
            distance = np.float64(values[row * LANES + lane]) - centre
            lanes[lane] += distance * distance
    for lane in range(len(values) - rows * LANES):
        distance = np.float64(values[rows * LANES + lane]) - centre
        lanes[lane] += distance * distance


@compiled
def _total(lanes):  # type: ignore[no-untyped-def]
    total = 0.0
    for lane in range(LANES):
        total += lanes[lane]
    return total


@compiled
def _merge(sums, n, total, centred, base_square):  # type: ignore[no-untyped-def]
    # Means and centred sums are merged after Chan, Golub and LeVeque (1983): plain sums of squares
    # would lose the spread of weights that lie close around 1.
    before = sums[0]
    if before > 0:
        step = total / n - sums[1] / before
        centred += step * step * (before * n / (before + n))
    sums[0] += n
    sums[1] += total
    sums[2] += centred
    sums[3] += base_square
