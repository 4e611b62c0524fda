"""The election of signs, and the mean of the entries that agree with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from delta_analysis._errors import checked_number
from delta_analysis._kernels import compiled, map_blocks, new_tensor


@dataclass(frozen=True)
class Slack:
    """A slack variable that keeps the entries of one delta from being outvoted.

    Where the entry s of the protected delta and the sum c of all others have opposite signs, the others
    win only if `|c| > (1 + relative) · |s| + absolute`; otherwise s does. With both at 0 this is the plain
    election (but that s wins where the two cancel exactly); with either at infinity s never loses.

    It follows the published description of a slack variable in the election: the exact algorithm was
    not available.

    Parameters
    ----------
    protected : position of the delta that is protected, from 0.
    relative, absolute : at least 0, infinity allowed.

    Raises
    ------
    ValueError
        A parameter out of its range.

    Source: described by Tao et al., arXiv 2407.03994 (TIES with a slack variable); this form is this package's.
    """

    protected: int
    relative: float = 0.0
    absolute: float = 0.0

    def __post_init__(self) -> None:
        checked_number("protected", self.protected, 0, whole=True)
        for name in ("relative", "absolute"):
            object.__setattr__(self, name, checked_number(name, getattr(self, name), 0, math.inf))

    def check(self, count: int) -> None:
        """Raise unless the protected delta is one of so many."""
        if self.protected >= count:
            raise ValueError(f"slack protects delta {self.protected} (from 0), and there are {count}")

    @property
    def label(self) -> str:
        """What tables and figures call it."""
        parts = [f"{value:g} {name}" for name in ("relative", "absolute") if (value := getattr(self, name))]
        return f"slack {' + '.join(parts) or 0}"


FUSIONS = ("mean", "sum")
_BLOCK = 2**15
"""Entries of a block: what is held of it stays in the cache."""


def elected(
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    scaling: float = 1.0,
    slack: Slack | None = None,
    elect: bool = True,
    fuse: str = "mean",
) -> torch.Tensor:
    """`scaling` times the weighted mean, or sum, of the entries that are not zero and have the elected sign.

    The sign is that of `Σ w_k δ_k`, positive where it is 0, unless slack protects a delta. Without an
    election every entry that is not zero counts. Where none does, the result is 0; an entry that is NaN
    makes it NaN. The arithmetic is float64.

    The mean divides by the sizes |w_k| of the weights of the entries that count. All deltas are float32 on the CPU.
    """
    if slack is not None:
        slack.check(len(deltas))
    flat = [delta.detach().reshape(-1) for delta in deltas]
    limits, shares = _limits(slack), np.array(weights, dtype=np.float64)

    def work(values: torch.Tensor, start: int, out: torch.Tensor) -> None:
        stop = start + values.numel()
        votes = np.stack([each[start:stop].numpy() for each in flat])
        _elect(votes, shares, scaling, elect, fuse == "mean", *limits, out.numpy())

    return new_tensor(deltas[0], work, block=_BLOCK)


def outvoted(
    own: torch.Tensor, other: torch.Tensor, weights: tuple[float, float], slack: Slack | None = None
) -> tuple[int, int, int]:
    """Of the entries of one delta, how many are not zero, meet one of the other sign in the other, lose the election.

    The deltas are float32 on the CPU, without NaN. The rule is that of `elected`.
    """
    limits, shares, beside = _limits(slack), np.array(weights, dtype=np.float64), other.reshape(-1)

    def work(values: torch.Tensor, start: int) -> np.ndarray:
        votes = np.stack([values.numpy(), beside[start : start + len(values)].numpy()])
        counts = np.zeros(3, dtype=np.int64)
        _count_outvoted(votes, shares, *limits, counts)
        return counts

    kept, conflicts, lost = sum(map_blocks(own, work, block=_BLOCK), np.zeros(3, dtype=np.int64)).tolist()
    return kept, conflicts, lost


def _limits(slack: Slack | None) -> tuple[int, float, float]:
    """Which delta is protected, -1 for none, and the factor and the constant of its slack."""
    return (-1, 1.0, 0.0) if slack is None else (slack.protected, 1 + slack.relative, slack.absolute)


@compiled
def _signs(votes, weights, protected, factor, absolute):  # type: ignore[no-untyped-def]
    """The weighted sum of each entry, and its elected sign."""
    numel = votes.shape[1]
    total = np.zeros(numel)
    for k in range(weights.size):
        for i in range(numel):
            total[i] += weights[k] * np.float64(votes[k, i])
    sign = np.where(total >= 0, 1.0, -1.0)
    if protected >= 0:
        for i in range(numel):
            own = weights[protected] * np.float64(votes[protected, i])
            others = total[i] - own
            if own * others < 0 and not abs(others) > factor * abs(own) + absolute:
                sign[i] = 1.0 if own > 0 else -1.0
    return total, sign


@compiled
def _count_outvoted(votes, weights, protected, factor, absolute, counts):  # type: ignore[no-untyped-def]
    _, sign = _signs(votes, weights, protected, factor, absolute)
    for i in range(sign.size):
        own, other = weights[0] * np.float64(votes[0, i]), weights[1] * np.float64(votes[1, i])
        counts[0] += own != 0
        counts[1] += own * other < 0
        counts[2] += own * sign[i] < 0


@compiled
def _elect(votes, weights, scaling, elect, mean, protected, factor, absolute, out):  # type: ignore[no-untyped-def]
    total, sign = _signs(votes, weights, protected, factor, absolute)
    fused, whole = np.zeros(out.size), np.zeros(out.size)
    for k in range(weights.size):
        for i in range(out.size):
            vote = weights[k] * np.float64(votes[k, i])
            counts = (vote * sign[i] > 0) if elect else (vote != 0)
            fused[i] += vote if counts else 0.0
            whole[i] += abs(weights[k]) if counts else 0.0
    for i in range(out.size):
        value = scaling * (fused[i] / whole[i] if mean and whole[i] != 0 else fused[i])
        out[i] = np.float32(value if total[i] == total[i] else total[i])
