"""The package's own errors, all of them `ValueError`s, and the checks of arguments that every room needs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: says which file and tensor, and what to do."""


class NotHomologousError(ValueError):
    """Two checkpoints that do not share an architecture, so that their difference means nothing."""


def one_of(what: str, value: object, allowed: Iterable[object]) -> str:
    """Message for a value outside a known set."""
    return f"{what} must be one of {', '.join(map(repr, allowed))}; not {value!r}"


def checked_number(
    name: str,
    value: object,
    low: float | None = None,
    high: float | None = None,
    *,
    low_open: bool = False,
    high_open: bool = False,
    whole: bool = False,
) -> float:
    """The value as a plain number; raise unless it is one between the bounds.

    Infinite is a value only where a bound is infinite, never where there is none; NaN and truth values are no numbers.

    Examples
    --------
    >>> checked_number("window", 1, 0)
    1.0
    >>> checked_number("share", float("nan"), 0, 1, low_open=True)
    Traceback (most recent call last):
    ...
    ValueError: share must be a number in (0, 1]; not nan
    """
    if isinstance(value, Integral if whole else Real) and not isinstance(value, bool):
        found = int(value) if whole else float(value)  # type: ignore[call-overload]
        lowest, highest = -math.inf if low is None else low, math.inf if high is None else high
        above = found > lowest if low_open or low is None else found >= lowest
        below = found < highest if high_open or high is None else found <= highest
        if above and below:
            return found
    kind = "whole number" if whole else "finite number" if high is None else "number"
    if low is not None and high not in (None, math.inf):
        bounds = f" in {'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
    else:
        bounds = "" if low is None else f" above {low:g}" if low_open else f" of at least {low:g}"
    raise ValueError(f"{name} must be a {kind}{bounds}; not {value!r}")
