"""Figures of merges, by the artists they draw: data, labels and colours, not pixels."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.lines import Line2D
from matplotlib.text import Annotation

import delta_analysis as da
from delta_analysis import plots
from delta_analysis.checkpoints.names import NO_LAYER

RATES = (0.0, 0.5, 0.9)
WAYS = ("task arithmetic", "TIES", "average")


def with_ends(rows: list[dict[str, object]]) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    return table.assign(low=table["value"] - 0.1, high=table["value"] + 0.05)


@pytest.fixture
def scores() -> pd.DataFrame:
    return with_ends(
        [
            {"way": way, "drop_rate": rate, "task": "mean", "value": 0.3 + 0.1 * i - 0.1 * rate}
            for i, way in enumerate(WAYS)
            for rate in RATES
            if (way, rate) != ("average", 0.5)
        ]
    )


@pytest.fixture
def trail() -> pd.DataFrame:
    ways = (
        "before merging",
        "TIES, sum",
        "fine-tuned afterwards",
        "slack 1",
        "TIES, sum, scaled",
        "DELLA, no election",
        "TIES",
    )
    return with_ends(
        [
            {"way": way, "steps": steps, "value": 0.2 + 0.05 * i + steps / 10000}
            for i, way in enumerate(ways)
            for steps in (4000, 100, 640)
        ]
    )


def bars(ax: Axes) -> dict[str, ErrorbarContainer]:
    """Points with intervals, by their label."""
    return {str(each.get_label()): each for each in ax.containers if isinstance(each, ErrorbarContainer)}


def ends(container: ErrorbarContainer) -> np.ndarray:
    """Both ends of each interval: (points, ends, axes)."""
    (lines,) = container.lines[2]
    return np.array(lines.get_segments(), dtype=float)


def lines_of(ax: Axes) -> dict[str, Line2D]:
    return {str(line.get_label()): line for line in ax.get_lines() if not str(line.get_label()).startswith("_")}


def points(line: Line2D) -> np.ndarray:
    return np.column_stack([line.get_xdata(), line.get_ydata()]).astype(float)


def test_dots_stand_in_the_row_of_their_method(scores: pd.DataFrame) -> None:
    _, ax = plt.subplots()
    assert plots.merge_dots(scores, {}, ax=ax) is ax
    assert [label.get_text() for label in ax.get_yticklabels()] == list(WAYS)
    found = bars(ax)
    assert list(found) == ["nothing dropped", "p = 0.5", "p = 0.9"]
    for shift, rate, dots in zip((-0.2, 0, 0.2), RATES, found.values(), strict=True):
        here = scores[scores["drop_rate"] == rate]
        rows = [WAYS.index(way) + shift for way in here["way"]]
        np.testing.assert_allclose(points(dots.lines[0]), np.column_stack([here["value"], rows]))
        np.testing.assert_allclose(ends(dots)[:, :, 0], here[["low", "high"]])
    # Read from above, and a shade a drop rate; what is whole is grey.
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    shades = [dots.lines[0].get_color() for dots in found.values()]
    assert shades[0] == plots.GREY
    assert len(set(shades)) == len(RATES)
    assert ax.get_legend() is not None


def test_reference_lines_are_drawn_where_they_belong(scores: pd.DataFrame) -> None:
    ax = plots.merge_dots(scores, {"base": 0.1, "each its own task": 0.9, "near it": 0.88})
    drawn = {float(points(line)[0, 0]) for line in ax.get_lines() if line.get_linestyle() == "--"}
    assert drawn == {0.1, 0.9, 0.88}
    labels = {text.get_text(): text.xy for text in ax.texts if isinstance(text, Annotation)}
    assert {name: place[0] for name, place in labels.items()} == {
        "base": 0.1,
        "each its own task": 0.9,
        "near it": 0.88,
    }
    # Neighbours are written on two heights.
    assert labels["near it"][1] != labels["each its own task"][1]


def test_dots_of_a_single_drop_rate(scores: pd.DataFrame) -> None:
    for rate in (0.0, 0.9):
        ax = plots.merge_dots(scores[scores["drop_rate"] == rate], {"base": 0.2}, ax=plt.figure().subplots())
        assert len(bars(ax)) == 1
        assert ax.get_legend() is not None


def test_curves_have_a_line_a_task() -> None:
    tasks = [f"task {i}" for i in range(9)]
    scores = with_ends(
        [
            {"task": task, "drop_rate": rate, "value": 0.5 + 0.01 * i - 0.1 * rate}
            for i, task in enumerate(tasks)
            for rate in (0.9, 0, 0.5)
        ]
    )
    found = bars(plots.merge_curves(scores))
    # As many as there are, also beyond the palette.
    assert list(found) == tasks
    for task, curve in found.items():
        line = scores[scores["task"] == task].sort_values("drop_rate")
        np.testing.assert_allclose(points(curve.lines[0]), line[["drop_rate", "value"]])
        np.testing.assert_allclose(ends(curve)[:, :, 1], line[["low", "high"]])
    assert [found[task].lines[0].get_color() for task in tasks[:3]] == list(plots.PALETTE[:3])


def test_along_the_trail_lines_are_in_order_with_bands(trail: pd.DataFrame) -> None:
    _, ax = plt.subplots()
    assert plots.along_trail(trail, ax=ax) is ax
    found = lines_of(ax)
    assert list(found) == list(dict.fromkeys(trail["way"]))
    bands = [each for each in ax.collections if isinstance(each, PolyCollection)]
    for (way, line), band in zip(found.items(), bands, strict=True):
        own = trail[trail["way"] == way].sort_values("steps")
        np.testing.assert_allclose(points(line), own[["steps", "value"]])
        corners = np.array(band.get_paths()[0].vertices)
        assert corners[:, 1].min() == pytest.approx(own["low"].min())
        assert corners[:, 1].max() == pytest.approx(own["high"].max())
        np.testing.assert_allclose(np.array(band.get_facecolor())[0, :3], mpl.colors.to_rgb(str(line.get_color())))
    assert ax.get_xscale() == "log"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["100", "640", "4000"]
    assert ax.get_xticks(minor=True).size == 0


def test_a_way_has_the_colour_of_the_longest_name_it_begins_with(trail: pd.DataFrame) -> None:
    colours = {way: line.get_color() for way, line in lines_of(plots.along_trail(trail)).items()}
    named = plots.MERGE_COLOURS
    assert colours["TIES"] == named["TIES"]
    assert colours["TIES, sum"] == colours["TIES, sum, scaled"] == named["TIES, sum"]
    assert colours["slack 1"] == named["slack"]
    assert colours["DELLA, no election"] == named["DELLA"]
    assert colours["before merging"] == named["before merging"]
    assert len(set(named.values())) == len(named)
    # Whatever other ways there are, and in another figure.
    alone = plots.along_trail(trail[trail["way"] == "TIES, sum"], ax=plt.figure().subplots())
    assert lines_of(alone)["TIES, sum"].get_color() == colours["TIES, sum"]
    styles = {
        way: line.get_linestyle()
        for way, line in lines_of(plots.along_trail(trail, ax=plt.figure().subplots())).items()
    }
    assert {way for way, style in styles.items() if style == "--"} == {"before merging", "fine-tuned afterwards"}


def test_null_models_are_told_from_what_was_measured() -> None:
    ways = ("not trimmed", "null, permuted", "null, normal", "slack 1")
    rates = pd.DataFrame(
        [{"way": way, "steps": steps, "discarded": 0.1 * (i + 1)} for i, way in enumerate(ways) for steps in (640, 100)]
    )
    found = lines_of(plots.discards_along_trail(rates))
    assert list(found) == list(ways)
    for way, line in found.items():
        own = rates[rates["way"] == way].sort_values("steps")
        np.testing.assert_allclose(points(line), own[["steps", "discarded"]])
        assert (line.get_color() == plots.GREY) == way.startswith("null")
        assert (line.get_linestyle() == "-") != way.startswith("null")
    assert found["not trimmed"].get_color() != found["slack 1"].get_color()
    assert found["null, permuted"].get_linestyle() != found["null, normal"].get_linestyle()


def test_interference_is_drawn_by_layer() -> None:
    rows = [
        {"way": way, "layer": layer, "conflicts": share * (2 + layer), "cosine": 0.5}
        for way, share in (("whole", 0.1), ("DARE", 0.001))
        for layer in (1, NO_LAYER, 0)
    ]
    table = pd.DataFrame(rows).astype({"layer": "Int64"})
    ax = plots.conflicts_by_layer(table)
    found = lines_of(ax)
    assert list(found) == ["whole", "DARE"]
    for (_, line), share, colour in zip(found.items(), (0.1, 0.001), plots.PALETTE, strict=False):
        np.testing.assert_allclose(points(line), [[-1, share], [0, 2 * share], [1, 3 * share]])
        assert line.get_color() == colour
    assert ax.get_yscale() == "log"
    assert ax.get_ylim()[0] < 0.001
    other = lines_of(plots.conflicts_by_layer(table, column="cosine", ax=plt.figure().subplots()))
    assert set(points(other["DARE"])[:, 1]) == {0.5}


@pytest.mark.parametrize("shares", [[0.0, 0.1, 0.01], [0.0, 0.0, 0.0], [np.nan, 0.2, 0.0]], ids=str)
def test_layers_without_a_conflict_leave_the_log_axis_whole(shares: list[float]) -> None:
    table = pd.DataFrame({"way": "DARE", "layer": [0, 1, 2], "conflicts": shares})
    ax = plots.conflicts_by_layer(table)
    ax.figure.canvas.draw()
    low, high = ax.get_ylim()
    positive = [share for share in shares if share > 0]
    assert 0 < low < min([1.0, *positive]) and high > 1


def test_of_real_deltas() -> None:
    deltas = {name: da.load_delta(base="zoo:tiny/base", finetuned=f"zoo:tiny/{name}") for name in ("instruct", "math")}
    ways = {"whole": deltas, "DARE": {name: delta.pruned(da.Dare(0.99), seed=0) for name, delta in deltas.items()}}
    table = pd.concat([da.merging.interference(each, by="layer").assign(way=way) for way, each in ways.items()])
    ax = plots.conflicts_by_layer(table)
    ax.figure.canvas.draw()
    whole, dropped = lines_of(ax).values()
    assert len(points(whole)) == len(points(dropped)) == 5
    assert np.all(points(dropped)[:, 1] < points(whole)[:, 1])
