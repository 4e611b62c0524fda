"""The inner loops of pruning in plain torch, for devices other than the CPU; see `kernels`.

Every operation is an integer one or a single correctly rounded float one, so that the bits are
those of the CPU's loops, the payload of a NaN aside.
"""

from __future__ import annotations

import numpy as np
import torch

from delta_analysis._kernels.drop import inverse_keep
from delta_analysis._kernels.floats import HIGH, LOW
from delta_analysis._kernels.philox import LANES, MULTIPLIERS, RANGE, ROUNDS, WEYL, Key
from delta_analysis._kernels.philox import LOW as WORD

_MAGNITUDE = 0x7FFFFFFF


def random_bits(key: Key, start: int, count: int, device: torch.device) -> torch.Tensor:
    """Numbers `start` to `start + count` of a stream, in int64."""
    block = torch.arange(start // LANES, (start + count + LANES - 1) // LANES, device=device)
    c0, c1, c2, c3 = block & WORD, block >> 32, torch.zeros_like(block), torch.zeros_like(block)
    for i in range(ROUNDS):
        # The products wrap around in int64, which leaves the 64 bits of the unsigned product.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        k0, k1 = ((word + i * step) & WORD for word, step in zip(key, WEYL, strict=True))
        c0, c1 = (product1 >> 32) & WORD ^ c1 ^ k0, product1 & WORD
        c2, c3 = (product0 >> 32) & WORD ^ c3 ^ k1, product0 & WORD
    offset = start % LANES
    return torch.stack((c0, c1, c2, c3), dim=1).reshape(-1)[offset : offset + count]


def drop(
    values: torch.Tensor, p: float | torch.Tensor, factor: float | None, key: Key, start: int, out: torch.Tensor
) -> None:
    bits = random_bits(key, start, values.numel(), values.device)
    if isinstance(p, torch.Tensor):
        kept = bits >= torch.round(p.view(-1) * RANGE)
        scale = (1 / (1 - p.view(-1))).to(torch.float32) if factor is None else factor
    else:
        kept = bits >= round(p * RANGE)
        scale = inverse_keep(p) if factor is None else factor
    out.copy_(torch.where(kept, _scaled(values, scale), 0.0))


def _scaled(values: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    return values.to(torch.float32) * (scale if isinstance(scale, torch.Tensor) else float(np.float32(scale)))


def _magnitudes(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float32).view(torch.int32) & _MAGNITUDE


def rank_sums(rows: torch.Tensor) -> torch.Tensor:
    magnitudes = _magnitudes(rows)
    in_order = magnitudes.sort(dim=1).values
    first = torch.searchsorted(in_order, magnitudes) + 1
    last = torch.searchsorted(in_order, magnitudes, right=True)
    return (first + last).to(torch.float64)


def count_high(values: torch.Tensor) -> np.ndarray:
    return torch.bincount(_magnitudes(values) >> 16, minlength=HIGH).cpu().numpy()


def count_low(values: torch.Tensor, high: int) -> np.ndarray:
    magnitudes = _magnitudes(values)
    return torch.bincount(magnitudes[magnitudes >> 16 == high] & 0xFFFF, minlength=LOW).cpu().numpy()


def tied(
    values: torch.Tensor, start: int, *, size: int, window: tuple[int, int], key: Key
) -> tuple[int, np.ndarray, np.ndarray]:
    positions = torch.nonzero(_magnitudes(values) == size)[:, 0]
    numbers = random_bits(key, start, values.numel(), values.device)[positions]
    inside = (numbers >= window[0]) & (numbers < window[1])
    below = int(torch.count_nonzero(numbers < window[0]))
    return below, numbers[inside].cpu().numpy(), (positions[inside] + start).cpu().numpy()


def drop_below(
    values: torch.Tensor, cut: tuple[int, int, int], factor: float, key: Key, start: int, out: torch.Tensor
) -> None:
    size, number, position = cut
    magnitudes = _magnitudes(values)
    dropped = magnitudes < size if size < HIGH * LOW else torch.ones_like(magnitudes, dtype=torch.bool)
    if number or position:
        numbers = random_bits(key, start, values.numel(), values.device)
        positions = torch.arange(start, start + values.numel(), device=values.device)
        before = (numbers < number) | ((numbers == number) & (positions < position))
        dropped |= (magnitudes == size) & before
    out.copy_(torch.where(dropped, 0.0, _scaled(values, factor)))


def drop_least(
    values: torch.Tensor, row: int, count: int, factor: float, key: Key, start: int, out: torch.Tensor
) -> None:
    numbers = random_bits(key, start, values.numel(), values.device).view(-1, row)
    dropped = least_of_rows(values.view(-1, row), numbers, count).view(-1)
    out.copy_(torch.where(dropped, 0.0, _scaled(values, factor)))


def least_of_rows(values: torch.Tensor, numbers: torch.Tensor, count: int) -> torch.Tensor:
    """True for the `count` least entries of each row in the order of (|δ|, random number, position)."""
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    order = _magnitudes(values).to(torch.int64) << 32 | numbers
    last = order.kthvalue(count, dim=1, keepdim=True).values
    before, equal = order < last, order == last
    return before | (equal & (equal.cumsum(dim=1) <= count - before.sum(dim=1, keepdim=True)))


def power_sums(values: torch.Tensor, power: int) -> torch.Tensor:
    sizes = _magnitudes(values)
    exponents = sizes >> 23
    integers = ((sizes & 0x7FFFFF) | ((exponents > 0).int() << 23)).to(torch.int64)
    terms = integers if power == 1 else integers * integers
    sums = torch.zeros(2, 256, dtype=torch.int64, device=values.device)
    parts = (terms, torch.zeros_like(terms)) if power == 1 else (terms & 0xFFFFFF, terms >> 24)
    for row, part in zip(sums, parts, strict=True):
        row.index_add_(0, exponents, part)
    return sums.cpu()
