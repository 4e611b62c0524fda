"""The regression mean of the deltas."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from delta_analysis._errors import checked_number
from delta_analysis.merging.methods import MergeMethod, Parts, check_weights, weighted_mean


@dataclass(frozen=True)
class RegMean(MergeMethod):
    """The delta whose outputs are nearest, by least squares, to those of every model on its own data.

    With `G_k = E[x xᵀ]` of the inputs of model k it solves `Σ w_k G_k · Δ = Σ w_k G_k δ_k` for the weights
    (inputs, outputs) of a linear layer, which is the regression mean of the models less their base. Other
    tensors get the weighted mean.

    Parameters
    ----------
    scaling : a finite number.
    shrink : what the entries of each `G_k` off the diagonal are multiplied by, in [0, 1].
    ridge : what is added to the diagonal of each `G_k`, in units of the mean of all their diagonals;
        at least 0. The larger, the nearer to the weighted mean.

    Raises
    ------
    ValueError
        A parameter out of its range. When called: weights below 0, or that sum to 0; moments of too few
        inputs to determine the weights.

    Source: Jin et al., "Dataless knowledge fusion by merging weights of language models", arXiv
    2212.09849, which has no ridge.

    Examples
    --------
    >>> one, two = torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, 3.0]])
    >>> moments = torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([1.0, 1.0]))
    >>> method = RegMean(ridge=0.0)
    >>> method(Parts("w", (one, two), (1.0, 1.0), torch.zeros(1, 2), tuple(each[None] for each in moments)))
    tensor([[1.5000, 2.0000]])
    """

    scaling: float = 1.0
    shrink: float = 0.9
    ridge: float = 1e-6
    label = "RegMean"
    statistic = "moments"

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_number("shrink", self.shrink, 0, 1)
        checked_number("ridge", self.ridge, 0)

    def check(self, weights: tuple[float, ...]) -> None:
        check_weights(weights)

    def __call__(self, parts: Parts) -> torch.Tensor:
        check_weights(parts.weights)
        statistics = parts.statistics or ()
        matrices = [each.double().view(each.shape[-1], each.shape[-1]) for each in statistics]
        level = sum(float(each.diagonal().mean()) for each in matrices) / max(len(matrices), 1)
        if not level:
            return weighted_mean(parts).mul_(self.scaling)
        # The statistic has the axes of the weight, 1 long for the outputs.
        transposed = statistics[0].shape[:2] != (1, parts.deltas[0].shape[1])
        left = torch.zeros_like(matrices[0])
        right = torch.zeros(len(left), parts.deltas[0].numel() // len(left), dtype=torch.float64)
        for matrix, delta, weight in zip(matrices, parts.deltas, parts.weights, strict=True):
            columns = (delta if transposed else delta.T).double()
            added = (1 - self.shrink) * matrix.diagonal() + self.ridge * level
            left.add_(matrix, alpha=weight * self.shrink).diagonal().add_(added, alpha=weight)
            right.addmm_(matrix, columns, alpha=weight * self.shrink).addcmul_(added[:, None], columns, value=weight)
        merged = _solve(left, right, parts.name).mul_(self.scaling)
        return (merged if transposed else merged.T).float().contiguous()


def _solve(left: torch.Tensor, right: torch.Tensor, name: str) -> torch.Tensor:
    """The solution of a symmetric positive definite system, if it is determined."""
    factor, failed = torch.linalg.cholesky_ex(left)
    # What of each input the others leave unexplained, as a share: rounding alone makes it no smaller than this.
    unexplained = factor.diagonal().square() / left.diagonal()
    if failed or not float(unexplained.min()) > len(left) * torch.finfo(left.dtype).eps:
        raise ValueError(
            f"tensor {name!r}: the moments of its {len(left)} inputs are singular, so that the data does not determine "
            "its weights; raise ridge, lower shrink, or give more data"
        )
    return torch.cholesky_solve(right, factor)
