"""Methods beside each other."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from delta_analysis.plots.style import (
    dot_rows,
    method_colours,
    metric_axis,
    name_point,
    plain_log_axis,
    readable_on,
)


def method_dots(curve: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """The metric of one pair at one drop rate, a method a row from the top, with 95% intervals.

    `curve` has the columns of `drop_curve`.
    """
    ax = ax or plt.gca()
    methods = curve["method"].tolist()
    dot_rows(ax, curve, "value", methods, method_colours(methods), "method")
    metric_axis(ax, "x", curve)
    return ax


def drift_scatter(summary: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Drift of the model's output against the error of the parameters, one labelled point a method.

    `summary` has one row a method: `method, parameter_error, drift, low, high`.
    """
    ax = ax or plt.gca()
    palette = method_colours(summary["method"].tolist())
    points = summary.sort_values("parameter_error")
    # A label stands left of its point where the next point is near on the right.
    crowded = points["parameter_error"].shift(-1) < 3 * points["parameter_error"]
    for (_, row), left in zip(points.iterrows(), crowded, strict=True):
        colour = palette[row["method"]]
        ax.plot([row["parameter_error"]] * 2, [row["low"], row["high"]], color=colour, lw=1.6)
        ax.plot(row["parameter_error"], row["drift"], "o", color=colour, ms=6)
        look = {"ha": "right" if left else "left", "va": "center", "color": colour, "size": "small"}
        name_point(ax, row["method"], (row["parameter_error"], row["drift"]), (-7 if left else 7, 0), **look)
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="relative squared error of the parameters",
        ylabel="output drift (nats a token)",
    )
    ax.set_xlim(points["parameter_error"].min() / 3, points["parameter_error"].max() * 8)
    plain_log_axis(ax.xaxis)
    plain_log_axis(ax.yaxis)
    return ax


def winner_map(best: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """The best method by pair and drop rate; grey where its lead over the second is not clear.

    `best` is a table of `best_methods`; pairs are drawn from the top in their order in it. In a cell:
    the lead, in points of the untouched model's metric.
    """
    ax = ax or plt.gca()
    palette = method_colours(best["method"].tolist())
    pairs, rates = list(dict.fromkeys(best["pair"])), sorted(set(best["drop_rate"]))
    for _, row in best.iterrows():
        x, y = rates.index(row["drop_rate"]), len(pairs) - 1 - pairs.index(row["pair"])
        face = palette[row["method"]] if row["clear"] else "#e8e8e8"
        ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=face, edgecolor="white", lw=1.5))
        text = f"{row['method']}\n+{100 * row['lead']:.0f}" if row["clear"] else "no clear\nwinner"
        ax.text(x, y, text, ha="center", va="center", size="x-small", color=readable_on(face))
    ax.set_xticks(range(len(rates)), [f"{p:g}" for p in rates])
    ax.set_yticks(range(len(pairs)), pairs[::-1])
    ax.set(xlabel="drop rate p", xlim=(-0.5, len(rates) - 0.5), ylim=(-0.5, len(pairs) - 0.5))
    ax.tick_params(axis="both", length=0)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    return ax
