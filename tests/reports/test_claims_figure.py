"""Figures of claims, by the artists they draw: data, labels and colours, not pixels."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from delta_analysis import plots
from delta_analysis.reports.claims.claim import CANNOT_TELL, NOT_REPRODUCED, REPRODUCED, REVERSED, STATUSES, UNITS
from delta_analysis.reports.claims.figure import AXES, SHARES, claim_effects, claim_groups, status_handles

NAN = math.nan
ROWS = [
    ("Most can be dropped", "drop rate", 0.9, NAN, (0.95, 0.92, 0.97), REPRODUCED),
    ("It destroys", "share", NAN, 0.5, (0.97, 0.9, 1.02), NOT_REPRODUCED),
    ("It gains", "points", 0.0, NAN, (-0.2, -0.3, -0.1), REVERSED),
    ("It loses", "points", NAN, 0.0, (0.1, -0.1, 0.3), CANNOT_TELL),
    ("Size matters", "log-odds", 0.0, NAN, (2.0, 1.0, math.inf), REPRODUCED),
    ("Range foretells", "rank correlation", NAN, 0.0, (-0.9, -0.95, -0.8), REPRODUCED),
    ("Nobody looked", "points", 0.0, NAN, (NAN, NAN, NAN), CANNOT_TELL),
]


@pytest.fixture
def judged() -> pd.DataFrame:
    names = ["claim", "unit", "claimed_at_least", "claimed_at_most", "value", "low", "high", "status"]
    return pd.DataFrame([(*row[:4], *row[4], row[5]) for row in ROWS], columns=names)


def lines(ax: Axes) -> tuple[list[Line2D], list[Line2D], list[Line2D]]:
    """Claimed sides, intervals and markers, from the top."""
    drawn = list(ax.get_lines())
    return drawn[::3], drawn[1::3], drawn[2::3]


def along(line: Line2D) -> tuple[float, ...]:
    """Where a line has its points along the axis."""
    return tuple(np.asarray(line.get_xdata(), dtype=float).tolist())


def test_every_unit_has_one_axis() -> None:
    assert sorted(unit for units in AXES.values() for unit in units) == sorted(UNITS)


def test_claims_with_an_effect_are_grouped_by_axis(judged: pd.DataFrame) -> None:
    groups = claim_groups(judged)
    assert list(groups) == list(AXES)
    assert [rows["claim"].tolist() for rows in groups.values()] == [
        ["Most can be dropped", "It destroys"],
        ["It gains", "It loses"],
        ["Size matters"],
        ["Range foretells"],
    ]
    assert list(claim_groups(judged[judged["unit"] == "points"])) == [list(AXES)[1]]
    nothing = claim_groups(judged.tail(1))
    assert list(nothing) == [SHARES]
    assert nothing[SHARES].empty
    assert not list(claim_effects(nothing[SHARES], ax=plt.figure().subplots()).get_lines())


def test_shares_stand_on_a_logit_axis_with_their_claimed_side(judged: pd.DataFrame) -> None:
    _, ax = plt.subplots()
    assert claim_effects(claim_groups(judged)[SHARES], ax=ax) is ax
    assert (ax.get_xscale(), ax.get_xlabel()) == ("logit", SHARES)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["Most can be dropped", "It destroys"]
    bottom, top = ax.get_ylim()
    assert bottom > 1 > 0 > top
    left, right = ax.get_xlim()
    claimed, bars, markers = lines(ax)
    assert [along(each) for each in claimed] == [(0.9, right), (0.5, left)]
    # Beyond the axis, at its end.
    assert [along(each) for each in bars] == [(0.92, 0.97), (0.9, right)]
    assert [along(each) for each in markers] == [(0.95,), (0.97,)]
    assert [np.asarray(each.get_ydata()).tolist() for each in markers] == [[0], [1]]


def test_points_are_hundredths_on_an_axis_that_holds_them_all(judged: pd.DataFrame) -> None:
    ax = claim_effects(claim_groups(judged)["points of the untouched accuracy, or hundredths of a cosine"])
    claimed, bars, markers = lines(ax)
    left, right = ax.get_xlim()
    assert left < -30 < 30 < right
    assert [along(each) for each in claimed] == [(0, right), (0, left)]
    np.testing.assert_allclose([along(each) for each in bars], [(-30, -10), (-10, 30)])
    np.testing.assert_allclose([along(each) for each in markers], [(-20,), (10,)])
    assert ax.get_xscale() == "linear"


def test_an_open_interval_reaches_the_end_of_the_axis(judged: pd.DataFrame) -> None:
    ax = claim_effects(claim_groups(judged)["difference of tolerated drop rates on log(p / (1 − p))"])
    (claimed,), (bar,), _ = lines(ax)
    assert ax.get_xlim()[0] < 0
    assert along(bar) == (1, ax.get_xlim()[1])
    assert along(claimed) == (0, ax.get_xlim()[1])


def test_marker_and_colour_are_those_of_the_legend(judged: pd.DataFrame) -> None:
    legend = {str(handle.get_label()): (handle.get_marker(), handle.get_color()) for handle in status_handles()}
    assert list(legend) == list(STATUSES)
    assert len(set(legend.values())) == len(STATUSES)
    for rows in claim_groups(judged).values():
        _, bars, markers = lines(claim_effects(rows, ax=plt.figure().subplots()))
        assert [(each.get_marker(), each.get_color()) for each in markers] == [legend[name] for name in rows["status"]]
        assert [each.get_color() for each in bars] == [legend[name][1] for name in rows["status"]]


def test_long_claims_are_broken_and_every_group_can_be_drawn(judged: pd.DataFrame) -> None:
    """No text, tick or limit that is not a number, which drawing would warn of."""
    long = judged.assign(claim=judged["claim"] + " whatever the model, the task, the size and the number of masks")
    with plt.rc_context():
        plots.set_style()
        figure, axes = plt.subplots(len(AXES), 1, layout="constrained", figsize=(9, 7))
        for ax, rows in zip(axes, claim_groups(long).values(), strict=True):
            claim_effects(rows, ax=ax)
            assert all("\n" in tick.get_text() for tick in ax.get_yticklabels())
        figure.draw_without_rendering()
