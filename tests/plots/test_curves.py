"""Figures of a metric against something, by the artists they draw: data, labels and colours, not pixels."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from delta_analysis import plots
from delta_analysis.sweeps.intervals import logit


def test_drop_curves_draw_lines_bands_and_both_ends(curve: pd.DataFrame) -> None:
    _, ax = plt.subplots()
    assert plots.drop_curves(curve, ax=ax) is ax
    lines = _labelled(ax)
    assert list(lines) == ["a → b", "c → d"]
    np.testing.assert_allclose(lines["a → b"].get_xdata(), [logit(p) for p in (0.1, 0.5, 0.9)])
    np.testing.assert_allclose(lines["c → d"].get_ydata(), [0.7, 0.2, 0.0])
    assert len(ax.collections) == 2
    ends = [line for line in ax.get_lines() if line.get_marker() == "D"]
    # The untouched model stands left of all, and the base right.
    assert [float(line.get_ydata()[0]) for line in ends] == [1, 0.1, 1, 0]
    assert [float(line.get_xdata()[0]) for line in ends] == [logit(0.1) - 0.8, logit(0.9) + 0.8] * 2
    assert "drop rate" in ax.get_xlabel()
    assert "accuracy" in ax.get_ylabel()
    assert ax.get_legend() is not None


def test_perplexity_is_drawn_on_a_log_axis(curve: pd.DataFrame) -> None:
    curve = curve.assign(
        metric="perplexity", kind="perplexity", value=curve["value"] + 2, low=curve["low"] + 2, high=curve["high"] + 2
    )
    ax = plots.drop_curves(curve)
    assert ax.get_yscale() == "log"
    assert ax.get_ylabel() == "perplexity"


def test_what_is_no_share_of_items_is_drawn_as_it_is(curve: pd.DataFrame) -> None:
    longer = {column: 40 * curve[column] for column in ("value", "low", "high")}
    ax = plots.drop_curves(curve.assign(metric="task/length", **longer))
    assert ax.get_yscale() == "linear"
    assert ax.get_ylabel() == "task/length"
    assert ax.get_ylim()[1] > 40


def test_ends_of_method_curves_belong_to_no_method(curve: pd.DataFrame) -> None:
    one = curve[curve["pair"] == "a → b"]
    ax = plots.drop_curves(one, hue="method", palette=plots.METHOD_COLOURS)
    ends = [line for line in ax.get_lines() if line.get_marker() == "D"]
    assert {line.get_color() for line in ends} == {plots.GREY}


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


def test_named_lines_are_dashed_and_the_others_are_not(curve: pd.DataFrame) -> None:
    ax = plots.drop_curves(curve, dashed=["c → d"])
    assert {name: line.get_linestyle() for name, line in _labelled(ax).items()} == {"a → b": "-", "c → d": "--"}
    legend = ax.get_legend()
    assert legend is not None
    assert [handle.get_linestyle() for handle in legend.get_lines()] == ["-", "--"]


@pytest.fixture
def layers() -> pd.DataFrame:
    rows = [
        {"method": method, "layer": layer, "value": v, "low": v - 0.02, "high": v + 0.01}
        for method, values in {"DARE": (1.0, 0.97, 0.9), "drop only": (1.0, 0.99, 0.98)}.items()
        for layer, v in reversed(list(enumerate(values)))
    ]
    return pd.DataFrame(rows)


def test_similarity_is_drawn_by_layer_in_the_colours_of_the_methods(layers: pd.DataFrame) -> None:
    ax = plots.similarity_by_layer(layers)
    lines = _labelled(ax)
    assert list(lines) == ["DARE", "drop only"]
    for method, values in {"DARE": [1.0, 0.97, 0.9], "drop only": [1.0, 0.99, 0.98]}.items():
        np.testing.assert_array_equal(lines[method].get_xdata(), [0, 1, 2])
        np.testing.assert_array_equal(lines[method].get_ydata(), values)
        assert lines[method].get_color() == plots.METHOD_COLOURS[method]
    low, high = _band(ax, 0)
    np.testing.assert_allclose(low, [0.98, 0.95, 0.88])
    np.testing.assert_allclose(high, [1.01, 0.98, 0.91])
    (reference,) = [line for line in ax.get_lines() if line.get_linestyle() == "--"]
    assert list(reference.get_ydata()) == [1, 1]
    assert all(float(tick).is_integer() for tick in ax.get_xticks())
    assert "layer" in ax.get_xlabel()


@pytest.fixture
def factors() -> pd.DataFrame:
    rows = [
        {"drop_rate": p, "factor": (1 / (1 - p)) ** share, "value": v, "low": v - 0.1, "high": v + 0.1}
        for p, values in {0.9: (0.2, 0.5, 0.4), 0.5: (0.8, 0.9, 1.0)}.items()
        for share, v in zip((0, 0.5, 1), values, strict=True)
    ]
    return pd.DataFrame(rows)


def test_factors_run_from_drop_only_to_dare_whatever_the_drop_rate(factors: pd.DataFrame) -> None:
    chosen = pd.DataFrame(
        [
            {"drop_rate": 0.9, "chosen_by": "labels", "factor": 10**0.5},
            {"drop_rate": 0.9, "chosen_by": "no labels", "factor": 10.0},
        ]
    )
    ax = plots.factor_curves(factors, chosen)
    lines = _labelled(ax)
    assert list(lines) == ["p = 0.5", "p = 0.9"]
    for name, values in {"p = 0.5": [0.8, 0.9, 1.0], "p = 0.9": [0.2, 0.5, 0.4]}.items():
        np.testing.assert_allclose(lines[name].get_xdata(), [0, 0.5, 1], atol=1e-12)
        np.testing.assert_array_equal(lines[name].get_ydata(), values)
    marks = {line.get_marker(): line for line in ax.get_lines() if line.get_marker() in ("^", "v")}
    (below,), (above,) = (np.atleast_1d(marks[marker].get_ydata()) for marker in ("^", "v"))
    assert below < 0.5
    assert above > 0.4
    np.testing.assert_allclose([np.atleast_1d(marks[m].get_xdata())[0] for m in ("^", "v")], [0.5, 1])
    assert {line.get_color() for line in marks.values()} == {lines["p = 0.9"].get_color()}
    assert [tick.get_text().split("\n")[0] for tick in ax.get_xticklabels()] == ["1", "1/√(1 − p)", "1/(1 − p)"]


@pytest.fixture
def tolerances() -> pd.DataFrame:
    rows = [
        {"relation": relation, "parameters": n, "tolerated": p, "low": p - 0.05, "high": p + 0.01}
        for relation, found in {"a → b": {800_000: 0.9, 200_000: 0.6}, "c → d": {800_000: 0.3, 200_000: 0.2}}.items()
        for n, p in found.items()
    ]
    return pd.DataFrame(rows)


def test_tolerance_grows_with_size_on_the_scale_of_the_search(tolerances: pd.DataFrame) -> None:
    ax = plots.tolerance_by_size(tolerances)
    handles, labels = ax.get_legend_handles_labels()
    assert labels == ["a → b", "c → d"]
    for handle, rates in zip(handles, ([0.6, 0.9], [0.2, 0.3]), strict=True):
        line, _, (bars,) = handle
        np.testing.assert_allclose(line.get_ydata(orig=False), [logit(p) for p in rates])
        # Beside each other, but by less than would be taken for another size.
        np.testing.assert_allclose(line.get_xdata(orig=False), [200_000, 800_000], rtol=0.05)
        ends = [(segment[0, 1], segment[1, 1]) for segment in bars.get_segments()]
        np.testing.assert_allclose(ends, [(logit(p - 0.05), logit(p + 0.01)) for p in rates])
    assert ax.get_xscale() == "log"
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0.2M", "0.8M"]
    shown = dict(zip([tick.get_text() for tick in ax.get_yticklabels()], ax.get_yticks(), strict=True))
    assert shown["0.5"] == pytest.approx(0)
    assert ax.get_ylim()[0] < logit(0.15) < logit(0.91) < ax.get_ylim()[1]


def test_sizes_of_billions_are_written_as_such(tolerances: pd.DataFrame) -> None:
    ax = plots.tolerance_by_size(tolerances.assign(parameters=tolerances["parameters"] * 35_000))
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["7B", "28B"]


@pytest.mark.parametrize("figure", ["drop", "similarity", "factor", "tolerance"])
def test_the_legend_stands_below_the_axes_and_their_label(
    figure: str, curve: pd.DataFrame, layers: pd.DataFrame, factors: pd.DataFrame, tolerances: pd.DataFrame
) -> None:
    with plt.rc_context():
        plots.set_style()
        for height in (2.5, 5):
            canvas, ax = plt.subplots(figsize=(7, height))
            if figure == "drop":
                plots.drop_curves(curve, ax=ax)
            elif figure == "similarity":
                plots.similarity_by_layer(layers, ax=ax)
            elif figure == "factor":
                plots.factor_curves(factors, pd.DataFrame(columns=["drop_rate", "chosen_by", "factor"]), ax=ax)
            else:
                plots.tolerance_by_size(tolerances, ax=ax)
            canvas.draw_without_rendering()
            legend = ax.get_legend()
            assert legend is not None
            assert legend.get_window_extent().y1 <= ax.xaxis.label.get_window_extent().y0


def _labelled(ax: Axes) -> dict[str, Line2D]:
    """The lines that the legend names."""
    return {str(line.get_label()): line for line in ax.get_lines() if not str(line.get_label()).startswith("_")}


def _band(ax: Axes, which: int) -> tuple[list[float], list[float]]:
    """The lower and the upper edge of a band, by x."""
    points = ax.collections[which].get_paths()[0].vertices
    xs = sorted(set(points[:, 0]))
    edges = [[float(limit(points[points[:, 0] == x, 1])) for x in xs] for limit in (np.min, np.max)]
    return edges[0], edges[1]
