"""A metric against drop rate, factor, layer or size."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter

from delta_analysis.plots.style import (
    GREY,
    RATE_TICKS,
    band,
    colours,
    is_share,
    legend_below,
    logit_axis,
    method_colours,
    metric_axis,
    name_point,
    percent_axis,
    spread,
)
from delta_analysis.sweeps import logit


def drop_curves(
    curve: pd.DataFrame,
    *,
    hue: str = "pair",
    palette: Mapping[str, str] | None = None,
    dashed: Collection[str] = (),
    ax: Axes | None = None,
) -> Axes:
    """The metric against drop rate with 95% bands, one line a pair (or method), on a logit axis.

    `curve` is a table of `drop_curve`; `palette` gives a colour to each name, for figures that have
    to agree with one another; `dashed` are names with a dashed line. Drop rates 0 and 1 have no place
    on such an axis: they are drawn as open diamonds at its two ends, the untouched model left, all
    dropped (the base) right.
    """
    ax = ax or plt.gca()
    palette = palette or colours(curve[hue].tolist())
    rates = curve.loc[curve["drop_rate"].between(0, 1, inclusive="neither"), "drop_rate"]
    left, right = logit(rates.min()) - 0.8, logit(rates.max()) + 0.8
    for name, group in curve.groupby(hue, sort=False):
        colour = palette[str(name)]
        line = group[group["drop_rate"].between(0, 1, inclusive="neither")].sort_values("drop_rate")
        band(ax, line["drop_rate"].map(logit), line, colour, "o--" if name in dashed else "o-", label=name)
        for end, place in ((0.0, left), (1.0, right)):
            reference = group[group["drop_rate"] == end]
            # Where nothing or everything is dropped, methods do not differ.
            end_colour = colour if hue == "pair" else GREY
            ax.plot([place] * len(reference), reference["value"], "D", color=end_colour, ms=6, mfc="white", zorder=4)
    ticks = [p for p in RATE_TICKS if rates.min() <= p <= rates.max()]
    ax.set_xticks([left, *map(logit, ticks), right], ["0\n(untouched)", *(f"{p:g}" for p in ticks), "1\n(all dropped)"])
    ax.set_xlabel("drop rate p, on the scale log(p / (1 − p))")
    metric_axis(ax, "y", curve)
    if is_share(curve):
        ax.set_ylim(-0.03, 1.03)
    return legend_below(ax, columns=2)


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
            look = {"ha": "right" if place > 0.5 else "left", "va": side, "size": "x-small", "color": GREY}
            name_point(ax, label, (place, value), (0, offset), xycoords=ax.get_yaxis_transform(), **look)
    return ax


def mark_tolerated(tolerance: pd.Series, *, ax: Axes) -> Axes:
    """The tolerated drop rate of one pair and its interval, on the axes of `drop_curves`.

    `tolerance` is a row of the table of `measure_tolerance`.
    """
    ax.axvspan(logit(tolerance["low"]), logit(tolerance["high"]), color=GREY, alpha=0.2, lw=0, zorder=1)
    ax.axvline(logit(tolerance["tolerated"]), color=GREY, lw=1.2, zorder=1)
    return ax


def similarity_by_layer(curve: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Cosine similarity of the hidden states to the untouched model's, by layer, one line a method, with 95% bands.

    `curve` has the columns of `drop_curve` and `layer`, 0 being the embedding output; one pair and drop rate.
    """
    ax = ax or plt.gca()
    palette = method_colours(curve["method"].tolist())
    for method, line in curve.groupby("method", sort=False):
        line = line.sort_values("layer")
        band(ax, line["layer"], line, palette[str(method)], label=method)
    ax.axhline(1, color=GREY, lw=0.9, ls="--", zorder=1)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="layer (0: embedding output)", ylabel="cosine to the untouched model")
    return legend_below(ax, columns=2)


def factor_curves(curve: pd.DataFrame, chosen: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Accuracy of one pair against the factor after dropping, one line a drop rate, with 95% bands.

    The axis runs from drop only (factor 1) to DARE (factor 1/(1-p)), in equal ratios. `curve` has the
    columns of `drop_curve` and `factor`. `chosen` has rows of `best_factors` of the pair: ▲ below the
    line marks the factor chosen with labels, ▼ above it the one chosen without.
    """
    ax = ax or plt.gca()
    rates = sorted(set(curve["drop_rate"]))
    shades = sns.color_palette("crest", len(rates)).as_hex()
    for rate, colour in zip(rates, shades, strict=True):
        line = curve[curve["drop_rate"] == rate].sort_values("factor")
        place = np.log(line["factor"]) / -np.log1p(-rate)
        band(ax, place, line, colour, ms=3.5, label=f"p = {rate:g}")
        for _, row in chosen[chosen["drop_rate"] == rate].iterrows():
            at = int(np.argmin(np.abs(line["factor"] - row["factor"])))
            below = row["chosen_by"] == "labels"
            beside = line["value"].iloc[at] + (-0.07 if below else 0.07)
            ax.plot(place.iloc[at], beside, "^" if below else "v", color=colour, ms=7, zorder=4)
    ax.set_xticks([0, 0.5, 1], ["1\n(drop only)", "1/√(1 − p)", "1/(1 − p)\n(DARE)"])
    ax.set(xlabel="factor after dropping", ylabel="accuracy (exact match)", ylim=(-0.1, 1.12))
    percent_axis(ax.yaxis)
    return legend_below(ax, columns=len(rates))


def tolerance_by_size(tolerances: pd.DataFrame, *, hue: str = "relation", ax: Axes | None = None) -> Axes:
    """The tolerated drop rate, on the scale log(p/(1-p)), against the number of parameters, with 95% intervals.

    `tolerances` has the columns of `measure_tolerance`, `parameters` and the one named by `hue`: a line each.
    """
    ax = ax or plt.gca()
    palette = colours(tolerances[hue].tolist())
    for i, (name, line) in enumerate(tolerances.groupby(hue, sort=False)):
        line, colour = line.sort_values("parameters"), palette[str(name)]
        # Side by side, so that intervals of one size do not hide each other.
        x = line["parameters"] * 1.03 ** (i - (len(palette) - 1) / 2)
        y, low, high = (line[column].map(logit) for column in ("tolerated", "low", "high"))
        ax.errorbar(x, y, spread(y, low, high), fmt="o-", color=colour, ms=5, lw=1.4, elinewidth=1.4, label=name)
    ends = tolerances["low"].map(logit).min() - 0.3, tolerances["high"].map(logit).max() + 0.3
    logit_axis(ax, "y", *ends)
    ax.set(xscale="log", xlabel="parameters", ylabel="tolerated drop rate, on log(p / (1 − p))")
    sizes = sorted(set(tolerances["parameters"]))
    ax.set_xticks(sizes, [f"{n / 1e6:.2g}M" if n < 1e9 else f"{n / 1e9:.2g}B" for n in sizes])
    ax.xaxis.set_minor_formatter(NullFormatter())
    return legend_below(ax, columns=2)
