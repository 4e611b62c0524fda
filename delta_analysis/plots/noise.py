"""Noise in layers, and what it foretells beside what was measured."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from delta_analysis.checkpoints import NO_LAYER
from delta_analysis.plots.style import (
    GREY,
    METHOD_COLOURS,
    PALETTE,
    band,
    colours,
    dot_rows,
    is_share,
    legend_below,
    logit_axis,
    method_colours,
    metric_axis,
    name_point,
    percent_axis,
    plain_log_axis,
    spread,
)
from delta_analysis.sweeps import logit

APART = 1.35
"""Labels of points that are nearer to each other on a log axis would overlap."""


def noise_by_layer(noise: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """N/Y of every use of a tensor against its layer, on a log axis, with the medians of linear layers as a line.

    `noise` has the columns of `layer_noise`, with one pruner, and `pair`. What stands outside the
    layers is drawn beside them, embeddings left and the rest right; the largest of each pair is named.
    """
    ax = ax or plt.gca()
    palette = colours(noise["pair"].tolist())
    last = int(noise["layer"].max())
    for i, (pair, group) in enumerate(noise.groupby("pair", sort=False)):
        outside = np.where(group["kind"] == "embedding", -1, last + 1)
        x = np.where(group["layer"] == NO_LAYER, outside, group["layer"])
        shift = 0.12 * (i - (len(palette) - 1) / 2)
        colour = palette[str(pair)]
        ax.plot(x + shift, group["noise_share"], "o", ms=3.5, mec="none", color=colour, alpha=0.55)
        linear = group[(group["kind"] == "linear") & (group["layer"] != NO_LAYER)]
        medians = linear.groupby("layer")["noise_share"].median()
        ax.plot(medians.index + shift, medians, "-", color=colour, lw=1.6, label=pair)
        top = int(np.nanargmax(group["noise_share"]))
        row = group.iloc[top]
        near_right = x[top] > last - 1
        look = {"ha": "right" if near_right else "left", "size": "x-small", "color": colour}
        name_point(ax, row["module"], (x[top] + shift, row["noise_share"]), (-6 if near_right else 6, 4), **look)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda at, _: _place_name(at, last)))
    ax.set(yscale="log", xlabel="layer", ylabel="noise base N / output energy Y", xlim=(-1.6, last + 1.6))
    return legend_below(ax, columns=1)


def _place_name(at: float, last: int) -> str:
    if at == -1:
        return "embed"
    return "after" if at == last + 1 else f"{at:g}" if 0 <= at <= last else ""


def foretold_scatter(table: pd.DataFrame, *, hue: str = "group", ax: Axes | None = None) -> Axes:
    """Measured against foretold tolerated drop rates on log(p/(1-p)), with intervals, a colour a group.

    `table` has `foretold` (on that scale), `tolerated, low, high` (drop rates), and the column named by
    `hue`. The diagonal is where both agree.
    """
    ax = ax or plt.gca()
    for name, colour in colours(table[hue].tolist()).items():
        group = table[table[hue] == name]
        y, low, high = (group[column].map(logit) for column in ("tolerated", "low", "high"))
        reach = spread(y, low, high)
        ax.errorbar(group["foretold"], y, reach, fmt="o", ms=4, lw=0.8, color=colour, alpha=0.75, label=name)
    ends = [float(table["foretold"].min()) - 0.5, float(table["foretold"].max()) + 0.5]
    ax.plot(ends, ends, "--", color=GREY, lw=1, zorder=1)
    logit_axis(ax, "x", *ends)
    logit_axis(ax, "y", table["low"].map(logit).min() - 0.3, table["high"].map(logit).max() + 0.3)
    ax.set(xlabel="foretold tolerated drop rate", ylabel="measured")
    return legend_below(ax, columns=3)


def shift_rows(shifts: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """How far interventions shift what is lost: measured as a dot with its 95% interval, foretold as a bar; one a row.

    `shifts` has `intervention, foretold, measured, low, high` of one pair, all on log(p/(1-p)): how much
    larger the odds of DARE would have to be to lose as much. An infinite end is drawn to the axis' end.
    """
    ax = ax or plt.gca()
    shifts = shifts.reset_index(drop=True)
    places = np.arange(len(shifts))[::-1]
    ax.axvline(0, color=GREY, lw=0.8, ls=":", zorder=1)
    finite = shifts[["foretold", "measured", "low", "high"]].replace([np.inf, -np.inf], np.nan)
    left, right = finite.min().min() - 1, finite.max().max() + 1
    ends = shifts[["measured", "low", "high"]].clip(left, right)
    for place, (index, row) in zip(places, shifts.iterrows(), strict=True):
        first = place == places[0]
        row = pd.concat([row[["foretold"]], ends.loc[index]])
        ax.plot(row["foretold"], place, "|", color="black", ms=17, mew=1.6, label="foretold" if first else None)
        ax.plot([row["low"], row["high"]], [place, place], color=PALETTE[0], lw=1.8, zorder=3)
        ax.plot(
            row["measured"], place, "o", color=PALETTE[0], ms=6, zorder=4, label="measured, with 95%" if first else None
        )
    ax.set_yticks(places, shifts["intervention"])
    ax.set(xlim=(left, right), ylim=(-0.7, len(places) - 0.3), xlabel="shift of log(p / (1 − p))")
    return legend_below(ax, columns=2)


def metric_by_noise(curve: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """The metric against the noise in the layers, p/(1-p) times what N/Y comes to, with 95% bands, one line a pair.

    `curve` has the columns of `drop_curve` and `noise`. Where noise alone decides, the lines lie on each other.
    """
    ax = ax or plt.gca()
    inner = curve[curve["drop_rate"].between(0, 1, inclusive="neither")]
    for pair, colour in colours(inner["pair"].tolist()).items():
        line = inner[inner["pair"] == pair].sort_values("noise")
        band(ax, line["noise"], line, colour, label=pair)
    ax.set(xscale="log", xlabel="noise in the layers, p / (1 − p) · N/Y brought together")
    metric_axis(ax, "y", inner)
    # Over many decades only their powers of ten can be named.
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if is_share(inner):
        ax.set_ylim(-0.03, 1.03)
    return legend_below(ax, columns=2)


def trail_tolerance(trail: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """The tolerated drop rate of one fine-tune against bases of growing distance, with 95% intervals.

    `trail` has `label`, `noise` (a predictor, log axis), `tolerated, low, high`; one point a base.
    """
    ax = ax or plt.gca()
    ordered = trail.sort_values("noise")
    y, low, high = (ordered[column].map(logit) for column in ("tolerated", "low", "high"))
    ax.errorbar(ordered["noise"], y, spread(y, low, high), fmt="o", color=PALETTE[0], ms=5, lw=1.4)
    named = 0.0
    for _, row in ordered.iterrows():
        # Of bases whose noise is nearly the same the first is named.
        if row["noise"] < APART * named:
            continue
        named = row["noise"]
        name_point(ax, row["label"], (row["noise"], logit(row["tolerated"])), (6, 6), size="small", color=GREY)
    ax.set(xscale="log", xlabel="noise in the layers, N/Y brought together", ylabel="tolerated drop rate")
    plain_log_axis(ax.xaxis)
    logit_axis(ax, "y", math.floor(low.min()) - 0.3, high.max() + 0.4)
    return ax


def recovery_dots(recoveries: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """The share of the untouched metric that each way to drop keeps, most first, with 95% intervals; DARE as a line.

    `recoveries` is a table of `recovered` for one pair and drop rate, with `floor`, what is kept when all is
    dropped (a dotted line). Filled: no choice or one without labels; open: chosen with labels.
    """
    ax = ax or plt.gca()
    recoveries = recoveries.sort_values("kept", ascending=False, kind="stable")
    # By the alphabet, so that panels agree.
    palette = method_colours(sorted(set(recoveries["way"])))
    dare = recoveries.loc[recoveries["way"] == "DARE", "kept"].iloc[0]
    ax.axvline(dare, color=METHOD_COLOURS["DARE"], lw=0.9, ls="--", zorder=1)
    ax.axvline(recoveries["floor"].iloc[0], color=GREY, lw=0.9, ls=":", zorder=1)
    names = [
        row["way"] if row["chosen_by"] == "-" else f"{row['way']}, {row['chosen_by']}"
        for _, row in recoveries.iterrows()
    ]
    hollow = np.flatnonzero(recoveries["chosen_by"] == "labels").tolist()
    dot_rows(ax, recoveries, "kept", names, palette, "way", hollow)
    percent_axis(ax.xaxis)
    ax.set(xlabel="share of the untouched metric that is kept", xlim=(-0.03, 1.08))
    return ax
