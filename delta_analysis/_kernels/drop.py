"""Dropping by probability: random numbers, masks and factors over one block of entries."""

from __future__ import annotations

import numpy as np
import torch

from delta_analysis._kernels.floats import compiled, entries, magnitude, narrow, widen
from delta_analysis._kernels.philox import GROUP, LANES, RANGE, Key, draw, number_at, schedule

_SIGN = np.uint32(2**31)


def key_words(key: Key) -> tuple[np.uint64, np.uint64]:
    """A key as compiled loops take it."""
    return np.uint64(key[0]), np.uint64(key[1])


def drop_randomly(
    values: torch.Tensor, p: float | torch.Tensor, factor: float | None, key: Key, start: int, out: torch.Tensor
) -> None:
    """Set `out` to 0 where the random number is below round(p · 2³²), to `values · factor` elsewhere.

    `p` is one probability or a float64 block of them; a factor of None is 1/(1-p) of each entry.
    """
    scale = np.float32(inverse_keep(p) if factor is None and isinstance(p, float) else factor or 0)
    if isinstance(p, torch.Tensor):
        _drop_each(entries(values), *key_words(key), start, p.view(-1).numpy(), scale, factor is None, entries(out))
    elif round(p * RANGE) == RANGE:
        out.zero_()
    else:
        _drop_uniform(entries(values), *key_words(key), start, np.uint32(round(p * RANGE)), scale, entries(out))


def inverse_keep(p: float) -> float:
    """1/(1-p); where everything is dropped there is nothing to rescale, and it is 1."""
    return 1.0 if p == 1 else 1 / (1 - p)


@compiled
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


@compiled
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


def drop_at(
    values: torch.Tensor, p: torch.Tensor, factor: float | None, key: Key, positions: torch.Tensor
) -> torch.Tensor:
    """What `drop_randomly` makes of float32 entries that stand at scattered positions of the tensor."""
    out = torch.empty_like(values)
    arguments = positions.numpy(), p.numpy(), np.float32(factor or 0), factor is None
    _drop_at(values.numpy(), *key_words(key), *arguments, out.numpy())
    return out


@compiled
def _drop_at(values, k0, k1, positions, p, factor, own_factor, out):  # type: ignore[no-untyped-def]
    keys = schedule(k0, k1)
    for i in range(values.size):
        number = number_at(positions[i], keys)
        scaled = values[i] * (np.float32(1 / (1 - p[i])) if own_factor else factor)
        out[i] = scaled if np.float64(number) >= np.rint(p[i] * RANGE) else np.float32(0)


def power_sums(values: torch.Tensor, power: int) -> torch.Tensor:
    """Exact sums of |x|^power by exponent: integers of shape (2, 256), a low and a high part.

    A float32 is an integer below 2²⁴ times a power of two. The sums are of these integers; of their
    squares, the low part has the lower 24 bits, the high part the rest.
    """
    sums = np.zeros((2, 256), dtype=np.int64)
    _power_sums(entries(values), power, sums)
    return torch.from_numpy(sums)


@compiled
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
