"""The look of the figures."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from delta_analysis import plots
from delta_analysis.plots.style import readable_on


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
