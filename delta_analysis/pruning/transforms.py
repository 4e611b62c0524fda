"""Other deltas made of a delta: scaled, clipped, without its largest entries, permuted, with signs drawn anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from delta_analysis._errors import checked_number
from delta_analysis._kernels import stream_key


class Change(Protocol):
    """Makes another tensor of a delta's tensor: a frozen dataclass such as `Scaled`."""

    @property
    def label(self) -> str: ...
    def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class Scaled:
    """`factor · δ`, with a finite factor above 0.

    Examples
    --------
    >>> Scaled(2.0)(torch.tensor([1.0, -2.0]), name="w", seed=0)
    tensor([ 2., -4.])
    """

    factor: float

    def __post_init__(self) -> None:
        checked_number("factor", self.factor, 0, low_open=True)

    @property
    def label(self) -> str:
        return f"size × {self.factor:.3g}"

    def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
        return tensor * self.factor


@dataclass(frozen=True)
class Clipped:
    """Without outliers: the `share` of each tensor's entries that are largest is cut to the size of the next one.

    Of n entries `round(share · n)` are cut; where the next one is as large as they are, nothing changes,
    and at a share of 1 nothing is left.

    Examples
    --------
    >>> Clipped(0.25)(torch.tensor([1.0, -2.0, 3.0, -9.0]), name="w", seed=0)
    tensor([ 1., -2.,  3., -3.])
    """

    share: float

    def __post_init__(self) -> None:
        checked_number("share", self.share, 0, 1)

    @property
    def label(self) -> str:
        return f"largest {100 * self.share:g}% clipped"

    def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
        sizes = tensor.abs().reshape(-1)
        left = len(sizes) - round(self.share * len(sizes))
        limit = float(sizes.kthvalue(left).values) if left else 0.0
        return tensor.clamp(-limit, limit)


@dataclass(frozen=True)
class Topless:
    """With the `share` of each tensor's entries that are largest set to zero, and all that equal the last of them.

    Examples
    --------
    >>> Topless(0.25)(torch.tensor([1.0, -2.0, 3.0, -9.0]), name="w", seed=0)
    tensor([ 1., -2.,  3.,  0.])
    """

    share: float

    def __post_init__(self) -> None:
        checked_number("share", self.share, 0, 1)

    @property
    def label(self) -> str:
        return f"largest {100 * self.share:g}% spared"

    def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
        return tensor.masked_fill(largest(tensor, self.share), 0.0)


@dataclass(frozen=True)
class Permuted:
    """With the entries of each tensor in an order drawn from (seed, name): equal values, no structure.

    Examples
    --------
    >>> Permuted()(torch.tensor([1.0, -2.0, 3.0, -4.0]), name="w", seed=0).sort().values
    tensor([-4., -2.,  1.,  3.])
    """

    @property
    def label(self) -> str:
        return "entries permuted"

    def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
        order = np.random.default_rng(stream_key(seed, f"{name}/order")).permutation(tensor.numel())
        return tensor.reshape(-1)[torch.from_numpy(order).to(tensor.device)].view(tensor.shape)


@dataclass(frozen=True)
class SignsRedrawn:
    """With the sign of each entry drawn anew from (seed, name): equal sizes in equal places, no direction.

    Examples
    --------
    >>> SignsRedrawn()(torch.tensor([1.0, -2.0, 3.0, -4.0]), name="w", seed=0).abs()
    tensor([1., 2., 3., 4.])
    """

    @property
    def label(self) -> str:
        return "signs redrawn"

    def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
        drawn = np.random.default_rng(stream_key(seed, f"{name}/signs")).integers(0, 2, tensor.numel(), dtype=np.int8)
        return tensor.abs() * torch.from_numpy(2 * drawn - 1).to(tensor).view(tensor.shape)


def largest(tensor: torch.Tensor, share: float) -> torch.Tensor:
    """A mask of the `share` of entries that are largest in magnitude, and of all that equal the last of them."""
    count = round(share * tensor.numel())
    if not count:
        return torch.zeros_like(tensor, dtype=torch.bool)
    sizes = tensor.abs()
    return sizes >= sizes.reshape(-1).kthvalue(tensor.numel() - count + 1).values
