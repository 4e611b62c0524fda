"""Merges: what they are worth, what they have to agree on, and how they go along continual pre-training."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from delta_analysis.plots.style import GREY, PALETTE, band, legend_below, percent_axis, spread, step_axis

MERGE_COLOURS = {
    "task arithmetic": "#0072B2",
    "TIES": "#D55E00",
    "TIES, sum": "#E69F00",
    "slack": "#CC79A7",
    "average": "#56B4E9",
    "DELLA": "#009E73",
    "before merging": GREY,
    "fine-tuned afterwards": "#000000",
}
"""A way to merge has the same colour in every figure."""


def merge_dots(scores: pd.DataFrame, lines: Mapping[str, float], *, ax: Axes | None = None) -> Axes:
    """Accuracy of merge methods as dots with 95% intervals, a row a method, a shade a drop rate.

    `scores` has `way` (the row), `drop_rate`, `value, low, high`; `lines` are labelled reference values,
    drawn down the figure.
    """
    ax = ax or plt.gca()
    ways = list(dict.fromkeys(scores["way"]))
    rates = sorted(scores["drop_rate"].unique())
    shades = dict(zip(rates, [GREY, *sns.color_palette("crest", max(len(rates) - 1, 1)).as_hex()], strict=False))
    for i, rate in enumerate(rates):
        here = scores[scores["drop_rate"] == rate]
        y = [ways.index(way) + 0.2 * (i - (len(rates) - 1) / 2) for way in here["way"]]
        reach = spread(here["value"], here["low"], here["high"])
        label = f"p = {rate:g}" if rate else "nothing dropped"
        ax.errorbar(here["value"], y, xerr=reach, fmt="o", ms=5, lw=1.4, color=shades[rate], label=label)
    for i, (label, value) in enumerate(sorted(lines.items(), key=lambda line: line[1])):
        ax.axvline(value, color=GREY, lw=0.9, ls="--", zorder=1)
        # By turns on two heights, so that neighbours do not overlap.
        place = (value, 1.01 + 0.045 * (i % 2))
        ax.annotate(label, place, xycoords=ax.get_xaxis_transform(), ha="center", size="x-small", color=GREY)
    ax.set_yticks(range(len(ways)), ways)
    ax.set(ylim=(len(ways) - 0.4, -0.6), xlabel="accuracy (exact match), mean over the tasks")
    percent_axis(ax.xaxis)
    return legend_below(ax, columns=len(rates))


def merge_curves(scores: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Accuracy of one merge method against drop rate, a line a task, with 95% intervals.

    `scores` has `task, drop_rate, value, low, high`.
    """
    ax = ax or plt.gca()
    for i, (task, line) in enumerate(scores.groupby("task", sort=False)):
        line, colour = line.sort_values("drop_rate"), PALETTE[i % len(PALETTE)]
        reach = spread(line["value"], line["low"], line["high"])
        ax.errorbar(line["drop_rate"], line["value"], reach, fmt="o-", ms=4, lw=1.6, color=colour, label=task)
    ax.set(ylim=(-0.03, 1.03), xlim=(-0.05, 1.02), xlabel="drop rate p", ylabel="accuracy")
    percent_axis(ax.yaxis)
    return ax


def along_trail(scores: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Accuracy against the steps of continual pre-training, a line a way, with 95% bands.

    `scores` has `way`, one of `MERGE_COLOURS` or beginning with one, `steps`, `value, low, high`.
    """
    ax = ax or plt.gca()
    for way, line in scores.groupby("way", sort=False):
        line = line.sort_values("steps")
        # That of the longest name, so that "TIES, sum" is not taken for "TIES".
        colour = MERGE_COLOURS[max((name for name in MERGE_COLOURS if str(way).startswith(name)), key=len)]
        style = "o--" if way in ("before merging", "fine-tuned afterwards") else "o-"
        band(ax, line["steps"], line, colour, style, label=way)
    ax.set(ylim=(-0.03, 1.03), ylabel="accuracy (exact match)")
    step_axis(ax, scores["steps"])
    percent_axis(ax.yaxis)
    return ax


def discards_along_trail(rates: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """The share of a fine-tune's entries that lose the election, and of null models, against steps.

    `rates` has `way` (a line), `steps` and `discarded`.
    """
    ax = ax or plt.gca()
    for i, (way, line) in enumerate(rates.groupby("way", sort=False)):
        line = line.sort_values("steps")
        null = str(way).startswith("null")
        style = (":" if i % 2 else "--") if null else "o-"
        colour = GREY if null else PALETTE[i % len(PALETTE)]
        ax.plot(line["steps"], line["discarded"], style, color=colour, ms=4, lw=1.6, label=way)
    ax.set(ylim=(-0.01, 0.55), ylabel="entries that lose the election")
    step_axis(ax, rates["steps"])
    percent_axis(ax.yaxis)
    return legend_below(ax, columns=3)


def conflicts_by_layer(table: pd.DataFrame, *, column: str = "conflicts", ax: Axes | None = None) -> Axes:
    """A share that measures interference against the layer, on a log axis, a line a way of pruning.

    `table` has `way`, `layer` (tensors outside the layers are drawn left of them) and the column.
    """
    ax = ax or plt.gca()
    for i, (way, line) in enumerate(table.groupby("way", sort=False)):
        line = line.sort_values("layer")
        ax.plot(line["layer"], line[column], "o-", ms=4, lw=1.6, color=PALETTE[i % len(PALETTE)], label=way)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    # A layer in which nothing meets has no place on a log axis.
    least = table.loc[table[column] > 0, column].min()
    ax.set(ylim=(least / 1.5 if least > 0 else 1e-3, 1.3), yscale="log", xlabel="layer (−1: outside the layers)")
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    return ax
