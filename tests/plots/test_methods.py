"""Figures of methods beside each other, by the artists they draw."""

from __future__ import annotations

import pandas as pd

from delta_analysis import plots


def test_dots_stand_from_the_top_with_their_intervals(curve: pd.DataFrame) -> None:
    table = curve.head(3).assign(method=["DARE", "MAGPRUNE", "MAGPRUNE by tensor"])
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
    ax = plots.drift_scatter(summary)
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
