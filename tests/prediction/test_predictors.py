"""Predictors by hand: summaries of noise shares, values of a part of a delta, and the committed table."""

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
from transformers import MambaConfig, MambaForCausalLM

import delta_analysis as da
from delta_analysis.checkpoints.paths import zoo_model
from delta_analysis.checkpoints.provenance import content_hash
from delta_analysis.deltas import Delta
from delta_analysis.prediction.layers import delta_noise
from delta_analysis.prediction.predict import calibration_table, tolerated_drop_rate
from delta_analysis.prediction.predictors import (
    LEAST_SHARE,
    NOISE,
    NORMS,
    SUMMARIES,
    VALUES,
    delta_predictors,
    noise_predictors,
    value_predictors,
    within,
)
from delta_analysis.reports.calibration import QUESTIONS, TEXTS
from delta_analysis.reports.parameter_checks import choose_evaluation
from delta_analysis.zoo.tokenizer import character_tokenizer
from tests.tiny_family import EMBED, NORM, QUERY, UP

SaveCheckpoint = Callable[..., Path]
SCOPES = ["all", "attention", "mlp", "embeddings", "norms", "*.layers.0.*,*embed*"]
INPUTS = ["some text", "2 plus 3 is 5\n"]


@pytest.fixture(scope="module")
def delta() -> Delta:
    return da.load_delta(base="zoo:tiny/base", finetuned="zoo:tiny/math")


def weights(name: str) -> dict[str, torch.Tensor]:
    return {key: each.double() for key, each in load_file(zoo_model(f"zoo:tiny/{name}") / "model.safetensors").items()}


def shares(values: dict[str, list[float]]) -> pd.DataFrame:
    """A table of noise shares, with a row for each use of a tensor."""
    rows = [(name, share) for name, found in values.items() for share in found]
    return pd.DataFrame(rows, columns=["tensor", "noise_share"])


def test_names_are_in_order() -> None:
    assert NOISE == ("noise_largest", "noise_rss", "noise_sum", "noise_mean", "noise_median")
    assert NORMS == ("norms_largest", "norms_rss", "norms_sum", "norms_mean", "norms_median")


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
    part = within(delta, scope)
    assert inside in part
    assert outside not in part
    assert torch.equal(part[inside], delta[inside])
    assert list(part) == [name for name in delta if name in part]


def test_everything_is_in_all_and_edits_stay(delta: Delta) -> None:
    assert list(within(delta, "all")) == list(delta)
    edited = within(delta.pruned(da.Dare(1.0), seed=0), "mlp")
    assert set(edited) == set(within(delta, "mlp"))
    assert not edited[UP].any()


def test_the_head_of_a_classifier_is_in_no_scope() -> None:
    delta = da.load_delta(base="zoo:encoder/strings", finetuned="zoo:encoder/code")
    assert set(delta) - set(within(delta, "all")) == {name for name in delta if name.startswith("classifier.")} != set()


def test_a_scope_that_selects_nothing(delta: Delta) -> None:
    for call in (lambda: within(delta, "*nowhere*"), lambda: delta_predictors(delta, ["all", "*nowhere*"])):
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
    table = delta_predictors(delta, SCOPES)
    assert list(table.columns) == ["scope", *NOISE, *NORMS, *VALUES]
    assert table["scope"].tolist() == SCOPES
    assert table[list(NOISE)].isna().all(axis=None)
    for scope, row in zip(SCOPES, table.to_dict("records"), strict=True):
        part = {name: tuned[name] - start[name] for name in within(delta, scope)}
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
    table = delta_predictors(delta, SCOPES, INPUTS)
    noise = delta_noise(delta, INPUTS)
    # The embedding is tied to the head, and its noise counts in both.
    assert (noise["tensor"] == EMBED).sum() == 2
    for scope, row in zip(SCOPES, table.to_dict("records"), strict=True):
        expected = noise_predictors(noise, list(within(delta, scope)))
        assert {name: row[name] for name in NOISE} == expected
    without = delta_predictors(delta, SCOPES)
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
    everything, alone = delta_predictors(delta, ["all", "*.A_log"], INPUTS).to_dict("records")
    assert everything["noise_sum"] > 0
    assert all(math.isnan(alone[name]) for name in NOISE)
    assert min(alone[name] for name in (*NORMS, "rms")) > 0
    with pytest.raises(ValueError, match=r"scope '\*\.A_log': noise_\w+ is nan there, .*no layer that inputs reach"):
        tolerated_drop_rate(delta, INPUTS, scope="*.A_log")
    assert tolerated_drop_rate(delta, scope="*.A_log").value > 0


# The committed table: where these fail, measure again with `python -m delta_analysis.reports.calibration`.


def test_the_committed_table_is_of_the_embedded_checkpoints() -> None:
    table = calibration_table()
    for side in ("base", "finetuned"):
        hashes = table.drop_duplicates(side).set_index(side)[f"{side}_hash"]
        assert {source: content_hash(source) for source in hashes.index} == hashes.to_dict()
        assert table.groupby(side)[f"{side}_hash"].nunique().eq(1).all()


@pytest.mark.parametrize(("base", "finetuned"), [("base", "instruct"), ("base", "code")])
def test_the_committed_predictors_are_those_computed_now(base: str, finetuned: str) -> None:
    table = calibration_table()
    rows = table[(table["base"] == f"zoo:tiny/{base}") & (table["finetuned"] == f"zoo:tiny/{finetuned}")]
    delta = da.load_delta(base=f"zoo:tiny/{base}", finetuned=f"zoo:tiny/{finetuned}")
    assert rows["numel"].unique().tolist() == [sum(tensor.numel() for tensor in delta.values())]
    inputs = choose_evaluation(rows["task"].iloc[0], QUESTIONS).texts[:TEXTS]
    found = delta_predictors(delta, rows["scope"].tolist(), inputs)
    # Six digits are kept; sums in another order differ in the last ones.
    pd.testing.assert_frame_equal(rows[found.columns].reset_index(drop=True), found, rtol=1e-4, check_dtype=False)
