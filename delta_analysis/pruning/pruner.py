"""What a pruner is: a probability of dropping each entry, a mask from random numbers, a factor for what is left.

The random numbers are those that (seed, tensor) name. The arithmetic is float32 whatever the storage; the
result has the input's dtype, shape and device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import torch

from delta_analysis._errors import checked_number
from delta_analysis.pruning.rescaling import Rescale

Prune = Callable[..., torch.Tensor]
"""Called as `(tensor, name=…, seed=…)`."""


class Pruner(Protocol):
    """Makes a pruned tensor out of a tensor, its name and a seed: a frozen dataclass such as `Dare`.

    `method` is what tables and figures call it, whatever the drop rate; `random` tells whether seeds
    make a difference, beyond ties.
    """

    @property
    def drop_rate(self) -> float: ...
    @property
    def rescale(self) -> Rescale: ...
    @property
    def method(self) -> str: ...
    @property
    def random(self) -> bool: ...
    def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor: ...


@runtime_checkable
class WholeModel(Protocol):
    """A pruner that may compare the entries of all tensors (`within="model"`), and so has to read them first."""

    @property
    def within(self) -> str: ...
    def over(self, tensors: Mapping[str, torch.Tensor], seed: int) -> Prune: ...


def bind(pruner: Pruner | Prune, tensors: Mapping[str, torch.Tensor], seed: int) -> Prune:
    """The pruner as it acts on the tensors of one delta; one that compares all of them reads them now."""
    if isinstance(pruner, WholeModel) and pruner.within == "model":
        return pruner.over(tensors, seed)
    return pruner


def one_is_no_model(name: str) -> ValueError:
    return ValueError(
        f"within='model' compares the entries of all tensors, and {name!r} is one; use delta.pruned(pruner, seed=…)"
    )


def checked_drop_rate(drop_rate: float) -> float:
    return checked_number("drop_rate", drop_rate, 0, 1)
