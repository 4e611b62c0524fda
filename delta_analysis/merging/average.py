"""The weighted mean of the deltas."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from delta_analysis.merging.methods import MergeMethod, Parts, check_mean, weighted_mean


@dataclass(frozen=True)
class Average(MergeMethod):
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
    label = "average"

    def check(self, weights: tuple[float, ...]) -> None:
        check_mean(weights)

    def __call__(self, parts: Parts) -> torch.Tensor:
        return weighted_mean(parts).mul_(self.scaling)
