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
from delta_analysis.pruning import Pruner
from delta_analysis.sweep import EditableModel, Pair, for_each_pair, outcome_matrix, useful_seeds

KEPT_SHARE = 0.95
"""A drop rate is tolerated while the model keeps this share of the untouched model's metric."""
LOWEST, HIGHEST = 0.001, 0.999
RESOLUTION = 0.25
"""Bisection stops when the bracket is this narrow on the scale log(p / (1 - p))."""


def logit(p: float) -> float:
    """log(p / (1 - p)): the scale on which drop rates are searched and compared."""
    return math.log(p / (1 - p))


def inverse_logit(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def measure_tolerance(
    pairs: Sequence[Pair],
    pruner: Pruner,
    seeds: Sequence[int],
    cells: pd.DataFrame,
    *,
    device: str = "cpu",
    workers: int = 1,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The drop rate up to which 95% of the untouched model's metric is kept, by pair.

    Starting from the cells of a sweep, the bracket between the last tolerated and the first failing
    drop rate (in the mean over seeds) is halved on log(p/(1-p)) over the sweep's nested masks.

    Parameters
    ----------
    pairs, seeds, device, workers : as in the sweep.
    pruner : the method to bisect on; its own drop rate is replaced.
    cells : rows of `sweep` for these pairs, drop rate 0 among them.

    Returns
    -------
    tolerances : one row a pair; `pair`; `tolerated, low, high`, drop rates with a 95% interval over
        seeds and items, where the mean over seeds first falls below 95%, or the end of the searched
        range [0.001, 0.999] if that lies beyond; `untouched`, the metric at drop rate 0;
        `kept_at_1`, the share of it that is kept with the whole delta dropped (NaN if the sweep has
        no such cell). Where masks differ much more than items do, few seeds give an interval that is
        too narrow.
    refined : the cells that the bisection added, in the columns of `sweep`.

    Raises
    ------
    ValueError
        Seeds other than the sweep's, or no cell of an untouched model that answers something.
    """

    def bisect(pair: Pair) -> tuple[dict[str, object], list[dict[str, object]]]:
        metric = METRICS[pair.evaluation.metric]
        known = known_cells(cells, pair, at_drop_rate(pruner, 0.5), seeds)
        outcomes = {p: outcome_matrix(known[known["drop_rate"] == p]) for p in set(known["drop_rate"].tolist())}
        added: list[dict[str, object]] = []
        editable = None
        while (rate := next_rate(metric, outcomes)) is not None:
            editable = editable or EditableModel.load(pair, device)
            at_rate = at_drop_rate(pruner, rate)
            judged = [editable.judge(at_rate, seed) for seed in useful_seeds(at_rate, seeds)]
            outcomes[rate] = outcome_matrix(pd.DataFrame(judged))
            added += judged
        tolerated, low, high = tolerated_interval(metric, outcomes)
        untouched = float(metric.value(outcomes[0.0].mean()))
        row = {"pair": pair.name, "tolerated": tolerated, "low": low, "high": high, "untouched": untouched}
        return {**row, "kept_at_1": kept_shares(metric, outcomes).get(1.0, math.nan)}, added

    found = for_each_pair(bisect, pairs, workers)
    refined = pd.DataFrame([cell for _, added in found for cell in added], columns=cells.columns)
    return pd.DataFrame([row for row, _ in found]), refined


def at_drop_rate(pruner: Pruner, drop_rate: float) -> Pruner:
    """The same method at another drop rate."""
    return replace(pruner, drop_rate=drop_rate)  # type: ignore[type-var]


def known_cells(cells: pd.DataFrame, pair: Pair, pruner: Pruner, seeds: Sequence[int]) -> pd.DataFrame:
    """The cells of a pair under the pruner's method, with the untouched model of whichever method."""
    here = cells[cells["pair"] == pair.name]
    known = here[(here["method"] == pruner.method) & (here["drop_rate"] > 0)]
    drawn = sorted(set(known.loc[known["drop_rate"] < 1, "seed"]))
    if drawn and drawn != sorted(useful_seeds(pruner, seeds)):
        raise ValueError(f"seeds must be those of the sweep of {pair.name}, {drawn}; not {list(seeds)}")
    return pd.concat([here[here["drop_rate"] == 0].head(1), known])


def kept_shares(metric: Metric, outcomes: Mapping[float, np.ndarray]) -> dict[float, float]:
    """The metric at each drop rate as a share of the untouched model's, in order of drop rate."""
    needs = "the tolerated drop rate needs an untouched model (drop rate 0) that answers something"
    if 0.0 not in outcomes:
        raise ValueError(f"{needs}; include drop rate 0 in the sweep")
    if metric.name == "accuracy" and not outcomes[0.0].any():
        raise ValueError(f"{needs}; this one is always wrong, check that questions and prompt format are its own")
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
