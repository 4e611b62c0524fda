"""Foresight on tables made up along known lines; oracles are numpy.polyfit and scipy.stats."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.special import expit
from scipy.special import logit as scipy_logit
from scipy.stats import spearmanr

import delta_analysis as da
from delta_analysis.checkpoints.paths import zoo_model
from delta_analysis.deltas import Delta
from delta_analysis.prediction.predict import (
    LOGITS,
    PREDICTORS,
    Line,
    best_predictor,
    calibration_table,
    fit_line,
    left_out,
    tolerated_drop_rate,
)
from delta_analysis.prediction.predictors import NOISE, NORMS, VALUES, delta_predictors
from delta_analysis.reports.calibration import TEXTS
from delta_analysis.reports.parameter_checks import choose_evaluation
from delta_analysis.studies.foresight import _fine_tune_weights, chosen_anew, compare_predictors, error_difference
from delta_analysis.sweeps.intervals import RESAMPLES
from delta_analysis.sweeps.tolerance import HIGHEST, LOWEST

SaveCheckpoint = Callable[..., Path]
SCOPES = ("all", "attention", "mlp")
INTERCEPT, SLOPE = -1.5, -0.8
COLUMNS = [
    "predictor", "rows", "error", "low", "high", "median_error", "strict_error",
    "rank", "rank_low", "rank_high", "slope", "slope_low", "slope_high",
]  # fmt: skip


def made_up(
    spread: float = 0.0, *, pair_spread: float = 0.0, pairs: int = 14, seed: int = 0, predictors: Sequence[str] = ()
) -> pd.DataFrame:
    """Pairs in three scopes whose tolerance follows `good` along the line, off by a normal error of `spread`.

    Two pairs each share a fine-tune. `fair` is `good` with an error, `bad` and all other predictors
    have nothing to do with it. Each pair also has an error common to its scopes.
    """
    rng = np.random.default_rng(seed)
    pair = np.repeat(np.arange(pairs), len(SCOPES))
    x = rng.uniform(-5, 0, len(pair)) + np.repeat(rng.uniform(-2, 0, pairs), len(SCOPES))
    y = (
        INTERCEPT
        + SLOPE * x
        + spread * rng.normal(size=len(x))
        + np.repeat(pair_spread * rng.normal(size=pairs), len(SCOPES))
    )
    others = {name: np.exp(rng.uniform(-5, 0, len(x))) for name in ("bad", *predictors)}
    return pd.DataFrame(
        {
            "base": [f"base {k}" for k in pair],
            "finetuned": [f"tuned {k // 2}" for k in pair],
            "scope": SCOPES * pairs,
            "numel": 220_000,
            "tolerated": np.clip(expit(y), LOWEST, HIGHEST),
            "good": np.exp(x),
            "fair": np.exp(x + rng.normal(size=len(x))),
            **others,
        }
    )


def measured(table: pd.DataFrame) -> np.ndarray:
    return scipy_logit(table["tolerated"].to_numpy())


def foretold_by_others(table: pd.DataFrame, predictor: str, by: Sequence[str] = ("base", "finetuned")) -> np.ndarray:
    """Row by row, with numpy.polyfit on the inner rows of other groups."""
    found = []
    for _, row in table.iterrows():
        others = table[(table[list(by)] != row[list(by)]).any(axis=1)]
        inner = others[others["tolerated"].between(1.001 * LOWEST, 0.999_999 * HIGHEST)]
        line = np.polyfit(np.log(inner[predictor]), measured(inner), 1)
        found.append(np.clip(np.polyval(line, np.log(row[predictor])), *LOGITS))
    return np.array(found)


# Lines.


def test_the_scale_ends_where_the_search_does() -> None:
    assert scipy_logit([LOWEST, HIGHEST]) == pytest.approx(LOGITS)


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


def test_a_line_is_that_of_least_squares() -> None:
    table = made_up(0.7)
    line = fit_line(table, "fair")
    slope, intercept = np.polyfit(np.log(table["fair"]), measured(table), 1)
    assert line == pytest.approx((intercept, slope))


def censored(table: pd.DataFrame) -> pd.DataFrame:
    """The same with two tolerances at each end of the search, which may be off by rounding."""
    ordered = table["tolerated"].sort_values().index
    table.loc[ordered[:2], "tolerated"] = [LOWEST, LOWEST * (1 + 1e-12)]
    table.loc[ordered[-2:], "tolerated"] = [HIGHEST - 1e-12, HIGHEST]
    return table


def test_rows_at_the_ends_are_not_fitted_on() -> None:
    table = censored(made_up(0.5))
    ends = table.index[(table["tolerated"] < 0.0011) | (table["tolerated"] > 0.9989)]
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


# Each pair foretold by the others.


def test_without_errors_every_pair_is_foretold_exactly() -> None:
    table = made_up()
    for by in (["base", "finetuned"], ["finetuned"]):
        assert left_out(table, "good", by=by).to_numpy() == pytest.approx(measured(table))


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
    foretold = left_out(table, "good")
    assert foretold[[0, 4]].tolist() == pytest.approx([LOGITS[1], LOGITS[0]])
    assert foretold.index.equals(table.index)


def test_the_order_and_index_of_rows_do_not_matter() -> None:
    table = made_up(0.5)
    mixed = table.sample(frac=1, random_state=3)
    pd.testing.assert_series_equal(left_out(mixed, "fair").sort_index(), left_out(table, "fair"))
    shifted = table.set_index(table.index + 100)
    np.testing.assert_allclose(left_out(shifted, "fair"), left_out(table, "fair"))


# Predictors compared.


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return censored(made_up(0.4, pair_spread=0.4))


@pytest.fixture(scope="module")
def compared(table: pd.DataFrame) -> pd.DataFrame:
    return compare_predictors(table, ["bad", "good", "fair"])


def test_predictors_are_in_order_of_error(compared: pd.DataFrame) -> None:
    assert list(compared.columns) == COLUMNS
    assert compared["predictor"].tolist() == ["good", "fair", "bad"]
    assert compared["error"].is_monotonic_increasing
    assert compared.index.tolist() == [0, 1, 2]


def test_errors_ranks_and_slopes_against_others(table: pd.DataFrame, compared: pd.DataFrame) -> None:
    inner = table["tolerated"].between(0.0011, 0.9989)
    for row in compared.to_dict("records"):
        values = table[row["predictor"]]
        errors = measured(table) - foretold_by_others(table, row["predictor"])
        strict = measured(table) - foretold_by_others(table, row["predictor"], ["finetuned"])
        assert row["rows"] == len(table)
        assert row["error"] == pytest.approx(np.sqrt(np.mean(errors**2)))
        assert row["median_error"] == pytest.approx(np.median(np.abs(errors)))
        assert row["strict_error"] == pytest.approx(np.sqrt(np.mean(strict**2)))
        # Equal tolerances at an end share their rank.
        assert row["rank"] == pytest.approx(spearmanr(values, table["tolerated"].round(9)).statistic, abs=0.005)
        assert row["slope"] == pytest.approx(np.polyfit(np.log(values[inner]), measured(table[inner]), 1)[0])


def test_ranks_are_spearmans() -> None:
    table = made_up(0.8)
    for row in compare_predictors(table, ["good", "fair"]).to_dict("records"):
        expected = spearmanr(table[row["predictor"]], table["tolerated"]).statistic
        assert row["rank"] == pytest.approx(expected, abs=1e-12)


def test_values_are_inside_their_intervals(compared: pd.DataFrame) -> None:
    for value, prefix in (("error", ""), ("rank", "rank_"), ("slope", "slope_")):
        assert (compared[f"{prefix}low"] < compared[value]).all()
        assert (compared[value] < compared[f"{prefix}high"]).all()
    # What foretells nothing has a rank correlation and a slope of either sign.
    bad = compared.set_index("predictor").loc["bad"]
    assert bad["rank_low"] < 0 < bad["rank_high"]
    assert bad["slope_low"] < 0 < bad["slope_high"]


def test_a_row_that_one_predictor_lacks_is_left_out_for_all(table: pd.DataFrame) -> None:
    holed = table.copy()
    holed.loc[0, "fair"], holed.loc[1, "good"] = np.nan, 0.0
    found = compare_predictors(holed, ["good", "fair"])
    assert found["rows"].tolist() == [len(table) - 2] * 2
    pd.testing.assert_frame_equal(found, compare_predictors(holed.drop(index=[0, 1]), ["good", "fair"]))
    assert compare_predictors(holed, ["bad"])["rows"].tolist() == [len(table)]


def test_intervals_hold_the_true_slope_where_pairs_have_an_error_of_their_own() -> None:
    """About 95%; a percentile interval of 20 pairs holds it somewhat less often. Standard error 0.03."""
    repetitions = 60
    held = 0
    for seed in range(repetitions):
        (row,) = compare_predictors(made_up(0.2, pair_spread=0.8, pairs=20, seed=seed), ["good"]).to_dict("records")
        held += row["slope_low"] <= SLOPE <= row["slope_high"]
    assert 0.84 < held / repetitions < 1


def test_intervals_are_wider_where_scopes_of_a_pair_err_together() -> None:
    """Equal errors, once of each row and once of each pair: resampled are pairs."""

    def width(spread: float, pair_spread: float, seed: int) -> float:
        table = made_up(spread, pair_spread=pair_spread, seed=seed)
        found = error_difference(table, "good", "bad")
        return found.high - found.low

    alone, together = (np.mean([width(*how, seed) for seed in range(8)]) for how in ((1.2, 0.0), (0.0, 1.2)))
    assert together > 1.15 * alone


def widths(table: pd.DataFrame) -> np.ndarray:
    found = compare_predictors(table, ["good", "fair"])
    return np.concatenate([found["high"] - found["low"], found["slope_high"] - found["slope_low"]])


def test_more_bases_of_the_same_fine_tunes_narrow_no_interval_much() -> None:
    """Twice the pairs, and as many fine-tunes: resampled are fine-tunes, and a copy tells nothing new."""
    table = made_up(0.5, pair_spread=0.5, pairs=20)
    copied = table.assign(base=table["base"] + " again")
    twice = pd.concat([table, copied], ignore_index=True)
    assert widths(twice) == pytest.approx(widths(table), rel=0.1)
    # As fine-tunes of their own they would.
    others = pd.concat([table, copied.assign(finetuned=table["finetuned"] + " again")], ignore_index=True)
    assert (widths(others) < 0.85 * widths(table)).all()


def test_rows_of_a_fine_tune_are_drawn_together() -> None:
    table = made_up(pairs=6).sample(frac=1, random_state=1)
    weights = _fine_tune_weights(table)
    count = table["finetuned"].nunique()
    assert weights.shape == (RESAMPLES, len(table))
    one_each = []
    for rows in table.groupby("finetuned").indices.values():
        assert (weights[:, rows] == weights[:, rows[:1]]).all()
        one_each.append(weights[:, rows[0]])
    assert (np.sum(one_each, axis=0) == count).all()


def test_the_best_predictor_is_the_first_of_the_comparison(table: pd.DataFrame, compared: pd.DataFrame) -> None:
    assert best_predictor(table, ["bad", "good", "fair"]) == compared["predictor"].iloc[0] == "good"
    assert best_predictor(table, ["bad", "fair"]) == "fair"
    assert best_predictor(table, ["bad"]) == "bad"
    same = table.assign(same=table["good"])
    assert best_predictor(same, ["same", "good"]) == "same"
    assert best_predictor(same, ["good", "same"]) == "good"
    # One that is missing where it would err most does not gain by it.
    errors = pd.Series(np.abs(measured(table) - left_out(table, "good")))
    holed = table.assign(lucky=table["good"].where(errors < errors.median()))
    assert best_predictor(holed, ["good", "lucky"]) == "good"


def test_the_predictor_too_is_chosen_without_the_pair(table: pd.DataFrame) -> None:
    # One pair, far off, decides which of two predictors is the better one: for itself it cannot.
    own = table["base"] == "base 3"
    twin = table["good"] * np.exp(np.random.default_rng(1).normal(size=len(table)) / 3)
    odd = table.assign(
        twin=twin.where(~own, table["good"] * np.exp(8)), tolerated=table["tolerated"].where(~own, 0.002)
    )
    predictors = ["good", "twin"]
    foretold = chosen_anew(odd, predictors)
    for pair in odd["base"].unique():
        others, this = odd[odd["base"] != pair], odd["base"] == pair
        best = best_predictor(others, predictors)
        np.testing.assert_array_equal(foretold[this], fit_line(others, best).at(odd.loc[this, best]))
    moved = chosen_anew(odd.assign(tolerated=odd["tolerated"].where(~own, 0.9)), predictors)
    np.testing.assert_array_equal(moved[own], foretold[own])
    assert (moved[~own] != foretold[~own]).all()
    holed = chosen_anew(odd.assign(twin=odd["twin"].where(odd.index != 5)), predictors)
    assert holed.isna().to_numpy().nonzero()[0].tolist() == [5]


def test_error_difference_is_positive_where_the_first_is_worse(table: pd.DataFrame, compared: pd.DataFrame) -> None:
    errors = compared.set_index("predictor")["error"]
    found = error_difference(table, "bad", "good")
    assert found.value == pytest.approx(errors["bad"] - errors["good"])
    assert 0 < found.low < found.value < found.high
    reverse = error_difference(table, "good", "bad")
    assert reverse == pytest.approx((-found.value, -found.high, -found.low))
    assert error_difference(table, "good", "good") == (0, 0, 0)
    holed = table.copy()
    holed.loc[3, "bad"] = np.nan
    assert error_difference(holed, "bad", "good") == error_difference(table.drop(index=3), "bad", "good")


# Foretelling a delta.


@pytest.fixture(scope="module")
def delta() -> Delta:
    return da.load_delta(base="zoo:tiny/base", finetuned="zoo:tiny/math")


def fitted(delta: Delta, best: str, spread: float = 0.0, *, shift: float = 0.0, **options: object) -> pd.DataFrame:
    """A table in which one predictor foretells, around the delta's own value; `shift` moves the others away from it."""
    table = made_up(spread, predictors=PREDICTORS, **options)  # type: ignore[arg-type]
    (own,) = delta_predictors(delta, ["all"], INPUTS).to_dict("records")
    x = np.log(table["good"])
    return table.assign(**{best: np.exp(x - x.mean() + shift) * own[best]})


