"""How figures look: colours, axes, legends."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from delta_analysis.sweeps import MEAN, metric_of

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


def is_share(curve: pd.DataFrame) -> bool:
    """Whether a metric is a share of items, such as an accuracy: nothing of it lies outside 0 to 1."""
    inside = bool(curve["low"].min() >= 0 and curve["high"].max() <= 1)
    return inside and metric_of(curve) is MEAN


def metric_label(curve: pd.DataFrame) -> str:
    """A metric as an axis names it."""
    name = str(curve["metric"].iloc[0])
    return "accuracy (exact match)" if name == "accuracy" else name
