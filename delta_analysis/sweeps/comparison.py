"""Which method is best at a drop rate, with the uncertainty of its lead."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

from delta_analysis.sweeps.curves import outcome_matrix
from delta_analysis.sweeps.intervals import CONFIDENCE, Interval, metric_of, resampled_means, two_way_resamples

UPPER = (1 + CONFIDENCE) / 2
NORMAL = float(stats.norm.ppf(UPPER))


def lead(cells: pd.DataFrame, method: str, other: str) -> Interval:
    """How much more of the untouched metric one method keeps than another, with its 95% interval.

    Both are compared on the same seeds and the same items. The half width is the root of the sum of
    two squares: 1.96 standard deviations of the lead when items are resampled, and Student's t times
    the standard error over seeds, which is honest about few seeds where a bootstrap is not. A method
    has all seeds or, if nothing about it is random, a single one.

    Parameters
    ----------
    cells : rows of `sweep` for one pair, at drop rate 0 and at one other.
    """
    outcomes, untouched = _outcomes(cells)
    metric = metric_of(cells)
    one, two = outcomes[method], outcomes[other]

    def kept_more(means: list[np.ndarray]) -> np.ndarray:
        """The lead, from the means of one, of the other and of the untouched model."""
        return metric.kept_share(means[0], means[2]) - metric.kept_share(means[1], means[2])

    over_seeds = [each.mean(axis=0, keepdims=True) for each in (one, two, untouched)]
    value = float(kept_more([each.mean() for each in over_seeds]))
    resamples = two_way_resamples(1, untouched.shape[1], block=metric.block)
    by_items = NORMAL * kept_more([resampled_means(each, resamples) for each in over_seeds]).std()
    by_seed = metric.kept_share(one.mean(axis=1), untouched.mean()) - metric.kept_share(
        two.mean(axis=1), untouched.mean()
    )
    error = by_seed.std(ddof=1) / np.sqrt(len(by_seed)) if len(by_seed) > 1 else 0.0
    half = float(np.hypot(by_items, stats.t.ppf(UPPER, max(len(by_seed) - 1, 1)) * error))
    return Interval(value, value - half, value + half)


def paired_difference(one: np.ndarray, other: np.ndarray, *, looks: int = 1) -> Interval:
    """How much larger the mean of one's outcomes is than the other's, with its 95% interval.

    Both are (seeds, items), of the same items and, where both have several, the same seeds; a single row is
    an outcome that no seed changes. The half width is the root of the sum of two squares: 1.96 standard
    errors over items, and Student's t times the standard error over seeds. With several `looks`, of which it
    is counted how many are clear, all intervals together hold with 95% (Bonferroni).

    Examples
    --------
    >>> paired_difference(np.ones((3, 50)), np.zeros((1, 50)))
    Interval(value=1.0, low=1.0, high=1.0)
    """
    by_item = one.mean(axis=0) - other.mean(axis=0)
    by_seed = one.mean(axis=1) - other.mean(axis=1)
    upper = 1 - (1 - UPPER) / looks
    half = stats.norm.ppf(upper) * by_item.std(ddof=1) / np.sqrt(len(by_item))
    if len(by_seed) > 1:
        over_seeds = stats.t.ppf(upper, len(by_seed) - 1) * by_seed.std(ddof=1) / np.sqrt(len(by_seed))
        half = np.hypot(half, over_seeds)
    value = float(by_item.mean())
    return Interval(value, value - float(half), value + float(half))


def _outcomes(cells: pd.DataFrame) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Outcomes of each method at the drop rate that is not 0, and of the untouched model."""
    names = list(dict.fromkeys(cells["metric"]))
    if len(names) > 1:
        raise ValueError(f"methods are compared by one metric; these cells have {', '.join(names)}, give those of one")
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
            metric = metric_of(here)
            kept = {m: float(metric.kept_share(o.mean(), start.mean())) for m, o in outcomes.items()}
            best, second = sorted(kept, key=kept.__getitem__, reverse=True)[:2]
            ahead = lead(both, best, second)
            row = {"pair": pair, "drop_rate": drop_rate, "method": best, "second": second, "kept": kept[best]}
            rows.append({**row, "lead": ahead.value, "low": ahead.low, "high": ahead.high, "clear": ahead.low > 0})
    return pd.DataFrame(rows)
