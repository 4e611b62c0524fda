"""Predictors of tolerances: by hand, and compared on tables made up along a known line; oracles are numpy and scipy."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.stats import spearmanr
from transformers import MambaConfig, MambaForCausalLM

import delta_analysis as da
from delta_analysis.checkpoints.paths import zoo_model
from delta_analysis.deltas import Delta
from delta_analysis.prediction import calibration_table, delta_noise, fit_line, left_out
from delta_analysis.prediction.predict import WITH_INPUTS, WITHOUT_INPUTS
from delta_analysis.reports.calibration import TEXTS, WHOLE
from delta_analysis.reports.parameter_checks import choose_evaluation
from delta_analysis.studies.foresight import (
    LEAST_SHARE,
    NOISE,
    NORMS,
    PREDICTORS,
    SUMMARIES,
    VALUES,
    best_predictor,
    chosen_anew,
    compare_predictors,
    delta_predictors,
    error_difference,
    noise_predictors,
    value_predictors,
)
from delta_analysis.zoo.tokenizer import character_tokenizer
from tests.prediction.made_up import SLOPE, censored, foretold_by_others, made_up, measured
from tests.tiny_family import EMBED, NORM, QUERY, UP

SaveCheckpoint = Callable[..., Path]
COLUMNS = [
    "predictor", "rows", "error", "low", "high", "median_error", "strict_error",
    "rank", "rank_low", "rank_high", "slope", "slope_low", "slope_high",
]  # fmt: skip
WITHIN = ["all", "attention", "mlp", "embeddings", "norms", "*.layers.0.*,*embed*"]
INPUTS = ["some text", "2 plus 3 is 5\n"]


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
    inner = table["reading"] == "measured"
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


# Predictors by hand.


@pytest.fixture(scope="module")
def delta() -> Delta:
    return da.load_delta(base="zoo:tiny/base", finetuned="zoo:tiny/math")


def weights(name: str) -> dict[str, torch.Tensor]:
    return {key: each.double() for key, each in load_file(zoo_model(f"zoo:tiny/{name}") / "model.safetensors").items()}


def shares(values: dict[str, list[float]]) -> pd.DataFrame:
    """A table of noise shares, with a row for each use of a tensor."""
    rows = [(name, share) for name, found in values.items() for share in found]
    return pd.DataFrame(rows, columns=["tensor", "noise_share"])


def test_summaries_by_hand() -> None:
    table = shares({"a": [3.0], "b": [4.0, 12.0], "c": [100.0], "d": [math.nan]})
    # The tied tensor has two uses, and one without output has no share.
    assert noise_predictors(table, ["a", "b", "d"]) == {
        "noise_largest": 12, "noise_rss": 13, "noise_sum": 19, "noise_mean": pytest.approx(19 / 3), "noise_median": 4,
    }  # fmt: skip
    assert set(noise_predictors(table, ["c"], prefix="norms").values()) == {100}
    assert list(noise_predictors(table, ["c"], prefix="norms")) == list(NORMS)


@pytest.mark.parametrize("tensors", [[], ["elsewhere"], ["d"]], ids=["none", "without a row", "without a share"])
def test_without_a_share_summaries_are_missing(tensors: list[str]) -> None:
    found = noise_predictors(shares({"a": [3.0], "d": [math.nan]}), tensors)
    assert list(found) == list(NOISE)
    assert all(math.isnan(value) for value in found.values())


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20))
def test_summaries_are_in_the_order_of_size(values: list[float]) -> None:
    found = noise_predictors(shares({"a": values}), ["a"])
    largest, rss, total, mean, median = (found[f"noise_{summary}"] for summary in SUMMARIES)
    assert largest <= rss * (1 + 1e-9)
    assert rss <= total * (1 + 1e-9)
    assert max(mean, median) <= largest * (1 + 1e-9)
    assert total == pytest.approx(mean * len(values))
    assert rss == pytest.approx(math.hypot(*values))


@pytest.mark.parametrize(
    ("scope", "inside", "outside"),
    [
        ("attention", QUERY, UP),
        ("mlp", UP, QUERY),
        ("embeddings", EMBED, NORM),
        ("norms", NORM, EMBED),
        ("*.layers.0.*", UP, EMBED),
        ("mlp,norms", NORM, QUERY),
    ],
)
def test_a_scope_selects_tensors(delta: Delta, scope: str, inside: str, outside: str) -> None:
    part = delta.select(scope)
    assert inside in part
    assert outside not in part
    assert torch.equal(part[inside], delta[inside])
    assert list(part) == [name for name in delta if name in part]


def test_everything_is_in_all_and_edits_stay(delta: Delta) -> None:
    assert list(delta.select("all")) == list(delta)
    edited = delta.pruned(da.Dare(1.0), seed=0).select("mlp")
    assert set(edited) == set(delta.select("mlp"))
    assert not edited[UP].any()


def test_a_scope_that_selects_nothing(delta: Delta) -> None:
    for call in (lambda: delta.select("*nowhere*"), lambda: delta_predictors(delta, ["all", "*nowhere*"])):
        with pytest.raises(ValueError, match=r"scope '\*nowhere\*' selects none"):
            call()


def test_values_by_hand(save_checkpoint: SaveCheckpoint) -> None:
    start = torch.tensor([[1.0, -1.0, 1.0, 1.0], [1.0, 1.0, 1.0, -1.0]])
    change = torch.tensor([[0.0, 0.001, -0.001, 0.25], [0.25, -0.25, 0.5, -0.5]])
    base, tuned = (save_checkpoint(n, {"a.weight": w}) for n, w in (("base", start), ("tuned", start + change)))
    found = value_predictors(da.load_delta(base=base, finetuned=tuned))
    rms = math.sqrt(float((start + change - start).square().mean()))
    assert list(found) == list(VALUES)
    assert found["rms"] == pytest.approx(rms)
    assert found["relative_rms"] == pytest.approx(rms)
    # Ranks 4 and 8 of 8; quantiles are known to 0.4%.
    assert found["abs_p50"] == pytest.approx(0.25, rel=0.004)
    assert found["abs_p99"] == pytest.approx(0.5, rel=0.004)
    assert found["abs_max"] == 0.5
    assert found["share_above_0.002"] == pytest.approx(5 / 8)


@pytest.mark.parametrize("change", [0.0, 0.001], ids=["no delta", "a small one"])
def test_a_share_of_zero_above_the_limit_has_a_logarithm(save_checkpoint: SaveCheckpoint, change: float) -> None:
    base, tuned = (
        save_checkpoint(n, {"a.weight": torch.ones(5, 4) + d}) for n, d in (("base", 0.0), ("tuned", change))
    )
    found = value_predictors(da.load_delta(base=base, finetuned=tuned))
    assert found["share_above_0.002"] == LEAST_SHARE > 0
    assert (found["rms"] > 0) == (change > 0)


def test_predictors_of_scopes_against_sums_of_squares(delta: Delta) -> None:
    start, tuned = weights("base"), weights("math")
    table = delta_predictors(delta, WITHIN)
    assert list(table.columns) == ["scope", *NOISE, *NORMS, *VALUES]
    assert table["scope"].tolist() == WITHIN
    assert table[list(NOISE)].isna().all(axis=None)
    for scope, row in zip(WITHIN, table.to_dict("records"), strict=True):
        part = {name: tuned[name] - start[name] for name in delta.select(scope)}
        ratios = [float(each.square().sum() / tuned[name].square().sum()) for name, each in part.items()]
        assert row["norms_largest"] == pytest.approx(max(ratios))
        assert row["norms_rss"] == pytest.approx(math.hypot(*ratios))
        assert row["norms_sum"] == pytest.approx(sum(ratios))
        assert row["norms_mean"] == pytest.approx(np.mean(ratios))
        assert row["norms_median"] == pytest.approx(np.median(ratios))
        entries = torch.cat([tensor.flatten() for tensor in part.values()])
        base = torch.cat([start[name].flatten() for name in part])
        assert row["rms"] == pytest.approx(float(entries.square().mean().sqrt()))
        assert row["relative_rms"] == pytest.approx(float((entries.square().mean() / base.square().mean()).sqrt()))
        assert row["abs_max"] == pytest.approx(float(entries.abs().max()))
        assert row["share_above_0.002"] == pytest.approx(float((entries.abs() >= 0.002).double().mean()))
        assert row["abs_p50"] == pytest.approx(float(entries.abs().median()), rel=0.005)


def test_with_inputs_noise_is_that_of_the_layers(delta: Delta) -> None:
    table = delta_predictors(delta, WITHIN, INPUTS)
    noise = delta_noise(delta, INPUTS)
    # The embedding is tied to the head, and its noise counts in both.
    assert (noise["tensor"] == EMBED).sum() == 2
    for scope, row in zip(WITHIN, table.to_dict("records"), strict=True):
        expected = noise_predictors(noise, list(delta.select(scope)))
        assert {name: row[name] for name in NOISE} == expected
    without = delta_predictors(delta, WITHIN)
    pd.testing.assert_frame_equal(table.drop(columns=[*NOISE]), without.drop(columns=[*NOISE]))


def test_without_a_base_the_weights_are_the_delta() -> None:
    (row,) = delta_predictors(da.load_delta(base=None, finetuned="zoo:tiny/math")).to_dict("records")
    assert row["norms_largest"] == row["norms_median"] == 1
    assert row["abs_max"] == max(float(weight.abs().max()) for weight in weights("math").values())
    assert math.isnan(row["relative_rms"])


def test_tensors_that_no_layer_multiplies_have_no_noise(tmp_path: Path) -> None:
    """A parameter that the model uses in its own way: nothing is known with inputs, norms and values are."""
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=97, hidden_size=8, state_size=4, num_hidden_layers=1, conv_kernel=2, time_step_rank=2
    )
    model = MambaForCausalLM(config)
    for name in ("base", "tuned"):
        model.save_pretrained(tmp_path / name)
        character_tokenizer().save_pretrained(tmp_path / name)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    delta = da.load_delta(base=tmp_path / "base", finetuned=tmp_path / "tuned")
    with pytest.warns(UserWarning, match="tensors are not in the table, such as"):
        everything, alone = delta_predictors(delta, ["all", "*.A_log"], INPUTS).to_dict("records")
    assert everything["noise_sum"] > 0
    assert all(math.isnan(alone[name]) for name in NOISE)
    assert min(alone[name] for name in (*NORMS, "rms")) > 0


def test_what_foretells_is_the_best_of_its_kind_on_the_committed_table() -> None:
    table = calibration_table()
    assert table[list(PREDICTORS)].gt(0).all(axis=None)
    assert best_predictor(table, NOISE) == WITH_INPUTS
    assert best_predictor(table, (*NORMS, *VALUES)) == WITHOUT_INPUTS


@pytest.mark.parametrize(("base", "finetuned"), [("base", "instruct"), ("base", "code")])
def test_the_committed_predictors_are_those_computed_now(base: str, finetuned: str) -> None:
    table = calibration_table()
    rows = table[(table["base"] == f"zoo:tiny/{base}") & (table["finetuned"] == f"zoo:tiny/{finetuned}")]
    delta = da.load_delta(base=f"zoo:tiny/{base}", finetuned=f"zoo:tiny/{finetuned}")
    assert rows["numel"].unique().tolist() == [sum(tensor.numel() for tensor in delta.values())]
    inputs = choose_evaluation(rows["task"].iloc[0], WHOLE.items).texts[:TEXTS]
    found = delta_predictors(delta, rows["scope"].tolist(), inputs)
    # Six digits are kept; sums in another order differ in the last ones.
    pd.testing.assert_frame_equal(rows[found.columns].reset_index(drop=True), found, rtol=1e-4, check_dtype=False)
