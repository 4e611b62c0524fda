"""Foretell the tolerated drop rate: from the noise in the layers, or from the value ranges alone.

What foretells is fitted on the embedded family, whose tolerated drop rates were measured (see
`calibration`). Dropping makes noise of energy `p/(1-p) · N` in a layer; if a model breaks when this
passes some share τ of the output Y, then `log(p/(1-p)) = log τ - log(N/Y)`: a line of slope -1. Every
predictor is given a line of its own, on the logarithm of the predictor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from delta_analysis.delta import Delta
from delta_analysis.intervals import CONFIDENCE, RESAMPLES, Interval, percentile_interval
from delta_analysis.paths import find_root
from delta_analysis.predictors import NOISE, NORMS, VALUES, delta_predictors
from delta_analysis.tolerance import END, HIGHEST, LOWEST, inverse_logit, logit

PREDICTORS = (*NOISE, *NORMS, *VALUES)
LOGITS = logit(LOWEST), logit(HIGHEST)
TENFOLD = 10.0


class Line(NamedTuple):
    """`log(p/(1-p)) = intercept + slope · log(predictor)`."""

    intercept: float
    slope: float

    def at(self, values: pd.Series | np.ndarray | float) -> np.ndarray:
        """The foretold log(p/(1-p)), within the range in which tolerances are sought."""
        return np.clip(self.intercept + self.slope * np.log(values), *LOGITS)


def calibration_file() -> Path:
    return find_root() / "data" / "reference" / "tolerances.csv"


@lru_cache(maxsize=1)
def _calibration() -> pd.DataFrame:
    return pd.read_csv(calibration_file())


def calibration_table() -> pd.DataFrame:
    """The measured tolerances of the embedded family with their predictors, one row a pair and scope.

    Columns: `base, finetuned, kind, task, numel, base_hash, finetuned_hash, scope`; `untouched`, the
    accuracy; `tolerated, low, high` as in `measure_tolerance`, for DARE; the predictors; `group`, the
    size, `trail` or `encoder`.
    """
    return _calibration().copy()


def fit_line(table: pd.DataFrame, predictor: str) -> Line:
    """Least squares over the rows whose tolerance is not at an end of the search, where it is only a bound.

    Rows whose predictor is 0 or missing are left out too.

    Examples
    --------
    >>> bool(-1.1 < fit_line(calibration_table(), "noise_rss").slope < -0.8)
    True
    """
    usable = table[table[predictor].gt(0)]
    return _fitted(*_points(usable, predictor))


def _points(table: pd.DataFrame, predictor: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logarithms of a predictor, log(p/(1-p)) of the tolerances, and which of these are no bounds."""
    tolerated = table["tolerated"].to_numpy()
    inner = (tolerated >= LOWEST + END) & (tolerated <= HIGHEST - END)
    return np.log(table[predictor].to_numpy()), np.log(tolerated / (1 - tolerated)), inner


def _fitted(x: np.ndarray, y: np.ndarray, some: np.ndarray) -> Line:
    slope, intercept = np.polyfit(x[some], y[some], 1)
    return Line(float(intercept), float(slope))


def left_out(table: pd.DataFrame, predictor: str, *, by: Sequence[str] = ("base", "finetuned")) -> pd.Series:
    """The log(p/(1-p)) of each row foretold by the line through all rows of other pairs (by `by`).

    Missing where the predictor is 0 or missing.

    Examples
    --------
    >>> table = calibration_table()
    >>> left_out(table, "noise_rss").between(*LOGITS).all().item()
    True
    """
    usable = table[table[predictor].gt(0)]
    x, y, inner = _points(usable, predictor)
    groups = usable.groupby(list(by), sort=False).ngroup().to_numpy()
    foretold = np.full(len(usable), np.nan)
    for group in range(groups.max(initial=-1) + 1):
        own = groups == group
        foretold[own] = _fitted(x, y, inner & ~own).at(np.exp(x[own]))
    return pd.Series(foretold, usable.index).reindex(table.index)


