"""Figures of how large a delta is, by the artists they draw: data, labels and colours, not pixels."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import delta_analysis as da
from delta_analysis import plots
from delta_analysis.checkpoints.names import NO_LAYER
from delta_analysis.deltas import magnitude_histogram


@pytest.fixture
def ranges() -> pd.DataFrame:
    delta = da.load_delta(base="zoo:small/base", finetuned="zoo:small/math")
    return da.value_ranges(delta)


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
    histogram = magnitude_histogram(delta).assign(pair="a → b")
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
