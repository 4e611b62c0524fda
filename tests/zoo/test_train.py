"""Training resumes as if it had never stopped, and learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from delta_analysis.zoo import __main__ as command
from delta_analysis.zoo import decoder, encoder, train
from delta_analysis.zoo.decoder import LLAMA
from delta_analysis.zoo.encoder import BERT
from delta_analysis.zoo.recipe import Recipe, Shape, Stage
from delta_analysis.zoo.tokenizer import MASK_ID, encode, masking_tokenizer

SHAPE = Shape(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
BASE = Stage("base", None, "base", 12, 1e-2, 4, 2, 0.1, seed=1)
CPT = Stage("code-cpt", "base", "python", 12, 1e-2, 4, 2, 0.1, seed=2, trail=2)
TUNE = Stage("math", "base", "math", 8, 1e-3, 4, 2, 0.0, seed=3)


@pytest.fixture(autouse=True)
def _small_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "TEXT_SIZE", 20_000)
    monkeypatch.setattr(train, "EXAMPLE_COUNT", 64)
    monkeypatch.setattr(train, "SAVE_EVERY", 5)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("architecture", [LLAMA, BERT], ids=["llama", "bert"])
def test_an_interrupted_training_ends_with_the_same_weights(
    architecture: train.Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.train_stage(BASE, SHAPE, _made(tmp_path / "whole"), architecture)

    def stop(stage: Stage, step: int) -> float:
        if step == 7:
            raise KeyboardInterrupt
        return train_learning_rate(stage, step)

    train_learning_rate = train.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", stop)
        with pytest.raises(KeyboardInterrupt):
            train.train_stage(BASE, SHAPE, _made(tmp_path / "cut"), architecture)
    assert not (tmp_path / "cut" / "base").exists()
    train.train_stage(BASE, SHAPE, tmp_path / "cut", architecture)
    whole, cut = _weights(tmp_path / "whole" / "base"), _weights(tmp_path / "cut" / "base")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_family_is_trained_once_and_renewed_with_its_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe("test", SHAPE, (BASE, CPT, TUNE))
    command.train_family(recipe, tmp_path)
    assert recipe.model_names() == ["base", "code-cpt-0002", "code-cpt-0005", "code-cpt", "math"]
    assert all((tmp_path / name / "model.safetensors").exists() for name in recipe.model_names())
    assert not list(tmp_path.glob(".*"))
    capsys.readouterr()
    command.train_family(recipe, tmp_path)
    assert capsys.readouterr().out.count("already trained") == 3
    command.train_family(replace(recipe, stages=(BASE, replace(CPT, seed=9), TUNE)), tmp_path)
    assert capsys.readouterr().out.count("already trained") == 2


def test_a_changed_base_renews_what_descends_from_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.train_family(Recipe("test", SHAPE, (BASE, TUNE)), tmp_path)
    capsys.readouterr()
    command.train_family(Recipe("test", SHAPE, (replace(BASE, seed=9), TUNE)), tmp_path)
    assert "already trained" not in capsys.readouterr().out
    record = json.loads((tmp_path / "math" / "training.json").read_text())
    assert record["step"] == TUNE.steps


def test_only_answers_are_learnt_in_fine_tuning() -> None:
    batch = decoder.chat_batches([("ab", "c\n"), ("a", "\n")], replace(TUNE, batch_size=8))(0)
    ids, labels = batch["input_ids"], batch["labels"]
    assert ids.shape == labels.shape
    learnt = labels != train.IGNORE
    assert torch.equal(labels[learnt], ids[learnt])
    assert set(learnt.sum(dim=1).tolist()) <= {1, 2}


def test_an_encoder_family_ends_in_classifiers(tmp_path: Path) -> None:
    base, code = replace(BASE, data="words"), replace(CPT, data="sessions", trail=0)
    tune = replace(TUNE, name="strings", data="strings-right")
    recipe = Recipe("test", SHAPE, (base, tune, code), architecture="bert")
    command.train_family(recipe, tmp_path)
    command.write_questions(BERT, tmp_path / "tasks")
    command.write_manifest(recipe, tmp_path, tmp_path / "tasks")
    models = json.loads((tmp_path / "manifest.json").read_text())["models"]
    assert set(models["strings"]["accuracy"]) == {"strings-right", "code-right"}
    assert set(models["code-cpt"]["accuracy"]) == {"masked strings-right", "masked code-right"}
    assert "classifier.weight" in _weights(tmp_path / "strings")


def test_the_encoder_names_the_characters_that_are_hidden_or_altered() -> None:
    text = "".join(f"entry {i}\n" for i in range(200))
    batch = encoder.masked_batches(text, replace(BASE, batch_size=400), 48)(0)
    ids, labels, present = batch["input_ids"], batch["labels"], batch["attention_mask"].bool()
    chosen = labels != train.IGNORE
    assert not (chosen & ~present).any()
    assert chosen.sum() / present.sum() == pytest.approx(encoder.CHOSEN, abs=0.02)
    assert (ids == MASK_ID).sum() / chosen.sum() == pytest.approx(encoder.HIDDEN, abs=0.03)
    assert set(ids[~present].tolist()) == {0}
    # What is neither hidden nor altered reads as the text does, and so do the labels.
    restored = torch.where(chosen, labels, ids)
    assert {masking_tokenizer().decode(row[keep]) for row, keep in zip(restored, present, strict=True)} <= set(
        text.splitlines(keepends=True)
    )


def test_an_answer_at_the_prompt_stays_with_its_question() -> None:
    text = "a line\n\n>>> len('abc')\n3\n>>> 'abc'*2\n'abcabc'\n"
    assert encoder.ENTRY.findall(text) == ["a line\n", ">>> len('abc')\n3\n", ">>> 'abc'*2\n'abcabc'\n"]


def test_windows_begin_at_the_start_of_a_line() -> None:
    text = "".join(f"line {i} of the text\n" for i in range(200))
    ids = decoder.text_batches(text, BASE, 32)(0)["input_ids"]
    assert ids.shape == (4, 32)
    assert np.all(ids[:, 0].numpy() == encode("l")[0])


def test_the_learning_rate_rises_stays_and_falls() -> None:
    stage = replace(BASE, steps=100, warmup=10, decay_share=0.3, learning_rate=1.0)
    rates = [train.learning_rate(stage, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:70] == [1.0] * 60
    assert rates[85] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(1 / 30)
