"""Metrics as means over items, and their uncertainty over mask seeds and over items."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from delta_analysis.evaluation import Kind

RESAMPLES = 1000
PARTS = 10
"""A tenth of the resamples is in float64 at a time."""


CONFIDENCE = 0.95


FEWEST_BLOCKS = 8
"""Fewer items than so many blocks make have shorter blocks: from one or two, no spread can be seen."""


@dataclass(frozen=True)
class Metric:
    """How a metric follows from the mean of its items, and what share of it an edit keeps.

    `kept_share(mean, untouched_mean)` is 1 for the untouched model and falls as the model breaks.
    `block` neighbouring items are resampled together, where they depend on each other.
    """

    value: Callable[[np.ndarray], np.ndarray]
    kept_share: Callable[[np.ndarray, np.ndarray], np.ndarray]
    block: int = 1
    larger_is_better: bool = True


MEAN = Metric(lambda mean: mean, lambda mean, untouched: mean / np.maximum(untouched, 1e-12))
"""A mean of items, such as right (1) and wrong (0) answers."""


PERPLEXITY = Metric(
    np.exp, lambda mean, untouched: np.nan_to_num(np.exp(untouched - mean)), block=64, larger_is_better=False
)
"""Items are losses of tokens; what is kept of it is the (geometric mean) probability of a token."""


def _no_share(mean: np.ndarray, untouched: np.ndarray) -> np.ndarray:
    raise ValueError("this metric is an error, 0 for the untouched model, so that no share of it can be kept")


ERROR = Metric(lambda mean: mean, _no_share, larger_is_better=False)
"""A mean of items that is 0 for the untouched model, such as the drift of its output."""


KINDS: dict[Kind, Metric] = {"score": MEAN, "perplexity": PERPLEXITY, "error": ERROR}


def metric_of(table: pd.DataFrame) -> Metric:
    """What the metric of a table's rows is, by its column `kind`; without one it is a score."""
    return KINDS[table["kind"].iloc[0]] if "kind" in table else MEAN


class Interval(NamedTuple):
    """A value with the ends of its 95% interval."""

    value: float
    low: float
    high: float


class Resamples(NamedTuple):
    """How often each seed and each block of neighbouring items is drawn, a bootstrap sample a row.

    Items are drawn whole times, at most 255, seeds with weights that sum to their number (see `two_way_resamples`).
    """

    seeds: np.ndarray
    items: np.ndarray
    block: int


