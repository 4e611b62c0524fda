"""The weighted sum of the deltas."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from delta_analysis.merging.methods import MergeMethod, Parts, weighted_sum


@dataclass(frozen=True)
class TaskArithmetic(MergeMethod):
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
    label = "task arithmetic"

    def __call__(self, parts: Parts) -> torch.Tensor:
        return weighted_sum(parts.deltas, parts.weights).mul_(self.scaling)
