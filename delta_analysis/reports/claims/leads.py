"""What the reports' results say about each claim on methods beside each other: similarities and leads.

As in `claim_effects`, a function takes the results of one report and returns an `Interval`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from delta_analysis.reports.claims.measures import (
    FINE_TUNED,
    RATE,
    NotMeasuredError,
    at_rate,
    average,
    average_over_rates,
    difference,
    least,
    made_by,
    rates_tried,
)
from delta_analysis.sweeps import MEAN, Interval, first_metric, lead, metric_interval, outcome_matrix


def similarities(results: pd.DataFrame) -> dict[str, dict[tuple[str, str], np.ndarray]]:
    """Of each fine-tune at the high rate: cosines of (seeds, texts) by layer and method."""
    rows = made_by(results[results["table"] == "ladder"], FINE_TUNED)
    rows = rows[rows["metric"].str.startswith("similarity/")]
    return {
        pair: {
            (str(layer), str(method)): outcome_matrix(group)
            for (layer, method), group in each[each["drop_rate"] == RATE].groupby(["metric", "method"])
        }
        for pair, each in at_rate(rows, RATE).items()
    }


def least_similarity(results: pd.DataFrame) -> Interval:
    return least(
        metric_interval(MEAN, outcomes)
        for by_layer in similarities(results).values()
        for (_, method), outcomes in by_layer.items()
        if method == "DARE"
    )


def similarity_gain(results: pd.DataFrame) -> Interval:
    """How much more similar hidden states are with rescaling, the mean over layers."""
    gains = []
    for by_layer in similarities(results).values():
        layers = dict.fromkeys(layer for layer, _ in by_layer)
        gain = np.mean([by_layer[each, "DARE"] - by_layer[each, "drop only"] for each in layers], axis=0)
        gains.append(metric_interval(MEAN, gain))
    return average(gains)


def lead_at_high_rate(results: pd.DataFrame, method: str, other: str) -> Interval:
    """The lead of one method over another at the high rate, over the fine-tunes."""
    rows = compared(results)
    return average(lead(each, method, other) for each in at_rate(rows, RATE).values())


def lead_at_all_rates(results: pd.DataFrame, method: str, other: str, kinds: Iterable[str] = FINE_TUNED) -> Interval:
    """The lead of one method over another, the mean over all drop rates tried, over the pairs of some kinds."""
    rows = compared(results, kinds)
    leads = [
        average_over_rates(lead(at_rate(each, p)[str(pair)], method, other) for p in rates_tried(each))
        for pair, each in rows.groupby("pair", sort=False)
    ]
    return average(leads)


def lead_grows(results: pd.DataFrame, method: str, other: str) -> Interval:
    """How much larger the lead is at the high rate than at the lowest one, over the fine-tunes."""
    rows = compared(results)
    lowest = rates_tried(rows)[0]
    if lowest >= RATE:
        raise NotMeasuredError(f"no model at a drop rate below {RATE:g}")
    high, low = ({pair: lead(each, method, other) for pair, each in at_rate(rows, p).items()} for p in (RATE, lowest))
    return average(difference(high[pair], low[pair]) for pair in high)


def compared(results: pd.DataFrame, kinds: Iterable[str] = FINE_TUNED) -> pd.DataFrame:
    """The cells of pairs of some kinds under every method, by their first metric."""
    return first_metric(made_by(results[results["table"].isin(["ladder", "cells"])], kinds))
