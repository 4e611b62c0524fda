"""Report 07: whether larger models tolerate more dropping, and whether model or delta is what grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pandas as pd
from scipy import stats

from delta_analysis.deltas import load_delta, value_ranges
from delta_analysis.sweeps import Interval, Pair, tolerance_difference


def with_sizes(tolerances: pd.DataFrame, pairs: Sequence[Pair]) -> pd.DataFrame:
    """With the entries of each pair's delta and their size; `tolerances` has a row for each pair, in order."""
    ranges = pd.concat([value_ranges(load_delta(base=p.base, finetuned=p.finetuned), by="model") for p in pairs])
    sizes = ranges.rename(columns={"numel": "parameters"})[["parameters", "abs_p50", "relative_rms"]]
    return tolerances.assign(**{column: sizes[column].tolist() for column in sizes})


class Gain(NamedTuple):
    """The smallest and the largest model of a relation, and how much more the largest tolerates."""

    smallest: pd.Series
    largest: pd.Series
    difference: Interval


def gains(tolerances: pd.DataFrame) -> dict[str, Gain]:
    """Relation -> its gain, where it has several sizes."""
    found = {}
    for relation, group in _by_size(tolerances):
        smallest, largest = group.iloc[0], group.iloc[-1]
        if smallest["parameters"] < largest["parameters"]:
            found[relation] = Gain(smallest, largest, tolerance_difference(largest, smallest))
    return found


def steps(tolerances: pd.DataFrame) -> list[Interval]:
    """How much more is tolerated from one size to the next, of all relations."""
    return [
        tolerance_difference(group.iloc[i + 1], group.iloc[i])
        for _, group in _by_size(tolerances)
        for i in range(len(group) - 1)
    ]


def size_groups(tolerances: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """All pairs, and those that continual pre-training does not decide."""
    return {"all pairs": tolerances, "SFT on its true base": tolerances[tolerances["made_by"].isin(["SFT", "given"])]}


RANKED = {
    "with parameters": "parameters",
    "with rms δ / rms base": "relative_rms",
    "with median |δ|": "abs_p50",
    "with untouched metric": "untouched",
}


def rank_correlations(groups: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Spearman's correlations with the tolerated drop rate as text, a row for each group of pairs."""
    rows = {
        name: {"pairs": len(frame)} | {label: _rank_correlation(frame, column) for label, column in RANKED.items()}
        for name, frame in groups.items()
    }
    return pd.DataFrame(rows).T


def _rank_correlation(frame: pd.DataFrame, column: str) -> str:
    if len(frame) < 3 or frame[column].min() == frame[column].max():
        return "too few"
    found = stats.spearmanr(frame[column], frame["tolerated"])
    return f"{found.statistic:.2f} (p = {found.pvalue:.2g})"


def delta_moves(tolerances: pd.DataFrame) -> list[float]:
    """From the smallest to the largest model, the factor by which a fine-tune's delta grows relative to its base."""
    groups = (group for _, group in _by_size(size_groups(tolerances)["SFT on its true base"]))
    return [
        group["relative_rms"].iloc[-1] / group["relative_rms"].iloc[0]
        for group in groups
        if group["parameters"].iloc[0] < group["parameters"].iloc[-1]
    ]


def _by_size(tolerances: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each relation, from the smallest model to the largest."""
    return [(str(name), group.sort_values("parameters")) for name, group in tolerances.groupby("relation", sort=False)]