def compare_predictors(table: pd.DataFrame, predictors: Sequence[str] = PREDICTORS) -> pd.DataFrame:
    """How well each predictor foretells tolerances that it was not fitted on, best first.

    Intervals resample fine-tunes, each with all its bases and scopes: pairs of one fine-tune are alike.

    Parameters
    ----------
    table : as `calibration_table`; rows that any of the predictors lacks are left out for all.

    Returns
    -------
    DataFrame, one row a predictor: `predictor`; `rows`; `error`, the root mean square of measured less
    foretold log(p/(1-p)), each pair foretold by all others, with its 95% interval `low, high`;
    `median_error`, of its absolute value; `strict_error`, as `error` but with all pairs of a fine-tune left
    out together; `rank`, Spearman's correlation with the measured tolerance, and `rank_low, rank_high`;
    `slope` of the line through all rows, and `slope_low, slope_high`.

    Examples
    --------
    >>> compare_predictors(calibration_table(), ["abs_p50", "noise_rss"])["predictor"].tolist()
    ['noise_rss', 'abs_p50']
    """
    predictors = list(predictors)
    table = table[table[predictors].gt(0).all(axis=1)].reset_index(drop=True)
    measured, weights = table["tolerated"].map(logit), _fine_tune_weights(table)
    inner = table["tolerated"].between(LOWEST + END, HIGHEST - END).to_numpy()
    rows = []
    for predictor in predictors:
        errors = measured - left_out(table, predictor)
        strict = measured - left_out(table, predictor, by=["finetuned"])
        ranks, x = table[predictor].rank(), np.log(table[predictor])
        rank = percentile_interval(ranks.corr(measured.rank()), _correlations(weights, ranks, measured.rank()))
        slope = percentile_interval(
            fit_line(table, predictor).slope, _slopes(weights[:, inner], x[inner], measured[inner])
        )
        error = _error(errors, weights)
        rows.append(
            {
                "predictor": predictor,
                "rows": len(table),
                **dict(zip(("error", "low", "high"), error, strict=True)),
                "median_error": float(errors.abs().median()),
                "strict_error": _rms(strict),
                **dict(zip(("rank", "rank_low", "rank_high"), rank, strict=True)),
                **dict(zip(("slope", "slope_low", "slope_high"), slope, strict=True)),
            }
        )
    return pd.DataFrame(rows).sort_values("error", kind="stable", ignore_index=True)


def error_difference(table: pd.DataFrame, one: str, other: str) -> Interval:
    """How much larger the error of one predictor is than that of another, with an interval that resamples fine-tunes.

    The error is that of `compare_predictors`; rows that either lacks are left out.

    Examples
    --------
    >>> error_difference(calibration_table(), "abs_p50", "noise_rss").low > 0
    True
    """
    table = table[table[[one, other]].gt(0).all(axis=1)].reset_index(drop=True)
    measured, weights = table["tolerated"].map(logit), _fine_tune_weights(table)
    first, second = (_error_samples(measured - left_out(table, each), weights) for each in (one, other))
    values = [_rms(measured - left_out(table, each)) for each in (one, other)]
    return percentile_interval(values[0] - values[1], first - second)


def best_predictor(table: pd.DataFrame, predictors: Sequence[str]) -> str:
    """The one of least error, each pair foretold by all others; rows that any lacks are left out for all.

    Examples
    --------
    >>> best_predictor(calibration_table(), ["abs_p50", "noise_rss"])
    'noise_rss'
    """
    usable = table[table[list(predictors)].gt(0).all(axis=1)]
    measured = usable["tolerated"].map(logit)
    return min(predictors, key=lambda predictor: _rms(measured - left_out(usable, predictor)))


def chosen_anew(table: pd.DataFrame, predictors: Sequence[str]) -> pd.Series:
    """The log(p/(1-p)) of each row foretold without its pair: the predictor too is chosen among the other pairs."""
    usable = table[table[list(predictors)].gt(0).all(axis=1)]
    foretold = pd.Series(np.nan, table.index)
    for _, group in usable.groupby(["base", "finetuned"], sort=False):
        others = usable.drop(group.index)
        best = best_predictor(others, predictors)
        foretold[group.index] = fit_line(others, best).at(group[best])
    return foretold


def _fine_tune_weights(table: pd.DataFrame) -> np.ndarray:
    """How often each row is drawn when fine-tunes are resampled, with all their bases and scopes: (samples, rows)."""
    tunes = table.groupby("finetuned", sort=False).ngroup().to_numpy()
    count = int(tunes.max()) + 1
    rng = np.random.default_rng(count)
    return rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)[:, tunes].astype(np.float64)


def _error_samples(errors: pd.Series, weights: np.ndarray) -> np.ndarray:
    return np.sqrt((weights @ np.square(errors.to_numpy())) / weights.sum(axis=1))


def _error(errors: pd.Series, weights: np.ndarray) -> Interval:
    return percentile_interval(_rms(errors), _error_samples(errors, weights))


