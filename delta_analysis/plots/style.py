"""How figures look: colours, axes, legends."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter
from matplotlib.transforms import ScaledTranslation

from delta_analysis.sweeps import MEAN, PERPLEXITY, logit, metric_of

PALETTE = ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
"""Okabe and Ito's colours, told apart by every common kind of colour vision."""
GREY = "#6b6b6b"
METHOD_COLOURS = {
    "DARE": "#0072B2",
    "drop only": "#56B4E9",
    "MP": "#D55E00",
    "MP + rescale": "#CC79A7",
    "MAGPRUNE": "#009E73",
    "proportional": "#E69F00",
}
"""A method has the same colour in every figure."""

RATE_TICKS = (0.001, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 0.999)
"""Drop rates that an axis of log(p/(1-p)) names."""


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


def method_colours(methods: Sequence[str]) -> dict[str, str]:
    """The colour of each method; variants (`MAGPRUNE by tensor`) have that of their method."""
    others = [colour for colour in (*PALETTE, GREY) if colour not in METHOD_COLOURS.values()]
    families = {method: method.split(" by ")[0].split(", ")[0] for method in methods}
    unnamed = [family for family in dict.fromkeys(families.values()) if family not in METHOD_COLOURS]
    known = METHOD_COLOURS | {family: others[i % len(others)] for i, family in enumerate(unnamed)}
    return {method: known[family] for method, family in families.items()}


def legend_below(ax: Axes, *, columns: int, handles: list[Line2D] | None = None) -> Axes:
    """The legend under the axis label, at a distance in points whatever the axes' height."""
    below = ax.transAxes + ScaledTranslation(0, -46 / 72, ax.figure.dpi_scale_trans)
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, ncols=columns)
    return ax


def plain_log_axis(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 times the powers of ten, written as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def readable_on(face: str) -> str:
    """Black or white, whichever is read better on a colour."""
    red, green, blue = mpl.colors.to_rgb(face)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def percent_axis(axis: Axis) -> None:
    axis.set_major_formatter(PercentFormatter(1, decimals=0))


def logit_axis(ax: Axes, side: Literal["x", "y"], low: float, high: float) -> None:
    """Drop rates as ticks of an axis of log(p/(1-p)) from `low` to `high`."""
    shown = [p for p in RATE_TICKS if low <= logit(p) <= high]
    ax.set(**{f"{side}lim": (low, high), f"{side}ticks": [logit(p) for p in shown]})
    ax.set(**{f"{side}ticklabels": [f"{p:g}" for p in shown]})


def step_axis(ax: Axes, steps: pd.Series) -> None:
    """Steps of continual pre-training, each named, on a log axis."""
    ax.set(xscale="log", xlabel="steps of continual pre-training")
    named = sorted(steps.unique())
    ax.set_xticks(named, [f"{each:g}" for each in named])
    ax.minorticks_off()


def metric_axis(ax: Axes, side: Literal["x", "y"], curve: pd.DataFrame) -> None:
    """A metric's name, in percent if it is a share of items, on a log axis if it is a perplexity."""
    name = str(curve["metric"].iloc[0])
    ax.set(**{f"{side}label": "accuracy (exact match)" if name == "accuracy" else name})
    if is_share(curve):
        percent_axis(ax.xaxis if side == "x" else ax.yaxis)
    elif metric_of(curve) is PERPLEXITY:
        ax.set(**{f"{side}scale": "log"})


def is_share(curve: pd.DataFrame) -> bool:
    """Whether a metric is a share of items, such as an accuracy: nothing of it lies outside 0 to 1."""
    inside = bool(curve["low"].min() >= 0 and curve["high"].max() <= 1)
    return inside and metric_of(curve) is MEAN


def band(ax: Axes, x: pd.Series, line: pd.DataFrame, colour: str, style: str = "o-", **look: Any) -> None:
    """A line of `value` over the band from `low` to `high`."""
    ax.plot(x, line["value"], style, **{"color": colour, "ms": 4, "lw": 1.6, "zorder": 3, **look})
    ax.fill_between(x, line["low"], line["high"], color=colour, alpha=0.18, lw=0, zorder=2)


def spread(value: pd.Series, low: pd.Series, high: pd.Series) -> list[pd.Series]:
    """How far an interval reaches below and above its value, as error bars take it; never beyond the value."""
    return [(value - low).clip(lower=0), (high - value).clip(lower=0)]


def dot_rows(
    ax: Axes,
    table: pd.DataFrame,
    value: str,
    names: Sequence[str],
    palette: Mapping[str, str],
    by: str,
    hollow: Collection[int] = (),
) -> None:
    """A dot with its interval in each row, the first at the top, in the colour of what stands in column `by`."""
    places = range(len(table))[::-1]
    for i, (place, (_, row)) in enumerate(zip(places, table.iterrows(), strict=True)):
        colour = palette[row[by]]
        ax.plot([row["low"], row["high"]], [place, place], color=colour, lw=1.6)
        face = "white" if i in hollow else colour
        ax.plot(row[value], place, "o", color=colour, ms=5, mfc=face, zorder=3)
    ax.set_yticks(places, names)
    ax.set_ylim(-0.6, len(table) - 0.4)


def name_point(ax: Axes, text: str, at: tuple[float, float], away: tuple[float, float], **look: Any) -> None:
    """A text at some points from a place."""
    ax.annotate(text, at, xytext=away, textcoords="offset points", **look)
