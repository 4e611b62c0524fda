"""The weighted sum of the deltas."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from delta_analysis.merging.methods import Parts, Statistic, check_scaling, weighted_sum


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