INPUTS = ["2 plus 3 is 5\n", "12 plus 30 is 42\n"]


def line_of(table: pd.DataFrame, predictor: str) -> tuple[float, float]:
    slope, intercept = np.polyfit(np.log(table[predictor]), measured(table), 1)
    return slope, intercept


@pytest.mark.parametrize("best", ["norms_rss", "abs_p99", "share_above_0.002"])
def test_without_inputs_norms_and_values_foretell(delta: Delta, best: str) -> None:
    # The noise in the layers would foretell as well, and is not looked at.
    table = fitted(delta, best)
    table["noise_sum"] = table["good"]
    found = tolerated_drop_rate(delta, table=table)
    assert found.predictor == best
    assert found.value == delta_predictors(delta)[best].item()
    expected = expit(np.polyval(line_of(table, best), np.log(found.value)))
    # All errors are zero.
    assert (found.tolerated, found.low, found.high) == pytest.approx((expected,) * 3)
    assert found.outside == ()


def test_with_inputs_the_noise_in_layers_foretells(delta: Delta) -> None:
    table = fitted(delta, "noise_mean")
    table["norms_sum"] = table["good"]
    found = tolerated_drop_rate(delta, INPUTS, table=table)
    assert found.predictor == "noise_mean"
    assert found.value == delta_predictors(delta, ["all"], INPUTS)["noise_mean"].item()
    expected = expit(np.polyval(line_of(table, "noise_mean"), np.log(found.value)))
    assert found.tolerated == pytest.approx(expected)
    assert tolerated_drop_rate(delta, INPUTS[:1], table=table).value != found.value


