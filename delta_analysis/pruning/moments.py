"""The law of a pruner: with which probability each entry is dropped, and what survivors are multiplied by.

From it follow the mean and the variance of every entry, hence the expected error of any output,
without drawing a mask.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch

from delta_analysis._kernels import inverse_keep
from delta_analysis.pruning.rescaling import Rescale, uniform_factor

Number = float | torch.Tensor
_POWERS = {"l1": 1, "l2": 2}


class Law(NamedTuple):
    """Entries are dropped independently of each other, each with probability `drop`; survivors times `factor`.

    Both are one number for all entries, or a float64 tensor of the delta's shape. With m an entry's
    mask, its pruned value is `m · factor · δ`: mean `(1 + bias) · δ` and variance `variance · δ²`.
    """

    drop: Number
    factor: Number

    @property
    def bias(self) -> Number:
        """`(1-p) · factor - 1`, the mean's distance from δ, in units of δ."""
        return (1 - self.drop) * self.factor - 1

    @property
    def variance(self) -> Number:
        """`p(1-p) · factor²`, in units of δ²."""
        return self.drop * (1 - self.drop) * self.factor**2


@runtime_checkable
class Lawful(Protocol):
    """A random pruner whose law is known."""

    def law(self, tensor: torch.Tensor, *, name: str) -> Law: ...


def expected_factor(rescale: Rescale, tensor: torch.Tensor, drop: Number, drop_rate: float) -> Number:
    """What survivors are multiplied by; for a norm that is restored, by the ratio of its means.

    The ratio itself depends on the mask, but hardly so for a large tensor.
    """
    if rescale == "inverse_keep":
        if isinstance(drop, torch.Tensor):
            return torch.where(drop < 1, 1 / (1 - drop), 1.0)
        return inverse_keep(drop)
    if rescale not in _POWERS:
        return uniform_factor(rescale, drop_rate)
    power = _POWERS[str(rescale)]
    sizes = tensor.to("cpu", torch.float64).abs() ** power
    kept = float((sizes * (1 - drop)).sum())
    return (float(sizes.sum()) / kept) ** (1 / power) if kept else 1.0
