"""The tolerated drop rate of a pair, measured: how much can be dropped before the ability goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd

from delta_analysis.evaluation import Evaluation
from delta_analysis.pruning import Dare, Pruner
from delta_analysis.sweeps.curves import first_metric, outcome_matrix
from delta_analysis.sweeps.engine import Cell, Evaluations, as_edit, evaluations_of, judge, release, useful_seeds
from delta_analysis.sweeps.intervals import (
    CONFIDENCE,
    MEAN,
    Interval,
    Metric,
    inverse_logit,
    logit,
    metric_of,
    percentile_interval,
    resampled_means,
    two_way_resamples,
)
from delta_analysis.sweeps.pairs import Edit, Pair

KEPT_SHARE = 0.95
"""A drop rate is tolerated while the model keeps this share of what the untouched model has above the floor."""


LOWEST, HIGHEST = 0.001, inverse_logit(10.0)
"""Where the search ends; a tolerance there is a bound."""


MEASURED, AT_LEAST, AT_MOST, NONE = "measured", "at least", "at most", "none"
"""What a tolerance is: a value, a bound, or nothing since the fine-tune is not clearly above the floor."""


Means = Callable[[np.ndarray], np.ndarray]


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
    """The drop rate up to which 95% of what the fine-tune has above the floor is kept, by pair.

    With a the metric at a drop rate, u that of the untouched model and f the floor, what is left with the
    whole delta dropped or chance if that is more, the share kept is `(a - f) / (u - f)`; of a perplexity, a
    is its reciprocal. The floor is the same for every scope of a pair, so that their tolerances compare. The
    bracket between the last tolerated and the first failing drop rate (in the mean over seeds) is halved on
    log(p/(1-p)), over nested masks; all pairs go on together, a drop rate each at a time.

    Parameters
    ----------
    pairs, seeds, out_dir, executor, device, progress : as in `sweep`.
    edit : the method to bisect on; its own drop rate is replaced.
    evaluations : as in `sweep`, one for each pair. Its metric, the first if it has several, falls as a
        model breaks, as that of `ExactMatch` does, or is a perplexity. Chance is its `chance` if it has one.
    drop_rates : where to begin, besides 0; those of a sweep into the same `out_dir` cost nothing.
    resolution : the search ends when its bracket is this narrow on log(p/(1-p)); above 0.

    Returns
    -------
    tolerances : one row a pair; `pair, method, scope`; `tolerated, low, high`, drop rates with a 95%
        interval over seeds and items; `reading`, what `tolerated` is: `measured`, or a bound, `at least` the
        upper or `at most` the lower end of the searched range, log odds -6.9 to 10, or `none` (missing
        values) where the untouched model is not clearly above the floor; `open_low, open_high`, whether an
        end of the interval is an end of that range, so that the truth may lie beyond; `untouched` and
        `floor`, the metric at drop rate 0 and the floor.
    cells : all that was judged of each pair in this scope, in the columns of `sweep`.

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
    judges = {pair: _only_one(pair, evaluations) for pair in pairs}
    judged = partial(judge, out_dir=out_dir, executor=executor, device=device, progress=progress)
    try:
        return _search(edit, judges, seeds, judged, {0.0, *drop_rates}, resolution)
    finally:
        release()


