"""How large a delta is: quantiles, distributions, places."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from delta_analysis.checkpoints import NO_LAYER
from delta_analysis.deltas import MAGNITUDE_QUANTILES, THRESHOLDS
from delta_analysis.plots.style import GREY, colours, legend_below, name_point, percent_axis, plain_log_axis


def magnitude_quantiles(ranges: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Quantiles of |δ| of each pair on a log axis, beside the papers' reference lines.

    `ranges` has one row a pair: the columns of `value_ranges(by="model")` and `pair`.
    """
    ax = ax or plt.gca()
    columns = {**dict.fromkeys(MAGNITUDE_QUANTILES, ""), "abs_max": ""}
    markers = dict(zip(columns, ("o", "s", "D", "^", "x"), strict=True))
    labels = {"abs_p50": "median", "abs_p90": "90%", "abs_p99": "99%", "abs_p999": "99.9%", "abs_max": "maximum"}
    palette = colours(ranges["pair"].tolist())
    places = np.arange(len(ranges))[::-1]
    for place, (_, row) in zip(places, ranges.iterrows(), strict=True):
        ax.plot([row["abs_p50"], row["abs_max"]], [place, place], color=palette[row["pair"]], lw=1, zorder=2)
        for column, marker in markers.items():
            ax.plot(row[column], place, marker, color=palette[row["pair"]], ms=6, zorder=3)
    for threshold in THRESHOLDS[2:]:
        ax.axvline(threshold, color=GREY, lw=0.8, ls=":", zorder=1)
        ax.text(threshold, len(ranges) - 0.45, f"{threshold:g}", color=GREY, ha="center", va="bottom", size="x-small")
    ax.set(xscale="log", yticks=places, xlabel="|δ| (dotted: the papers' reference values)", ylabel="")
    ax.set_yticklabels(ranges["pair"])
    ax.set_ylim(-0.6, len(ranges) - 0.5)
    plain_log_axis(ax.xaxis)
    handles = [
        Line2D([], [], color=GREY, ls="", marker=marker, ms=6, label=labels[column])
        for column, marker in markers.items()
    ]
    return legend_below(ax, columns=len(handles), handles=handles)


def magnitude_histograms(histograms: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Distribution of |δ| on a log axis, one outline a pair.

    `histograms` stacks tables of `magnitude_histogram`, with a column `pair`.
    """
    ax = ax or plt.gca()
    palette = colours(histograms["pair"].tolist())
    for pair, group in histograms.groupby("pair", sort=False):
        edges = np.append(group["low"].to_numpy(), group["high"].iloc[-1])
        ax.stairs(group["density"], edges, color=palette[str(pair)], lw=1.8, label=pair)
    for threshold in THRESHOLDS[2:]:
        ax.axvline(threshold, color=GREY, lw=0.8, ls=":", zorder=1)
    ax.set(xscale="log", xlabel="|δ| (dotted: 0.002, 0.005, 0.01, 0.03)", ylabel="share of entries per decade of |δ|")
    shown = histograms.loc[histograms["density"] > 1e-4]
    if len(shown):
        ax.set_xlim(max(shown["low"].min(), 1e-8), shown["high"].max())
    percent_axis(ax.yaxis)
    return legend_below(ax, columns=2)


def layer_heatmap(ranges: pd.DataFrame, *, value: str = "abs_p50", ax: Axes | None = None) -> Axes:
    """One statistic by layer and module, on a log colour scale.

    `ranges` is a table of `value_ranges(by="place")` for one pair. Up to 8 layers have their values
    in the cells; of many layers every tenth is labelled.
    """
    ax = ax or plt.gca()
    table = ranges.assign(
        layer=ranges["layer"].map(lambda layer: "outside" if layer == NO_LAYER else str(layer)),
        module=ranges["module"].map(short_module),
    ).pivot_table(index="module", columns="layer", values=value, sort=False)
    few = len(table.columns) <= MOST_ANNOTATED
    positive = table.to_numpy()[table.to_numpy() > 0]
    sns.heatmap(
        table,
        ax=ax,
        cmap="viridis",
        norm=mpl.colors.LogNorm(positive.min(), positive.max()) if positive.size else None,
        annot=table * 1000 if few else None,
        fmt=".3g",
        annot_kws={"size": 7},
        linewidths=0.5 if few else 0,
        xticklabels=[
            label if few or not label.isdecimal() or int(label) % 10 == 0 < int(label) else ""
            for label in table.columns
        ],
        yticklabels=True,
        cbar_kws={"label": _STATISTICS.get(value, value) + (" (in the cells: thousandths)" if few else "")},
    )
    ax.set(xlabel="layer", ylabel="")
    ax.tick_params(axis="both", length=0)
    ax.tick_params(axis="x", labelrotation=0)
    return ax


MOST_ANNOTATED = 8


_STATISTICS = {
    "abs_p50": "median |δ|",
    "abs_p99": "99% quantile of |δ|",
    "rms": "rms of δ",
    "relative_rms": "rms δ / rms base",
}


def short_module(module: str) -> str:
    """A module's name without the block it stands in."""
    return module.removeprefix("self_attn.").removeprefix("mlp.")


def trail_growth(trail: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Growth of |δ| along the steps of continual pre-training, both axes logarithmic.

    `trail` has columns `step` and those of `value_ranges(by="model")`.
    """
    ax = ax or plt.gca()
    labels = {"abs_p50": "median", "abs_p90": "90%", "abs_p99": "99%", "abs_p999": "99.9%"}
    shades = sns.color_palette("crest", len(labels)).as_hex()
    for (column, label), colour in zip(labels.items(), shades, strict=True):
        ax.plot(trail["step"], trail[column], "o-", color=colour, ms=4)
        end = (trail["step"].iloc[-1], trail[column].iloc[-1])
        name_point(ax, label, end, (8, 0), va="center", color=colour)
    for threshold in THRESHOLDS[2:]:
        ax.axhline(threshold, color=GREY, lw=0.8, ls=":", zorder=1)
        ax.text(trail["step"].iloc[0], threshold, f"{threshold:g}", color=GREY, va="bottom", size="x-small")
    ax.set(xscale="log", yscale="log", xlabel="steps of continual pre-training", ylabel="|δ| against the base")
    plain_log_axis(ax.xaxis)
    return ax
