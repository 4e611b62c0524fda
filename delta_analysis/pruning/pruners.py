"""Pruning operators: which entries of a delta are dropped, and how the rest is rescaled.

Each operator has one shape: the probability of dropping an entry, the mask from the random numbers
named by (seed, tensor), the rescaling of what is left. The arithmetic is float32 whatever the
storage; the result has the input's dtype, shape and device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Literal, Protocol, runtime_checkable

import torch

from delta_analysis._errors import one_of
from delta_analysis._kernels import NATIVE, kernels_for, new_tensor, row_length, stream_key
from delta_analysis.pruning.by_row import drop_by_rank, drop_least, drop_rows, shares_of_range
from delta_analysis.pruning.moments import Law, expected_factor
from delta_analysis.pruning.rescaling import Rescale, check_rescale, match_norm, rescale_name, uniform_factor
from delta_analysis.pruning.threshold import Cut, find_cut

SCOPES = ("tensor", "row", "model")
RANKS = ("row", "tensor", "value")
WIDEST = 0.9
"""The widest window as a share of the one at which a probability would reach 0 or 1."""
_SMALL = 2**17
"""A tensor of so many entries is one row: tables of counts for its whole range would be the larger part."""


Prune = Callable[..., torch.Tensor]
"""Called as `(tensor, name=…, seed=…)`."""


class Pruner(Protocol):
    """Makes a pruned tensor out of a tensor, its name and a seed: a frozen dataclass such as `Dare`.

    `method` is what tables and figures call it, whatever the drop rate; `random` tells whether seeds
    make a difference, beyond ties.
    """

    @property
    def drop_rate(self) -> float: ...
    @property
    def rescale(self) -> Rescale: ...
    @property
    def method(self) -> str: ...
    @property
    def random(self) -> bool: ...
    def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class Dare:
    """Drop entries at random and rescale the rest: `m ⊙ δ · factor`, `m ~ Bernoulli(1 - p)`.

    Entry i of tensor `name` under `seed` is dropped when its 32-bit random number is below
    `round(p · 2³²)`. So masks are nested (what is kept at 0.9 is kept at 0.5 too) and do not
    depend on the order of tensors, on chunks, on threads, on the device or on the dtype.

    With `inverse_keep` the result is unbiased: mean δ, variance `p/(1-p) · δ²` an entry.

    Parameters
    ----------
    drop_rate : p, in [0, 1]; 0 changes nothing (up to float32), 1 gives zeros.
        Survivors that the factor takes beyond float32, or beyond the storage dtype, become infinite.
    rescale : `"inverse_keep"`, the factor 1/(1-p); `"none"`, drop only; `"l1"` or `"l2"`, the factor
        that gives each tensor its norm back (Σ|δ| or √Σδ²); or the factor itself, a finite number
        ≥ 1 (the 1/q of DAREx).

    Raises
    ------
    ValueError
        A drop rate outside [0, 1], or a rescale of no known form. When called: a tensor that is not
        of floating dtype, or one of NaN or infinite entries whose norm is to be matched.

    Source: Yu et al., "Language Models are Super Mario" (DARE), arXiv 2311.03099, section 3; factor
    1/q: Deng et al., DAREx, arXiv 2410.09344; L1: what mergekit does since its version 0.1.0.

    Examples
    --------
    >>> delta = torch.tensor([1.0, -2.0, 3.0, -4.0])
    >>> Dare(0.5)(delta, name="w", seed=0)
    tensor([ 0., -4.,  0., -8.])
    """

    drop_rate: float
    rescale: Rescale = "inverse_keep"

    def __post_init__(self) -> None:
        object.__setattr__(self, "drop_rate", checked_drop_rate(self.drop_rate))
        check_rescale(self.rescale)

    @property
    def method(self) -> str:
        """What tables and figures call it."""
        names = {"inverse_keep": "DARE", "none": "drop only", "l1": "drop + L1", "l2": "drop + L2"}
        return names.get(str(self.rescale), f"drop × {self.rescale}")

    @property
    def random(self) -> bool:
        """Whether seeds make a difference."""
        return 0 < self.drop_rate < 1

    def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
        """The pruned tensor, of the input's shape, dtype and device."""
        kernels, key = kernels_for(tensor.device), stream_key(seed, name)
        p, factor = self.drop_rate, uniform_factor(self.rescale, self.drop_rate)
        pruned = new_tensor(
            tensor, lambda values, start, out: kernels.drop(values, p, factor, key, start, out), dtypes=NATIVE
        )
        return match_norm(pruned, tensor, self.rescale, name)

    def law(self, tensor: torch.Tensor, *, name: str) -> Law:
        """One probability and one factor for all entries."""
        return Law(self.drop_rate, expected_factor(self.rescale, tensor, self.drop_rate, self.drop_rate))


