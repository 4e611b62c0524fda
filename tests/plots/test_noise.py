"""Figures of the noise in layers, by the artists they draw: data, labels and colours, not pixels."""

from __future__ import annotations

import math

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from delta_analysis import plots
from delta_analysis.checkpoints.names import NO_LAYER
from delta_analysis.sweeps.intervals import inverse_logit, logit

SHARES = {
    "a → b": [
        ("embed_tokens", NO_LAYER, "embedding", 0.01),
        ("q_proj", 0, "linear", 0.02),
        ("up_proj", 0, "linear", 0.04),
        ("up_proj", 1, "linear", 0.08),
        ("q_proj", 1, "linear", 0.5),
        ("input_layernorm", 1, "norm", 0.001),
        ("norm", NO_LAYER, "norm", 0.003),
        ("embed_tokens", NO_LAYER, "linear", 0.3),
    ],
    "c → d": [
        ("embed_tokens", NO_LAYER, "embedding", 0.9),
        ("q_proj", 0, "linear", 0.2),
        ("up_proj", 1, "linear", 0.4),
    ],
}


@pytest.fixture
def noise() -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"pair": pair, "module": module, "layer": layer, "kind": kind, "noise_share": share}
            for pair, rows in SHARES.items()
            for module, layer, kind, share in rows
        ]
    )


def labelled(ax: Axes) -> dict[str, Line2D]:
    """The lines that the legend names."""
    return {str(line.get_label()): line for line in ax.get_lines() if not str(line.get_label()).startswith("_")}


def test_noise_is_drawn_by_layer_with_the_rest_beside(noise: pd.DataFrame) -> None:
    _, ax = plt.subplots()
    assert plots.noise_by_layer(noise, ax=ax) is ax
    dots = [line for line in ax.get_lines() if line.get_marker() == "o"]
    for line, rows, shift in zip(dots, SHARES.values(), (-0.06, 0.06), strict=True):
        # Embeddings left of the layers; a last norm and a head (a tied embedding's second use) right of them.
        places = [layer if layer != NO_LAYER else -1 if kind == "embedding" else 2 for _, layer, kind, _ in rows]
        np.testing.assert_allclose(line.get_xdata(), np.array(places) + shift)
        np.testing.assert_allclose(line.get_ydata(), [share for *_, share in rows])
    assert ax.get_yscale() == "log"
    assert ax.get_xlabel() == "layer"
    assert "N" in ax.get_ylabel()


def test_the_line_is_the_median_of_the_linear_layers(noise: pd.DataFrame) -> None:
    lines = labelled(plots.noise_by_layer(noise))
    assert list(lines) == list(SHARES)
    np.testing.assert_allclose(lines["a → b"].get_ydata(), [0.03, 0.29])
    np.testing.assert_allclose(lines["c → d"].get_ydata(), [0.2, 0.4])
    assert lines["a → b"].get_color() != lines["c → d"].get_color()


def test_the_noisiest_of_each_pair_is_named_in_its_colour(noise: pd.DataFrame) -> None:
    ax = plots.noise_by_layer(noise)
    lines = labelled(ax)
    first, second = ax.texts
    assert (first.get_text(), second.get_text()) == ("q_proj", "embed_tokens")
    assert [text.get_color() for text in (first, second)] == [line.get_color() for line in lines.values()]
    np.testing.assert_allclose([first.xy, second.xy], [(1 - 0.06, 0.5), (-1 + 0.06, 0.9)])
    # What stands at the right end is written to the left.
    right = plots.noise_by_layer(noise[noise["noise_share"].isin([0.02, 0.3])], ax=plt.figure().subplots())
    assert (right.texts[0].get_ha(), second.get_ha()) == ("right", "left")


def test_places_outside_the_layers_have_names(noise: pd.DataFrame) -> None:
    ax = plots.noise_by_layer(noise)
    names = ax.xaxis.get_major_formatter()
    assert [names(at, 0) for at in (-2, -1, 0, 1, 2, 3)] == ["", "embed", "0", "1", "after", ""]


def test_a_use_of_unknown_noise_is_not_named(noise: pd.DataFrame) -> None:
    spoilt = noise.assign(noise_share=noise["noise_share"].where(noise["noise_share"] != 0.5))
    assert plots.noise_by_layer(spoilt).texts[0].get_text() == "embed_tokens"


@pytest.fixture
def foretold() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "group": ["small", "small", "trail"],
            "kind": ["SFT", "CPT", "CPT"],
            "foretold": [2.0, -1.0, 0.5],
            "tolerated": [0.9, 0.3, 0.6],
            "low": [0.85, 0.2, 0.6],
            # One interval leaves its own value out.
            "high": [0.95, 0.29, 0.7],
        }
    )


