"""Plots are tested by the artists they draw: data, labels and colours, not pixels."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import delta_analysis as da
from delta_analysis import plots
from delta_analysis.names import NO_LAYER
from delta_analysis.tolerance import logit

RATES = (0.0, 0.1, 0.5, 0.9, 1.0)


@pytest.fixture
def curve() -> pd.DataFrame:
    rows = [
        {"pair": pair, "method": "DARE", "metric": "accuracy", "drop_rate": p, "value": v, "low": v - 0.05, "high": v}
        for pair, values in {"a → b": (1, 0.9, 0.8, 0.5, 0.1), "c → d": (1, 0.7, 0.2, 0.0, 0.0)}.items()
        for p, v in zip(RATES, values, strict=True)
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def ranges() -> pd.DataFrame:
    delta = da.load_delta(base="zoo:small/base", finetuned="zoo:small/math")
    return da.value_ranges(delta)


def test_drop_curves_draw_lines_bands_and_both_ends(curve: pd.DataFrame) -> None:
    _, ax = plt.subplots()
    assert plots.drop_curves(curve, ax=ax) is ax
    lines = {line.get_label(): line for line in ax.get_lines() if not str(line.get_label()).startswith("_")}
    assert list(lines) == ["a → b", "c → d"]
    np.testing.assert_allclose(lines["a → b"].get_xdata(), [logit(p) for p in (0.1, 0.5, 0.9)])
    np.testing.assert_allclose(lines["c → d"].get_ydata(), [0.7, 0.2, 0.0])
    assert len(ax.collections) == 2
    ends = [line for line in ax.get_lines() if line.get_marker() == "D"]
    assert [float(line.get_ydata()[0]) for line in ends] == [1, 0.1, 1, 0]
    assert "drop rate" in ax.get_xlabel()
    assert "accuracy" in ax.get_ylabel()
    assert ax.get_legend() is not None


def test_names_keep_their_colour_in_order_of_appearance() -> None:
    assert plots.colours(["x", "y", "x"]) == {"x": plots.PALETTE[0], "y": plots.PALETTE[1]}


def test_perplexity_is_drawn_on_a_log_axis(curve: pd.DataFrame) -> None:
    curve = curve.assign(metric="perplexity", value=curve["value"] + 2, low=curve["low"] + 2, high=curve["high"] + 2)
    ax = plots.drop_curves(curve)
    assert ax.get_yscale() == "log"
    assert ax.get_ylabel() == "perplexity"


def test_the_tolerated_rate_is_marked_with_its_interval(curve: pd.DataFrame) -> None:
    tolerance = pd.Series({"tolerated": 0.5, "low": 0.4, "high": 0.6})
    _, ax = plt.subplots()
    before = len(ax.get_lines())
    plots.mark_tolerated(tolerance, ax=ax)
    assert ax.get_lines()[before].get_xdata()[0] == pytest.approx(0.0)
    span = ax.patches[0].get_extents().transformed(ax.transData.inverted())
    assert (span.x0, span.x1) == (pytest.approx(logit(0.4)), pytest.approx(logit(0.6)))


def test_reference_lines_stand_at_the_untouched_model_and_the_base(curve: pd.DataFrame) -> None:
    _, ax = plt.subplots()
    plots.reference_lines(curve[curve["pair"] == "a → b"], ax=ax)
    assert [float(line.get_ydata()[0]) for line in ax.get_lines()] == [1.0, 0.1]
    assert [text.get_text() for text in ax.texts] == ["untouched model", "all dropped (p = 1)"]


def test_magnitude_quantiles_show_every_pair_and_reference(ranges: pd.DataFrame) -> None:
    table = pd.concat([ranges.head(1).assign(pair="a → b"), ranges.tail(1).assign(pair="c → d")])
    ax = plots.magnitude_quantiles(table)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a → b", "c → d"]
    assert ax.get_xscale() == "log"
    assert {"0.002", "0.005", "0.01", "0.03"} <= {text.get_text() for text in ax.texts}
    drawn = {float(x) for line in ax.get_lines() for x in np.atleast_1d(line.get_xdata())}
    assert {float(table["abs_p50"].iloc[0]), float(table["abs_max"].iloc[1])} <= drawn


def test_histograms_are_outlines_of_the_table() -> None:
    delta = da.load_delta(base="zoo:small/base", finetuned="zoo:small/math")
    histogram = da.magnitude_histogram(delta).assign(pair="a → b")
    ax = plots.magnitude_histograms(histogram)
    outline = ax.patches[0]
    np.testing.assert_allclose(outline.get_data().values, histogram["density"])
    np.testing.assert_allclose(outline.get_data().edges[:-1], histogram["low"])


def test_the_heat_map_has_a_cell_for_each_layer_and_module(ranges: pd.DataFrame) -> None:
    ax = plots.layer_heatmap(ranges)
    columns = [tick.get_text() for tick in ax.get_xticklabels()]
    assert columns == ["outside", "0", "1", "2", "3"]
    values = ax.collections[0].get_array()
    expected = ranges.loc[ranges["layer"] != NO_LAYER, "abs_p50"]
    assert np.ma.compressed(values).size == len(expected) + (ranges["layer"] == NO_LAYER).sum()
    assert float(values.max()) == pytest.approx(ranges["abs_p50"].max())


def test_the_heat_map_of_a_delta_of_zeros_is_drawn() -> None:
    zeros = da.value_ranges(da.load_delta(base="zoo:small/base", finetuned="zoo:small/base"))
    assert (zeros["abs_max"] == 0).all()
    assert len(plots.layer_heatmap(zeros).collections) == 1


def test_growth_is_drawn_against_steps(ranges: pd.DataFrame) -> None:
    trail = ranges.head(3).assign(step=[10, 100, 1000])
    ax = plots.trail_growth(trail)
    np.testing.assert_allclose(ax.get_lines()[0].get_xdata(), [10, 100, 1000])
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), trail["abs_p50"])
    assert ax.get_xscale() == ax.get_yscale() == "log"


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


def test_ends_of_method_curves_belong_to_no_method(curve: pd.DataFrame) -> None:
    one = curve[curve["pair"] == "a → b"]
    ax = plots.drop_curves(one, hue="method", palette=plots.METHOD_COLOURS)
    ends = [line for line in ax.get_lines() if line.get_marker() == "D"]
    assert {line.get_color() for line in ends} == {plots.GREY}


def test_dots_stand_from_the_top_with_their_intervals(curve: pd.DataFrame) -> None:
    table = curve.head(3).assign(method=["DARE", "MAGPRUNE", "MAGPRUNE by value"])
    ax = plots.method_dots(table)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == table["method"].tolist()
    bars, dots = ax.get_lines()[::2], ax.get_lines()[1::2]
    assert [dot.get_ydata()[0] for dot in dots] == [2, 1, 0]
    assert [dot.get_xdata()[0] for dot in dots] == table["value"].tolist()
    assert [tuple(bar.get_xdata()) for bar in bars] == list(zip(table["low"], table["high"], strict=True))
    assert dots[1].get_color() == dots[2].get_color() == plots.METHOD_COLOURS["MAGPRUNE"]


def test_damage_is_drawn_with_a_label_for_each_method() -> None:
    summary = pd.DataFrame(
        {
            "method": ["DARE", "MP"],
            "parameter_error": [9.0, 0.5],
            "drift": [0.01, 0.03],
            "low": [0.005, 0.02],
            "high": [0.02, 0.04],
        }
    )
    ax = plots.damage_scatter(summary)
    dots = {
        line.get_color(): (line.get_xdata()[0], line.get_ydata()[0])
        for line in ax.get_lines()
        if line.get_marker() == "o"
    }
    assert dots == {plots.METHOD_COLOURS["DARE"]: (9.0, 0.01), plots.METHOD_COLOURS["MP"]: (0.5, 0.03)}
    assert {text.get_text(): text.get_color() for text in ax.texts} == {
        "DARE": plots.METHOD_COLOURS["DARE"],
        "MP": plots.METHOD_COLOURS["MP"],
    }
    assert ax.get_xscale() == ax.get_yscale() == "log"


def test_the_map_names_clear_winners_only() -> None:
    best = pd.DataFrame(
        {
            "pair": ["a", "a", "b"],
            "drop_rate": [0.5, 0.9, 0.5],
            "method": ["DARE", "MP", "MP"],
            "lead": [0.2, 0.01, 0.4],
            "clear": [True, False, True],
        }
    )
    ax = plots.winner_map(best)
    assert [text.get_text() for text in ax.texts] == ["DARE\n+20", "no clear\nwinner", "MP\n+40"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["b", "a"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0.5", "0.9"]
    assert len({patch.get_facecolor() for patch in ax.patches}) == 3
