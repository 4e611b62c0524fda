"""Pruning operators: which entries of a delta are dropped, and how the rest is rescaled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch

from delta_analysis._errors import one_of
from delta_analysis.philox import random_bits

Rescale = str | float
RESCALES = ("inverse_keep", "none")
_RANGE = 2**32


@dataclass(frozen=True)
class Dare:
    """Drop entries at random and rescale the rest: `m ⊙ δ · factor`, `m ~ Bernoulli(1 - p)`.

    Entry i of tensor `name` under `seed` is dropped when its 32-bit random number is below
    `round(p · 2³²)`. So masks are nested (what is kept at 0.9 is kept at 0.5 too) and do not
    depend on the order of tensors, on chunks, on the device or on the dtype.

    With `inverse_keep` the result is unbiased: mean δ, variance `p/(1-p) · δ²` an entry.

    Parameters
    ----------
    drop_rate : p, in [0, 1]; 0 changes nothing (up to float32), 1 gives zeros.
    rescale : `"inverse_keep"`, the factor 1/(1-p); `"none"`, drop only; or the factor itself, a
        finite number ≥ 1 (the 1/q of DAREx).

    Raises
    ------
    ValueError
        A drop rate outside [0, 1], or a rescale of no known form.

    Source: Yu et al., "Language Models are Super Mario" (DARE), arXiv 2311.03099, section 3; factor
    1/q: Deng et al., DAREx, arXiv 2410.09344.

    Examples
    --------
    >>> delta = torch.tensor([1.0, -2.0, 3.0, -4.0])
    >>> Dare(0.5)(delta, name="w", seed=0)
    tensor([ 0., -4.,  0., -8.])
    """

    drop_rate: float
    rescale: Rescale = "inverse_keep"

    def __post_init__(self) -> None:
        check_drop_rate(self.drop_rate)
        check_rescale(self.rescale)

    @property
    def method(self) -> str:
        """What tables and figures call it."""
        return {"inverse_keep": "DARE", "none": "drop only"}.get(str(self.rescale), f"drop × {self.rescale}")

    def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
        """The pruned tensor, of the input's shape and dtype; the arithmetic is float32."""
        kept = keep_mask(tensor.shape, self.drop_rate, name=name, seed=seed).to(tensor.device)
        scaled = tensor.to(torch.float32) * rescale_factor(self.rescale, self.drop_rate)
        return torch.where(kept, scaled, 0.0).to(tensor.dtype)


def keep_mask(shape: torch.Size, drop_rate: float, *, name: str, seed: int) -> torch.Tensor:
    """True where an entry survives: its random number is not below `round(p · 2³²)`."""
    bits = random_bits(math.prod(shape), seed=seed, name=name)
    return torch.from_numpy(bits >= round(drop_rate * _RANGE)).reshape(shape)


def rescale_factor(rescale: Rescale, drop_rate: float) -> float:
    """What survivors are multiplied by; at p = 1 nothing survives and the factor is 1."""
    if rescale == "none" or drop_rate == 1:
        return 1.0
    return 1 / (1 - drop_rate) if rescale == "inverse_keep" else float(rescale)


def check_drop_rate(drop_rate: float) -> None:
    """Raise unless the drop rate is a number in [0, 1]."""
    if not isinstance(drop_rate, Real) or isinstance(drop_rate, bool) or not 0 <= drop_rate <= 1:
        raise ValueError(f"drop_rate must be a number in [0, 1], the share of entries set to zero; not {drop_rate!r}")


def check_rescale(rescale: Rescale) -> None:
    """Raise unless the rescale is a known name or a factor of at least 1."""
    if isinstance(rescale, str) and rescale in RESCALES:
        return
    if not isinstance(rescale, Real) or isinstance(rescale, bool):
        raise ValueError(one_of("rescale", rescale, RESCALES) + ", nor a factor of at least 1")
    if not math.isfinite(rescale) or rescale < 1:
        hint = f"; was q meant? Its factor is 1/q = {1 / rescale:g}" if 0 < rescale < 1 else ""
        raise ValueError(f"rescale as a number is the factor itself and must be at least 1; not {rescale!r}{hint}")
