"""What the overview says follows from the table of claims alone."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from delta_analysis.reports import overview
from delta_analysis.reports.claims.figure import claims_figure


def judged(*statuses: str, measured: bool = True) -> pd.DataFrame:
    """A table of `judge` with a claim of each status."""
    claim = {"topic": "Dropping", "figure": "", "notebook": "02_x", "measured": "m", "source": "s", "unit": "share"}
    side = {"claimed_at_least": 0.9, "claimed_at_most": None}
    effect = {"value": 0.5, "low": 0.25, "high": 0.75} if measured else dict.fromkeys(("value", "low", "high"), pd.NA)
    rows = [
        {**claim, **side, **effect, "claim": f"claim {i}", "status": status, "reason": "no results"}
        for i, status in enumerate(statuses)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("table", "headline"),
    [
        (judged("reproduced", "reversed"), "Of 2 .* reproduced for 1, .*reversed for 1, cannot tell for 0[.]$"),
        (judged("cannot tell", measured=False), "cannot tell for 1 [(]all for want of results[)][.]$"),
        (
            pd.concat([judged("cannot tell"), judged("cannot tell", measured=False)]),
            "cannot tell for 2 [(]1 for want of results[)][.]$",
        ),
    ],
)
def test_the_headline_counts_each_status(table: pd.DataFrame, headline: str) -> None:
    assert pd.Series([overview.headline_of(table)]).str.contains(headline).all()


def test_failures_are_listed_by_status_and_only_where_there_are_some() -> None:
    found = overview.failures(judged("cannot tell", "reproduced", "reversed"))
    assert found == [
        "Reversed:\n\n- claim 2: **50.0%** (25.0% to 75.0%), claimed above 90.0%.",
        "Cannot tell though measured:\n\n- claim 0: **50.0%** (25.0% to 75.0%), claimed above 90.0%.",
    ]
    assert overview.failures(judged("reproduced")) == []
    assert overview.failures(judged("cannot tell", measured=False)) == []


def test_tables_and_measurements_hold_every_claim() -> None:
    table = pd.concat([judged("reproduced"), judged("cannot tell", measured=False).assign(topic="Merging")])
    dropping, merging = overview.claims_tables(table)
    assert dropping.startswith("### Dropping\n\n| claim |")
    assert dropping.endswith("| claim 0 | none | above 90.0% | 50.0% | 25.0% to 75.0% | **reproduced** |")
    assert merging.endswith("| claim 0 | none | above 90.0% |  | no results | **cannot tell** |")
    assert overview.measurements(table).splitlines() == ["- **claim 0** (02_x): m. Source: s."] * 2


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ({}, "1 claims are judged by 0 reports; of 02_x there are no results."),
        ({"02_x": pd.DataFrame({"pair": ["a"]})}, "1 claims are judged by 1 reports."),
        (
            {"02_x": pd.DataFrame({"parameters": [1e6, None, 2.5e6]})},
            "1 claims are judged by 1 reports. The models whose size is known have 1 to 2.5 million parameters.",
        ),
    ],
)
def test_the_extent_tells_reports_and_sizes(results: dict[str, pd.DataFrame], expected: str) -> None:
    assert overview.extent(judged("reproduced"), results) == expected


def test_runs_are_told_by_what_they_were_given() -> None:
    runs: dict[str, dict[str, Any]] = {
        "01_x": {"base": "", "finetuned": ""},
        "02_x": {"base": "b", "finetuned": "f", "n_seeds": 3},
    }
    results = dict.fromkeys(runs, pd.DataFrame({"pair": ["a", "a", "b"]}))
    table = overview.runs_table(runs, results)
    assert table.loc["01_x"].tolist() == ["embedded family", 2, "none", "none", 3]
    assert table.loc["02_x"].tolist() == ["b → f", 2, 3, "none", 3]


def test_the_figure_has_a_panel_for_each_kind_of_unit() -> None:
    points = judged("reversed").assign(unit="points")
    figure = claims_figure(pd.concat([judged("reproduced", "cannot tell"), points]))
    assert [len(ax.get_yticks()) for ax in figure.axes] == [2, 1]
    assert len(figure.legends[0].get_texts()) == 4
    plt.close(figure)