def test_the_interval_is_of_errors_on_other_fine_tunes(delta: Delta) -> None:
    table = fitted(delta, "norms_sum", 0.6, pair_spread=0.4)
    found = tolerated_drop_rate(delta, table=table)
    assert found.predictor == "norms_sum"
    errors = measured(table) - foretold_by_others(table, "norms_sum", ["finetuned"])
    ends = scipy_logit(found.tolerated) + np.quantile(errors, [0.025, 0.975])
    assert scipy_logit([found.low, found.high]) == pytest.approx(ends)
    assert found.low < found.tolerated < found.high


@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 99), shift=st.floats(-12, 12))
def test_the_interval_holds_the_value_and_ends_with_the_search(delta: Delta, seed: int, shift: float) -> None:
    found = tolerated_drop_rate(delta, table=fitted(delta, "rms", 0.5, seed=seed, shift=shift))
    assert LOWEST * (1 - 1e-9) <= found.low <= found.tolerated <= found.high <= HIGHEST * (1 + 1e-9)


@pytest.mark.parametrize(("shift", "end"), [(14.0, HIGHEST), (-14.0, LOWEST)])
def test_beyond_the_search_its_end_is_foretold(delta: Delta, shift: float, end: float) -> None:
    found = tolerated_drop_rate(delta, table=fitted(delta, "rms", 0.3, shift=shift))
    assert found.tolerated == pytest.approx(end)
    assert found.low == pytest.approx(end) if end == LOWEST else found.low < end
    assert found.high == pytest.approx(end) if end == HIGHEST else found.high > end
    value, bound = found.outside
    assert value.startswith("its rms is ")
    assert bound.startswith("the rate that is foretold lies at an end")


