"""Report 02: what is compared between the two sides of a pair, and how far masks differ."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from delta_analysis.deltas import load_delta
from delta_analysis.sweeps import Pair


def coverage_of(pairs: Sequence[Pair]) -> pd.DataFrame:
    """The coverage of each pair's delta, one below the other, with the column `pair`."""
    deltas = {pair.name: load_delta(base=pair.base, finetuned=pair.finetuned) for pair in pairs}
    return pd.concat([delta.coverage().assign(pair=name) for name, delta in deltas.items()])


def between(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells in which a part of the delta is dropped."""
    return cells[cells["drop_rate"].between(0, 1, inclusive="neither")]


def widest_spread(cells: pd.DataFrame) -> pd.DataFrame:
    """For each pair, the drop rate at which masks differ most: `pair, drop_rate, min, max, std` of the metric."""
    values = between(cells).groupby(["pair", "drop_rate"], sort=False)["value"]
    spread = values.agg(["min", "max", "std"]).reset_index()
    widest = (spread["max"] - spread["min"]).groupby(spread["pair"], sort=False).idxmax()
    return spread.loc[widest].round(2)
