"""Merge methods that need no data: what one tensor of a merge is made of, and how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch

from delta_analysis._errors import one_of
from delta_analysis.merging.election import FUSIONS, Slack, elected
from delta_analysis.pruning import Magnitude, MagPrune, Pruner

Statistic = Literal["", "fisher", "moments"]
"""What a method has to know of the models' data: nothing, the Fisher information, or moments of the inputs."""


class Parts(NamedTuple):
    """What one tensor of a merge is made of.

    Attributes
    ----------
    name : of the tensor.
    deltas : float32, all of one shape, pruned and trimmed already.
    weights : one a delta.
    base : the base's tensor, float32; None unless the method `ReadsBase`.
    statistics : one a delta, None where the method needs none or the data said nothing of this tensor.
    """

    name: str
    deltas: tuple[torch.Tensor, ...]
    weights: tuple[float, ...]
    base: torch.Tensor | None = None
    statistics: tuple[torch.Tensor, ...] | None = None


class MergeMethod(Protocol):
    """Makes one tensor of the merged delta out of those of the deltas: a frozen dataclass such as `Ties`.

    `scaling` is what the merged delta is multiplied by; `label` is what tables and figures call the method;
    `trim` is the pruner that belongs to it, after any other, or None; `statistic` is what data it needs.
    """

    @property
    def scaling(self) -> float: ...
    @property
    def label(self) -> str: ...
    @property
    def trim(self) -> Pruner | None: ...
    @property
    def statistic(self) -> Statistic: ...
    def check(self, weights: tuple[float, ...]) -> None:
        """Raise a `ValueError` if deltas of these weights, as many, cannot be merged so."""
        ...

    def __call__(self, parts: Parts) -> torch.Tensor: ...


@runtime_checkable
class ReadsBase(Protocol):
    """A method that looks at the base's weights too; for the others these are not read."""

    @property
    def reads_base(self) -> Literal[True]: ...


@dataclass(frozen=True)
class Average:
    """The weighted mean of the deltas, `scaling · Σ w_k δ_k / Σ w_k`.

    Parameters
    ----------
    scaling : a finite number.

    Raises
    ------
    ValueError
        A scaling that is no finite number. When called: weights that sum to 0.

    Source: Wortsman et al., "Model soups", arXiv 2203.05482.

    Examples
    --------
    >>> one, two = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0])
    >>> Average()(Parts("w", (one, two), (1.0, 1.0), torch.zeros(2)))
    tensor([2., 1.])
    """

    scaling: float = 1.0
    label: str = field(default="average", init=False)
    trim: None = field(default=None, init=False)
    statistic: Statistic = field(default="", init=False)

    def __post_init__(self) -> None:
        check_scaling(self)

    def check(self, weights: tuple[float, ...]) -> None:
        """Raise if the weights have no mean."""
        check_mean(weights)

    def __call__(self, parts: Parts) -> torch.Tensor:
        return weighted_mean(parts).mul_(self.scaling)


@dataclass(frozen=True)
class TaskArithmetic:
    """The weighted sum of the deltas, `scaling · Σ w_k δ_k`.

    Parameters
    ----------
    scaling : λ, a finite number.

    Raises
    ------
    ValueError
        A scaling that is no finite number.

    Source: Ilharco et al., "Editing models with task arithmetic", arXiv 2212.04089.

    Examples
    --------
    >>> one, two = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0])
    >>> TaskArithmetic(0.5)(Parts("w", (one, two), (1.0, 1.0), torch.zeros(2)))
    tensor([2., 1.])
    """

    scaling: float = 1.0
    label: str = field(default="task arithmetic", init=False)
    trim: None = field(default=None, init=False)
    statistic: Statistic = field(default="", init=False)

    def __post_init__(self) -> None:
        check_scaling(self)

    def check(self, weights: tuple[float, ...]) -> None:
        """Any weights will do."""

    def __call__(self, parts: Parts) -> torch.Tensor:
        return weighted_sum(parts.deltas, parts.weights).mul_(self.scaling)