def test_a_scope_has_its_own_value(delta: Delta) -> None:
    table = fitted(delta, "norms_sum")
    found = {scope: tolerated_drop_rate(delta, scope=scope, table=table) for scope in ("all", "mlp", "norms")}
    values = delta_predictors(delta, list(found))["norms_sum"].tolist()
    assert [each.value for each in found.values()] == values
    # Less is dropped, so more of it.
    assert found["all"].tolerated < found["mlp"].tolerated
    with pytest.raises(ValueError, match="scope 'no.such' selects none"):
        tolerated_drop_rate(delta, scope="no.such", table=table)


def test_a_delta_of_zero_cannot_be_foretold(save_checkpoint: SaveCheckpoint) -> None:
    same = da.load_delta(base="zoo:tiny/math", finetuned="zoo:tiny/math")
    for inputs in (None, INPUTS):
        with pytest.raises(ValueError, match=r"scope 'all': \w+ is 0 there, .*the delta is zero there"):
            tolerated_drop_rate(same, inputs)
    start = {"a.weight": torch.ones(4, 3), "b.weight": torch.ones(4, 3)}
    base, tuned = (
        save_checkpoint("base", start),
        save_checkpoint("tuned", start | {"b.weight": torch.full((4, 3), 2.0)}),
    )
    partly = da.load_delta(base=base, finetuned=tuned)
    assert tolerated_drop_rate(partly).value > 0
    with pytest.raises(ValueError, match=r"scope 'a\.\*': \w+ is 0 there"):
        tolerated_drop_rate(partly, scope="a.*")


