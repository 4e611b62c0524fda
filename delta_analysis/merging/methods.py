"""What merge methods share: what one tensor of a merge is made of, their defaults, sums, means and checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch

from delta_analysis._errors import checked_number
from delta_analysis.pruning import Pruner

Statistic = Literal["", "fisher", "moments"]
"""What a method has to know of the models' data: nothing, the Fisher information, or moments of the inputs."""


class Parts(NamedTuple):
    """What one tensor of a merge is made of.

    Attributes
    ----------
    name : of the tensor.
    deltas : float32, all of one shape, pruned and trimmed already.
    weights : one a delta.
    base : the base's tensor, float32; None unless the method `reads_base`.
    statistics : one a delta, None where the method needs none or the data said nothing of this tensor.
    """

    name: str
    deltas: tuple[torch.Tensor, ...]
    weights: tuple[float, ...]
    base: torch.Tensor | None = None
    statistics: tuple[torch.Tensor, ...] | None = None


class MergeMethod:
    """Makes one tensor of the merged delta out of those of the deltas: a frozen dataclass such as `Ties`.

    `scaling` is what the merged delta is multiplied by; `label` is what tables and figures call the method;
    `trim` is the pruner that belongs to it, after any other, or None; `statistic` is what data it needs;
    `reads_base`, whether it looks at the base's weights too.
    """

    scaling: float
    statistic: ClassVar[Statistic] = ""
    reads_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "scaling", checked_number("scaling", self.scaling))

    @property
    def label(self) -> str:
        raise NotImplementedError

    @property
    def trim(self) -> Pruner | None:
        return None

    def check(self, weights: tuple[float, ...]) -> None:
        """Raise a `ValueError` if deltas of these weights, as many, cannot be merged so; any can by default."""

    def __call__(self, parts: Parts) -> torch.Tensor:
        raise NotImplementedError


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


def check_weights(weights: tuple[float, ...]) -> None:
    """Raise unless the weights are those of a mean that data weights too."""
    if min(weights) < 0 or not sum(weights):
        raise ValueError(f"weights {weights}: a mean weighted by data needs weights of at least 0, not all of them 0")
