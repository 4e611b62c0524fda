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

    @property
    def tail(self) -> Number:
        """`Φ(p) · factor²`: an entry's deviation has a moment-generating function of at most `exp(tail · δ²t²/4)`.

        `Φ(p) = (1-2p) / ln((1-p)/p)` and 1/2 at p = 1/2 (Kearns and Saul; DAREx, arXiv 2410.09344,
        equation 8 for a factor of 1/(1-p)). At p = 0 and p = 1 nothing is random and it is 0.
        """
        return kearns_saul(self.drop) * self.factor**2


@runtime_checkable
class Lawful(Protocol):
    """A random pruner whose law is known."""

    def law(self, tensor: torch.Tensor, *, name: str) -> Law: ...


def kearns_saul(p: Number) -> Number:
    """Φ(p), for a probability or a tensor of them.

    Examples
    --------
    >>> kearns_saul(0.5), round(kearns_saul(0.9), 4)
    (0.5, 0.3641)
    """
    if not isinstance(p, torch.Tensor):
        return float(kearns_saul(torch.tensor(p, dtype=torch.float64)))
    inner = p.clamp(1e-300, 1 - 2**-53)
    log_odds = torch.log1p(-inner) - torch.log(inner)
    phi = torch.where(log_odds.abs() < 1e-6, 0.5, (1 - 2 * inner) / log_odds)
    return torch.where((p <= 0) | (p >= 1), 0.0, phi)


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
    sizes = tensor.to(torch.float64).abs() ** power
    kept = float((sizes * (1 - drop)).sum())
    return (float(sizes.sum()) / kept) ** (1 / power) if kept else 1.0