@pytest.mark.parametrize("factor", [30, 1 / 30])
def test_a_model_of_another_size_is_outside(delta: Delta, factor: float) -> None:
    table = fitted(delta, "norms_sum")
    for near in (9, 1 / 9):
        assert tolerated_drop_rate(delta, table=table.assign(numel=table["numel"] * near)).outside == ()
    table["numel"] *= factor
    found = tolerated_drop_rate(delta, table=table)
    size = f"{0.22 * factor:.2g}"
    assert found.outside == (
        f"it has 0.22 million entries, and the models that were measured {size} to {size} million",
    )


@pytest.mark.parametrize("shift", [9.0, -9.0])
def test_a_value_beyond_those_fitted_on_is_outside(delta: Delta, shift: float) -> None:
    table = fitted(delta, "norms_sum", 0.2, shift=shift).assign(numel=1)
    found = tolerated_drop_rate(delta, table=table)
    # The rate that is foretold may be at an end too.
    value, size = found.outside[:2]
    low, high = table["norms_sum"].agg(["min", "max"])
    assert value == f"its norms_sum is {found.value:.3g}, and {low:.3g} to {high:.3g} where the line was fitted"
    assert "million entries" in size


def test_the_ends_of_a_rounded_table_are_inside(delta: Delta) -> None:
    table = fitted(delta, "norms_sum")
    own = delta_predictors(delta)["norms_sum"].item()
    for end in (own * (1 + 1e-5), own * (1 - 1e-5)):
        moved = table.assign(norms_sum=table["norms_sum"] / table["norms_sum"].agg("min" if end > own else "max") * end)
        assert tolerated_drop_rate(delta, table=moved).outside == ()