@lru_cache(maxsize=4)
def two_way_resamples(n_seeds: int, n_items: int, *, block: int = 1, count: int = RESAMPLES) -> Resamples:
    """Bootstrap weights that resample seeds and items (blocks of neighbours) independently of each other.

    A plain bootstrap of three seeds covers 75% instead of 95%: it misses the factor n/(n-1) of the
    variance, and Student's t. So each sample's weights of seeds are stretched about 1 by
    `t / 1.96 · √(n/(n-1))`, with t of n - 1 degrees of freedom.

    The last block may be shorter; all are, where items would make fewer than 8 of them. The same
    weights used on several outcomes of the same seeds and items keep them paired.
    """
    block = max(min(block, n_items // FEWEST_BLOCKS), 1)
    blocks = -(-n_items // block)
    rng = np.random.default_rng([n_seeds, blocks, count])
    seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=count)
    even = np.full(blocks, 1 / blocks)
    # A byte each, some samples at a time: thousands of items would fill 100 MB otherwise.
    items = [rng.multinomial(blocks, even, size=len(part)).astype(np.uint8) for part in np.array_split(seeds, PARTS)]
    return Resamples(1 + seed_stretch(n_seeds) * (seeds - 1.0), np.concatenate(items), block)


def seed_stretch(n_seeds: int) -> float:
    """How much wider than a plain bootstrap the interval over `n_seeds` has to be; 1 for one, which has none."""
    if n_seeds == 1:
        return 1.0
    t, normal = stats.t.ppf((1 + CONFIDENCE) / 2, n_seeds - 1), stats.norm.ppf((1 + CONFIDENCE) / 2)
    return float(t / normal * np.sqrt(n_seeds / (n_seeds - 1)))


def resampled_means(outcomes: np.ndarray, resamples: Resamples) -> np.ndarray:
    """Mean outcome in each bootstrap sample: not below 0 if no outcome is, not above 1 if all are 0 or 1.

    `outcomes` is (seeds, items); a single row is an outcome that no seed changes.
    """
    n_seeds, n_items = outcomes.shape
    starts = np.arange(0, n_items, resamples.block)
    # Counted from the lowest, the means of equal outcomes are exact.
    lowest = outcomes.min()
    sums = np.add.reduceat(outcomes.astype(np.float64) - lowest, starts, axis=1)
    summed = np.vstack([sums, np.diff(np.append(starts, n_items))]).T
    totals = np.concatenate([part.astype(np.float64) @ summed for part in np.array_split(resamples.items, PARTS)])
    by_seed, drawn = totals[:, :-1], totals[:, -1]
    means = by_seed[:, 0] / drawn if n_seeds == 1 else (by_seed * resamples.seeds).sum(axis=1) / (n_seeds * drawn)
    right_or_wrong = ((outcomes == 0) | (outcomes == 1)).all()
    return np.clip(lowest + means, 0.0 if lowest >= 0 else -np.inf, 1.0 if right_or_wrong else np.inf)


def percentile_interval(value: float, samples: np.ndarray) -> Interval:
    """The value with the central 95% of its bootstrap samples."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))


def metric_interval(metric: Metric, outcomes: np.ndarray) -> Interval:
    """A metric of (seeds, items) outcomes with a 95% interval that resamples both.

    For few seeds too it covers about 95%, if masks differ as a normal distribution does.

    Examples
    --------
    >>> metric_interval(MEAN, np.ones((5, 200)))
    Interval(value=1.0, low=1.0, high=1.0)
    """
    samples = resampled_means(outcomes, two_way_resamples(*outcomes.shape, block=metric.block))
    ends = percentile_interval(outcomes.mean(), samples)
    with np.errstate(over="ignore"):
        return Interval(*metric.value(np.array(ends)).tolist())


def kept_interval(metric: Metric, outcomes: np.ndarray, untouched: np.ndarray) -> Interval:
    """The share of the untouched metric that is kept, with a 95% interval that resamples seeds and items of both alike.

    Parameters
    ----------
    outcomes : of the edited model, (seeds, items).
    untouched : of the untouched model, (1, items), or one row a seed of `outcomes`.

    Examples
    --------
    >>> kept_interval(MEAN, np.zeros((5, 200)), np.ones((1, 200)))
    Interval(value=0.0, low=0.0, high=0.0)
    """
    resamples = two_way_resamples(*outcomes.shape, block=metric.block)
    sampled = metric.kept_share(resampled_means(outcomes, resamples), resampled_means(untouched, resamples))
    return percentile_interval(float(metric.kept_share(outcomes.mean(), untouched.mean())), sampled)


def rank_correlation(x: pd.Series, y: pd.Series) -> Interval:
    """Spearman's correlation with a 95% interval, `tanh(atanh r ± 1.96 √((1 + r²/2)/(n - 3)))`.

    It takes the n points as independent. Of fewer than 4, or where one side does not vary, it is not known (NaN).

    Source: Bonett and Wright, "Sample size requirements for estimating Pearson, Kendall and Spearman
    correlations", Psychometrika 65, 2000.

    Examples
    --------
    >>> rank_correlation(pd.Series([1, 2, 3, 4, 5]), pd.Series([1, 3, 2, 5, 4])).value
    0.8
    """
    r = float(np.corrcoef(x.rank(), y.rank())[0, 1]) if len(x) > 3 and x.nunique() > 1 < y.nunique() else np.nan
    # At 1 and -1 the formula has no width, whatever the number of points.
    inner = np.clip(r, -1 + 1e-9, 1 - 1e-9)
    half = stats.norm.ppf((1 + CONFIDENCE) / 2) * np.sqrt((1 + inner**2 / 2) / max(len(x) - 3, 1))
    return Interval(round(r, 12), float(np.tanh(np.arctanh(inner) - half)), float(np.tanh(np.arctanh(inner) + half)))


def logit(p: float) -> float:
    """log(p / (1 - p)): the scale on which drop rates are searched and compared."""
    return math.log(p / (1 - p))


def inverse_logit(x: float) -> float:
    return 1 / (1 + math.exp(-x))
