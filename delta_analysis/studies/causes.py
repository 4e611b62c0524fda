"""DARE's noise added to a delta without dropping, and noise that differs from it in a single respect."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch

from delta_analysis._errors import one_of
from delta_analysis._kernels import stream_key
from delta_analysis.pruning import Change, Dare, checked_drop_rate
from delta_analysis.sweeps import (
    CONFIDENCE,
    Interval,
    inverse_logit,
    kept_shares,
    logit,
    metric_of,
    outcome_matrix,
    resampled_means,
    two_way_resamples,
)

KINDS = ("dropping", "gaussian")


@dataclass(frozen=True)
class Noise:
    """The whole delta plus noise like that of DARE, `δ + ε`: nothing is dropped, the signal stays.

    DARE's result is δ plus noise of mean 0 and variance `p/(1-p) · δ²` an entry. Here noise is drawn
    from a law of another kind, or as if the delta were another one, d = `source(δ)`; so that it alone differs. With
    `kind` `dropping`, `ε = DARE(d) - d`, which with d = δ is DARE itself, to the last bit of float32; with
    `gaussian`, `ε = d · √(p/(1-p)) · z` with z standard normal.

    Examples
    --------
    >>> delta = torch.tensor([1.0, -2.0, 3.0, -4.0])
    >>> Noise(0.5)(delta, name="w", seed=0)
    tensor([ 0., -4.,  0., -8.])
    """

    drop_rate: float
    kind: Literal["dropping", "gaussian"] = "dropping"
    source: Change | None = None
    rescale: Literal["inverse_keep"] = "inverse_keep"

    def __post_init__(self) -> None:
        object.__setattr__(self, "drop_rate", checked_drop_rate(self.drop_rate))
        if self.kind not in KINDS:
            raise ValueError(one_of("kind", self.kind, KINDS))
        if self.drop_rate == 1:
            raise ValueError("drop_rate: at 1 the variance of DARE's noise is infinite; give one below 1")

    @property
    def method(self) -> str:
        """What tables and figures call it."""
        label = "" if self.source is None else f", {self.source.label}"
        return ("gaussian noise" if self.kind == "gaussian" else "noise of dropping") + label

    @property
    def random(self) -> bool:
        """Whether seeds make a difference."""
        return self.drop_rate > 0

    def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
        """The delta's tensor with noise, of its shape, dtype and device."""
        delta = tensor.detach().to(torch.float32)
        d = delta if self.source is None else self.source(delta, name=name, seed=seed)
        if self.kind == "gaussian":
            drawn = np.random.default_rng(stream_key(seed, f"{name}/normal")).standard_normal(
                delta.numel(), dtype=np.float32
            )
            z = torch.from_numpy(drawn).to(delta.device).view(delta.shape)
            noise = d * math.sqrt(self.drop_rate / (1 - self.drop_rate)) * z
        else:
            noise = Dare(self.drop_rate)(d, name=name, seed=seed) - d
        return (delta + noise).to(tensor.dtype)


def matched_rate(drop_rate: float, ratio: float) -> float:
    """The drop rate whose noise is that of `drop_rate` on a delta with a noise base `ratio` times as small.

    `p/(1-p) · ratio` stays the same, so a delta twice the size, of ratio 4, has a quarter of the odds.
    """
    return inverse_logit(logit(drop_rate) - float(np.log(ratio)))


def rate_keeping(cells: pd.DataFrame, *, kept: float = 0.5) -> float:
    """The drop rate in (0, 1) among those tried at which the share kept of the untouched metric is nearest to `kept`.

    There a difference between edits shows most.
    """
    metric = metric_of(cells)
    shares = kept_shares(metric, outcomes_by_rate(cells))
    return min((rate for rate in shares if 0 < rate < 1), key=lambda rate: abs(shares[rate] - kept))


def outcomes_by_rate(cells: pd.DataFrame) -> dict[float, np.ndarray]:
    """Drop rate -> outcomes (seeds, items) of one pair, method and metric."""
    return {float(rate): outcome_matrix(rows) for rate, rows in cells.groupby("drop_rate")}


