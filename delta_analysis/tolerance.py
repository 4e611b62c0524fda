"""The tolerated drop rate of a pair, measured: how much can be dropped before the ability goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from delta_analysis.intervals import (
    METRICS,
    Interval,
    Metric,
    percentile_interval,
    resampled_means,
    two_way_resamples,
)
from delta_analysis.pruning import Dare
from delta_analysis.sweep import EditableModel, Pair, outcome_matrix

KEPT_SHARE = 0.95
"""A drop rate is tolerated while the model keeps this share of the untouched model's metric."""
LOWEST, HIGHEST = 0.001, 0.999
RESOLUTION = 0.2
"""Bisection stops when the bracket is this narrow on the scale log(p / (1 - p))."""


def logit(p: float) -> float:
    """log(p / (1 - p)): the scale on which drop rates are searched and compared."""
    return math.log(p / (1 - p))


def inverse_logit(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def measure_tolerance(
    pairs: Sequence[Pair], pruner: Dare, seeds: Sequence[int], cells: pd.DataFrame, *, device: str = "cpu"
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The largest drop rate that keeps 95% of the untouched model's metric, by pair.

    Starting from the cells of a sweep, the bracket between the last tolerated and the first failing
    drop rate (in the mean over seeds) is halved on log(p/(1-p)) over the sweep's nested masks.

    Parameters
    ----------
    pairs, seeds, device : those of the sweep.
    pruner : the method to bisect on; its own drop rate is replaced.
    cells : rows of `sweep` for these pairs, drop rate 0 among them.

    Returns
    -------
    tolerances : one row a pair; `pair`; `tolerated, low, high`, drop rates with a 95% interval over
        seeds and items, limited to [0.001, 0.999]; `untouched`, the metric at drop rate 0.
    refined : the cells that the bisection added, in the columns of `sweep`.
    """
    rows, refined = [], []
    for pair in pairs:
        known = cells[(cells["pair"] == pair.name) & (cells["method"] == pruner.method)]
        outcomes = {p: outcome_matrix(known[known["drop_rate"] == p]) for p in set(known["drop_rate"].tolist())}
        metric = METRICS[pair.evaluation.metric]
        editable = None
        while (rate := next_rate(metric, outcomes)) is not None:
            editable = editable or EditableModel.load(pair, device)
            added = pd.DataFrame([editable.judge(replace(pruner, drop_rate=rate), seed) for seed in seeds])
            outcomes[rate] = outcome_matrix(added)
            refined.append(added)
        interval = tolerated_interval(metric, outcomes)
        rows.append(
            {
                "pair": pair.name,
                "tolerated": interval.value,
                "low": interval.low,
                "high": interval.high,
                "untouched": float(metric.value(outcomes[0.0].mean())),
            }
        )
    return pd.DataFrame(rows), pd.concat(refined, ignore_index=True) if refined else cells.iloc[:0]


def kept_shares(metric: Metric, outcomes: Mapping[float, np.ndarray]) -> dict[float, float]:
    """The metric at each drop rate as a share of the untouched model's, in order of drop rate."""
    if 0.0 not in outcomes or (metric.name == "accuracy" and not outcomes[0.0].any()):
        raise ValueError("the tolerated drop rate needs an untouched model (drop rate 0) that answers something")
    untouched = outcomes[0.0].mean()
    return {rate: float(metric.kept_share(outcomes[rate].mean(), untouched)) for rate in sorted(outcomes)}


def next_rate(metric: Metric, outcomes: Mapping[float, np.ndarray]) -> float | None:
    """The drop rate to evaluate next, None when the bracket is narrow enough."""
    shares = kept_shares(metric, outcomes)
    inner = [rate for rate in shares if LOWEST <= rate <= HIGHEST]
    failing = next((rate for rate in inner if shares[rate] < KEPT_SHARE), None)
    passing = max((rate for rate in inner if failing is None or rate < failing), default=None)
    if failing is None:
        return HIGHEST if passing != HIGHEST else None
    if passing is None:
        return LOWEST if failing != LOWEST else None
    if logit(failing) - logit(passing) <= RESOLUTION:
        return None
    return inverse_logit((logit(passing) + logit(failing)) / 2)


def tolerated_interval(metric: Metric, outcomes: Mapping[float, np.ndarray]) -> Interval:
    """Where the kept share first falls below 95%, interpolated on log(p/(1-p)), with its interval."""
    shares = {rate: share for rate, share in kept_shares(metric, outcomes).items() if LOWEST <= rate <= HIGHEST}
    resamples = two_way_resamples(max(len(outcomes[rate]) for rate in shares), outcomes[0.0].shape[1])
    untouched = resampled_means(outcomes[0.0], resamples)
    samples = np.array([metric.kept_share(resampled_means(outcomes[rate], resamples), untouched) for rate in shares])
    scale = [logit(rate) for rate in shares]
    crossings = np.array([crossing(scale, column) for column in samples.T])
    value, low, high = percentile_interval(crossing(scale, np.array(list(shares.values()))), crossings)
    return Interval(inverse_logit(value), inverse_logit(low), inverse_logit(high))


def crossing(scale: Sequence[float], shares: np.ndarray) -> float:
    """Where `shares` over the increasing `scale` first falls below 95%, linear in between.

    The last point if it never falls, the first if it begins below.
    """
    below = np.flatnonzero(shares < KEPT_SHARE)
    if not len(below):
        return scale[-1]
    first = int(below[0])
    if first == 0:
        return scale[0]
    upper, lower = shares[first - 1], shares[first]
    return float(scale[first - 1] + (scale[first] - scale[first - 1]) * (upper - KEPT_SHARE) / (upper - lower))
