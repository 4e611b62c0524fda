"""How well predictors foretell tolerances that they were not fitted on: of the noise in layers, and of values."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd

from delta_analysis.deltas import Delta, value_ranges
from delta_analysis.prediction import delta_noise, fit_line, left_out
from delta_analysis.sweeps import RESAMPLES, Interval, logit, percentile_interval

SUMMARIES = ("largest", "rss", "sum", "mean", "median")
"""How the noise shares of layers are brought into one number; rss is the root of the sum of squares."""
NOISE = tuple(f"noise_{summary}" for summary in SUMMARIES)
"""Of N/Y, the noise base over the output energy of each layer, which needs inputs."""
NORMS = tuple(f"norms_{summary}" for summary in SUMMARIES)
"""Of the same without inputs, ‖D‖²/‖W‖²."""
VALUES = ("abs_p50", "abs_p99", "abs_max", "rms", "relative_rms", "share_above_0.002")
"""Of the values alone: the papers' rule of thumb speaks of median, maximum and the share below 0.002."""
LEAST_SHARE = 1e-7
"""A share of zero has no logarithm; this stands for it."""
PREDICTORS = (*NOISE, *NORMS, *VALUES)


def noise_predictors(noise: pd.DataFrame, tensors: Collection[str], *, prefix: str = "noise") -> dict[str, float]:
    """Summaries of the noise shares of some tensors, from a table of `layer_noise` with one pruner.

    A tensor with two uses counts twice; missing values if none of the tensors has a share.
    """
    shares = noise.loc[noise["tensor"].isin(tensors), "noise_share"].dropna().to_numpy()
    if not len(shares):
        return {f"{prefix}_{summary}": np.nan for summary in SUMMARIES}
    found = (shares.max(), np.sqrt((shares**2).sum()), shares.sum(), shares.mean(), np.median(shares))
    return {f"{prefix}_{summary}": float(value) for summary, value in zip(SUMMARIES, found, strict=True)}


def value_predictors(part: Delta) -> dict[str, float]:
    """The predictors of `VALUES`, as in `value_ranges`; a share of 0 above 0.002 is given as `LEAST_SHARE`."""
    row = value_ranges(part, by="model").iloc[0]
    above = max(1.0 - row["share_below_0.002"], LEAST_SHARE)
    return {name: float(row[name]) for name in VALUES[:-1]} | {VALUES[-1]: above}


def delta_predictors(
    delta: Delta, scopes: Sequence[str] = ("all",), inputs: Sequence[str] | None = None
) -> pd.DataFrame:
    """Columns `scope` and `PREDICTORS`; `NOISE` is missing without inputs, or where they reach no layer."""
    norms = delta_noise(delta)
    noise = norms.iloc[:0] if inputs is None else delta_noise(delta, inputs)
    rows = []
    for scope in scopes:
        part = delta.select(scope)
        found = noise_predictors(noise, part), noise_predictors(norms, part, prefix="norms"), value_predictors(part)
        rows.append({"scope": scope, **found[0], **found[1], **found[2]})
    return pd.DataFrame(rows)


def best_predictor(table: pd.DataFrame, predictors: Sequence[str]) -> str:
    """The one of least error, each pair foretold by all others; rows that any lacks are left out for all."""
    usable = table[table[list(predictors)].gt(0).all(axis=1)]
    measured = usable["tolerated"].map(logit)
    return min(predictors, key=lambda predictor: root_mean_square(measured - left_out(usable, predictor)))


def root_mean_square(errors: pd.Series) -> float:
    return float(np.sqrt(np.square(errors).mean()))


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
    """
    predictors = list(predictors)
    table = table[table[predictors].gt(0).all(axis=1)].reset_index(drop=True)
    measured, weights = table["tolerated"].map(logit), _fine_tune_weights(table)
    inner = table["reading"].eq("measured").to_numpy()
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