def test_measured_stands_against_foretold_on_one_scale(foretold: pd.DataFrame) -> None:
    _, ax = plt.subplots()
    assert plots.foretold_scatter(foretold, ax=ax) is ax
    handles, labels = ax.get_legend_handles_labels()
    assert labels == ["small", "trail"]
    for handle, name in zip(handles, labels, strict=True):
        group = foretold[foretold["group"] == name]
        line, _, (bars,) = handle
        np.testing.assert_allclose(line.get_xdata(orig=False), group["foretold"])
        np.testing.assert_allclose(line.get_ydata(orig=False), group["tolerated"].map(logit))
        ends = [(segment[0, 1], segment[1, 1]) for segment in bars.get_segments()]
        high = np.maximum(group["high"], group["tolerated"])
        np.testing.assert_allclose(ends, list(zip(group["low"].map(logit), high.map(logit), strict=True)))
    assert "foretold" in ax.get_xlabel() and "measured" in ax.get_ylabel()
    (diagonal,) = [line for line in ax.get_lines() if line.get_linestyle() == "--"]
    np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    assert (ax.get_xlim(), diagonal.get_color()) == ((-1.5, 2.5), plots.GREY)


def test_ticks_are_drop_rates(foretold: pd.DataFrame) -> None:
    ax = plots.foretold_scatter(foretold)
    for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        names = [tick.get_text() for tick in axis.get_ticklabels()]
        assert "0.5" in names
        for name, place in zip(names, axis.get_ticklocs(), strict=True):
            assert place == pytest.approx(logit(float(name)))
            assert low <= place <= high
    assert ax.get_ylim()[0] < logit(0.2) < logit(0.95) < ax.get_ylim()[1]


def test_any_column_may_be_the_hue(foretold: pd.DataFrame) -> None:
    assert plots.foretold_scatter(foretold, hue="kind").get_legend_handles_labels()[1] == ["SFT", "CPT"]


@pytest.fixture
def shifts() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "intervention": ["gaussian noise", "times 9", "signs redrawn"],
            "foretold": [0.0, 4.4, 0.0],
            "measured": [0.1, 4.0, -0.9],
            "low": [-0.2, 3.5, -1.5],
            "high": [0.4, 4.5, -0.3],
        }
    )


def test_interventions_stand_from_the_top_with_both_shifts(shifts: pd.DataFrame) -> None:
    _, ax = plt.subplots()
    assert plots.shift_rows(shifts, ax=ax) is ax
    assert [tick.get_text() for tick in ax.get_yticklabels()] == shifts["intervention"].tolist()
    assert ax.get_yticks().tolist() == [2, 1, 0]
    for marker, column in (("|", "foretold"), ("o", "measured")):
        marks = [line for line in ax.get_lines() if line.get_marker() == marker]
        assert [float(np.squeeze(line.get_xdata())) for line in marks] == shifts[column].tolist()
        assert [float(np.squeeze(line.get_ydata())) for line in marks] == [2, 1, 0]
    intervals = [line for line in ax.get_lines() if line.get_marker() == "None" and line.get_linestyle() == "-"]
    assert [tuple(line.get_xdata()) for line in intervals] == list(zip(shifts["low"], shifts["high"], strict=True))
    (nothing,) = [line for line in ax.get_lines() if line.get_linestyle() == ":"]
    assert list(nothing.get_xdata()) == [0, 0]
    assert list(labelled(ax)) == ["foretold", "measured, with 95%"]


def test_an_infinite_end_is_drawn_to_the_end_of_the_axis(shifts: pd.DataFrame) -> None:
    shifts.loc[1, ["measured", "high"]] = math.inf
    shifts.loc[2, "low"] = -math.inf
    ax = plots.shift_rows(shifts)
    # What is finite is between -0.9 and 4.4, and 1 is added on each side.
    assert ax.get_xlim() == (-1.9, 5.4)
    intervals = [line for line in ax.get_lines() if line.get_marker() == "None" and line.get_linestyle() == "-"]
    assert [tuple(line.get_xdata()) for line in intervals] == [(-0.2, 0.4), (3.5, 5.4), (-1.9, -0.3)]
    dots = [line for line in ax.get_lines() if line.get_marker() == "o"]
    assert [float(np.squeeze(line.get_xdata())) for line in dots] == [0.1, 5.4, -0.9]
    ax.figure.draw_without_rendering()


