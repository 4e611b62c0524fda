"""What effects of claims are built from: several intervals as one, rows of results, shares kept and tolerated."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from delta_analysis.reports.family import BOTH, CPT, ENCODER_PAIRS, SFT
from delta_analysis.sweeps import (
    Interval,
    first_metric,
    inverse_logit,
    kept_interval,
    logit,
    metric_of,
    outcome_matrix,
    tolerance_difference,
    tolerated_interval,
)

GIVEN = "given"
FINE_TUNED = (SFT, GIVEN)
"""A pair of the user's own is taken for a fine-tune on its true base."""
CONTINUED = (BOTH, CPT)
RATE = 0.9
"""What a claim's "high" drop rate is: the one that the papers lead with."""
ENCODER_TASKS = tuple(r.task for r in ENCODER_PAIRS if r.task)


class NotMeasuredError(LookupError):
    """The results hold nothing that an effect could be computed from; says what is missing."""


def least(effects: Iterable[Interval]) -> Interval:
    """The least of several effects: of values, lower ends and upper ends by themselves.

    The lower end is below the true least at least as often as that of one effect. The upper end errs
    the more often the more effects are near the least.
    """
    return Interval(*map(min, zip(*effects, strict=True)))


def greatest(effects: Iterable[Interval]) -> Interval:
    """The greatest of several effects, as `least`."""
    return Interval(*map(max, zip(*effects, strict=True)))


def average(effects: Iterable[Interval]) -> Interval:
    """The mean of several effects with independent errors: half widths add as squares, each side by itself.

    Examples
    --------
    >>> average([Interval(1.0, 0.0, 1.0), Interval(3.0, 3.0, 3.0)])
    Interval(value=2.0, low=1.5, high=2.0)
    """
    values, lows, highs = np.array(list(effects)).T
    value = float(values.mean())
    below, above = (float(np.linalg.norm(each)) / len(values) for each in (values - lows, highs - values))
    return Interval(value, value - below, value + above)


def average_over_rates(effects: Iterable[Interval]) -> Interval:
    """The mean of effects on the same items: as if all erred alike, so that no interval shrinks."""
    return Interval(*np.mean(list(effects), axis=0).tolist())


def difference(one: Interval, other: Interval) -> Interval:
    """The difference of two effects with independent errors."""
    return Interval(*(2 * x for x in average([one, negative(other)])))


def negative(effect: Interval) -> Interval:
    """The effect counted the other way round."""
    return Interval(-effect.value, -effect.high, -effect.low)


def made_by(results: pd.DataFrame, kinds: Iterable[str]) -> pd.DataFrame:
    """The rows of pairs of some kinds."""
    rows = results[results["made_by"].isin(list(kinds))]
    if rows.empty:
        raise NotMeasuredError(f"no pair made by {' or '.join(kind for kind in kinds if kind != GIVEN)}")
    return rows


def decoders(cells: pd.DataFrame) -> pd.DataFrame:
    """The first metric of the pairs that are not judged by an encoder's task."""
    rows = cells[~cells["evaluation"].isin(ENCODER_TASKS)]
    if rows.empty:
        raise NotMeasuredError("no decoder")
    return first_metric(rows)


def encoders(cells: pd.DataFrame) -> pd.DataFrame:
    """The first metric of the pairs that are judged by an encoder's task."""
    rows = cells[cells["evaluation"].isin(ENCODER_TASKS)]
    if rows.empty:
        raise NotMeasuredError("no encoder")
    return first_metric(rows)


def at_rate(cells: pd.DataFrame, p: float) -> dict[str, pd.DataFrame]:
    """Of each pair with cells at a drop rate, those and the untouched model's."""
    found = {
        str(pair): rows[rows["drop_rate"].isin([0.0, p])]
        for pair, rows in cells.groupby("pair", sort=False)
        if (rows["drop_rate"] == p).any()
    }
    if not found:
        raise NotMeasuredError(f"no model at drop rate {p:g}")
    return found


def kept(cells: pd.DataFrame) -> Interval:
    """The share of the untouched metric that a pair keeps at its other drop rate."""
    pruned, untouched = (outcome_matrix(cells[(cells["drop_rate"] > 0) == dropped]) for dropped in (True, False))
    return kept_interval(metric_of(cells), pruned, untouched[:1])


def tolerances(cells: pd.DataFrame) -> dict[str, Interval]:
    """The tolerated drop rate of each pair, from all cells of one method."""
    return {
        str(pair): tolerated_interval(
            metric_of(rows),
            {float(rate): outcome_matrix(group) for rate, group in rows.groupby("drop_rate")},
        )
        for pair, rows in cells.groupby("pair", sort=False)
    }


def on_log_odds(rates: Interval) -> Interval:
    """Drop rates as log(p/(1-p))."""
    return Interval(*map(logit, rates))


def average_rate(rates: Iterable[Interval]) -> Interval:
    """The mean of drop rates, taken on log(p/(1-p))."""
    return Interval(*map(inverse_logit, average(map(on_log_odds, rates))))


def tolerates_more(one: Interval, other: Interval) -> Interval:
    """How much larger one tolerated drop rate is than another, on log(p/(1-p))."""
    rows = [pd.Series({"tolerated": each.value, "low": each.low, "high": each.high}) for each in (one, other)]
    return tolerance_difference(*rows)


def rates_tried(cells: pd.DataFrame) -> list[float]:
    """Drop rates between 0 and 1."""
    return sorted(float(p) for p in cells["drop_rate"].unique() if 0 < p < 1)
