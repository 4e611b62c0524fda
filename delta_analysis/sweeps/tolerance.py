"""The tolerated drop rate of a pair, measured: how much can be dropped before the ability goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd

from delta_analysis.evaluation import Evaluation
from delta_analysis.pruning import Pruner
from delta_analysis.sweeps.curves import first_metric, outcome_matrix
from delta_analysis.sweeps.engine import Cell, Evaluations, as_edit, evaluations_of, judge, release, useful_seeds
from delta_analysis.sweeps.intervals import (
    MEAN,
    Interval,
    Metric,
    inverse_logit,
    logit,
    metric_named,
    percentile_interval,
    resampled_means,
    two_way_resamples,
)
from delta_analysis.sweeps.pairs import Edit, Pair

KEPT_SHARE = 0.95
"""A drop rate is tolerated while the model keeps this share of the untouched model's metric."""


LOWEST, HIGHEST = 0.001, 0.999


END = 1e-9
"""Nearer to an end of the search, a drop rate is that end."""


RESOLUTION = 0.25
"""Bisection stops when the bracket is this narrow on the scale log(p / (1 - p))."""


def measure_tolerance(
    pairs: Sequence[Pair],
    edit: Edit | Pruner,
    evaluations: Evaluations,
    seeds: Sequence[int],
    out_dir: str | Path,
    executor: Executor | None = None,
    *,
    drop_rates: Sequence[float] = (),
    resolution: float = RESOLUTION,
    device: str = "cpu",
    progress: TextIO | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The drop rate up to which 95% of the untouched model's metric is kept, by pair.

    The bracket between the last tolerated and the first failing drop rate (in the mean over seeds)
    is halved on log(p/(1-p)), over nested masks; all pairs go on together, a drop rate each at a time.

    Parameters
    ----------
    pairs, seeds, out_dir, executor, device, progress : as in `sweep`.
    edit : the method to bisect on; its own drop rate is replaced.
    evaluations : as in `sweep`, one for each pair. Its metric, the first if it has several, falls as a
        model breaks, as that of `ExactMatch` does, or is a perplexity.
    drop_rates : where to begin, besides 0; those of a sweep into the same `out_dir` cost nothing.
    resolution : the search ends when its bracket is this narrow on log(p/(1-p)); above 0.

    Returns
    -------
    tolerances : one row a pair; `pair, method, scope`; `tolerated, low, high`, drop rates with a 95%
        interval over seeds and items, where the mean over seeds first falls below 95%, or the end of
        the searched range [0.001, 0.999] if that lies beyond; `untouched`, the metric at drop rate 0;
        `kept_at_1`, its share kept with the whole delta dropped (NaN if 1 is not in `drop_rates`).
    cells : all that was judged, in the columns of `sweep`.

    Raises
    ------
    ValueError
        Several evaluations for one pair; an untouched model that answers nothing.
    SweepError
        Cells that failed.
    """
    edit = as_edit(edit)
    for rate in (LOWEST, HIGHEST):
        # A window that is too wide for the ends of the search is an error now, not in the middle.
        at_drop_rate(edit, rate)
    outcomes: dict[Pair, dict[float, np.ndarray]] = {pair: {} for pair in pairs}
    wanted: dict[Pair, list[float]] = {pair: sorted({0.0, *drop_rates}) for pair in pairs}
    tables: list[pd.DataFrame] = []
    metrics: dict[Pair, Metric] = {}
    try:
        while any(wanted.values()):
            asked = [
                Cell(pair, at_drop_rate(edit, rate), seed, _only_one(pair, evaluations))
                for pair, rates in wanted.items()
                for rate in rates
                for seed in useful_seeds(at_drop_rate(edit, rate).pruner, seeds)
            ]
            tables.append(judge(asked, out_dir, executor, device=device, progress=progress))
            for pair, rates in wanted.items():
                here = first_metric(tables[-1][tables[-1]["pair"] == pair.name])
                if rates:
                    metrics[pair] = metric_named(here["metric"].iloc[0])
                    outcomes[pair] |= {rate: outcome_matrix(here[here["drop_rate"] == rate]) for rate in rates}
            rates_next = {pair: next_rate(metrics[pair], outcomes[pair], resolution) for pair in pairs}
            wanted = {pair: [] if rate is None else [rate] for pair, rate in rates_next.items()}
    finally:
        release()
    found = [_tolerance(pair, edit, metrics[pair], outcomes[pair]) for pair in pairs]
    return pd.DataFrame(found), pd.concat(tables, ignore_index=True)


def _tolerance(pair: Pair, edit: Edit, metric: Metric, outcomes: Mapping[float, np.ndarray]) -> dict[str, object]:
    """One row of the table of `measure_tolerance`."""
    tolerated, low, high = tolerated_interval(metric, outcomes)
    return {
        "pair": pair.name,
        "method": edit.pruner.method,
        "scope": edit.scope,
        "tolerated": tolerated,
        "low": low,
        "high": high,
        "untouched": float(metric.value(outcomes[0.0].mean())),
        "kept_at_1": kept_shares(metric, outcomes).get(1.0, math.nan),
    }


def _only_one(pair: Pair, evaluations: Evaluations) -> Evaluation:
    own = evaluations_of(pair, evaluations)
    if len(own) > 1:
        raise ValueError(f"evaluations: the tolerated drop rate of {pair.name!r} follows from one, not {len(own)}")
    return own[0]


def at_drop_rate(edit: Edit, drop_rate: float) -> Edit:
    """The same method and scope at another drop rate; at 0 the untouched model, which a factor would scale."""
    rescale = edit.pruner.rescale if drop_rate or isinstance(edit.pruner.rescale, str) else "none"
    return replace(edit, pruner=replace(edit.pruner, drop_rate=drop_rate, rescale=rescale))  # type: ignore[type-var]


def kept_shares(metric: Metric, outcomes: Mapping[float, np.ndarray]) -> dict[float, float]:
    """The metric at each drop rate as a share of the untouched model's, in order of drop rate."""
    needs = "the tolerated drop rate needs an untouched model (drop rate 0) that answers something"
    if 0.0 not in outcomes:
        raise ValueError(f"{needs}; include drop rate 0 in the sweep")
    if metric is MEAN and not outcomes[0.0].any():
        raise ValueError(f"{needs}; this one is always wrong, check that questions and prompt format are its own")
    untouched = outcomes[0.0].mean()
    return {rate: float(metric.kept_share(outcomes[rate].mean(), untouched)) for rate in sorted(outcomes)}


def next_rate(metric: Metric, outcomes: Mapping[float, np.ndarray], resolution: float = RESOLUTION) -> float | None:
    """The drop rate to evaluate next, None when the bracket is narrow enough."""
    shares = kept_shares(metric, outcomes)
    inner = [rate for rate in shares if LOWEST <= rate <= HIGHEST]
    failing = next((rate for rate in inner if shares[rate] < KEPT_SHARE), None)
    passing = max((rate for rate in inner if failing is None or rate < failing), default=None)
    if failing is None:
        return HIGHEST if passing != HIGHEST else None
    if passing is None:
        return LOWEST if failing != LOWEST else None
    if logit(failing) - logit(passing) <= resolution:
        return None
    return inverse_logit((logit(passing) + logit(failing)) / 2)


def tolerated_interval(metric: Metric, outcomes: Mapping[float, np.ndarray]) -> Interval:
    """Where the kept share first falls below 95%, interpolated on log(p/(1-p)), with its interval."""
    shares = {rate: share for rate, share in kept_shares(metric, outcomes).items() if LOWEST <= rate <= HIGHEST}
    resamples = two_way_resamples(
        max(len(outcomes[rate]) for rate in shares), outcomes[0.0].shape[1], block=metric.block
    )
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


def tolerance_difference(one: pd.Series, other: pd.Series) -> Interval:
    """How much more one pair tolerates than another, on log(p/(1-p)), with its 95% interval.

    `one` and `other` are rows of `measure_tolerance`. Their errors are taken as independent: half
    widths add as squares, each side by itself. A tolerance at an end of the search is only a bound, so
    that the difference is open on that side.
    """
    a, b = _with_open_ends(one), _with_open_ends(other)
    value = a[0] - b[0]
    return Interval(value, value - math.hypot(a[0] - a[1], b[2] - b[0]), value + math.hypot(a[2] - a[0], b[0] - b[1]))


def _with_open_ends(row: pd.Series) -> tuple[float, float, float]:
    """A tolerance and its interval on log(p/(1-p)), infinite where an end of the search is only a bound."""
    low = -math.inf if row["low"] <= LOWEST + END else logit(row["low"])
    high = math.inf if row["high"] >= HIGHEST - END else logit(row["high"])
    return logit(row["tolerated"]), low, high
