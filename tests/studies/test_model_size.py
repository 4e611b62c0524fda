"""Tolerated drop rates of several sizes, computed and told, on a table whose answers are known."""

from __future__ import annotations

import pandas as pd
import pytest

from delta_analysis.reports.model_size import gains_list, headline_of, limits_text, shown_table, steps_text
from delta_analysis.studies.model_size import (
    delta_moves,
    gains,
    rank_correlations,
    size_groups,
    steps,
    with_sizes,
)
from delta_analysis.sweeps import Pair, logit

COLUMNS = [
    "relation",
    "made_by",
    "size",
    "parameters",
    "untouched",
    "tolerated",
    "low",
    "high",
    "relative_rms",
    "abs_p50",
]
ROWS = [
    # Not in the order of sizes.
    ("base → math", "SFT", "large", 4_000_000, 0.9, 0.99, 0.98, 0.995, 0.01, 0.001),
    ("base → math", "SFT", "small", 1_000_000, 0.5, 0.9, 0.85, 0.93, 0.02, 0.002),
    ("base → code", "both", "small", 1_000_000, 0.6, 0.5, 0.4, 0.6, 0.6, 0.03),
    ("base → code", "both", "large", 4_000_000, 0.8, 0.45, 0.3, 0.6, 0.7, 0.04),
]


@pytest.fixture
def tolerances() -> pd.DataFrame:
    table = pd.DataFrame(ROWS, columns=COLUMNS)
    return table.assign(pair=table["size"] + ", " + table["relation"])


def test_the_largest_is_compared_with_the_smallest(tolerances: pd.DataFrame) -> None:
    found = gains(tolerances)
    assert list(found) == ["base → math", "base → code"]
    smallest, largest, difference = found["base → math"]
    assert (smallest["size"], largest["size"]) == ("small", "large")
    assert difference.value == pytest.approx(logit(0.99) - logit(0.9))
    assert difference.low > 0
    code = found["base → code"].difference
    assert code.low < 0 < code.high
    assert steps(tolerances) == [difference, code]
    assert gains(tolerances[tolerances["size"] == "small"]) == {}


def test_the_growth_of_a_delta_is_that_of_fine_tunes_on_their_true_base(tolerances: pd.DataFrame) -> None:
    assert delta_moves(tolerances) == [pytest.approx(0.5)]
    assert size_groups(tolerances)["SFT on its true base"]["relation"].unique().tolist() == ["base → math"]


def test_ranks_are_correlated_where_there_are_enough(tolerances: pd.DataFrame) -> None:
    found = rank_correlations(size_groups(tolerances))
    assert found["pairs"].tolist() == [4, 2]
    # Sizes of deltas fall in the very order in which the tolerated drop rates rise.
    assert found.loc["all pairs", "with rms δ / rms base"].startswith("-1.00 (p = ")
    assert set(found.loc["SFT on its true base"].drop("pairs")) == {"too few"}
    same = tolerances.assign(parameters=1)
    assert rank_correlations({"all": same}).loc["all", "with parameters"] == "too few"


def test_the_size_of_a_delta_is_that_of_its_entries(tolerances: pd.DataFrame) -> None:
    pair = Pair("tiny", "zoo:tiny/base", "zoo:tiny/math")
    found = with_sizes(pd.DataFrame({"pair": ["tiny", "again"]}), [pair, pair])
    assert found["pair"].tolist() == ["tiny", "again"]
    assert found["parameters"][0] == found["parameters"][1] > 100_000
    assert found["relative_rms"].between(0.001, 1).all()
    assert list(found.columns) == ["pair", "parameters", "abs_p50", "relative_rms"]


def test_sentences_tell_what_is_clear(tolerances: pd.DataFrame) -> None:
    assert headline_of(tolerances) == (
        "From the smallest to the largest of 2 sizes, the tolerated drop rate rises clearly in 1 of 2 relations "
        "(base → math), falls clearly in 0, and is undecided in 1."
    )
    math, code = gains_list(tolerances).splitlines()
    assert math.startswith("- **base → math**: 0.90 [0.85, 0.93] at 1M parameters, 0.990 [0.980, 0.9950] at 4M; ")
    assert "the largest tolerates more (a difference of 2.4 [" in math
    assert "the largest tolerates neither clearly more nor clearly less" in code
    assert steps_text(tolerances).endswith("rises clearly in 1 of 2 steps and falls clearly in 0.")
    # The sizes the other way round.
    turned = tolerances.assign(parameters=5_000_000 - tolerances["parameters"])
    assert "falls clearly in 1 (base → math)" in headline_of(turned)
    assert "the largest tolerates less" in gains_list(turned)
    single = headline_of(tolerances.head(1))
    assert single.endswith("nothing can be said of size: large, base → math tolerates 0.990 [0.980, 0.9950].")


def test_limits_are_told(tolerances: pd.DataFrame) -> None:
    told = limits_text(tolerances, "accuracy")
    for part in (
        "2 sizes over a factor of 4 in parameters",
        "changes by a factor of 0.50 to 0.50 relative to its base, so size of model and size of delta are not told",
        "each size: 80% (large), 50% (small)",
        "differs by 4.8 on the scale",
        "the largest model here has 4M parameters",
    ):
        assert part in told
    assert "each size: perplexity 0.9 (large), perplexity 0.6 (small)" in limits_text(tolerances, "perplexity")
    assert "those of the paper" not in limits_text(tolerances.assign(parameters=8e9), "accuracy")
    assert shown_table(tolerances).index.tolist()[0] == ("base → code", "small")
