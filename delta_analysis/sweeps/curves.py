"""The cells of a sweep as curves: a metric against drop rate, with its uncertainty over seeds and items."""

from __future__ import annotations

import numpy as np
import pandas as pd

from delta_analysis.sweeps.intervals import metric_interval, metric_of


def outcome_matrix(cells: pd.DataFrame) -> np.ndarray:
    """Outcomes of the cells of one pair, method, drop rate and metric: (seeds, items)."""
    return np.array(cells.sort_values("seed")["outcomes"].tolist(), dtype=np.float64)


def first_metric(cells: pd.DataFrame) -> pd.DataFrame:
    """The rows of one metric of each pair: the first that the first of its evaluations gives."""
    first = cells.groupby("pair", sort=False)[["evaluation", "metric"]].transform("first")
    return cells[(cells["evaluation"] == first["evaluation"]) & (cells["metric"] == first["metric"])]


def drop_curve(cells: pd.DataFrame) -> pd.DataFrame:
    """The metric against drop rate, with intervals that resample both seeds and items.

    Returns
    -------
    DataFrame, one row a `pair, method, scope, evaluation, metric, kind, drop_rate`; `seeds`, how many;
    `value, low, high`.

    Raises
    ------
    ValueError
        Cells of one curve that differ in rescale or an option of the method: they are no seeds of each other.
    """
    known = ["pair", "method", "scope", "evaluation", "metric", "kind", "drop_rate"]
    keys = [key for key in known if key in cells]
    settings = [name for name in cells.columns if name == "rescale" or name.startswith("option_")]
    rows = []
    for _, group in cells.groupby(keys, sort=False):
        first = group.iloc[0]
        if differs := [name for name in settings if len(group[name].unique()) > 1]:
            raise ValueError(
                f"{first['pair']}, {first['method']} at drop rate {first['drop_rate']:g}: cells differ in "
                f"{differs[0]!r}, so they are no seeds of one curve; select one value, or put it into the method's name"
            )
        value, low, high = metric_interval(metric_of(group), outcome_matrix(group))
        rows.append(
            {**{key: first[key] for key in keys}, "seeds": len(group), "value": value, "low": low, "high": high}
        )
    return pd.DataFrame(rows).sort_values(keys, key=_in_order, ignore_index=True)


def _in_order(column: pd.Series) -> pd.Series:
    """Sort key that leaves names in order of appearance and numbers by size."""
    return column if column.dtype.kind == "f" else pd.Series(pd.factorize(column)[0], index=column.index)
