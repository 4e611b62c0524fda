"""What report 02 computes and tells, on tables whose answers are known."""

from __future__ import annotations

import pandas as pd
import pytest

from delta_analysis.reports.dare_ablation import (
    coverage_text,
    encoders_list,
    headline_of,
    levels_list,
    spread_text,
    two_bases,
    without_ability,
)
from delta_analysis.reports.family import TASK_PAIRS
from delta_analysis.studies.dare_ablation import coverage_of, widest_spread
from delta_analysis.sweeps import Pair


@pytest.fixture
def tolerances() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "pair": ["base → code", "code-cpt → code"],
            "tolerated": [0.2, 0.9],
            "low": [0.1, 0.8],
            "high": [0.3, 0.92],
            "untouched": 0.99,
            "floor": 0.5,
            "reading": "search",
        }
    )


def test_what_breaks_before_all_others_is_told(tolerances: pd.DataFrame) -> None:
    told = (
        "DARE: **code-cpt → code** tolerates 0.90 [0.80, 0.92]; **base → code** tolerates 0.20 [0.10, 0.30]."
        " base → code breaks before every other pair: its interval lies below all the others."
    )
    assert headline_of(tolerances) == told
    assert headline_of(tolerances.assign(high=0.95)).endswith("[0.10, 0.950].")
    assert headline_of(tolerances.head(1)).endswith("[0.10, 0.30].")
    assert encoders_list(tolerances.head(1)) == (
        "- **base → code** tolerates 0.20 [0.10, 0.30]: 99.0% untouched, "
        "50.0% with all of the delta dropped or by guessing."
    )


def test_a_delta_that_brought_nothing_is_told(tolerances: pd.DataFrame) -> None:
    assert without_ability(tolerances) == []
    (sentence,) = without_ability(tolerances.assign(reading=["none", "search"]))
    assert sentence.startswith("base → code: not clearly above")


def test_the_same_fine_tune_on_two_bases_is_compared(tolerances: pd.DataFrame) -> None:
    assert two_bases(TASK_PAIRS[:2], tolerances) == ["No fine-tune appears twice in this report."]
    (sentence,) = two_bases(TASK_PAIRS[2:], tolerances)
    assert sentence == (
        "The same model tolerates a drop rate of 0.90 as code-cpt → code and of 0.20 as base → code "
        "(continual pre-training + SFT); the intervals do not overlap."
    )
    assert two_bases(TASK_PAIRS[2:], tolerances.assign(high=0.95))[0].endswith("the intervals overlap.")


def test_levels_are_those_of_the_largest_rate_up_to_nine_tenths() -> None:
    rates = [0.0, 0.5, 0.9, 0.99, 1.0]
    curve = pd.DataFrame({"pair": "x", "drop_rate": rates, "value": [1, 0.8, 0.6, 0.4, 0.2], "low": 0.1, "high": 1.0})
    assert levels_list(curve, "accuracy", rates) == (
        "- **x**: accuracy 100% [10%, 100%] untouched, 60% [10%, 100%] at p = 0.9, "
        "20% [10%, 100%] with all of the delta dropped."
    )
    assert "untouched, 0.40 [0.10, 1.00] at p = 0.99, 0.20 [" in levels_list(curve, "perplexity", [0.0, 0.99, 1.0])


def test_masks_differ_most_at_one_rate() -> None:
    rows = [
        (0.0, 0, 1.0, 0.0),
        (0.5, 0, 0.8, 0.5),
        (0.5, 1, 0.7, 0.502),
        (0.9, 0, 0.6, 0.9),
        (0.9, 1, 0.2, 0.899),
        (1.0, 0, 0.0, 1.0),
    ]
    cells = pd.DataFrame(rows, columns=["drop_rate", "seed", "value", "achieved_drop_rate"]).assign(pair="x")
    assert widest_spread(cells)[["pair", "drop_rate", "min", "max"]].to_numpy().tolist() == [["x", 0.9, 0.2, 0.6]]
    assert spread_text(cells) == (
        "The widest spread over 2 masks is 0.20 to 0.60 (x at p = 0.9): a single mask could have shown any value "
        "between. The achieved drop rates are within 0.0020 of the nominal ones."
    )


def test_tensors_that_are_not_compared_are_named() -> None:
    coverage = coverage_of([Pair("encoder", "zoo:encoder/base", "zoo:encoder/strings")])
    assert set(coverage["pair"]) == {"encoder"}
    assert "of the entries) are not compared and stay as fine-tuned" in coverage_text(coverage)
    assert coverage_text(coverage[coverage["status"] == "compared"]).startswith("Every tensor stands on both sides")