def test_an_adapter_is_foretold(tmp_path: Path) -> None:
    """Its delta is computed, not read: here of one matrix, W = B A."""
    name = "model.layers.0.self_attn.q_proj"
    base = load_file(zoo_model("zoo:tiny/base") / "model.safetensors")[f"{name}.weight"].float()
    factors = torch.randn(2, len(base), generator=torch.Generator().manual_seed(0)) / 30
    tensors = {f"base_model.model.{name}.lora_A.weight": factors, f"base_model.model.{name}.lora_B.weight": factors.T}
    save_file({key: each.contiguous() for key, each in tensors.items()}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = da.load_delta(base="zoo:tiny/base", finetuned=tmp_path)
    table = fitted(adapter, "norms_sum")
    product = factors.T @ factors
    for inputs in (None, INPUTS):
        found = tolerated_drop_rate(adapter, inputs, table=table)
        assert 0 < found.tolerated < 1
    found = tolerated_drop_rate(adapter, table=table)
    assert found.value == pytest.approx(float(product.square().sum() / (base + product).square().sum()), rel=1e-4)
    # 4096 entries, of 220,000 where the line was fitted.
    (size,) = found.outside
    assert size.startswith("it has 0.0041 million entries")


# The committed table.


def test_a_change_of_the_table_stays_with_its_owner() -> None:
    mine = calibration_table()
    mine["tolerated"] = 0.5
    assert not calibration_table()["tolerated"].eq(0.5).all()


def test_the_committed_table_can_be_fitted_on() -> None:
    table = calibration_table()
    assert set(PREDICTORS) == {*NOISE, *NORMS, *VALUES} <= set(table.columns)
    assert table[list(PREDICTORS)].gt(0).all(axis=None)
    assert table["tolerated"].between(LOWEST, HIGHEST).all()
    assert (table["low"] <= table["tolerated"]).all()
    assert (table["tolerated"] <= table["high"]).all()
    assert not table.duplicated(["base", "finetuned", "scope"]).any()


@pytest.mark.parametrize("finetuned", ["instruct", "code"])
def test_an_embedded_pair_that_is_not_fitted_on_is_foretold(finetuned: str) -> None:
    """The measured tolerance lies in the interval foretold from other fine-tunes, with and without inputs."""
    table = calibration_table()
    source = f"zoo:tiny/{finetuned}"
    own = table[(table["finetuned"] == source) & (table["base"] == "zoo:tiny/base") & (table["scope"] == "all")].iloc[0]
    delta = da.load_delta(base="zoo:tiny/base", finetuned=source)
    for inputs in (None, choose_evaluation(finetuned, TEXTS).texts):
        found = tolerated_drop_rate(delta, inputs, table=table[table["finetuned"] != source])
        assert found.low < own["tolerated"] < found.high
        assert found.outside == ()
        with_it = tolerated_drop_rate(delta, inputs)
        assert with_it.predictor in (NOISE if inputs else (*NORMS, *VALUES))
        assert with_it.value == pytest.approx(own[with_it.predictor], rel=1e-4)
