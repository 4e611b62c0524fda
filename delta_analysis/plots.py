"""Figures: each function draws one table on one pair of axes and returns the axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter
from matplotlib.transforms import ScaledTranslation

from delta_analysis.names import NO_LAYER
from delta_analysis.tally import MAGNITUDE_QUANTILES, THRESHOLDS
from delta_analysis.tolerance import logit

PALETTE = ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
"""Okabe and Ito's colours, told apart by every common kind of colour vision."""
GREY = "#6b6b6b"
METHOD_COLOURS = {
    "DARE": "#0072B2",
    "drop only": "#56B4E9",
    "MP": "#D55E00",
    "MP + rescale": "#CC79A7",
    "MAGPRUNE": "#009E73",
}
"""A method has the same colour in every figure."""
_RATE_TICKS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 0.999)


def set_style() -> None:
    """The look of the reports' figures; notebooks call it once, plotting functions never do."""
    sns.set_theme(context="notebook", style="ticks", palette=PALETTE, font_scale=0.85)
    mpl.rcParams.update(
        {
            "figure.dpi": 80,
            "savefig.dpi": 110,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titlesize": "medium",
            "legend.frameon": False,
        }
    )


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name, in the order of first appearance."""
    unique = list(dict.fromkeys(names))
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(unique)}


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
    _plain_log_axis(ax.xaxis)
    handles = [
        Line2D([], [], color=GREY, ls="", marker=marker, ms=6, label=labels[column])
        for column, marker in markers.items()
    ]
    return _legend_below(ax, columns=len(handles), handles=handles)


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
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return _legend_below(ax, columns=2)


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
        ax.annotate(
            label,
            (trail["step"].iloc[-1], trail[column].iloc[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=colour,
        )
    for threshold in THRESHOLDS[2:]:
        ax.axhline(threshold, color=GREY, lw=0.8, ls=":", zorder=1)
        ax.text(trail["step"].iloc[0], threshold, f"{threshold:g}", color=GREY, va="bottom", size="x-small")
    ax.set(xscale="log", yscale="log", xlabel="steps of continual pre-training", ylabel="|δ| against the base")
    _plain_log_axis(ax.xaxis)
    return ax


def drop_curves(
    curve: pd.DataFrame, *, hue: str = "pair", palette: Mapping[str, str] | None = None, ax: Axes | None = None
) -> Axes:
    """The metric against drop rate with 95% bands, one line a pair (or method), on a logit axis.

    `curve` is a table of `drop_curve`; `palette` gives a colour to each name, for figures that have
    to agree with one another. Drop rates 0 and 1 have no place on such an axis: they are
    drawn as open diamonds at its two ends, the untouched model left, all dropped (the base) right.
    """
    ax = ax or plt.gca()
    palette = palette or colours(curve[hue].tolist())
    rates = curve.loc[curve["drop_rate"].between(0, 1, inclusive="neither"), "drop_rate"]
    left, right = logit(rates.min()) - 0.8, logit(rates.max()) + 0.8
    for name, group in curve.groupby(hue, sort=False):
        colour = palette[str(name)]
        line = group[group["drop_rate"].between(0, 1, inclusive="neither")].sort_values("drop_rate")
        x = line["drop_rate"].map(logit)
        ax.plot(x, line["value"], "o-", color=colour, ms=4, lw=1.6, label=name, zorder=3)
        ax.fill_between(x, line["low"], line["high"], color=colour, alpha=0.18, lw=0, zorder=2)
        for end, place in ((0.0, left), (1.0, right)):
            reference = group[group["drop_rate"] == end]
            # Where nothing or everything is dropped, methods do not differ.
            end_colour = colour if hue == "pair" else GREY
            ax.plot([place] * len(reference), reference["value"], "D", color=end_colour, ms=6, mfc="white", zorder=4)
    ticks = [p for p in _RATE_TICKS if rates.min() <= p <= rates.max()]
    ax.set_xticks([left, *map(logit, ticks), right], ["0\n(untouched)", *(f"{p:g}" for p in ticks), "1\n(all dropped)"])
    ax.set_xlabel("drop rate p, on the scale log(p / (1 − p))")
    if curve["metric"].iloc[0] == "accuracy":
        ax.set(ylabel="accuracy (exact match)", ylim=(-0.03, 1.03))
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    else:
        ax.set(ylabel=curve["metric"].iloc[0], yscale="log")
    return _legend_below(ax, columns=2)


def method_colours(methods: Sequence[str]) -> dict[str, str]:
    """The colour of each method; variants (`MAGPRUNE by tensor`) have that of their method."""
    others = [colour for colour in (*PALETTE, GREY) if colour not in METHOD_COLOURS.values()]
    families = {method: method.split(" by ")[0].split(", ")[0] for method in methods}
    unnamed = [family for family in dict.fromkeys(families.values()) if family not in METHOD_COLOURS]
    known = METHOD_COLOURS | {family: others[i % len(others)] for i, family in enumerate(unnamed)}
    return {method: known[family] for method, family in families.items()}


def method_dots(curve: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """The metric of one pair at one drop rate, a method a row from the top, with 95% intervals.

    `curve` has the columns of `drop_curve`.
    """
    ax = ax or plt.gca()
    palette = method_colours(curve["method"].tolist())
    places = np.arange(len(curve))[::-1]
    for place, (_, row) in zip(places, curve.iterrows(), strict=True):
        colour = palette[row["method"]]
        ax.plot([row["low"], row["high"]], [place, place], color=colour, lw=1.6)
        ax.plot(row["value"], place, "o", color=colour, ms=5)
    ax.set_yticks(places, curve["method"])
    ax.set_ylim(-0.6, len(curve) - 0.4)
    if curve["metric"].iloc[0] == "accuracy":
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set(xlabel="accuracy (exact match)")
    else:
        ax.set(xlabel=curve["metric"].iloc[0], xscale="log")
    return ax


def damage_scatter(summary: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
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
        ax.annotate(
            row["method"],
            (row["parameter_error"], row["drift"]),
            xytext=(-7 if left else 7, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            color=colour,
            size="small",
        )
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="relative squared error of the parameters",
        ylabel="output drift (nats a token)",
    )
    ax.set_xlim(points["parameter_error"].min() / 3, points["parameter_error"].max() * 8)
    _plain_log_axis(ax.xaxis)
    _plain_log_axis(ax.yaxis)
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
        ax.text(x, y, text, ha="center", va="center", size="x-small", color=_readable_on(face))
    ax.set_xticks(range(len(rates)), [f"{p:g}" for p in rates])
    ax.set_yticks(range(len(pairs)), pairs[::-1])
    ax.set(xlabel="drop rate p", xlim=(-0.5, len(rates) - 0.5), ylim=(-0.5, len(pairs) - 0.5))
    ax.tick_params(axis="both", length=0)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    return ax


def _readable_on(face: str) -> str:
    """Black or white, whichever is read better on a colour."""
    red, green, blue = mpl.colors.to_rgb(face)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def reference_lines(curve: pd.DataFrame, *, ax: Axes) -> Axes:
    """The untouched model and the one with all of its delta dropped as dashed lines, on the axes of `drop_curves`.

    `curve` is the table of one pair and method, drop rates 0 and 1 among its rows.
    """
    for drop_rate, label, place, offset, side in (
        (0.0, "untouched model", 0.99, -3, "top"),
        (1.0, "all dropped (p = 1)", 0.12, 2, "bottom"),
    ):
        for value in curve.loc[curve["drop_rate"] == drop_rate, "value"]:
            ax.axhline(value, color=GREY, lw=0.9, ls="--", zorder=1)
            ax.annotate(
                label,
                (place, value),
                xycoords=ax.get_yaxis_transform(),
                xytext=(0, offset),
                textcoords="offset points",
                ha="right" if place > 0.5 else "left",
                va=side,
                size="x-small",
                color=GREY,
            )
    return ax


def mark_tolerated(tolerance: pd.Series, *, ax: Axes) -> Axes:
    """The tolerated drop rate of one pair and its interval, on the axes of `drop_curves`.

    `tolerance` is a row of the table of `measure_tolerance`.
    """
    ax.axvspan(logit(tolerance["low"]), logit(tolerance["high"]), color=GREY, alpha=0.2, lw=0, zorder=1)
    ax.axvline(logit(tolerance["tolerated"]), color=GREY, lw=1.2, zorder=1)
    return ax


def _legend_below(ax: Axes, *, columns: int, handles: list[Line2D] | None = None) -> Axes:
    """The legend under the axis label, at a distance in points whatever the axes' height."""
    below = ax.transAxes + ScaledTranslation(0, -46 / 72, ax.figure.dpi_scale_trans)
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, ncols=columns)
    return ax


def _plain_log_axis(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 times the powers of ten, written as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
