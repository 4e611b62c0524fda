"""How well predictors foretell tolerances that they were not fitted on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from delta_analysis.prediction import PREDICTORS, best_predictor, fit_line, left_out, root_mean_square
from delta_analysis.sweeps import END, HIGHEST, LOWEST, RESAMPLES, Interval, logit, percentile_interval


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
    >>> from delta_analysis.prediction.predict import calibration_table
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
                "strict_error": root_mean_square(strict),
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
    >>> from delta_analysis.prediction.predict import calibration_table
    >>> error_difference(calibration_table(), "abs_p50", "noise_rss").low > 0
    True
    """
    table = table[table[[one, other]].gt(0).all(axis=1)].reset_index(drop=True)
    measured, weights = table["tolerated"].map(logit), _fine_tune_weights(table)
    first, second = (_error_samples(measured - left_out(table, each), weights) for each in (one, other))
    values = [root_mean_square(measured - left_out(table, each)) for each in (one, other)]
    return percentile_interval(values[0] - values[1], first - second)


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
    return percentile_interval(root_mean_square(errors), _error_samples(errors, weights))


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
