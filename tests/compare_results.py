"""Compare the tables that the notebooks have just written with the committed ones: `python -m tests.compare_results`.

Floating point differs between processors, so numbers are compared within a tolerance, and outcomes by their mean.
"""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd

from delta_analysis.checkpoints import find_root

OF_THE_RUN = ["seconds", "versions", "device", "cell"]
"""Columns that tell how a table was made."""

SHARE, LEAST = 1e-3, 1e-5
"""How far a number may lie from the committed one: a share of it, and at least so much."""


def differences(fresh: pd.DataFrame, committed: pd.DataFrame) -> list[str]:
    """The columns in which two tables differ, and by how much."""
    if list(fresh) != list(committed) or len(fresh) != len(committed):
        return [f"{len(fresh)} rows of {list(fresh)} instead of {len(committed)} of {list(committed)}"]
    return [
        f"{name}: {problem}"
        for name in fresh.columns.difference(OF_THE_RUN)
        if (problem := _difference(fresh[name], committed[name]))
    ]


def _difference(fresh: pd.Series, committed: pd.Series) -> str:
    """How two columns differ; empty if they do not."""
    if _has_lists(committed):
        if _has_lists(fresh) and not fresh.map(np.size).equals(committed.map(np.size)):
            return "not as many outcomes"
        fresh, committed = (
            column.map(lambda each: np.nan if each is None else np.mean(each)) for column in (fresh, committed)
        )
    if not pd.api.types.is_numeric_dtype(committed) or committed.dtype == bool:
        return "" if fresh.fillna("").equals(committed.fillna("")) else "not the same values"
    far = ~np.isclose(fresh.astype(float), committed.astype(float), rtol=SHARE, atol=LEAST, equal_nan=True)
    return (
        f"{far.sum()} of {len(far)} numbers, such as {fresh[far].iloc[0]} for {committed[far].iloc[0]}"
        if far.any()
        else ""
    )


def _mean(outcomes: np.ndarray | None) -> float:
    return np.nan if outcomes is None else float(np.mean(outcomes))


def _has_lists(column: pd.Series) -> bool:
    return bool(column.map(lambda each: isinstance(each, np.ndarray)).any())


def main() -> None:
    """Exit with every difference."""
    found = []
    for file in sorted((find_root() / "notebooks" / "results").glob("*/results.parquet")):
        fresh = find_root() / "runs" / file.parent.name / file.name
        told = differences(pd.read_parquet(fresh), pd.read_parquet(file)) if fresh.exists() else ["was not written"]
        found += [f"{file.parent.name}: {each}" for each in told]
    sys.exit("\n".join(found) or None)


if __name__ == "__main__":
    main()