@pytest.fixture
def damage() -> pd.DataFrame:
    """Two curves of `drop_curve`, in no order, with the untouched model and with all dropped."""
    rates, noises = [0.9, 0.0, 0.5, 1.0, 0.1], {"a → b": 0.01, "c → d": 0.5}
    rows = [
        {"pair": pair, "metric": "accuracy", "drop_rate": p, "noise": p / (1 - p) * noise if p < 1 else math.inf}
        for pair, noise in noises.items()
        for p in rates
    ]
    table = pd.DataFrame(rows)
    value = 1 - 0.8 * table["drop_rate"]
    return table.assign(value=value, low=value - 0.1, high=(value + 0.1).clip(upper=1))


def test_damage_stands_against_the_noise_with_a_band(damage: pd.DataFrame) -> None:
    _, ax = plt.subplots()
    assert plots.metric_by_noise(damage, ax=ax) is ax
    lines = labelled(ax)
    assert list(lines) == ["a → b", "c → d"]
    bands = list(ax.collections)
    for (pair, line), band in zip(lines.items(), bands, strict=True):
        # The ends have no place on a scale of odds.
        own = damage[(damage["pair"] == pair) & damage["drop_rate"].isin([0.1, 0.5, 0.9])].sort_values("drop_rate")
        assert list(line.get_xdata()) == own["noise"].tolist()
        assert list(line.get_ydata()) == own["value"].tolist()
        assert (line.get_marker(), line.get_linestyle()) == ("o", "-")
        corners = {(x, y) for x, y in band.get_paths()[0].vertices.tolist()}
        for column in ("low", "high"):
            assert set(zip(own["noise"], own[column], strict=True)) <= corners
        np.testing.assert_allclose(band.get_facecolor()[0, :3], mpl.colors.to_rgb(line.get_color()))
    assert lines["a → b"].get_color() != lines["c → d"].get_color()
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear")
    assert "p / (1 − p)" in ax.get_xlabel()
    assert ax.get_ylabel() == "accuracy (exact match)"
    assert ax.get_ylim() == (-0.03, 1.03)
    assert ax.yaxis.get_major_formatter()(0.5, 0) == "50%"


def test_perplexities_by_noise_have_a_logarithmic_axis(damage: pd.DataFrame) -> None:
    table = damage.assign(metric="perplexity", kind="perplexity", value=damage["value"] + 3, high=damage["high"] + 4)
    ax = plots.metric_by_noise(table)
    assert (ax.get_yscale(), ax.get_ylabel()) == ("log", "perplexity")
    drift = plots.metric_by_noise(table.assign(metric="kl", kind="error"), ax=plt.figure().subplots())
    assert (drift.get_yscale(), drift.get_ylabel()) == ("linear", "kl")
    assert drift.get_ylim()[1] > 4


@pytest.fixture
def trail() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "label": ["step 10", "step 1000", "step 1001", "step 100"],
            "noise": [0.5, 0.001, 0.00101, 0.02],
            "tolerated": [0.2, 0.95, 0.96, 0.7],
            "low": [0.15, 0.93, 0.94, 0.6],
            "high": [0.25, 0.97, 0.98, 0.75],
        }
    )


def test_the_trail_is_in_order_of_its_noise(trail: pd.DataFrame) -> None:
    _, ax = plt.subplots()
    assert plots.trail_tolerance(trail, ax=ax) is ax
    ordered = trail.sort_values("noise")
    line = ax.get_lines()[0]
    # Bases apart from each other are not joined.
    assert (line.get_marker(), line.get_linestyle()) == ("o", "None")
    assert list(line.get_xdata()) == ordered["noise"].tolist()
    assert list(line.get_ydata()) == ordered["tolerated"].map(logit).tolist()
    (bars,) = [each for each in ax.collections if isinstance(each, mpl.collections.LineCollection)]
    ends = [(inverse_logit(segment[0, 1]), inverse_logit(segment[1, 1])) for segment in bars.get_segments()]
    np.testing.assert_allclose(ends, list(zip(ordered["low"], ordered["high"], strict=True)))
    assert ax.get_xscale() == "log"
    assert {"0.3", "0.9"} <= {tick.get_text() for tick in ax.get_yticklabels()}
    assert ax.get_ylim()[0] < logit(0.15) < logit(0.98) < ax.get_ylim()[1]


def test_of_bases_next_to_each_other_one_is_named(trail: pd.DataFrame) -> None:
    ax = plots.trail_tolerance(trail)
    assert [text.get_text() for text in ax.texts] == ["step 1000", "step 100", "step 10"]
    np.testing.assert_allclose(
        [text.xy for text in ax.texts], [(0.001, logit(0.95)), (0.02, logit(0.7)), (0.5, logit(0.2))]
    )