def _search(
    edit: Edit,
    judges: Mapping[Pair, Evaluation],
    seeds: Sequence[int],
    judged: Callable[[Sequence[Cell]], pd.DataFrame],
    start: Collection[float],
    resolution: float,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables of `measure_tolerance`."""
    floors = _floors(judges, judged)
    outcomes: dict[Pair, dict[float, np.ndarray]] = {pair: {} for pair in judges}
    wanted: dict[Pair, list[float]] = {pair: sorted(start) for pair in judges}
    tables: list[pd.DataFrame] = []
    metrics: dict[Pair, Metric] = {}
    while any(wanted.values()):
        tables.append(
            judged(
                [
                    Cell(pair, at_drop_rate(edit, rate), seed, judges[pair])
                    for pair, rates in wanted.items()
                    for rate in rates
                    for seed in useful_seeds(at_drop_rate(edit, rate).pruner, seeds)
                ]
            )
        )
        for pair, rates in wanted.items():
            here = first_metric(tables[-1][tables[-1]["pair"] == pair.name])
            if rates:
                metrics[pair] = metric_of(here)
                outcomes[pair] |= {rate: outcome_matrix(here[here["drop_rate"] == rate]) for rate in rates}
        following = {pair: next_rate(metrics[pair], outcomes[pair], resolution, floors[pair]) for pair in judges}
        wanted = {pair: [] if rate is None else [rate] for pair, rate in following.items()}
    found = [_tolerance(pair, edit, metrics[pair], outcomes[pair], floors[pair]) for pair in judges]
    return pd.DataFrame(found), pd.concat(tables, ignore_index=True)


def _floors(judges: Mapping[Pair, Evaluation], judged: Callable[[Sequence[Cell]], pd.DataFrame]) -> dict[Pair, Floor]:
    """The floor of each pair, with the whole delta dropped whatever the scope."""
    table = judged([Cell(pair, Edit(Dare(1.0)), 0, evaluation) for pair, evaluation in judges.items()])
    return {
        pair: Floor(outcome_matrix(first_metric(table[table["pair"] == pair.name])), chance_of(evaluation))
        for pair, evaluation in judges.items()
    }


def _tolerance(
    pair: Pair, edit: Edit, metric: Metric, outcomes: Mapping[float, np.ndarray], floor: Floor
) -> dict[str, object]:
    """One row of the table of `measure_tolerance`."""
    found = tolerated_interval(metric, outcomes, floor)
    left = float(metric.value(floor.outcomes.mean()))
    return {
        "pair": pair.name,
        "method": edit.method,
        "scope": edit.scope,
        **dict(zip(("tolerated", "low", "high"), found, strict=True)),
        "reading": reading(found.value),
        "open_low": found.low <= LOWEST + END,
        "open_high": found.high >= HIGHEST - END,
        "untouched": float(metric.value(outcomes[0.0].mean())),
        "floor": max(left, floor.chance) if metric is MEAN else left,
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


@dataclass(frozen=True, eq=False)
class Floor:
    """What no fine-tuning is needed for: outcomes (1, items) with the whole delta dropped, and chance."""

    outcomes: np.ndarray
    chance: float = 0.0


def chance_of(evaluation: Evaluation) -> float:
    """What an evaluation says that a guess is worth, in its metric; 0 if it says nothing."""
    return float(getattr(evaluation, "chance", 0.0))


def reading(tolerated: float) -> str:
    """Whether a tolerated drop rate is measured, a bound, or none."""
    if math.isnan(tolerated):
        return NONE
    return AT_MOST if tolerated <= LOWEST + END else AT_LEAST if tolerated >= HIGHEST - END else MEASURED


def _floor(outcomes: Mapping[float, np.ndarray], floor: Floor | None) -> Floor | None:
    """The one given, or else the outcomes at drop rate 1, if they are known."""
    return Floor(outcomes[1.0]) if floor is None and 1.0 in outcomes else floor


def _left_at_floor(metric: Metric, floor: Floor | None, means: Means, untouched: np.ndarray) -> np.ndarray:
    """The share of the untouched metric that is left at the floor; 0 where none is known."""
    if floor is None:
        return np.zeros_like(untouched)
    left = metric.kept_share(means(floor.outcomes), untouched)
    return np.maximum(left, floor.chance / untouched) if floor.chance else left


def _above(kept: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Of shares of the untouched metric, the share of what is above the floor."""
    return (kept - left) / np.maximum(1 - left, 1e-12)


def kept_shares(metric: Metric, outcomes: Mapping[float, np.ndarray], floor: Floor | None = None) -> dict[float, float]:
    """What each drop rate keeps of what the untouched model has above the floor, in order of drop rate.

    Without a floor it is what is left at drop rate 1, or 0 if that is not among the outcomes.
    """
    needs = "the tolerated drop rate needs an untouched model (drop rate 0) that answers something"
    if 0.0 not in outcomes:
        raise ValueError(f"{needs}; include drop rate 0 in the sweep")
    if metric is MEAN and not outcomes[0.0].any():
        raise ValueError(f"{needs}; this one is always wrong, check that questions and prompt format are its own")
    untouched = np.asarray(outcomes[0.0].mean())
    left = _left_at_floor(metric, _floor(outcomes, floor), np.mean, untouched)
    return {rate: float(_above(metric.kept_share(outcomes[rate].mean(), untouched), left)) for rate in sorted(outcomes)}


def clearly_above(metric: Metric, outcomes: Mapping[float, np.ndarray], floor: Floor | None = None) -> bool:
    """Whether the untouched model is above the floor in 97.5% of the resamples of the items."""
    if (floor := _floor(outcomes, floor)) is None:
        return True
    resamples = two_way_resamples(1, outcomes[0.0].shape[1], block=metric.block)
    means = partial(resampled_means, resamples=resamples)
    left = _left_at_floor(metric, floor, means, means(outcomes[0.0]))
    return bool(np.quantile(left, (1 + CONFIDENCE) / 2) < 1)


def next_rate(
    metric: Metric,
    outcomes: Mapping[float, np.ndarray],
    resolution: float = RESOLUTION,
    floor: Floor | None = None,
) -> float | None:
    """The drop rate to evaluate next, None when the bracket is narrow enough, or there is nothing to lose."""
    shares = kept_shares(metric, outcomes, floor)
    if not clearly_above(metric, outcomes, floor):
        return None
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


def tolerated_interval(metric: Metric, outcomes: Mapping[float, np.ndarray], floor: Floor | None = None) -> Interval:
    """Where the share kept above the floor first falls below 95%, interpolated on log(p/(1-p)), with its interval.

    Missing values where the untouched model is not clearly above the floor (as in `kept_shares`).
    """
    kept = kept_shares(metric, outcomes, floor)
    floor = _floor(outcomes, floor)
    if not clearly_above(metric, outcomes, floor):
        return Interval(math.nan, math.nan, math.nan)
    shares = {rate: share for rate, share in kept.items() if LOWEST <= rate <= HIGHEST}
    resamples = two_way_resamples(
        max(len(outcomes[rate]) for rate in shares), outcomes[0.0].shape[1], block=metric.block
    )
    means = partial(resampled_means, resamples=resamples)
    untouched = means(outcomes[0.0])
    left = _left_at_floor(metric, floor, means, untouched)
    samples = np.array([_above(metric.kept_share(means(outcomes[rate]), untouched), left) for rate in shares])
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
