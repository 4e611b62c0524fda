"""DARE: drop at random and rescale."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from delta_analysis._kernels import NATIVE, drop_randomly, new_tensor, stream_key
from delta_analysis.pruning.moments import Law, expected_factor
from delta_analysis.pruning.pruner import checked_drop_rate
from delta_analysis.pruning.rescaling import Rescale, check_rescale, match_norm, uniform_factor


@dataclass(frozen=True)
class Dare:
    """Drop entries at random and rescale the rest: `m ⊙ δ · factor`, `m ~ Bernoulli(1 - p)`.

    Entry i of tensor `name` under `seed` is dropped when its 32-bit random number is below
    `round(p · 2³²)`. So masks are nested (what is kept at 0.9 is kept at 0.5 too) and do not
    depend on the order of tensors, on chunks, on threads, on the device or on the dtype.

    With `inverse_keep` the result is unbiased: mean δ, variance `p/(1-p) · δ²` an entry.

    Parameters
    ----------
    drop_rate : p, in [0, 1]; 0 changes nothing (up to float32), 1 gives zeros.
        Survivors that the factor takes beyond float32, or beyond the storage dtype, become infinite.
    rescale : `"inverse_keep"`, the factor 1/(1-p); `"none"`, drop only; `"l1"` or `"l2"`, the factor
        that gives each tensor its norm back (Σ|δ| or √Σδ²); or the factor itself, a finite number
        ≥ 1 (the 1/q of DAREx).

    Raises
    ------
    ValueError
        A drop rate outside [0, 1], or a rescale of no known form. When called: a tensor that is not
        of floating dtype, or one of NaN or infinite entries whose norm is to be matched.

    Source: Yu et al., "Language Models are Super Mario" (DARE), arXiv 2311.03099, section 3; factor
    1/q: Deng et al., DAREx, arXiv 2410.09344; L1: what mergekit does since its version 0.1.0.

    Examples
    --------
    >>> delta = torch.tensor([1.0, -2.0, 3.0, -4.0])
    >>> Dare(0.5)(delta, name="w", seed=0)
    tensor([ 0., -4.,  0., -8.])
    """

    drop_rate: float
    rescale: Rescale = "inverse_keep"

    def __post_init__(self) -> None:
        object.__setattr__(self, "drop_rate", checked_drop_rate(self.drop_rate))
        check_rescale(self.rescale)

    @property
    def method(self) -> str:
        """What tables and figures call it."""
        names = {"inverse_keep": "DARE", "none": "drop only", "l1": "drop + L1", "l2": "drop + L2"}
        return names.get(str(self.rescale), f"drop × {self.rescale}")

    @property
    def random(self) -> bool:
        """Whether seeds make a difference."""
        return 0 < self.drop_rate < 1

    def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
        """The pruned tensor, of the input's shape, dtype and device."""
        p, factor, key = self.drop_rate, uniform_factor(self.rescale, self.drop_rate), stream_key(seed, name)

        def drop(values: torch.Tensor, start: int, out: torch.Tensor) -> None:
            drop_randomly(values, p, factor, key, start, out)

        return match_norm(new_tensor(tensor, drop, dtypes=NATIVE), tensor, self.rescale, name)

    def law(self, tensor: torch.Tensor, *, name: str) -> Law:
        """One probability and one factor for all entries."""
        return Law(self.drop_rate, expected_factor(self.rescale, tensor, self.drop_rate, self.drop_rate))
