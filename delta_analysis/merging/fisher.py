"""The mean of the deltas, weighted by Fisher information."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from delta_analysis._errors import checked_number
from delta_analysis._kernels import new_tensor
from delta_analysis.merging.methods import MergeMethod, Parts, check_weights, weighted_mean


@dataclass(frozen=True)
class Fisher(MergeMethod):
    """The mean of the deltas, each entry weighted by its Fisher information: `scaling · Σ w_k F_k δ_k / Σ w_k F_k`.

    It is the Fisher-weighted mean of the models less their base. Where the data says nothing of a tensor
    it is the weighted mean, and so it is in entries of which no model has information.

    Parameters
    ----------
    scaling : a finite number.
    floor : what is added to each `F_k`, in units of the mean of all of them over the tensor; above 0.

    Raises
    ------
    ValueError
        A parameter out of its range. When called: weights below 0, or that sum to 0.

    Source: Matena and Raffel, "Merging models with Fisher-weighted averaging", arXiv 2111.09832.

    Examples
    --------
    >>> one, two, sure, unsure = torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([3.0]), torch.tensor([1.0])
    >>> Fisher()(Parts("w", (one, two), (1.0, 1.0), torch.zeros(1), (sure, unsure)))
    tensor([1.5000])
    """

    scaling: float = 1.0
    floor: float = 1e-6
    label = "Fisher"
    statistic = "fisher"

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_number("floor", self.floor, 0, low_open=True)

    def check(self, weights: tuple[float, ...]) -> None:
        check_weights(weights)

    def __call__(self, parts: Parts) -> torch.Tensor:
        check_weights(parts.weights)
        statistics = parts.statistics or ()
        mean = sum(float(each.mean(dtype=torch.float64)) for each in statistics) / max(len(statistics), 1)
        if not mean:
            return weighted_mean(parts).mul_(self.scaling)
        deltas = [each.detach().reshape(-1) for each in parts.deltas]
        informations = [each.reshape(-1) for each in statistics]

        def work(values: torch.Tensor, start: int, out: torch.Tensor) -> None:
            part = slice(start, start + values.numel())
            whole, total = torch.zeros(2, values.numel(), dtype=torch.float64)
            for delta, information, weight in zip(deltas, informations, parts.weights, strict=True):
                share = information[part].double().div_(mean).add_(self.floor).mul_(weight)
                whole += share
                total.addcmul_(share, delta[part].double())
            out.copy_(total.div_(whole).mul_(self.scaling))

        return new_tensor(parts.deltas[0], work)