@dataclass(frozen=True)
class Ties:
    """Trim, elect signs, and take the mean of the entries that agree.

    Of each delta the entries of least magnitude are dropped; an entry's sign is that of `Σ w_k δ_k`
    (positive where this is 0); of the entries with this sign the weighted mean is taken, and what is
    zero or was outvoted counts for nothing. Where one delta is far larger than the others, the mean
    makes it smaller wherever they agree with it, and `fuse="sum"` does not.

    Parameters
    ----------
    drop_rate : share of each delta that is trimmed, in [0, 1]; 0 leaves it to a pruner before.
    scope : among which entries the least are sought, as in `Magnitude`: `"tensor"`, `"row"`, or
        `"model"`, all of a delta together, as the paper has it.
    fuse : `"mean"`, the disjoint mean of the paper; or `"sum"`, `Σ w_k δ_k` over the same entries.
    scaling : λ, a finite number.
    slack : how far one delta is kept from being outvoted, None for the plain election.

    Raises
    ------
    ValueError
        A drop rate outside [0, 1], an unknown scope or fuse, a scaling that is no finite number. When called:
        a slack for a delta that is not there.

    Source: Yadav et al., "TIES-Merging", arXiv 2306.01708, section 3.

    Examples
    --------
    >>> one, two = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0])
    >>> Ties(0.0)(Parts("w", (one, two), (1.0, 1.0), torch.zeros(2)))
    tensor([2., 4.])
    """

    drop_rate: float = 0.8
    scope: Literal["tensor", "row", "model"] = "tensor"
    fuse: Literal["mean", "sum"] = "mean"
    scaling: float = 1.0
    slack: Slack | None = None
    statistic: Statistic = field(default="", init=False)

    def __post_init__(self) -> None:
        Magnitude(self.drop_rate, self.scope)
        if self.fuse not in FUSIONS:
            raise ValueError(one_of("fuse", self.fuse, FUSIONS))
        check_scaling(self)

    @property
    def label(self) -> str:
        """What tables and figures call it."""
        where = "" if self.scope == "tensor" else f" by {self.scope}"
        fuse = "" if self.fuse == "mean" else ", sum"
        return f"TIES{where}{fuse}" + ("" if self.slack is None else f", {self.slack.label}")

    @property
    def trim(self) -> Pruner | None:
        """What drops entries before the election."""
        return Magnitude(self.drop_rate, self.scope) if self.drop_rate else None

    def check(self, weights: tuple[float, ...]) -> None:
        """Raise if the slack protects a delta that is not there."""
        if self.slack is not None:
            self.slack.check(len(weights))

    def __call__(self, parts: Parts) -> torch.Tensor:
        return elected(parts.deltas, parts.weights, scaling=self.scaling, slack=self.slack, fuse=self.fuse)


@dataclass(frozen=True)
class Della:
    """Drop by MAGPRUNE, elect signs, and fuse the entries that agree into their mean.

    Parameters
    ----------
    drop_rate : p of `MagPrune`, in [0, 1].
    window, rank : as in `MagPrune`; `rank="value"` is the ablation without ranks, `"tensor"` the variant
        that ranks a whole layer.
    elect : False is the ablation without the election: the mean is over all entries that are not
        zero, whatever their sign.
    scaling : λ, a finite number.

    Raises
    ------
    ValueError
        A parameter out of its range.

    Source: Deep et al., DELLA, arXiv 2406.11617, and its released code, in which the ablation without
    the election is the method itself; here it is what its name says.

    Examples
    --------
    >>> one, two = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0])
    >>> Della(0.0, elect=False)(Parts("w", (one, two), (1.0, 1.0), torch.zeros(2)))
    tensor([2., 1.])
    """

    drop_rate: float = 0.5
    window: Literal["widest"] | float = "widest"
    rank: Literal["row", "tensor", "value"] = "row"
    elect: bool = True
    scaling: float = 1.0
    statistic: Statistic = field(default="", init=False)

    def __post_init__(self) -> None:
        MagPrune(self.drop_rate, self.window, self.rank)
        if not isinstance(self.elect, bool):
            raise ValueError(f"elect must be True or False; not {self.elect!r}")
        check_scaling(self)

    @property
    def label(self) -> str:
        """What tables and figures call it."""
        rank = {"row": "", "tensor": ", ranked by tensor", "value": ", no rank"}[self.rank]
        window = "" if self.window == "widest" else f", window {self.window:g}"
        return f"DELLA{rank}{'' if self.elect else ', no election'}{window}"

    @property
    def trim(self) -> Pruner | None:
        """What drops entries before the election."""
        return MagPrune(self.drop_rate, self.window, self.rank) if self.drop_rate else None

    def check(self, weights: tuple[float, ...]) -> None:
        """Any weights will do."""

    def __call__(self, parts: Parts) -> torch.Tensor:
        return elected(parts.deltas, parts.weights, scaling=self.scaling, elect=self.elect)


def weighted_sum(deltas: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """`Σ w_k δ_k`, a new tensor."""
    total = deltas[0] * weights[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total.add_(delta, alpha=weight)
    return total


def weighted_mean(parts: Parts) -> torch.Tensor:
    """`Σ w_k δ_k / Σ w_k`, a new tensor."""
    check_mean(parts.weights)
    whole = sum(parts.weights)
    return weighted_sum(parts.deltas, [weight / whole for weight in parts.weights])


def check_mean(weights: tuple[float, ...]) -> None:
    """Raise unless the weights have a sum to divide by."""
    if not sum(weights):
        raise ValueError(f"weights {weights} sum to 0, so that there is no mean")


def check_scaling(method: MergeMethod) -> None:
    """Make the scaling of a frozen method a float; raise unless it is a finite number."""
    scaling = method.scaling
    if not isinstance(scaling, Real) or isinstance(scaling, bool) or not math.isfinite(scaling):
        raise ValueError(f"scaling must be a finite number, what the merged delta is multiplied by; not {scaling!r}")
    object.__setattr__(method, "scaling", float(scaling))
