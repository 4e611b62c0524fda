"""The look of the figures."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from delta_analysis import plots
from delta_analysis.plots.style import is_share, metric_axis, readable_on


def test_names_keep_their_colour_in_order_of_appearance() -> None:
    assert plots.colours(["x", "y", "x"]) == {"x": plots.PALETTE[0], "y": plots.PALETTE[1]}


def test_plotting_leaves_the_global_style_alone(curve: pd.DataFrame) -> None:
    before = dict(plt.rcParams)
    plots.drop_curves(curve)
    assert dict(plt.rcParams) == before


def test_methods_have_one_colour_everywhere() -> None:
    colours = plots.method_colours(["MP", "DARE", "MAGPRUNE by tensor", "MAGPRUNE, half window", "other"])
    assert colours["DARE"] == plots.METHOD_COLOURS["DARE"]
    assert colours["MAGPRUNE by tensor"] == colours["MAGPRUNE, half window"] == plots.METHOD_COLOURS["MAGPRUNE"]
    assert len(set(plots.METHOD_COLOURS.values())) == len(plots.METHOD_COLOURS)
    assert colours["other"] not in plots.METHOD_COLOURS.values()


@pytest.mark.parametrize(("face", "text"), [("#000000", "white"), ("#ffffff", "black"), ("#F0E442", "black")])
def test_text_is_readable_on_its_ground(face: str, text: str) -> None:
    assert readable_on(face) == text


@pytest.mark.parametrize(
    ("kind", "low", "high", "expected"),
    [
        ("score", 0.0, 1.0, True),
        ("score", -0.1, 0.9, False),
        ("score", 0.0, 1.2, False),
        ("error", 0.3, 0.9, False),
        ("perplexity", 0.3, 0.9, False),
    ],
)
def test_a_share_is_a_mean_between_nothing_and_all(kind: str, low: float, high: float, expected: bool) -> None:
    rows = [{"kind": kind, "low": 0.5, "value": 0.6, "high": 0.7}, {"kind": kind, "low": low, "high": high}]
    assert is_share(pd.DataFrame(rows)) is expected


def test_accuracy_says_of_what() -> None:
    for side, metric, expected in (("x", "accuracy", "accuracy (exact match)"), ("y", "kl", "kl")):
        ax = plt.figure().subplots()
        metric_axis(ax, side, pd.DataFrame({"metric": [metric], "kind": ["score"], "low": [0.1], "high": [0.9]}))
        assert (ax.get_xlabel() if side == "x" else ax.get_ylabel()) == expected
