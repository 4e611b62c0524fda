"""Drop at random in proportion: the larger an entry, the likelier it is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from delta_analysis._errors import one_of
from delta_analysis._kernels import HIGH, map_blocks, stream_key
from delta_analysis.pruning.by_row import drop_rows
from delta_analysis.pruning.moments import Law
from delta_analysis.pruning.pruner import Prune, checked_drop_rate, one_is_no_model

WITHIN = ("tensor", "model")
DIGITS = 10
"""The scale is rounded to so many digits, so that no order of summation shows in a mask."""
_SUMMED = 2**21
"""Entries whose tables of counts and sums are held at a time."""


@dataclass(frozen=True)
class Proportional:
    """Keep entries at random with probability `min(1, c·|δ|)` and divide those kept by it.

    Of all ways to drop entries independently, leave the mean as it is, and keep `(1-p) · n` of them on
    average, this one has the least variance `Σ δ² (1/k - 1)`, over all entries together: with a
    multiplier μ for the number kept, `-δ²/k² + μ = 0` gives keep probabilities k in proportion to
    |δ|, up to 1. Small entries that are kept all become ±1/c. The random numbers are those of `Dare`.

    Parameters
    ----------
    drop_rate : p, in [0, 1]; 0 changes nothing (up to float32), 1 gives zeros. Entries that are zero
        are dropped first and count; if fewer than `(1-p) · n` are not zero, these are all kept.
    within : among which entries c is one number: those of each `"tensor"`, or of the whole `"model"`,
        so that tensors of small entries lose more. The latter works inside `Delta.pruned` and in sweeps
        only, and takes one more pass over the delta.

    Raises
    ------
    ValueError
        A drop rate outside [0, 1], an unknown `within`. When called: `within="model"` on a single tensor; NaN or
        infinite entries.

    Source: this package; sampling with probability proportional to size is Hansen and Hurwitz's, 1943,
    doi 10.1214/aoms/1177731356.

    Examples
    --------
    >>> delta = torch.tensor([1.0, -2.0, 3.0, -4.0])
    >>> Proportional(0.5)(delta, name="w", seed=0)
    tensor([ 0., -5.,  0., -5.])
    """

    drop_rate: float
    within: Literal["tensor", "model"] = "tensor"
    rescale: Literal["inverse_keep"] = "inverse_keep"

    def __post_init__(self) -> None:
        object.__setattr__(self, "drop_rate", checked_drop_rate(self.drop_rate))
        if self.within not in WITHIN:
            raise ValueError(one_of("within", self.within, WITHIN))
        if self.rescale != "inverse_keep":
            raise ValueError(f"rescale must be 'inverse_keep', each entry by its own probability; not {self.rescale!r}")

    @property
    def method(self) -> str:
        """What tables and figures call it."""
        return "proportional" if self.within == "tensor" else f"proportional by {self.within}"

    @property
    def random(self) -> bool:
        """Whether seeds make a difference."""
        return 0 < self.drop_rate < 1

    def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
        """The pruned tensor, of the input's shape, dtype and device."""
        return self._own(tensor, name)(tensor, name=name, seed=seed)

    def law(self, tensor: torch.Tensor, *, name: str) -> Law:
        """Each entry's own probability and factor, float64 tensors of its shape."""
        return self._own(tensor, name).law(tensor, name=name)

    def over(self, tensors: Mapping[str, torch.Tensor], seed: int) -> Prune:
        """The pruner of all these tensors together."""
        return KeepInProportion(find_scale(((name, tensors[name]) for name in sorted(tensors)), self.drop_rate))

    def _own(self, tensor: torch.Tensor, name: str) -> KeepInProportion:
        if self.within == "model":
            raise one_is_no_model(name)
        return KeepInProportion(find_scale([(name, tensor)], self.drop_rate))


@dataclass(frozen=True)
class KeepInProportion:
    """`Proportional` with its scale c found, at least 0: an infinite one keeps all that is not zero."""

    scale: float

    def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
        return drop_rows(tensor, 1, self._drop_probabilities, None, stream_key(seed, name))

    def law(self, tensor: torch.Tensor, *, name: str) -> Law:
        drop = self._drop_probabilities(tensor.detach().to("cpu", torch.float32))
        return Law(drop, torch.where(drop < 1, 1 / (1 - drop), 1.0))

    def _drop_probabilities(self, values: torch.Tensor) -> torch.Tensor:
        sizes = values.to(torch.float64).abs()
        return 1 - torch.where(sizes > 0, (sizes * self.scale).clamp(max=1), 0.0)


def find_scale(tensors: Iterable[tuple[str, torch.Tensor]], drop_rate: float) -> float:
    """The c for which `Σ min(1, c·|δ|)` is `(1-p) · n`, in one pass, or infinity if too few entries are not zero.

    Entries are counted and summed in buckets of magnitudes of equal upper 15 bits, which are less than 1%
    wide; sums are exact, so that only the bucket in which probabilities reach 1 is taken as a whole. Of
    the entries in that bucket up to 1 in 512 more are dropped than asked for, and never fewer.
    """
    counts, sums = np.zeros(HIGH), np.zeros(HIGH)
    for name, tensor in tensors:
        for part in tensor.detach().reshape(-1).split(_SUMMED):
            for of_block in map_blocks(part, lambda values, _: _count_and_sum(values)):
                counts += of_block[0]
                sums += of_block[1]
        if not np.isfinite(sums).all():
            raise ValueError(f"tensor {name!r} has NaN or infinite entries, so no probabilities in proportion to them")
    kept = (1 - drop_rate) * counts.sum()
    filled = np.flatnonzero(sums)[::-1]
    counts, sums = counts[filled], sums[filled]
    if counts.sum() <= kept:
        return np.inf
    # With the largest m buckets kept for certain, the others share what is left.
    certain = np.concatenate([[0.0], np.cumsum(counts)[:-1]])
    rest = np.cumsum(sums[::-1])[::-1]
    # Without a division the last comparison holds whatever the rounding, so that there is a first.
    first = int(np.argmax((kept - certain) * sums <= counts * rest))
    return float(f"{(kept - certain[first]) / rest[first]:.{DIGITS}g}")


def _count_and_sum(values: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of a float32 block, how many entries are in each bucket of magnitudes, and the sum of theirs."""
    sizes = values.abs()
    buckets = (sizes.view(torch.int32) >> 16).to(torch.int64)
    counts = torch.bincount(buckets, minlength=HIGH)
    sums = torch.bincount(buckets, weights=sizes.to(torch.float64), minlength=HIGH)
    return counts.numpy(), sums.numpy()
