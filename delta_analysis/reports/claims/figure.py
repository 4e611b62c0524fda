"""The papers' claims beside what was measured."""

from __future__ import annotations

import math
from textwrap import fill

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from delta_analysis.plots import GREY, PALETTE
from delta_analysis.reports.claims.claim import CANNOT_TELL, NOT_REPRODUCED, REPRODUCED, REVERSED

LOOKS = {
    REPRODUCED: ("o", PALETTE[0]),
    NOT_REPRODUCED: ("s", PALETTE[2]),
    REVERSED: ("v", "black"),
    CANNOT_TELL: ("D", GREY),
}
"""Marker and colour of each status."""
SHARES = "share of entries or of accuracy, drop rate, or cosine"
AXES = {
    SHARES: ("share", "drop rate", "similarity"),
    "points of the untouched accuracy, or hundredths of a cosine": ("points",),
    "difference of tolerated drop rates on log(p / (1 − p))": ("log-odds",),
    "rank correlation, or share of the gap between two bases": ("rank correlation", "share of a gap"),
}
"""Label of an axis -> the units that are drawn on it."""


def claim_groups(judged: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The claims that have an effect, by the label of the axis they are drawn on; never without a group.

    `judged` is a table of `overview.judge`.
    """
    measured = judged[judged["value"].notna()]
    groups = {label: measured[measured["unit"].isin(units)] for label, units in AXES.items()}
    return {label: rows for label, rows in groups.items() if len(rows)} or {SHARES: measured}


def claim_effects(rows: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Effects as markers with their 95% intervals, a claim a row from the top, on a grey line: the claimed side.

    `rows` are one group of `claim_groups`. Shares stand on a logit axis, differences on a linear one;
    what lies outside the axis is drawn at its end. Marker and colour tell the status, as in
    `status_handles`.
    """
    ax = ax or plt.gca()
    label = next(label for label, units in AXES.items() if set(rows["unit"]) <= set(units))
    scale = 100 if "points" in AXES[label] else 1
    if label == SHARES:
        ax.set_xscale("logit")
        ax.set_xlim(0.005, 0.9985)
        ax.set_xticks([0.01, 0.1, 0.5, 0.9, 0.99], ["0.01", "0.1", "0.5", "0.9", "0.99"])
        ax.set_xticks([], minor=True)
    else:
        ends = [scale * x for x in (*rows["value"], *rows["low"], *rows["high"], 0) if math.isfinite(x)]
        margin = 0.06 * (max(ends) - min(ends))
        ax.set_xlim(min(ends) - margin, max(ends) + margin)
    left, right = ax.get_xlim()
    for place, (_, row) in enumerate(rows.iterrows()):
        above = pd.notna(row["claimed_at_least"])
        claimed = [scale * row["claimed_at_least" if above else "claimed_at_most"], right if above else left]
        ax.plot(claimed, [place, place], color="0.88", lw=9, solid_capstyle="butt", zorder=1)
        value, low, high = (min(max(scale * row[each], left), right) for each in ("value", "low", "high"))
        marker, colour = LOOKS[row["status"]]
        ax.plot([low, high], [place, place], color=colour, lw=1.8, zorder=2)
        ax.plot(value, place, marker, color=colour, ms=6, zorder=3, clip_on=False)
    ax.set_yticks(range(len(rows)), [fill(claim, 64) for claim in rows["claim"]])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(label)
    return ax


def status_handles() -> list[Line2D]:
    """For a legend, the marker of each status."""
    return [Line2D([], [], ls="", marker=marker, color=colour, label=name) for name, (marker, colour) in LOOKS.items()]


def claims_figure(judged: pd.DataFrame) -> Figure:
    """All effects of claims, a panel for each kind of unit."""
    groups = claim_groups(judged)
    measured = judged["value"].notna().sum()
    figure, axes = plt.subplots(
        len(groups),
        1,
        squeeze=False,
        figsize=(9.5, 0.34 * measured + 0.75 * len(groups) + 0.5),
        height_ratios=[len(rows) + 0.4 for rows in groups.values()],
        layout="constrained",
    )
    for ax, rows in zip(axes[:, 0], groups.values(), strict=True):
        claim_effects(rows, ax=ax)
    figure.legend(handles=status_handles(), loc="outside upper center", ncols=len(LOOKS))
    return figure
