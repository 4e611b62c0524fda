"""What survivors are multiplied by: a factor that follows from the drop rate, or one that restores a norm.

Norms are formed in exact arithmetic, so that they depend on no order of summation.
"""

from __future__ import annotations

import math
from fractions import Fraction
from numbers import Real

import numpy as np
import torch

from delta_analysis._errors import one_of
from delta_analysis.blocks import map_blocks, new_tensor
from delta_analysis.kernels import inverse_keep

Rescale = str | float
RESCALES = ("inverse_keep", "none", "l1", "l2")
_POWERS = {"l1": 1, "l2": 2}

_EXPONENTS = 256
_SMALLEST = -149
"""A float32 is an integer below 2²⁴ times a power of two, the smallest of which is 2⁻¹⁴⁹."""
_PART = 24


def check_rescale(rescale: Rescale) -> None:
    """Raise unless the rescale is a known name or a factor of at least 1."""
    if isinstance(rescale, str) and rescale in RESCALES:
        return
    if not isinstance(rescale, Real) or isinstance(rescale, bool):
        raise ValueError(one_of("rescale", rescale, RESCALES) + ", nor a factor of at least 1")
    if not math.isfinite(rescale) or rescale < 1:
        hint = f"; was q meant? Its factor is 1/q = {1 / rescale:g}" if 0 < rescale < 1 else ""
        raise ValueError(f"rescale as a number is the factor itself and must be at least 1; not {rescale!r}{hint}")


def uniform_factor(rescale: Rescale, drop_rate: float) -> float:
    """What all survivors are multiplied by before norms are matched; at p = 1 none survives and it is 1."""
    if isinstance(rescale, str):
        return inverse_keep(drop_rate) if rescale == "inverse_keep" else 1.0
    return 1.0 if drop_rate == 1 else float(rescale)


def match_norm(pruned: torch.Tensor, tensor: torch.Tensor, rescale: Rescale, name: str) -> torch.Tensor:
    """The pruned tensor with the norm of the whole one, if the rescale asks for it."""
    if rescale not in _POWERS:
        return pruned
    factor = float(np.float32(norm_ratio(tensor, pruned, _POWERS[str(rescale)], name)))

    def multiply(values: torch.Tensor, start: int, out: torch.Tensor) -> None:
        torch.mul(values, factor, out=out)

    return new_tensor(pruned, multiply)


def rescale_name(rescale: Rescale, default: str) -> str:
    """How a method's name ends, given the rescale that goes without saying."""
    names = {default: "", "inverse_keep": " + rescale", "none": " drop only", "l1": " + L1", "l2": " + L2"}
    return {**names, default: ""}.get(str(rescale), f" × {rescale}")


def power_sum(tensor: torch.Tensor, power: int, name: str) -> Fraction:
    """Σ |x|^power over the float32 values of a tensor, exactly; power is 1 or 2.

    Raises
    ------
    ValueError
        A NaN or infinite entry; `name` says of which tensor.
    """
    sums = map_blocks(tensor, lambda values, _: _sums_by_exponent(values, power))
    total = sum(sums, torch.zeros(3, _EXPONENTS, dtype=torch.int64))
    if total[2, -1]:
        raise ValueError(f"tensor {name!r} has NaN or infinite entries, so that it has no norm to match")
    whole = 0
    for exponent, (low, high) in enumerate(zip(total[0].tolist(), total[1].tolist(), strict=True)):
        whole += (low + (high << _PART)) << (power * max(exponent - 1, 0))
    return whole * Fraction(2) ** (power * _SMALLEST)


def _sums_by_exponent(values: torch.Tensor, power: int) -> torch.Tensor:
    """Sums of the integers or their squares by exponent, in a low and a high part; counts below."""
    bits = values.view(torch.int32)
    exponents = (bits >> 23) & 0xFF
    integers = ((bits & 0x7FFFFF) | ((exponents > 0).int() << 23)).to(torch.int64)
    terms = integers if power == 1 else integers * integers
    sums = torch.zeros(3, _EXPONENTS, dtype=torch.int64, device=values.device)
    for row, part in enumerate((terms & (2**_PART - 1), terms >> _PART, torch.ones_like(terms))):
        sums[row].index_add_(0, exponents, part)
    return sums.cpu()


def norm_ratio(before: torch.Tensor, after: torch.Tensor, power: int, name: str) -> float:
    """The factor that gives `after` the norm of `before` (L1 or L2 by `power`); 1 if `after` is zero."""
    kept = power_sum(after, power, name)
    if not kept:
        return 1.0
    ratio = power_sum(before, power, name) / kept
    return float(ratio) if power == 1 else math.sqrt(ratio)