def _moments(weights: np.ndarray, x: pd.Series, y: pd.Series) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weighted variances of x and y and their covariance, one for each sample."""
    shares = weights / weights.sum(axis=1, keepdims=True)
    a, b = (each.to_numpy() - each.mean() for each in (x, y))
    means = shares @ a, shares @ b
    products = shares @ (a * a), shares @ (b * b), shares @ (a * b)
    return products[0] - means[0] ** 2, products[1] - means[1] ** 2, products[2] - means[0] * means[1]


def _correlations(weights: np.ndarray, x: pd.Series, y: pd.Series) -> np.ndarray:
    one, other, both = _moments(weights, x, y)
    return both / np.sqrt(one * other)


def _slopes(weights: np.ndarray, x: pd.Series, y: pd.Series) -> np.ndarray:
    one, _, both = _moments(weights, x, y)
    return both / one


def _rms(errors: pd.Series) -> float:
    return float(np.sqrt(np.square(errors).mean()))


@dataclass(frozen=True)
class ForetoldDropRate:
    """A foretold tolerated drop rate.

    Attributes
    ----------
    tolerated, low, high : the drop rate up to which DARE is expected to keep 95% of the ability, with
        its 95% interval: the errors that the same predictor made on fine-tunes it was not fitted on.
    predictor, value : what it was foretold from.
    outside : in which respects the delta lies outside of what the predictor was fitted on, one sentence
        each; the interval does not cover what they may do.
    """

    tolerated: float
    low: float
    high: float
    predictor: str
    value: float
    outside: tuple[str, ...]


def tolerated_drop_rate(
    delta: Delta, inputs: Sequence[str] | None = None, *, scope: str = "all", table: pd.DataFrame | None = None
) -> ForetoldDropRate:
    """Foretell how much of a delta DARE can drop, from the checkpoints and one forward pass over some texts.

    The predictor is the one that foretells best on the embedded family, each pair foretold by the
    others: of the noise shares N/Y of the layers if there are inputs, of norms and values if not.

    Parameters
    ----------
    delta : as from `load_delta`.
    inputs : a few texts of the kind that the fine-tune is for; None: from the checkpoints alone, which
        loads no model and foretells less well.
    scope : which tensors are dropped from, as in `Edit`.
    table : what to fit on, in the columns of `calibration_table`, which it is by default.

    Raises
    ------
    ValueError
        A scope that selects nothing; one in which the delta is zero, or with inputs reaches no layer.

    Examples
    --------
    >>> from delta_analysis import load_delta
    >>> found = tolerated_drop_rate(load_delta(base="zoo:small/code-cpt", finetuned="zoo:small/code"))
    >>> found.low < found.tolerated < found.high
    True
    """
    table = calibration_table() if table is None else table
    candidates = (*NORMS, *VALUES) if inputs is None else NOISE
    predictor = best_predictor(table, candidates)
    value = float(delta_predictors(delta, [scope], inputs)[predictor].iloc[0])
    if not value > 0:
        raise ValueError(
            f"scope {scope!r}: {predictor} is {value:g} there, and it foretells only above 0; "
            "either the delta is zero there, or no layer that inputs reach is in the scope: try another scope"
        )
    return foretell(delta, predictor, value, table)


def foretell(delta: Delta, predictor: str, value: float, table: pd.DataFrame) -> ForetoldDropRate:
    """What a predictor that has a value foretells of a delta, by the line through a table of `calibration_table`."""
    usable = table[table[predictor].gt(0)]
    errors = usable["tolerated"].map(logit) - left_out(usable, predictor, by=["finetuned"])
    foretold = float(fit_line(usable, predictor).at(value))
    tail = (1 - CONFIDENCE) / 2
    ends = np.clip(foretold + np.quantile(errors, [tail, 1 - tail]), *LOGITS)
    low, high = min(foretold, ends[0]), max(foretold, ends[1])
    outside = tuple(_outside(delta, usable, predictor, value))
    if not LOGITS[0] < foretold < LOGITS[1]:
        outside += ("the rate that is foretold lies at an end of the range in which tolerances were sought: a bound",)
    return ForetoldDropRate(inverse_logit(foretold), inverse_logit(low), inverse_logit(high), predictor, value, outside)


def _outside(delta: Delta, table: pd.DataFrame, predictor: str, value: float) -> list[str]:
    """In which respects a delta lies outside of the table."""
    found = []
    low, high = table[predictor].min(), table[predictor].max()
    # The table is rounded.
    if not 0.999 * low <= value <= 1.001 * high:
        found.append(f"its {predictor} is {value:.3g}, and {low:.3g} to {high:.3g} where the line was fitted")
    numel = sum(math.prod(match.shape) for match in delta.compared.values())
    low, high = table["numel"].min(), table["numel"].max()
    if not low / TENFOLD <= numel <= high * TENFOLD:
        found.append(
            f"it has {numel / 1e6:.3g} million entries, and the models that were measured {low / 1e6:.2g} to "
            f"{high / 1e6:.2g} million"
        )
    return found
