"""Factors chosen with and without labels, on cells made up by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from delta_analysis.evaluation.drift import OutputDrift
from delta_analysis.pruning import Dare
from delta_analysis.studies.rescaling import agreement, best_factors, factor_grid, factor_of, validation_and_test
from delta_analysis.sweeps.engine import sweep
from tests.tiny_family import UP, Reads, make_family

N = 40
CHOOSING, JUDGING = validation_and_test(N)
COLUMNS = [
    "pair", "drop_rate", "chosen_by", "factor", "q", "dare", "kept", "dare_kept", "lead", "low", "high",
    "regret", "regret_low", "regret_high",
]  # fmt: skip


def answers(validation: float, test: float) -> list[float]:
    """N outcomes, of which these shares of the validation and of the test questions are right, the first ones."""
    outcomes = np.zeros(N)
    outcomes[CHOOSING[: round(validation * len(CHOOSING))]] = 1
    outcomes[JUDGING[: round(test * len(JUDGING))]] = 1
    return outcomes.tolist()


def cell(rescale: object, seed: int, metric: str, outcomes: list[float], rate: float = 0.75) -> dict[str, object]:
    labels = {"pair": "a → b", "drop_rate": rate, "rescale": str(rescale), "seed": seed, "metric": metric}
    return {**labels, "value": float(np.mean(outcomes)), "outcomes": outcomes}


def made_up(
    found: Mapping[Any, tuple[float, float, float]], untouched: float = 1.0, rate: float = 0.75
) -> pd.DataFrame:
    """Rescale -> accuracy on validation and on test questions, and drift; two seeds that agree."""
    rows = [cell("inverse_keep", 0, "accuracy", answers(untouched, untouched), 0.0)]
    rows.append(cell("inverse_keep", 0, "top5_logit_mse", [0.0, 0.0], 0.0))
    for rescale, (validation, test, drift) in found.items():
        for seed in (0, 1):
            rows.append(cell(rescale, seed, "accuracy", answers(validation, test), rate))
            rows.append(cell(rescale, seed, "top5_logit_mse", [drift - 0.1, drift + 0.1], rate))
    return pd.DataFrame(rows)


@given(drop_rate=st.floats(0.01, 0.999), count=st.integers(2, 9))
def test_factors_go_from_drop_only_to_dare_in_equal_ratios(drop_rate: float, count: int) -> None:
    grid = factor_grid(drop_rate, count)
    assert grid[0] == Dare(drop_rate, "none")
    assert grid[-1] == Dare(drop_rate)
    assert len(grid) == count
    cells = pd.DataFrame({"drop_rate": drop_rate, "rescale": [str(each.rescale) for each in grid]})
    factors = factor_of(cells)
    assert factors.to_numpy() == pytest.approx(np.geomspace(1, 1 / (1 - drop_rate), count))


def test_factor_of_each_row() -> None:
    cells = pd.DataFrame(
        {
            "drop_rate": [0.0, 0.5, 0.9, 0.5, 0.9],
            "rescale": ["inverse_keep", "inverse_keep", "inverse_keep", "none", "2.5"],
        },
        index=[3, 1, 4, 0, 9],
    )
    factors = factor_of(cells)
    assert factors.index.tolist() == [3, 1, 4, 0, 9]
    assert factors.tolist() == pytest.approx([1, 2, 10, 1, 2.5])


@given(st.integers(2, 500))
def test_halves_are_disjoint_and_all(count: int) -> None:
    validation, test = validation_and_test(count)
    assert len(validation) == count // 2
    assert np.array_equal(np.sort(np.concatenate([validation, test])), np.arange(count))
    assert (np.diff(validation) > 0).all()
    assert (np.diff(test) > 0).all()
    assert all(
        np.array_equal(one, other) for one, other in zip((validation, test), validation_and_test(count), strict=True)
    )


def test_both_kinds_of_questions_are_in_both_halves_where_they_alternate() -> None:
    for half in validation_and_test(200):
        assert 30 < (half % 2).sum() < 70


def test_each_way_of_choosing_is_judged_on_the_other_half() -> None:
    found = {"none": (0.2, 0.9, 3.0), 2.0: (0.8, 0.4, 2.0), "inverse_keep": (0.5, 0.6, 1.0)}
    table = best_factors(made_up(found, untouched=0.8))
    assert list(table.columns) == COLUMNS
    labels, no_labels = table.to_dict("records")
    # Labels prefer 2 on their half, where it is worst on the other; the drift prefers DARE's 4.
    assert (labels["chosen_by"], labels["factor"], labels["q"], labels["dare"]) == ("labels", 2.0, 0.5, False)
    assert (labels["kept"], labels["dare_kept"]) == pytest.approx((0.5, 0.75))
    assert labels["lead"] == pytest.approx(-0.25)
    assert labels["low"] < labels["lead"] < labels["high"]
    assert (labels["regret"], labels["regret_low"], labels["regret_high"]) == (0, 0, 0)
    assert (no_labels["chosen_by"], no_labels["factor"], no_labels["dare"]) == ("no labels", 4.0, True)
    assert (no_labels["kept"], no_labels["dare_kept"]) == pytest.approx((0.75, 0.75))
    assert (no_labels["lead"], no_labels["low"], no_labels["high"]) == (0, 0, 0)
    # How much more the factor chosen with labels keeps: less, here.
    assert no_labels["regret"] == pytest.approx(-0.25)
    assert no_labels["regret_low"] < -0.25 < no_labels["regret_high"]


def test_a_clear_lead_and_a_clear_regret_are_above_zero() -> None:
    found = {"none": (0.1, 0.1, 0.5), 2.0: (1.0, 1.0, 2.0), "inverse_keep": (0.5, 0.5, 1.0)}
    labels, no_labels = best_factors(made_up(found)).to_dict("records")
    assert labels["factor"] == 2
    assert 0 < labels["low"] < labels["lead"] == pytest.approx(0.5)
    assert no_labels["factor"] == 1
    assert no_labels["lead"] == pytest.approx(-0.4)
    assert no_labels["high"] < 0 < no_labels["regret_low"]
    assert no_labels["regret"] == pytest.approx(0.9)


def test_of_equal_factors_the_largest_is_best() -> None:
    same = {"none": (0.5, 0.5, 1.0), 2.0: (0.5, 0.5, 1.0), 3.0: (0.5, 0.5, 1.0), "inverse_keep": (0.5, 0.5, 1.0)}
    assert best_factors(made_up(same))["factor"].tolist() == [4, 4]
    assert best_factors(made_up(same | {"inverse_keep": (0.4, 1.0, 1.5)}))["factor"].tolist() == [3, 3]


def test_seeds_count_alike() -> None:
    found = {"none": (0.5, 0.5, 1.0), "inverse_keep": (0.4, 0.4, 2.0)}
    # DARE is better under one seed, and not in the mean.
    cells = made_up(found)
    other = made_up(found | {"inverse_keep": (0.55, 0.55, 2.0)})
    cells = pd.concat([cells[cells["seed"] == 0], other[other["seed"] == 1]], ignore_index=True)
    assert best_factors(cells)["factor"].tolist() == [1, 1]


SHARES = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
FOUND = st.fixed_dictionaries(
    {rescale: st.tuples(SHARES, SHARES, st.sampled_from([0.5, 1.0, 2.0])) for rescale in ("none", 2.0, "inverse_keep")}
)


@settings(deadline=None, max_examples=12)
@given(found=FOUND, untouched=st.sampled_from([0.5, 0.9]), order=st.randoms(use_true_random=False))
def test_leads_and_regrets_are_differences_of_what_is_kept(
    found: dict[object, tuple[float, float, float]], untouched: float, order: object
) -> None:
    cells = made_up(found, untouched)
    table = best_factors(cells)
    factors = {"none": 1.0, 2.0: 2.0, "inverse_keep": 4.0}
    by_accuracy = max(found, key=lambda rescale: (found[rescale][0], factors[rescale]))
    by_drift = max(found, key=lambda rescale: (-found[rescale][2], factors[rescale]))
    assert table["factor"].tolist() == [factors[by_accuracy], factors[by_drift]]
    kept = [found[each][1] / untouched for each in (by_accuracy, by_drift)]
    dare = found["inverse_keep"][1] / untouched
    assert table["kept"].to_numpy() == pytest.approx(kept)
    assert table["dare_kept"].to_numpy() == pytest.approx([dare, dare])
    assert table["lead"].to_numpy() == pytest.approx([each - dare for each in kept])
    assert table["regret"].to_numpy() == pytest.approx([0, kept[0] - kept[1]])
    assert (table["low"] <= table["lead"] + 1e-12).all()
    assert (table["lead"] <= table["high"] + 1e-12).all()
    pd.testing.assert_frame_equal(best_factors(cells.sample(frac=1, random_state=order.randrange(99))), table)  # type: ignore[attr-defined]


@settings(deadline=None, max_examples=20)
@given(
    accuracies=st.lists(st.sampled_from([0.1, 0.2, 0.5, 1.0]), min_size=4, max_size=4),
    drifts=st.lists(st.floats(0.2, 9), min_size=4, max_size=4, unique=True),
)
def test_agreement_is_spearmans_correlation(accuracies: list[float], drifts: list[float]) -> None:
    rescales = ("none", 1.5, 3.0, "inverse_keep")
    found = {r: (a, a, d) for r, a, d in zip(rescales, accuracies, drifts, strict=True)}
    (row,) = agreement(made_up(found)).to_dict("records")
    if len(set(accuracies)) == 1:
        assert math.isnan(row["correlation"])
    else:
        expected = spearmanr([-each for each in drifts], accuracies).statistic
        assert row["correlation"] == pytest.approx(expected, abs=1e-12)


def test_factors_of_a_sweep(tmp_path: Path) -> None:
    """Entries of a matrix as accuracy: the mean of base + factor · pruned delta is largest with DARE's factor."""
    pair = make_family(tmp_path).pair()
    evaluations = [Reads((UP,)), OutputDrift(("some text", "another"))]
    edits = [Dare(0.0), *factor_grid(0.5, 4)]
    cells = sweep([pair], edits, evaluations, [0, 1], tmp_path / "out")
    assert sorted(set(factor_of(cells))) == pytest.approx(np.geomspace(1, 2, 4))
    table = best_factors(cells)
    assert table["chosen_by"].tolist() == ["labels", "no labels"]
    assert table.loc[0, "factor"] == 2
    assert table.loc[0, "dare"]
    drifts = cells[cells["metric"] == "top5_logit_mse"].assign(factor=factor_of)
    assert table.loc[1, "factor"] == drifts[drifts["drop_rate"] > 0].groupby("factor")["value"].mean().idxmin()
    assert len(agreement(cells)) == 1
