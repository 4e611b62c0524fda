"""Which method is best at a drop rate, with the uncertainty of its lead."""

from __future__ import annotations

import numpy as np
import pandas as pd

from delta_analysis.intervals import METRICS, Interval, percentile_interval, resampled_means, two_way_resamples
from delta_analysis.sweep import outcome_matrix


def lead(cells: pd.DataFrame, method: str, other: str) -> Interval:
    """How much more of the untouched metric one method keeps than another, with its 95% interval.

    Seeds and items are resampled once for both, so that they are compared on the same masks' seeds
    and the same questions. A method has all seeds or, if nothing about it is random, a single one.

    Parameters
    ----------
    cells : rows of `sweep` for one pair, at drop rate 0 and at one other.
    """
    outcomes, untouched = _outcomes(cells)
    metric = METRICS[cells["metric"].iloc[0]]
    resamples = two_way_resamples(max(map(len, outcomes.values())), untouched.shape[1])
    start = resampled_means(untouched, resamples)
    values = [metric.kept_share(outcomes[m].mean(), untouched.mean()) for m in (method, other)]
    samples = [metric.kept_share(resampled_means(outcomes[m], resamples), start) for m in (method, other)]
    return percentile_interval(float(values[0] - values[1]), samples[0] - samples[1])


def _outcomes(cells: pd.DataFrame) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Outcomes of each method at the drop rate that is not 0, and of the untouched model."""
    pruned = cells[cells["drop_rate"] > 0]
    by_method = {str(method): outcome_matrix(rows) for method, rows in pruned.groupby("method", sort=False)}
    return by_method, outcome_matrix(cells[cells["drop_rate"] == 0].head(1))


def best_methods(cells: pd.DataFrame) -> pd.DataFrame:
    """The best method of each pair at each drop rate, by the share of the untouched metric that it keeps.

    Parameters
    ----------
    cells : rows of `sweep`, drop rate 0 among them, at least two methods at each other drop rate,
        each with all seeds or a single one.

    Returns
    -------
    DataFrame, one row a `pair` and `drop_rate` in (0, 1): `method`, the best; `second`, the next;
    `kept`, the share that the best keeps; `lead`, how much more than the second, with its 95%
    interval `low, high`; `clear`, whether the interval lies above 0. The interval is for these two
    methods: that they were chosen as the best of several is not in it.
    """
    rows = []
    for pair, here in cells.groupby("pair", sort=False):
        untouched = here[here["drop_rate"] == 0]
        for drop_rate, group in here[here["drop_rate"].between(0, 1, inclusive="neither")].groupby("drop_rate"):
            both = pd.concat([untouched, group])
            outcomes, start = _outcomes(both)
            metric = METRICS[here["metric"].iloc[0]]
            kept = {m: float(metric.kept_share(o.mean(), start.mean())) for m, o in outcomes.items()}
            best, second = sorted(kept, key=kept.__getitem__, reverse=True)[:2]
            ahead = lead(both, best, second)
            row = {"pair": pair, "drop_rate": drop_rate, "method": best, "second": second, "kept": kept[best]}
            rows.append({**row, "lead": ahead.value, "low": ahead.low, "high": ahead.high, "clear": ahead.low > 0})
    return pd.DataFrame(rows)
