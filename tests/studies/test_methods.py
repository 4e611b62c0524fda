"""Reconstruction errors: closed forms against drawn masks, and the drift against the model's own predictions."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import delta_analysis as da
from delta_analysis.reports.family import questions_file
from delta_analysis.studies.methods import N_TEXTS, reconstruction_errors
from delta_analysis.sweeps import Edit
from delta_analysis.sweeps.pairs import EditablePair
from delta_analysis.zoo.tokenizer import character_tokenizer

PAIR = da.Pair("base → math", "zoo:small/base", "zoo:small/math")
QUESTIONS = da.evaluation.ExactMatch(tuple(da.evaluation.load_questions(questions_file("math"), 5)))
COLUMNS = [
    "method", "drop_rate", "scope", "parameter_error", "layer_error", "signal_kept", "pair", "drift", "low", "high",
]  # fmt: skip


def test_nothing_dropped_does_nothing_and_all_dropped_gives_the_base(tmp_path: Path) -> None:
    table = reconstruction_errors([PAIR], [da.Dare(0.0), da.Dare(1.0)], [QUESTIONS], [0, 1], tmp_path)
    assert sorted(table.columns) == sorted(COLUMNS)
    whole, none = table.to_dict("records")
    assert whole["parameter_error"] == whole["layer_error"] == whole["drift"] == 0
    assert whole["signal_kept"] == pytest.approx(1)
    assert [none["parameter_error"], none["layer_error"]] == pytest.approx([1, 1])
    assert none["signal_kept"] == pytest.approx(0, abs=1e-6)
    assert none["drift"] > 0


@pytest.mark.parametrize("scope", ["all", "mlp"])
def test_errors_are_those_of_drawn_masks_and_matrices(tmp_path: Path, scope: str) -> None:
    pruners = [da.Dare(0.5), da.Dare(0.9, "none"), da.Magnitude(0.7), da.MagPrune(0.6)]
    found = reconstruction_errors([PAIR], [Edit(each, scope) for each in pruners], [QUESTIONS], [0], tmp_path)
    held = EditablePair.load(PAIR)
    inputs: dict[str, list[torch.Tensor]] = {}

    def record(name: str, arguments: tuple[torch.Tensor, ...]) -> None:
        inputs.setdefault(name, []).append(arguments[0].flatten(0, -2))

    for path, module in held.model.named_modules():
        if isinstance(module, torch.nn.Linear) and (scope == "all" or "mlp" in path):
            module.register_forward_pre_hook(lambda _, x, name=f"{path}.weight": record(name, x))
    with torch.no_grad():
        for text in QUESTIONS.texts:
            held.model(input_ids=torch.tensor([held.tokenizer(text, add_special_tokens=False)["input_ids"]]))
    # The embeddings are tied: as the head they are one more linear layer.
    x = {name.replace("lm_head", "model.embed_tokens"): torch.cat(rows) for name, rows in inputs.items()}
    for pruner, row in zip(pruners, found.to_dict("records"), strict=True):
        scoped = {name: tensor for name, tensor in held.delta.items() if scope == "all" or "mlp" in name}
        seeds = range(40 if pruner.random else 1)
        pruned = [{n: pruner(t, name=n, seed=seed) for n, t in scoped.items()} for seed in seeds]
        wrong = np.mean([sum(float((each[n] - t).square().sum()) for n, t in scoped.items()) for each in pruned])
        assert row["parameter_error"] == pytest.approx(
            wrong / sum(float(t.square().sum()) for t in scoped.values()), rel=0.02
        )
        errors, kept = [], []
        for name, rows in x.items():
            signal = rows @ scoped[name].T
            responses = [rows @ each[name].T for each in pruned]
            energy = float(signal.square().sum())
            errors.append(np.mean([float((each - signal).square().sum()) / energy for each in responses]))
            kept.append(np.mean([float((each * signal).sum()) / energy for each in responses]))
        assert row["layer_error"] == pytest.approx(np.median(errors), rel=0.05)
        assert row["signal_kept"] == pytest.approx(np.median(kept), rel=0.03)


def test_drift_is_the_divergence_between_the_models_predictions(tmp_path: Path) -> None:
    pruner = da.Magnitude(0.7)
    (row,) = reconstruction_errors([PAIR], [pruner], [QUESTIONS], [0], tmp_path).to_dict("records")
    held = EditablePair.load(PAIR)
    weights = {n: held.base[n] + pruner(t, name=n, seed=0) for n, t in held.delta.items()}
    changed = copy.deepcopy(held.model)
    changed.load_state_dict(weights, strict=False)
    drifts = []
    for text in QUESTIONS.texts:
        ids = torch.tensor([held.tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            p = held.model(input_ids=ids).logits[0].double().softmax(-1)
            q = changed(input_ids=ids).logits[0].double().softmax(-1)
        drifts.append(float(torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(-1).mean()))
    assert row["drift"] == pytest.approx(np.mean(drifts), rel=1e-3)
    assert 0 <= row["low"] < row["drift"] < row["high"]


def test_a_row_is_a_pair_and_an_edit_in_their_order(tmp_path: Path) -> None:
    pairs = [PAIR, da.Pair("math", None, "zoo:small/math")]
    edits = [da.Magnitude(0.5), Edit(da.MagPrune(0.5), "mlp"), da.MagPrune(0.5)]
    table = reconstruction_errors(pairs, edits, [QUESTIONS], [4, 5], tmp_path)
    runs = [("MP", "all"), ("MAGPRUNE", "mlp"), ("MAGPRUNE", "all")]
    expected = [(pair.name, *run) for pair in pairs for run in runs]
    assert table[["pair", "method", "scope"]].to_records(index=False).tolist() == expected
    # Without its base a model is hurt more by the loss of its weights than by that of their change.
    delta, weights = (group["drift"].min() for _, group in table.groupby("pair", sort=False))
    assert weights > delta
    # The same call again reads the same from disk.
    pd.testing.assert_frame_equal(reconstruction_errors(pairs, edits, [QUESTIONS], [4, 5], tmp_path), table)


def test_the_first_texts_of_each_pair_are_read(tmp_path: Path) -> None:
    many = da.evaluation.ExactMatch(tuple(da.evaluation.load_questions(questions_file("math"), N_TEXTS + 3)))
    first = da.evaluation.ExactMatch(many.questions[:N_TEXTS])
    text = da.evaluation.TextPerplexity("one\ntwo\n\nthree")
    found = [
        reconstruction_errors([PAIR], [da.Magnitude(0.9)], {PAIR.name: evaluations}, [0], tmp_path)
        for evaluations in ([many, text], [first], [text])
    ]
    pd.testing.assert_frame_equal(found[0], found[1])
    assert found[0]["drift"].item() != found[2]["drift"].item()


def test_matrices_stored_the_other_way_round_are_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = character_tokenizer()
    sizes = {"n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=None, **sizes))
    for name in ("base", "tuned"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    pair = da.Pair("base → tuned", str(tmp_path / "base"), str(tmp_path / "tuned"))
    (row,) = reconstruction_errors([pair], [da.Dare(0.5)], [QUESTIONS], [0], tmp_path).to_dict("records")
    assert row["parameter_error"] == pytest.approx(1)
    assert row["layer_error"] > 0
    assert row["signal_kept"] == pytest.approx(1)
    assert row["drift"] > 0
