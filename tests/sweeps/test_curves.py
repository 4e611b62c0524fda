"""Curves of tables made up by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_analysis.sweeps.curves import drop_curve, first_metric, outcome_matrix
from delta_analysis.sweeps.intervals import MEAN, PERPLEXITY, metric_interval

KEYS = ["pair", "method", "scope", "evaluation", "metric", "kind", "drop_rate"]


def cell(method: str, rate: float, seed: int, outcomes: list[float], **labels: str) -> dict[str, object]:
    row = {
        "pair": "a",
        "method": method,
        "scope": "all",
        "evaluation": "questions",
        "metric": "accuracy",
        "kind": "score",
    }
    return {**row, "drop_rate": rate, "seed": seed, "outcomes": outcomes, **labels}


def test_outcomes_stand_in_order_of_seeds() -> None:
    cells = pd.DataFrame([cell("DARE", 0.5, 9, [1, 1]), cell("DARE", 0.5, 2, [0, 1]), cell("DARE", 0.5, 4, [0, 0])])
    matrix = outcome_matrix(cells)
    assert matrix.dtype == np.float64
    assert matrix.tolist() == [[0, 1], [0, 0], [1, 1]]


def test_a_curve_averages_seeds_and_keeps_the_order_of_names() -> None:
    cells = pd.DataFrame(
        [
            cell("drop only", 0.9, 0, [0, 0, 0, 1], pair="z"),
            cell("DARE", 0.9, 1, [0, 1, 1, 1], pair="z"),
            cell("DARE", 0.9, 0, [0, 0, 1, 1], pair="z"),
            cell("DARE", 0.0, 0, [1, 1, 1, 1], pair="z"),
            cell("drop only", 0.5, 0, [0, 0, 1, 1], pair="z"),
            cell("DARE", 0.99, 0, [2, 4, 2, 4], pair="a", kind="perplexity"),
            cell("DARE", 0.99, 1, [1, 1, 1, 1], pair="a", kind="perplexity"),
            cell("DARE", 0.05, 0, [1, 0, 1, 0], pair="a", kind="perplexity"),
        ]
    )
    curve = drop_curve(cells)
    assert list(curve.columns) == [*KEYS, "seeds", "value", "low", "high"]
    assert curve[["pair", "method", "drop_rate", "seeds"]].to_numpy().tolist() == [
        ["z", "drop only", 0.5, 1],
        ["z", "drop only", 0.9, 1],
        ["z", "DARE", 0.0, 1],
        ["z", "DARE", 0.9, 2],
        ["a", "DARE", 0.05, 1],
        ["a", "DARE", 0.99, 2],
    ]
    assert curve["value"].tolist() == pytest.approx([0.5, 0.25, 1.0, 0.625, np.exp(0.5), np.exp(2)])
    assert curve.index.tolist() == list(range(6))


@pytest.mark.parametrize("key", KEYS)
def test_what_differs_in_a_key_is_not_averaged(key: str) -> None:
    one = cell("DARE", 0.5, 0, [1, 1])
    other = {**one, "outcomes": [0, 0], key: 0.9 if key == "drop_rate" else "perplexity"}
    curve = drop_curve(pd.DataFrame([one, other]))
    assert curve["seeds"].tolist() == [1, 1]
    assert curve[key].tolist() == [one[key], other[key]]
    assert curve["value"].tolist() == [1, np.exp(0) if key == "kind" else 0]


def test_interval_resamples_seeds_and_items() -> None:
    rng = np.random.default_rng(0)
    outcomes = (rng.random((5, 40)) < rng.random((5, 1))).astype(float)
    cells = pd.DataFrame([cell("DARE", 0.5, seed, row.tolist()) for seed, row in enumerate(outcomes)])
    (row,) = drop_curve(cells.sample(frac=1, random_state=0)).itertuples()
    assert (row.value, row.low, row.high) == pytest.approx(tuple(metric_interval(MEAN, outcomes)))
    alone = metric_interval(MEAN, outcomes[:1])
    assert row.high - row.low > alone.high - alone.low


def test_perplexity_has_the_interval_of_its_blocks() -> None:
    losses = np.random.default_rng(1).random((2, 300))
    cells = pd.DataFrame([cell("DARE", 0.5, seed, row.tolist(), kind="perplexity") for seed, row in enumerate(losses)])
    (row,) = drop_curve(cells).itertuples()
    assert (row.value, row.low, row.high) == pytest.approx(tuple(metric_interval(PERPLEXITY, losses)))


@given(st.permutations(range(12)))
@settings(max_examples=20, deadline=None)
def test_the_order_of_cells_changes_no_value(order: list[int]) -> None:
    rng = np.random.default_rng(2)
    rows = [
        cell(method, rate, seed, rng.integers(0, 2, 5).tolist())
        for method in ("DARE", "MP")
        for rate in (0.5, 0.9)
        for seed in range(3)
    ]
    expected = drop_curve(pd.DataFrame(rows))
    found = drop_curve(pd.DataFrame([rows[i] for i in order]))
    order_of = ["method", "drop_rate"]
    pd.testing.assert_frame_equal(
        found.sort_values(order_of, ignore_index=True), expected.sort_values(order_of, ignore_index=True)
    )
    assert found["method"].unique().tolist() == list(dict.fromkeys(rows[i]["method"] for i in order))


def test_cells_that_failed_are_left_out() -> None:
    wrong = {**cell("DARE", 0.9, 1, []), "metric": None, "outcomes": None}
    curve = drop_curve(pd.DataFrame([cell("DARE", 0.9, 0, [1, 0]), wrong]))
    assert curve[["drop_rate", "seeds", "value"]].to_numpy().tolist() == [[0.9, 1, 0.5]]


def test_the_first_metric_of_the_first_evaluation_of_each_pair() -> None:
    cells = pd.DataFrame(
        [
            cell(method, rate, seed, [1.0], pair=pair, evaluation=evaluation, metric=metric)
            for pair, judged in {
                "b": [("read", "kl"), ("read", "accuracy"), ("asked", "kl")],
                "a": [("asked", "accuracy"), ("text", "perplexity"), ("read", "accuracy")],
            }.items()
            for method in ("DARE", "MP")
            for rate in (0.0, 0.5)
            for seed in range(2)
            for evaluation, metric in judged
        ]
    )
    first = first_metric(cells)
    labels = first[["pair", "evaluation", "metric"]].drop_duplicates().to_numpy().tolist()
    assert labels == [["b", "read", "kl"], ["a", "asked", "accuracy"]]
    # Every cell once, as it was.
    assert len(first) == len(cells) // 3
    pd.testing.assert_frame_equal(first, cells.loc[first.index])
    pd.testing.assert_frame_equal(first_metric(first), first)


@pytest.mark.parametrize("column", ["rescale", "option_by"])
def test_cells_of_other_options_are_no_seeds(column: str) -> None:
    one = cell("TIES", 0.5, 0, [1, 1], **{column: "a"})
    other = cell("TIES", 0.5, 1, [0, 0], **{column: "b"})
    with pytest.raises(ValueError, match=f"cells differ in '{column}'"):
        drop_curve(pd.DataFrame([one, other]))
    assert drop_curve(pd.DataFrame([one, {**other, "method": "another"}]))["seeds"].tolist() == [1, 1]