@pytest.fixture
def recoveries() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "way": ["proportional by model", "one factor", "one factor", "MP", "DARE"],
            "chosen_by": ["-", "labels", "no labels", "-", "-"],
            "kept": [0.9, 0.6, 0.5, 0.3, 0.1],
            "low": [0.8, 0.5, 0.4, 0.2, 0.0],
            "high": [1.0, 0.7, 0.6, 0.4, 0.2],
            "floor": 0.05,
        }
    )


def test_ways_stand_from_the_top_with_their_intervals(recoveries: pd.DataFrame) -> None:
    _, ax = plt.subplots()
    assert plots.recovery_dots(recoveries, ax=ax) is ax
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [
        "proportional by model",
        "one factor, labels",
        "one factor, no labels",
        "MP",
        "DARE",
    ]
    dots = [line for line in ax.get_lines() if line.get_marker() == "o"]
    assert [(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots] == list(
        zip(recoveries["kept"], [4, 3, 2, 1, 0], strict=True)
    )
    bars = [line for line in ax.get_lines() if line.get_marker() == "None" and line.get_linestyle() == "-"]
    assert [tuple(bar.get_xdata()) for bar in bars] == list(zip(recoveries["low"], recoveries["high"], strict=True))
    (reference,) = [line for line in ax.get_lines() if line.get_linestyle() == "--"]
    assert list(reference.get_xdata()) == [0.1, 0.1]
    (floor,) = [line for line in ax.get_lines() if line.get_linestyle() == ":"]
    assert list(floor.get_xdata()) == [0.05, 0.05]
    assert ax.xaxis.get_major_formatter()(0.5, 0) == "50%"


def test_a_way_chosen_with_labels_is_open_and_colours_are_those_of_methods(recoveries: pd.DataFrame) -> None:
    dots = [line for line in plots.recovery_dots(recoveries).get_lines() if line.get_marker() == "o"]
    assert [dot.get_markerfacecolor() == "white" for dot in dots] == [False, True, False, False, False]
    known = plots.METHOD_COLOURS
    assert [dots[i].get_color() for i in (0, 3, 4)] == [known["proportional"], known["MP"], known["DARE"]]
    assert dots[1].get_color() == dots[2].get_color() not in known.values()
    # Rows are sorted by what they keep, whatever their order.
    again = plots.recovery_dots(recoveries[::-1], ax=plt.figure().subplots())
    other = [line for line in again.get_lines() if line.get_marker() == "o"]
    assert [dot.get_xdata()[0] for dot in other] == recoveries["kept"].tolist()
    assert [dot.get_color() for dot in other] == [dot.get_color() for dot in dots]


@pytest.mark.parametrize("figure", ["noise", "foretold", "shifts", "damage"])
def test_the_legend_stands_below_the_axes_and_their_label(
    figure: str, noise: pd.DataFrame, foretold: pd.DataFrame, shifts: pd.DataFrame, damage: pd.DataFrame
) -> None:
    with plt.rc_context():
        plots.set_style()
        canvas, ax = plt.subplots(figsize=(7, 3.5))
        draw, table = {
            "noise": (plots.noise_by_layer, noise),
            "foretold": (plots.foretold_scatter, foretold),
            "shifts": (plots.shift_rows, shifts),
            "damage": (plots.metric_by_noise, damage),
        }[figure]
        draw(table, ax=ax)  # type: ignore[operator]
        canvas.draw_without_rendering()
        legend = ax.get_legend()
        assert legend is not None
        assert legend.get_window_extent().y1 <= ax.xaxis.label.get_window_extent().y0


def test_every_figure_can_be_drawn(
    noise: pd.DataFrame,
    foretold: pd.DataFrame,
    shifts: pd.DataFrame,
    trail: pd.DataFrame,
    recoveries: pd.DataFrame,
    damage: pd.DataFrame,
) -> None:
    """No text, tick or limit that is not a number, which drawing would warn of."""
    with plt.rc_context():
        plots.set_style()
        canvas, axes = plt.subplots(1, 6, figsize=(30, 4))
        plots.noise_by_layer(noise, ax=axes[0])
        plots.foretold_scatter(foretold, ax=axes[1])
        plots.shift_rows(shifts, ax=axes[2])
        plots.trail_tolerance(trail, ax=axes[3])
        plots.recovery_dots(recoveries, ax=axes[4])
        plots.metric_by_noise(damage, ax=axes[5])
        canvas.draw_without_rendering()
        for ax in axes:
            assert all(math.isfinite(limit) for limit in (*ax.get_xlim(), *ax.get_ylim()))