def equivalent_shift(reference: pd.DataFrame, edited: pd.DataFrame, drop_rate: float) -> Interval:
    """How much further than `drop_rate` DARE would have to go to lose as much, on log(p/(1-p)).

    The share of the untouched metric that is kept is looked up on DARE's curve, linear between the rates
    tried; where it has the value more than once, on a plateau or by chance, the rate nearest to `drop_rate`
    counts; less lost than at any rate tried is -∞, more than at any ∞. 0: as much as DARE loses at
    `drop_rate`; 1: as much as at odds p/(1-p) that are e times as large.

    `reference` are rows of `sweep` for DARE on one pair and metric, drop rate 0 among them; `edited` those of one edit
    with all its seeds, of the same pair, or of another with drop rate 0 among them. The 95% interval resamples seeds
    and items, the same on both sides.
    """
    metric = metric_of(reference)
    curve = outcomes_by_rate(reference)
    own = outcomes_by_rate(edited)
    start = curve[0.0]
    own_start = own.pop(0.0, start)
    (outcomes,) = own.values()
    rates = [rate for rate in curve if 0 < rate < 1]
    seeds = max(len(outcomes), *(len(curve[rate]) for rate in rates))
    resamples = two_way_resamples(seeds, start.shape[1], block=metric.block)

    def shares(values: np.ndarray, untouched: np.ndarray) -> np.ndarray:
        """The share kept, first as measured, then in every sample."""
        sampled = metric.kept_share(resampled_means(values, resamples), resampled_means(untouched, resamples))
        return np.concatenate([[metric.kept_share(values.mean(), untouched.mean())], sampled])

    line = np.array([shares(curve[rate], start) for rate in rates])
    wanted, scale, target = shares(outcomes, own_start), np.array([logit(rate) for rate in rates]), logit(drop_rate)
    shifts = np.array([_place(share, one, scale, target) for share, one in zip(wanted, line.T, strict=True)]) - target
    tail = (1 - CONFIDENCE) / 2
    # Between an infinite sample and a finite one there is nothing to interpolate.
    low, high = np.quantile(shifts[1:], [tail, 1 - tail], method="inverted_cdf")
    return Interval(float(shifts[0]), float(low), float(high))


def _place(share: float, curve: np.ndarray, scale: np.ndarray, target: float) -> float:
    """Where a curve has this value, nearest to the target; infinite where it never has."""
    left, right = curve[:-1] - share, curve[1:] - share
    start, width = scale[:-1], np.diff(scale)
    crossed, flat = left * right < 0, (left == 0) & (right == 0)
    places = np.concatenate(
        [
            scale[curve == share],
            (start + width * np.divide(left, left - right, where=crossed, out=np.zeros_like(left)))[crossed],
            np.clip(target, start, start + width)[flat],
        ]
    )
    if not len(places):
        return -np.inf if share > curve.max() else np.inf
    return float(places[np.argmin(np.abs(places - target))])


def share_of(part: Interval, whole: Interval) -> Interval:
    """What share of a positive whole a part is; the interval takes in the ends of both.

    Examples
    --------
    >>> share_of(Interval(1.0, 0.5, 1.5), Interval(2.0, 1.0, 4.0))
    Interval(value=0.5, low=0.125, high=1.5)
    """
    if whole.low <= 0:
        return Interval(part.value / whole.value, -np.inf, np.inf)
    ends = [end / size for end in part[1:] for size in whole[1:]]
    return Interval(part.value / whole.value, min(ends), max(ends))


def between(found: Interval, low: float, high: float) -> str:
    """Whether a value is between two bounds, as far as its interval tells: `holds`, `refuted` or `cannot tell`.

    Examples
    --------
    >>> between(Interval(0.9, 0.7, 1.1), 0.5, 1.5), between(Interval(0.1, 0.0, 0.2), 0.5, 1.5)
    ('holds', 'refuted')
    """
    if low <= found.low and found.high <= high:
        return "holds"
    return "refuted" if found.high < low or found.low > high else "cannot tell"