@dataclass(frozen=True)
class Magnitude:
    """Drop the entries of least magnitude, exactly `round(p · n)` of n (MP).

    Among entries of equal |δ| the random numbers of (seed, name) decide, then the position; without
    ties nothing is random.

    Parameters
    ----------
    drop_rate : p, in [0, 1]; 0 changes nothing (up to float32), 1 gives zeros.
    scope : among which entries the least are sought: `"tensor"`; `"row"`, all that feed one output
        (the first dimension; a vector is one row); or `"model"`, all tensors of a delta together,
        which works inside `Delta.pruned` and in sweeps only, and takes three passes over the delta.
    rescale : `"none"`; or as for `Dare`. With 1/(1-p) the result is far larger than the delta, since
        the entries that are kept are the large ones.

    Raises
    ------
    ValueError
        A drop rate outside [0, 1], a scope or rescale of no known form. When called: scope `"model"`
        on a single tensor.

    Source: DARE, arXiv 2311.03099, section 4.5, without its inflation of the drop rate by ties.

    Examples
    --------
    >>> delta = torch.tensor([1.0, -2.0, 3.0, -4.0])
    >>> Magnitude(0.5)(delta, name="w", seed=0)
    tensor([ 0.,  0.,  3., -4.])
    """

    drop_rate: float
    scope: Literal["tensor", "row", "model"] = "tensor"
    rescale: Rescale = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "drop_rate", checked_drop_rate(self.drop_rate))
        if self.scope not in SCOPES:
            raise ValueError(one_of("scope", self.scope, SCOPES))
        check_rescale(self.rescale)

    @property
    def method(self) -> str:
        """What tables and figures call it."""
        return "MP" + ("" if self.scope == "tensor" else f" by {self.scope}") + rescale_name(self.rescale, "none")

    @property
    def random(self) -> bool:
        """Whether seeds make a difference beyond ties."""
        return False

    def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
        """The pruned tensor, of the input's shape, dtype and device."""
        if self.scope == "model":
            raise ValueError(
                f"scope='model' compares entries of all tensors, and {name!r} is one; use delta.pruned(pruner, seed=…)"
            )
        row = row_length(tensor) if self.scope == "row" else tensor.numel()
        if row < tensor.numel() or row <= _SMALL:
            count, factor = round(self.drop_rate * row), uniform_factor(self.rescale, self.drop_rate)
            return match_norm(
                drop_least(tensor, row, count, factor, stream_key(seed, name)), tensor, self.rescale, name
            )
        return self.drop_below(self.cut({name: tensor}, seed), tensor, name=name, seed=seed)

    def over(self, tensors: Mapping[str, torch.Tensor], seed: int) -> Prune:
        """The pruner of all these tensors together."""
        return partial(self.drop_below, self.cut(tensors, seed))

    def cut(self, tensors: Mapping[str, torch.Tensor], seed: int) -> Cut:
        """Where the entries to drop end, in the order of magnitudes over all these tensors."""
        return find_cut(tensors.items, self.drop_rate, seed=seed)

    def drop_below(self, cut: Cut, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
        """One of the tensors whose cut was found, pruned."""
        kernels, key = kernels_for(tensor.device), stream_key(seed, name)
        place, factor = cut.within(name), uniform_factor(self.rescale, self.drop_rate)
        pruned = new_tensor(
            tensor, lambda values, start, out: kernels.drop_below(values, place, factor, key, start, out), dtypes=NATIVE
        )
        return match_norm(pruned, tensor, self.rescale, name)


@dataclass(frozen=True)
class MagPrune:
    """Drop entries at random, small ones more often than large ones (DELLA's MAGPRUNE).

    The probability falls linearly with the rank r = 1 … n of |δ|, over a window centred on p:
    `p_i = p + window · (1/2 - (r_i - 1)/(n - 1))`, so that its mean is p exactly; equal magnitudes
    share their mean rank. Ranks are integers whatever the dtype. The random numbers are those of
    `Dare`, and with a window of 0 so is the result.

    Parameters
    ----------
    drop_rate : p, in [0, 1]; 0 and 1 leave no room and accept any window.
    window : full width of the probabilities (the paper's ε; half of it is mergekit's), at least 0,
        at most 2p and below 2(1-p); `"widest"` is `1.8 · min(p, 1-p)`.
    rank : where magnitudes are ranked: in each `"row"` (all that feed one output; a vector is one
        row), in the whole `"tensor"`, or not at all: `"value"` puts the magnitude itself, scaled
        from its least to its greatest in the row, in place of the rank. An outlier then moves all
        others towards the high end, and the mean probability is above p.
    rescale : `"inverse_keep"`, for each entry its own 1/(1-p_i), which leaves the mean unchanged; or
        as for `Dare`, one factor for all.

    Raises
    ------
    ValueError
        A drop rate outside [0, 1]; a window that would take a probability out of [0, 1), with the
        largest one allowed; a rank or rescale of no known form. When called with `rank="value"`: NaN
        or infinite entries.

    Source: Deep et al., DELLA, arXiv 2406.11617, and its released code (functions rank_magnitude,
    rank_magnitude_layer, magnitude_sample).

    Examples
    --------
    >>> delta = torch.tensor([1.0, -2.0, 3.0, -4.0])
    >>> MagPrune(0.5, window=0.8)(delta, name="w", seed=0)
    tensor([ 0.0000, -5.4545,  0.0000, -4.4444])
    """

    drop_rate: float
    window: Literal["widest"] | float = "widest"
    rank: Literal["row", "tensor", "value"] = "row"
    rescale: Rescale = "inverse_keep"

    def __post_init__(self) -> None:
        object.__setattr__(self, "drop_rate", checked_drop_rate(self.drop_rate))
        object.__setattr__(self, "window", checked_window(self.window, self.drop_rate))
        if self.rank not in RANKS:
            raise ValueError(one_of("rank", self.rank, RANKS))
        check_rescale(self.rescale)

    @property
    def method(self) -> str:
        """What tables and figures call it."""
        window = "" if self.window == "widest" else f", window {self.window:g}"
        rank = "" if self.rank == "row" else f" by {self.rank}"
        return f"MAGPRUNE{rank}{rescale_name(self.rescale, 'inverse_keep')}{window}"

    @property
    def random(self) -> bool:
        """Whether seeds make a difference."""
        return 0 < self.drop_rate < 1

    @property
    def width(self) -> float:
        """The window as a number; 0 where p leaves no room."""
        room = 2 * min(self.drop_rate, 1 - self.drop_rate)
        return WIDEST * room if self.window == "widest" else float(self.window) if room else 0.0

    def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
        """The pruned tensor, of the input's shape, dtype and device."""
        key = stream_key(seed, name)
        factor = None if self.rescale == "inverse_keep" else uniform_factor(self.rescale, self.drop_rate)
        if self.rank == "value":
            pruned = drop_rows(tensor, row_length(tensor), partial(self._by_value, name), factor, key)
        else:
            row = tensor.numel() if self.rank == "tensor" else row_length(tensor)
            pruned = drop_by_rank(tensor, row, partial(self._by_rank, row), factor, key)
        return match_norm(pruned, tensor, self.rescale, name)

    def law(self, tensor: torch.Tensor, *, name: str) -> Law:
        """Each entry's own probability and factor, float64 tensors of its shape."""
        values = tensor.detach().to(torch.float32)
        if self.rank == "value":
            drop = self._by_value(name, values.reshape(-1, row_length(tensor)))
        else:
            row = tensor.numel() if self.rank == "tensor" else row_length(tensor)
            drop = self._by_rank(row, kernels_for(tensor.device).rank_sums(values.reshape(-1, row)))
        drop = drop.view(tensor.shape).clamp(0, 1)
        return Law(drop, expected_factor(self.rescale, tensor, drop, self.drop_rate))

    def _by_rank(self, count: int, sums: torch.Tensor) -> torch.Tensor:
        """Probabilities for sums of first and last rank among `count` entries, in place of them."""
        fall = self.width / (2 * max(count - 1, 1))
        return sums.mul_(-fall).add_(self.drop_rate + self.width / 2 * (count > 1) + 2 * fall)

    def _by_value(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Probabilities for the entries of float32 rows."""
        return self.drop_rate + self.width / 2 - self.width * shares_of_range(rows, name)


@runtime_checkable
class WholeModel(Protocol):
    """A pruner that may compare entries of all tensors (scope `"model"`), and so has to read them first."""

    @property
    def scope(self) -> str: ...
    def over(self, tensors: Mapping[str, torch.Tensor], seed: int) -> Prune: ...


def bind(pruner: Pruner | Prune, tensors: Mapping[str, torch.Tensor], seed: int) -> Prune:
    """The pruner as it acts on the tensors of one delta; one that compares all of them reads them now."""
    if isinstance(pruner, WholeModel) and pruner.scope == "model":
        return pruner.over(tensors, seed)
    return pruner


def checked_drop_rate(drop_rate: float) -> float:
    """The drop rate as a float; raise unless it is a number in [0, 1]."""
    if not isinstance(drop_rate, Real) or isinstance(drop_rate, bool) or not 0 <= drop_rate <= 1:
        raise ValueError(f"drop_rate must be a number in [0, 1], the share of entries set to zero; not {drop_rate!r}")
    return float(drop_rate)


def checked_window(window: str | float, drop_rate: float) -> str | float:
    """The window, a number as a float; raise unless it is "widest" or keeps every probability in [0, 1)."""
    if isinstance(window, str) and window == "widest":
        return window
    if not isinstance(window, Real) or isinstance(window, bool) or not 0 <= window < math.inf:
        raise ValueError(f"window must be 'widest' or a width of at least 0; not {window!r}")
    if 0 < drop_rate < 1 and not (0 <= drop_rate - window / 2 and drop_rate + window / 2 < 1):
        limit = f"at most {2 * drop_rate!r}" if drop_rate < 0.5 else f"below {2 * (1 - drop_rate):g}"
        raise ValueError(
            f"window {window!r} takes drop probabilities out of [0, 1) at drop rate {drop_rate!r}; it must be {limit}"
        )
    return float(window)
