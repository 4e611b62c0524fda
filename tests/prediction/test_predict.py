"""Foresight on tables made up along known lines, against numpy.polyfit; and of embedded pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.special import logit as scipy_logit

import delta_analysis as da
from delta_analysis.checkpoints.provenance import content_hash
from delta_analysis.deltas import Delta
from delta_analysis.prediction.predict import (
    LOGITS,
    WITH_INPUTS,
    WITHOUT_INPUTS,
    Line,
    calibration_table,
    fit_line,
    foretell,
    left_out,
)
from delta_analysis.sweeps.tolerance import HIGHEST, LOWEST
from tests.prediction.made_up import censored, foretold_by_others, made_up, measured

SaveCheckpoint = Callable[..., Path]
INPUTS = ["2 plus 3 is 5\n", "12 plus 30 is 42\n"]


@given(
    intercept=st.floats(-20, 20),
    slope=st.floats(-10, 10),
    values=st.lists(st.floats(1e-8, 1e3), min_size=1, max_size=5),
)
def test_what_a_line_foretells_is_within_the_search(intercept: float, slope: float, values: list[float]) -> None:
    line = Line(intercept, slope)
    found = line.at(np.array(values))
    assert ((LOGITS[0] <= found) & (found <= LOGITS[1])).all()
    assert found == pytest.approx(np.clip(intercept + slope * np.log(values), *LOGITS))
    assert [float(line.at(value)) for value in values] == pytest.approx(found.tolist())
    index = [7 * k for k in range(len(values))]
    assert np.asarray(line.at(pd.Series(values, index))) == pytest.approx(found)


@settings(deadline=None, max_examples=25)
@given(intercept=st.floats(-3, 3), slope=st.floats(-1.5, 1.5), seed=st.integers(0, 99))
def test_a_known_line_is_found(intercept: float, slope: float, seed: int) -> None:
    table = made_up(seed=seed)
    table["tolerated"] = np.clip(expit(intercept + slope * np.log(table["good"])), 0.002, 0.998)
    on_it = table[table["tolerated"].between(0.0021, 0.9979)]
    if len(on_it) > 2:
        assert fit_line(on_it, "good") == pytest.approx((intercept, slope), abs=1e-6)


def test_rows_at_the_ends_are_not_fitted_on() -> None:
    table = censored(made_up(0.5))
    ends = table.index[table["reading"] != "measured"]
    assert len(ends) == 4
    assert fit_line(table, "good") == fit_line(table.drop(index=ends), "good")
    assert fit_line(table, "good") != pytest.approx(fit_line(made_up(0.5), "good"))
    # So their predictors do not matter either.
    moved = table.copy()
    moved.loc[ends, "good"] *= 1e6
    assert fit_line(moved, "good") == fit_line(table, "good")


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_rows_without_the_predictor_are_not_fitted_on(value: float) -> None:
    table = made_up(0.5)
    table.loc[[1, 5], "good"] = value
    assert fit_line(table, "good") == fit_line(table.drop(index=[1, 5]), "good")
    foretold = left_out(table, "good")
    assert foretold.isna().to_numpy().nonzero()[0].tolist() == [1, 5]
    pd.testing.assert_series_equal(foretold.dropna(), left_out(table.drop(index=[1, 5]), "good"))


@pytest.mark.parametrize("by", [("base", "finetuned"), ("finetuned",)], ids=["pair", "fine-tune"])
def test_left_out_against_fits_row_by_row(by: Sequence[str]) -> None:
    table = censored(made_up(0.8, pair_spread=0.5))
    assert left_out(table, "fair", by=by).to_numpy() == pytest.approx(foretold_by_others(table, "fair", by))


@settings(deadline=None, max_examples=20)
@given(pair=st.integers(0, 13), tolerated=st.floats(0.01, 0.99), seed=st.integers(0, 9))
def test_a_pair_does_not_help_to_foretell_itself(pair: int, tolerated: float, seed: int) -> None:
    table = made_up(0.5, seed=seed)
    own, tuned = table["base"] == f"base {pair}", table["finetuned"] == f"tuned {pair // 2}"
    other = table.copy()
    other.loc[own, "tolerated"] = tolerated
    before, after = left_out(table, "good"), left_out(other, "good")
    np.testing.assert_array_equal(before[own], after[own])
    assert (before[~own] != after[~own]).all()
    before, after = (left_out(each, "good", by=["finetuned"]) for each in (table, other))
    np.testing.assert_array_equal(before[tuned], after[tuned])
    assert (before[~tuned] != after[~tuned]).all()


def test_rows_at_the_ends_are_foretold_within_the_search() -> None:
    table = made_up(0.3)
    table.loc[[0, 4], "good"] = [1e-12, 1e12]
    table.loc[[0, 4], "tolerated"] = [HIGHEST, LOWEST]
    table.loc[[0, 4], "reading"] = ["at least", "at most"]
    foretold = left_out(table, "good")
    assert foretold[[0, 4]].tolist() == pytest.approx([LOGITS[1], LOGITS[0]])
    assert foretold.index.equals(table.index)


def test_the_order_and_index_of_rows_do_not_matter() -> None:
    table = made_up(0.5)
    mixed = table.sample(frac=1, random_state=3)
    pd.testing.assert_series_equal(left_out(mixed, "fair").sort_index(), left_out(table, "fair"))
    shifted = table.set_index(table.index + 100)
    np.testing.assert_allclose(left_out(shifted, "fair"), left_out(table, "fair"))


@pytest.fixture(scope="module")
def delta() -> Delta:
    return da.load_delta(base="zoo:tiny/base", finetuned="zoo:tiny/math")


def around(value: float, spread: float = 0.0, *, shift: float = 0.0, **options: float) -> pd.DataFrame:
    """A table whose `good` lies around a value; `shift` moves it away."""
    table = made_up(spread, **options)  # type: ignore[arg-type]
    x = np.log(table["good"])
    return table.assign(good=np.exp(x - x.mean() + shift) * value)


def test_the_interval_is_of_errors_on_other_fine_tunes(delta: Delta) -> None:
    table = around(0.3, 0.6, pair_spread=0.4)
    found = foretell(delta, "good", 0.3, table)
    line = np.polyfit(np.log(table["good"]), measured(table), 1)
    assert scipy_logit(found.tolerated) == pytest.approx(np.polyval(line, np.log(0.3)))
    errors = measured(table) - foretold_by_others(table, "good", ["finetuned"])
    ends = scipy_logit(found.tolerated) + np.quantile(errors, [0.025, 0.975])
    assert scipy_logit([found.low, found.high]) == pytest.approx(ends)
    assert found.low < found.tolerated < found.high
    assert (found.predictor, found.value, found.outside) == ("good", 0.3, ())


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), shift=st.floats(-12, 12))
def test_the_interval_holds_the_value_and_ends_with_the_search(delta: Delta, seed: int, shift: float) -> None:
    found = foretell(delta, "good", 0.3, around(0.3, 0.5, seed=seed, shift=shift))
    assert LOWEST * (1 - 1e-9) <= found.low <= found.tolerated <= found.high <= HIGHEST * (1 + 1e-9)


@pytest.mark.parametrize(("shift", "end"), [(14.0, HIGHEST), (-14.0, LOWEST)])
def test_beyond_the_search_its_end_is_foretold(delta: Delta, shift: float, end: float) -> None:
    table = around(0.3, 0.3, shift=shift)
    found = foretell(delta, "good", 0.3, table)
    assert found.tolerated == pytest.approx(end)
    assert found.low == pytest.approx(end) if end == LOWEST else found.low < end
    assert found.high == pytest.approx(end) if end == HIGHEST else found.high > end
    low, high = table["good"].agg(["min", "max"])
    value, bound = found.outside
    assert value == f"its good is 0.3, and {low:.3g} to {high:.3g} where the line was fitted"
    assert bound.startswith("the rate that is foretold lies at an end")


@pytest.mark.parametrize("factor", [30, 1 / 30])
def test_a_model_of_another_size_is_outside(delta: Delta, factor: float) -> None:
    table = around(0.3)
    for near in (9, 1 / 9):
        assert foretell(delta, "good", 0.3, table.assign(numel=table["numel"] * near)).outside == ()
    size = f"{0.22 * factor:.2g}"
    assert foretell(delta, "good", 0.3, table.assign(numel=table["numel"] * factor)).outside == (
        f"it has 0.22 million entries, and the models that were measured {size} to {size} million",
    )


@pytest.mark.parametrize("rounding", [1 + 1e-5, 1 - 1e-5])
def test_the_ends_of_a_rounded_table_are_inside(delta: Delta, rounding: float) -> None:
    good = around(0.3)["good"]
    table = around(0.3).assign(good=good / good.agg("min" if rounding > 1 else "max") * 0.3 * rounding)
    assert foretell(delta, "good", 0.3, table).outside == ()


# The committed table: where these fail, measure again with `python -m delta_analysis.reports.calibration`.


def test_a_change_of_the_table_stays_with_its_owner() -> None:
    mine = calibration_table()
    mine["tolerated"] = 0.5
    assert not calibration_table()["tolerated"].eq(0.5).all()


def test_the_committed_table_can_be_fitted_on() -> None:
    table = calibration_table()
    assert table[[WITH_INPUTS, WITHOUT_INPUTS]].gt(0).all(axis=None)
    assert table["tolerated"].between(LOWEST, HIGHEST).all()
    bounds = table[table["tolerated"].isin([table["tolerated"].max(), LOWEST])]
    assert bounds["reading"].isin(["at least", "at most"]).all()
    assert (table["low"] <= table["tolerated"]).all()
    assert (table["tolerated"] <= table["high"]).all()
    assert not table.duplicated(["base", "finetuned", "scope"]).any()
    for side in ("base", "finetuned"):
        hashes = table.drop_duplicates(side).set_index(side)[f"{side}_hash"]
        assert {source: content_hash(source) for source in hashes.index} == hashes.to_dict()
        assert table.groupby(side)[f"{side}_hash"].nunique().eq(1).all()
