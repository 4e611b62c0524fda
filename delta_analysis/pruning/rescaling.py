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
from delta_analysis._kernels import NATIVE, inverse_keep, map_blocks, power_sums

Rescale = str | float
RESCALES = ("inverse_keep", "none", "l1", "l2")
_POWERS = {"l1": 1, "l2": 2}

_SMALLEST = -149
"""A float32 is an integer below 2²⁴ times a power of two, the smallest of which is 2⁻¹⁴⁹."""
_PART = 24


def check_rescale(rescale: Rescale) -> None:
    """Raise unless the rescale is a known name or a factor of at least 1."""
    if isinstance(rescale, str) and rescale in RESCALES:
        return
    if not isinstance(rescale, Real) or isinstance(rescale, bool):
        raise ValueError(one_of("rescale", rescale, RESCALES) + ", nor a factor of at least 1")
    if not 1 <= rescale <= float(np.finfo(np.float32).max):
        hint = (
            f"; was q meant? Its factor is 1/q = {1 / rescale:g}"
            if 0 < rescale < 1
            else " (beyond float32)"
            if rescale > 1
            else ""
        )
        raise ValueError(f"rescale as a number is the factor itself and must be at least 1; not {rescale!r}{hint}")


def uniform_factor(rescale: Rescale, drop_rate: float) -> float:
    """What all survivors are multiplied by before norms are matched; at p = 1 none survives and it is 1."""
    if isinstance(rescale, str):
        return inverse_keep(drop_rate) if rescale == "inverse_keep" else 1.0
    return 1.0 if drop_rate == 1 else float(rescale)


def match_norm(pruned: torch.Tensor, tensor: torch.Tensor, rescale: Rescale, name: str) -> torch.Tensor:
    """The pruned tensor, rescaled in place to the norm of the whole one if the rescale asks for it."""
    if rescale not in _POWERS:
        return pruned
    factor = norm_ratio(tensor, pruned, _POWERS[str(rescale)], name)
    if factor > float(np.finfo(np.float32).max):
        raise ValueError(f"tensor {name!r}: the factor {factor:g} that would restore its norm is beyond float32")
    factor = float(np.float32(factor))
    on_cpu = pruned.cpu()
    flat = on_cpu.view(-1)

    def multiply(values: torch.Tensor, start: int) -> None:
        flat[start : start + values.numel()].copy_(values * factor)

    map_blocks(on_cpu, multiply)
    return on_cpu.to(pruned.device)


def rescale_name(rescale: Rescale, default: str) -> str:
    """How a method's name ends, given the rescale that goes without saying."""
    names = {default: "", "inverse_keep": " + rescale", "none": " drop only", "l1": " + L1", "l2": " + L2"}
    return {**names, default: ""}.get(str(rescale), f" × {rescale}")


def power_sum(tensor: torch.Tensor, power: int, name: str) -> Fraction:
    """Σ |x|^power over the float32 values of a tensor, exactly; power is 1 or 2."""
    sums = map_blocks(tensor, lambda values, _: power_sums(values, power), dtypes=NATIVE)
    total = sum(sums, torch.zeros(2, 256, dtype=torch.int64))
    # Infinities and NaNs have the last exponent, and the bit that is implied makes their sum positive.
    if total[:, -1].any():
        raise ValueError(f"tensor {name!r} has NaN or infinite entries in float32, so that it has no norm to match")
    whole = 0
    for exponent in total.any(dim=0).nonzero()[:, 0].tolist():
        low, high = total[:, exponent].tolist()
        whole += (low + (high << _PART)) << (power * max(exponent - 1, 0))
    return whole * Fraction(2) ** (power * _SMALLEST)


def norm_ratio(before: torch.Tensor, after: torch.Tensor, power: int, name: str) -> float:
    """The factor that gives `after` the norm of `before` (L1 or L2 by `power`); 1 if `after` is zero."""
    kept = power_sum(after, power, name)
    if not kept:
        return 1.0
    ratio = power_sum(before, power, name) / kept
    return float(ratio) if power == 1 else math.sqrt(ratio)
