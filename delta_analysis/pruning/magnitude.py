"""Magnitude pruning (MP): drop the smallest entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from delta_analysis._errors import one_of
from delta_analysis._kernels import NATIVE, drop_below, drop_least, new_tensor, row_length, stream_key
from delta_analysis.pruning.by_row import ROWS_BLOCK
from delta_analysis.pruning.pruner import Prune, checked_drop_rate, one_is_no_model
from delta_analysis.pruning.rescaling import Rescale, check_rescale, match_norm, rescale_name, uniform_factor
from delta_analysis.pruning.threshold import Threshold, find_threshold

WITHIN = ("tensor", "row", "model")
_SMALL = 2**17
"""A tensor of so many entries is one row: tables of counts for its whole range would be the larger part."""


@dataclass(frozen=True)
class Magnitude:
    """Drop the entries of least magnitude, exactly `round(p · n)` of n (MP).

    Among entries of equal |δ| the random numbers of (seed, name) decide, then the position; without
    ties nothing is random.

    Parameters
    ----------
    drop_rate : p, in [0, 1]; 0 changes nothing (up to float32), 1 gives zeros.
    within : among which entries the least are sought: `"tensor"`; `"row"`, all that feed one output
        (the first dimension; a vector is one row); or `"model"`, all tensors of a delta together,
        which works inside `Delta.pruned` and in sweeps only, and takes three passes over the delta.
    rescale : `"none"`; or as for `Dare`. With 1/(1-p) the result is far larger than the delta, since
        the entries that are kept are the large ones.

    Raises
    ------
    ValueError
        A drop rate outside [0, 1], a `within` or rescale of no known form. When called: `within="model"`
        on a single tensor.

    Source: DARE, arXiv 2311.03099, section 4.5, without its inflation of the drop rate by ties.

    Examples
    --------
    >>> delta = torch.tensor([1.0, -2.0, 3.0, -4.0])
    >>> Magnitude(0.5)(delta, name="w", seed=0)
    tensor([ 0.,  0.,  3., -4.])
    """

    drop_rate: float
    within: Literal["tensor", "row", "model"] = "tensor"
    rescale: Rescale = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "drop_rate", checked_drop_rate(self.drop_rate))
        if self.within not in WITHIN:
            raise ValueError(one_of("within", self.within, WITHIN))
        check_rescale(self.rescale)

    @property
    def method(self) -> str:
        """What tables and figures call it."""
        return "MP" + ("" if self.within == "tensor" else f" by {self.within}") + rescale_name(self.rescale, "none")

    @property
    def random(self) -> bool:
        """Whether seeds make a difference beyond ties."""
        return False

    def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
        """The pruned tensor, of the input's shape, dtype and device."""
        if self.within == "model":
            raise one_is_no_model(name)
        row = row_length(tensor) if self.within == "row" else tensor.numel()
        if row < tensor.numel() or row <= _SMALL:
            return self._drop_least(tensor, row, name, seed)
        return self.drop_below(self.threshold({name: tensor}, seed), tensor, name=name, seed=seed)

    def _drop_least(self, tensor: torch.Tensor, row: int, name: str, seed: int) -> torch.Tensor:
        count, factor = round(self.drop_rate * row), uniform_factor(self.rescale, self.drop_rate)
        key = stream_key(seed, name)

        def drop(values: torch.Tensor, start: int, out: torch.Tensor) -> None:
            drop_least(values, row, count, factor, key, start, out)

        return match_norm(new_tensor(tensor, drop, multiple=row, block=ROWS_BLOCK), tensor, self.rescale, name)

    def over(self, tensors: Mapping[str, torch.Tensor], seed: int) -> Prune:
        """The pruner of all these tensors together."""
        return partial(self.drop_below, self.threshold(tensors, seed))

    def threshold(self, tensors: Mapping[str, torch.Tensor], seed: int) -> Threshold:
        """Where the entries to drop end, in the order of magnitudes over all these tensors."""
        return find_threshold(tensors.items, self.drop_rate, seed=seed)

    def drop_below(self, threshold: Threshold, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
        """One of the tensors whose threshold was found, pruned."""
        place, key = threshold.of(name), stream_key(seed, name)
        factor = uniform_factor(self.rescale, self.drop_rate)

        def drop(values: torch.Tensor, start: int, out: torch.Tensor) -> None:
            drop_below(values, place, factor, key, start, out)

        return match_norm(new_tensor(tensor, drop, dtypes=NATIVE), tensor, self.rescale, name)
