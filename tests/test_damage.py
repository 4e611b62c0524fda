"""Damage of pruning: against closed forms on a real pair, and on tables made up by hand."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch

import delta_analysis as da
from delta_analysis.damage import damage, damage_summary, log_probabilities, probe, pruning_damage, rank_agreement
from delta_analysis.evaluate import ExactMatch, TextPerplexity, load_questions, patched
from delta_analysis.family import questions_file
from delta_analysis.sweep import EditableModel, Pair

PAIR = Pair(
    "base → math", "zoo:small/base", "zoo:small/math", ExactMatch(tuple(load_questions(questions_file("math"), 6)))
)


@cache
def editable() -> EditableModel:
    return EditableModel.load(PAIR)


def test_nothing_dropped_does_nothing_and_all_dropped_gives_the_base() -> None:
    whole, none = pruning_damage([PAIR], [da.Dare(0.0), da.Dare(1.0)], [0, 1]).to_dict("records")
    assert whole["parameter_error"] == whole["layer_error"] == whole["drift"] == 0
    assert whole["signal_kept"] == 1
    assert none["parameter_error"] == none["layer_error"] == 1
    assert none["signal_kept"] == 0
    assert none["drift"] > 0


def test_scaling_has_the_errors_of_the_formula() -> None:
    # At p = 0 a factor f leaves D̂ = f·D: the squared errors are (f - 1)², the signal kept is f.
    (row,) = pruning_damage([PAIR], [da.Dare(0.0, 3.0)], [0]).to_dict("records")
    assert row["parameter_error"] == pytest.approx(4, rel=1e-5)
    assert row["layer_error"] == pytest.approx(4, rel=1e-5)
    assert row["signal_kept"] == pytest.approx(3, rel=1e-5)


def test_layer_error_and_signal_are_those_of_the_matrices() -> None:
    model, pruner = editable(), da.Dare(0.5, "none")
    before = probe(model)
    row = damage(model, before, pruner, 3)
    errors, signals = [], []
    for name, inputs in before.inputs.items():
        delta = model.delta[name].double()
        pruned = pruner(model.delta[name], name=name, seed=3).double()
        whole, part = inputs.double() @ delta.T, inputs.double() @ pruned.T
        errors.append(float(((part - whole) ** 2).sum() / (whole**2).sum()))
        signals.append(float((part * whole).sum() / (whole**2).sum()))
    assert row["layer_error"] == pytest.approx(np.median(errors), rel=1e-4)
    assert row["signal_kept"] == pytest.approx(np.median(signals), rel=1e-4)


def test_drift_is_the_divergence_between_the_models_predictions() -> None:
    model, pruner = editable(), da.Magnitude(0.7)
    before = probe(model)
    row = damage(model, before, pruner, 0)
    weights = {n: model.base[n] + pruner(t, name=n, seed=0) for n, t in model.delta.items()}
    ids = torch.tensor([model.tokenizer(PAIR.evaluation.texts[2], add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        p = model.model(input_ids=ids).logits[0].double().softmax(-1)
        with patched(model.model, weights):
            q = model.model(input_ids=ids).logits[0].double().softmax(-1)
    expected = torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(-1).mean()
    assert row["drifts"][2] == pytest.approx(float(expected), rel=1e-3)
    assert row["drift"] == pytest.approx(np.mean(row["drifts"]))


def test_the_probe_holds_inputs_of_every_linear_layer_and_leaves_no_hook() -> None:
    model = editable()
    before = probe(model)
    linear = {f"{n}.weight" for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(before.inputs) == linear & set(model.delta)
    for name, inputs in before.inputs.items():
        assert 256 <= len(inputs) <= sum(map(len, before.texts)) or len(inputs) == sum(map(len, before.texts))
        assert inputs.shape[1] == model.delta[name].shape[1]
    assert not any(module._forward_pre_hooks for module in model.model.modules())
    assert len(log_probabilities(model, before.texts)) == len(PAIR.evaluation.texts)


def test_seeds_that_change_nothing_are_not_repeated() -> None:
    table = pruning_damage([PAIR], [da.Magnitude(0.5), da.MagPrune(0.5)], [4, 5])
    assert table[["method", "seed"]].to_numpy().tolist() == [["MP", 4], ["MAGPRUNE", 4], ["MAGPRUNE", 5]]


def test_texts_of_an_evaluation() -> None:
    questions = PAIR.evaluation.questions  # type: ignore[attr-defined]
    assert PAIR.evaluation.texts[0] == questions[0].prompt + questions[0].answer
    assert TextPerplexity("one\ntwo\n\n\n\nthree").texts == ("one\ntwo", "three")


def table(drifts: dict[str, list[list[float]]], **columns: list[float]) -> pd.DataFrame:
    rows = []
    for i, (method, seeds) in enumerate(drifts.items()):
        for seed, values in enumerate(seeds):
            row = {"pair": "a → b", "method": method, "drop_rate": 0.9, "seed": seed, "drifts": values}
            rows.append({**row, "drift": np.mean(values), **{key: column[i] for key, column in columns.items()}})
    return pd.DataFrame(rows)


def test_summary_averages_over_seeds_with_an_interval() -> None:
    damages = table(
        {"DARE": [[1, 2], [3, 4]], "MP": [[1, 1]]}, parameter_error=[9, 1], layer_error=[2, 1], signal_kept=[1, 0]
    )
    summary = damage_summary(damages).set_index("method")
    assert summary.loc["DARE", ["seeds", "parameter_error", "drift"]].tolist() == [2, 9, 2.5]
    assert 1 <= summary.loc["DARE", "low"] < 2.5 < summary.loc["DARE", "high"] <= 4
    assert summary.loc["MP", ["drift", "low", "high"]].tolist() == [1, 1, 1]


def test_rank_agreement_is_spearmans_correlation() -> None:
    drifts = {"DARE": [[3.0, 3.1], [3.2, 3.0]], "MP": [[1.0, 1.1]], "drop only": [[2.0, 2.1], [2.0, 2.2]]}
    damages = table(drifts, parameter_error=[9, 1, 3], layer_error=[1, 2, 3], signal_kept=[1.0, 4.0, 0.1])
    assert tuple(rank_agreement(damages, "parameter_error")) == pytest.approx((1, 1, 1))
    assert rank_agreement(damages, "layer_error").value == pytest.approx(-0.5)
    # |1 - signal| orders the methods DARE < drop only < MP, the drift MP < drop only < DARE.
    assert tuple(rank_agreement(damages, "signal_lost")) == pytest.approx((-1, -1, -1))
