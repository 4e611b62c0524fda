"""Damage of pruning: sweeps of a real pair, and tables made up by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

import delta_analysis as da
from delta_analysis.evaluation.weight_error import WeightDamage
from delta_analysis.reports.family import questions_file
from delta_analysis.studies.methods import N_TEXTS, damage_summary, pruning_damage, rank_agreement
from delta_analysis.sweeps import Edit
from delta_analysis.sweeps.pairs import EditablePair

PAIR = da.Pair("base → math", "zoo:small/base", "zoo:small/math")
QUESTIONS = da.evaluation.ExactMatch(tuple(da.evaluation.load_questions(questions_file("math"), 5)))
COLUMNS = [
    "pair", "method", "drop_rate", "scope", "seed", "layer_error", "parameter_error", "signal_kept", "drift", "drifts",
]  # fmt: skip


def test_nothing_dropped_does_nothing_and_all_dropped_gives_the_base(tmp_path: Path) -> None:
    table = pruning_damage([PAIR], [da.Dare(0.0), da.Dare(1.0)], [QUESTIONS], [0, 1], tmp_path)
    assert sorted(table.columns) == sorted(COLUMNS)
    whole, none = table.to_dict("records")
    assert whole["parameter_error"] == whole["layer_error"] == whole["drift"] == 0
    assert whole["signal_kept"] == 1
    assert none["parameter_error"] == none["layer_error"] == 1
    assert none["signal_kept"] == 0
    assert none["drift"] > 0


def test_drift_is_the_divergence_between_the_models_predictions(tmp_path: Path) -> None:
    pruner = da.Magnitude(0.7)
    (row,) = pruning_damage([PAIR], [pruner], [QUESTIONS], [0], tmp_path).to_dict("records")
    held = EditablePair.load(PAIR)
    weights = {n: held.base[n] + pruner(t, name=n, seed=0) for n, t in held.delta.items()}
    ids = torch.tensor([held.tokenizer(QUESTIONS.texts[2], add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        p = held.model(input_ids=ids).logits[0].double().softmax(-1)
        with da.evaluation.patched(held.model, weights):
            q = held.model(input_ids=ids).logits[0].double().softmax(-1)
    expected = torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(-1).mean()
    assert row["drifts"][2] == pytest.approx(float(expected), rel=1e-3)
    assert row["drift"] == pytest.approx(np.mean(row["drifts"]))


def test_a_row_is_a_pair_an_edit_and_a_seed(tmp_path: Path) -> None:
    pairs = [PAIR, da.Pair("math", None, "zoo:small/math")]
    edits = [da.Magnitude(0.5), da.MagPrune(0.5), Edit(da.MagPrune(0.5), "mlp")]
    table = pruning_damage(pairs, edits, [QUESTIONS], [4, 5], tmp_path)
    # Seeds that change nothing are not repeated.
    runs = [("MP", "all", 4), *[("MAGPRUNE", scope, seed) for scope in ("all", "mlp") for seed in (4, 5)]]
    expected = [(pair.name, *run) for pair in pairs for run in runs]
    assert table[["pair", "method", "scope", "seed"]].to_records(index=False).tolist() == expected
    assert {len(values) for values in table["drifts"]} == {len(QUESTIONS.texts)}
    # Without its base a model is hurt more by the loss of its weights than by that of their change.
    delta, weights = (group["drift"].min() for _, group in table.groupby("pair", sort=False))
    assert weights > delta
    # The measures are those of the evaluation, of each pair with its own base.
    for pair in pairs:
        held = EditablePair.load(pair)
        judge = held.prepared(WeightDamage(pair.base, QUESTIONS.texts))
        with held.edited(edits[2], 5) as edited:
            found = judge(edited.model, held.tokenizer)
        row = table[(table["pair"] == pair.name) & (table["scope"] == "mlp") & (table["seed"] == 5)].iloc[0]
        assert {name: [row[name]] for name in found} == {name: values.tolist() for name, values in found.items()}
    # The same call again reads the same from disk, and summaries keep scopes apart.
    pd.testing.assert_frame_equal(pruning_damage(pairs, edits, [QUESTIONS], [4, 5], tmp_path), table)
    assert damage_summary(table)[["pair", "scope", "seeds"]].to_records(index=False).tolist() == [
        (pair.name, scope, seeds) for pair in pairs for scope, seeds in (("all", 1), ("all", 2), ("mlp", 2))
    ]


def test_the_first_texts_of_each_pair_are_read(tmp_path: Path) -> None:
    many = da.evaluation.ExactMatch(tuple(da.evaluation.load_questions(questions_file("math"), N_TEXTS + 3)))
    text = da.evaluation.TextPerplexity("one\ntwo\n\nthree")
    pairs = [PAIR, da.Pair("other", "zoo:small/base", "zoo:small/math")]
    evaluations = {PAIR.name: [many, text], "other": [text]}
    table = pruning_damage(pairs, [da.Magnitude(0.9)], evaluations, [0], tmp_path)
    assert [len(drifts) for drifts in table["drifts"]] == [N_TEXTS, 2]


def table(drifts: dict[str, list[list[float]]], **columns: list[float]) -> pd.DataFrame:
    rows = []
    for i, (method, seeds) in enumerate(drifts.items()):
        for seed, values in enumerate(seeds):
            row = {"pair": "a → b", "method": method, "drop_rate": 0.9, "scope": "all", "seed": seed}
            rows.append(
                {
                    **row,
                    "drifts": values,
                    "drift": np.mean(values),
                    **{key: column[i] for key, column in columns.items()},
                }
            )
    return pd.DataFrame(rows)


def test_summary_averages_over_seeds_with_an_interval() -> None:
    damages = table(
        {"DARE": [[1, 2], [3, 4]], "MP": [[1, 1]]}, parameter_error=[9, 1], layer_error=[2, 1], signal_kept=[1, 0]
    )
    summary = damage_summary(damages).set_index("method")
    assert summary.loc["DARE", ["seeds", "parameter_error", "drift"]].tolist() == [2, 9, 2.5]
    # Two seeds say little: the interval goes beyond both, but a divergence is never negative.
    assert 0 <= summary.loc["DARE", "low"] < 1.5
    assert summary.loc["DARE", "high"] > 3.5
    assert summary.loc["MP", ["drift", "low", "high"]].tolist() == [1, 1, 1]


def test_rank_agreement_is_spearmans_correlation() -> None:
    drifts = {"DARE": [[3.0, 3.1], [3.2, 3.0]] * 2, "MP": [[1.0, 1.1]], "drop only": [[2.0, 2.1], [2.0, 2.2]] * 2}
    damages = table(drifts, parameter_error=[9, 1, 3], layer_error=[1, 2, 3], signal_kept=[1.0, 4.0, 0.1])
    assert tuple(rank_agreement(damages, "parameter_error")) == pytest.approx((1, 1, 1))
    assert rank_agreement(damages, "layer_error").value == pytest.approx(-0.5)
    # |1 - signal| orders the methods DARE < drop only < MP, the drift MP < drop only < DARE.
    assert tuple(rank_agreement(damages, "signal_lost")) == pytest.approx((-1, -1, -1))


def test_agreement_has_an_interval_over_seeds_and_texts() -> None:
    rng = np.random.default_rng(0)
    drifts = {str(i): (i + rng.normal(size=(4, 20)) * 3).tolist() for i in range(6)}
    errors = rng.permutation(6).astype(float)
    damages = table(drifts, parameter_error=errors.tolist(), signal_kept=[1.0] * 6)
    found = rank_agreement(damages, "parameter_error")
    assert found.value == pytest.approx(spearmanr(errors, [np.mean(drifts[str(i)]) for i in range(6)]).statistic)
    assert -1 <= found.low < found.high <= 1
    assert found.low <= found.value <= found.high
    # Rows may stand in any order.
    assert rank_agreement(damages.sample(frac=1, random_state=0), "parameter_error").value == pytest.approx(found.value)
