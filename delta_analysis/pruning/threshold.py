"""The place in the order of magnitudes below which magnitude pruning drops, over any number of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from delta_analysis._kernels import HIGH, LOW, NATIVE, RANGE, count_high, count_low, map_blocks, stream_key, tied

Tensors = Callable[[], Iterable[tuple[str, torch.Tensor]]]
"""Starts a pass: each call yields every tensor with its name again, in any order."""
_COUNTED = 2**22
"""Entries of a block that is counted; each gives a table of counts of its own."""
_SUMMED = 2**23
"""Entries whose tables of counts are held at a time."""
_SIGMAS = 9


@dataclass(frozen=True)
class Threshold:
    """Entries are dropped when (magnitude, random number, tensor's name, position) is below this.

    `magnitude` is the float32 bits of |δ| without the sign, as an integer.
    """

    magnitude: int
    number: int = 0
    name: str = ""
    position: int = 0

    def of(self, name: str) -> tuple[int, int, int]:
        """The same for one tensor: (magnitude, number, position) below which its entries are dropped."""
        if name == self.name:
            return self.magnitude, self.number, self.position
        # A tensor earlier in the alphabet loses the ties at the number itself, a later one keeps them.
        return self.magnitude, self.number + (name < self.name), 0


def find_threshold(tensors: Tensors, drop_rate: float, *, seed: int) -> Threshold:
    """The threshold below which exactly `round(p · n)` of n entries lie, in at most three passes over the tensors.

    The first pass counts the upper 15 bits of the magnitudes, the second the lower 16 of those in
    the bucket that holds the threshold; so its magnitude is exact. If only some of the entries of that
    magnitude are to be dropped, a third pass looks at their random numbers. Since these are uniform,
    the threshold among them is known within a narrow window beforehand, and only the entries in the window
    are collected. (A rank outside nine standard deviations would take one more pass.)
    """
    high_counts = _count_all(tensors, HIGH, count_high)
    count = round(drop_rate * int(high_counts.sum()))
    if count == 0:
        return Threshold(0)
    high, remaining = _place(high_counts, count)
    low_counts = _count_all(tensors, LOW, partial(count_low, high=high))
    low, remaining = _place(low_counts, remaining)
    magnitude, ties = high * LOW + low, int(low_counts[low])
    if remaining == ties:
        return Threshold(magnitude + 1)
    for window in (_window(remaining, ties), (0, RANGE)):
        below, inside = _ties(tensors, magnitude, window, seed)
        if below <= remaining < below + len(inside):
            break
    number, name, position = sorted(inside)[remaining - below]
    return Threshold(magnitude, number, name, position)


def _place(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """The bucket that holds the entry of a rank (from 1), and its rank within the bucket."""
    cumulative = np.cumsum(counts)
    bucket = int(np.searchsorted(cumulative, rank))
    return bucket, int(rank - (cumulative[bucket] - counts[bucket]))


Count = Callable[[torch.Tensor], np.ndarray]
"""Makes a table of counts of a block."""


def count_digit(tensor: torch.Tensor, size: int, count: Count) -> np.ndarray:
    """The sum over a tensor's blocks of a table of `size` counts."""
    total = np.zeros(size, dtype=np.int64)
    for part in tensor.detach().reshape(-1).split(_SUMMED):
        total += sum(map_blocks(part, lambda values, _: count(values), block=_COUNTED, dtypes=NATIVE))
    return total


def _count_all(tensors: Tensors, size: int, count: Count) -> np.ndarray:
    return sum((count_digit(tensor, size, count) for _, tensor in tensors()), np.zeros(size, dtype=np.int64))


def _window(rank: int, ties: int) -> tuple[int, int]:
    """Numbers between which the one of this rank among `ties` uniform ones lies, almost surely."""
    share = rank / ties
    margin = _SIGMAS * math.sqrt(share * (1 - share) / ties) + _SIGMAS**2 / ties
    return max(math.floor((share - margin) * RANGE), 0), min(math.ceil((share + margin) * RANGE), RANGE)


def _ties(
    tensors: Tensors, magnitude: int, window: tuple[int, int], seed: int
) -> tuple[int, list[tuple[int, str, int]]]:
    """How many entries of a magnitude have numbers below the window, and those inside it."""
    below, inside = 0, []
    for name, tensor in tensors():
        work = partial(tied, size=magnitude, window=window, key=stream_key(seed, name))
        for fewer, numbers, positions in map_blocks(tensor, work, dtypes=NATIVE):
            below += fewer
            inside += [(number, name, i) for number, i in zip(numbers.tolist(), positions.tolist(), strict=True)]
    return below, inside
