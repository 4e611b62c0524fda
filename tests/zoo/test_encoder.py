"""The shipped encoders are what the manifest says, load as BERT does, and judge statements."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

import delta_analysis as da
from delta_analysis.checkpoints.paths import find_root
from delta_analysis.reports.family import questions_file
from delta_analysis.zoo.encoder import accuracies
from delta_analysis.zoo.recipe import RECIPES
from delta_analysis.zoo.tokenizer import MASK, MASK_ID, encode

FAMILY = find_root() / "data" / "zoo" / "encoder"
MANIFEST = json.loads((FAMILY / "manifest.json").read_text())
NAMES = RECIPES["encoder"].model_names()
CLASSIFIERS = {"strings": "strings-right", "code": "code-right"}


def test_the_manifest_names_every_model_and_the_recipe_of_the_code() -> None:
    assert list(MANIFEST["models"]) == NAMES
    for stage, recorded in zip(RECIPES["encoder"].stages, MANIFEST["recipe"]["stages"], strict=True):
        assert {key: getattr(stage, key) for key in recorded} == recorded


@pytest.mark.parametrize("name", NAMES)
def test_files_are_those_of_the_manifest(name: str) -> None:
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (FAMILY / name).iterdir()}
    assert found == MANIFEST["models"][name]["sha256"]


def test_questions_are_those_of_the_manifest_and_as_often_right_as_wrong() -> None:
    for task in CLASSIFIERS.values():
        content = questions_file(task).read_bytes()
        assert hashlib.sha256(content).hexdigest() == MANIFEST["tasks"][f"{task}.jsonl"]
        labels = [json.loads(line)["label"] for line in content.splitlines()]
        assert labels == [0, 1] * 250


@pytest.mark.parametrize("name", NAMES)
def test_models_load_in_transformers_offline_with_every_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    auto = AutoModelForSequenceClassification if name in CLASSIFIERS else AutoModelForMaskedLM
    model, report = auto.from_pretrained(FAMILY / name, output_loading_info=True)
    assert not any(report.values())
    inputs = AutoTokenizer.from_pretrained(FAMILY / name)(
        ["reverse(abc)=cba\n", "last(abc)=c\n"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


def test_the_tokenizer_reads_characters_and_the_mask_and_pads_on_the_right() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FAMILY / "base")
    text = "reverse(abc)=cba\n"
    assert tokenizer(text)["input_ids"] == encode(text).tolist()
    assert tokenizer(f"last(abc)={MASK}\n")["input_ids"] == [*encode("last(abc)="), MASK_ID, *encode("\n")]
    assert tokenizer.mask_token_id == MASK_ID
    assert tokenizer([text, "a"], padding=True)["attention_mask"][1] == [1] + [0] * (len(text) - 1)


@pytest.mark.parametrize("name", NAMES)
def test_accuracies_are_those_recorded(name: str) -> None:
    found = accuracies(FAMILY / name, questions_file("strings-right").parent)
    assert found == pytest.approx(MANIFEST["models"][name]["accuracy"], abs=0.004)


@pytest.mark.parametrize(("name", "task"), CLASSIFIERS.items())
def test_fine_tunes_judge_statements(name: str, task: str) -> None:
    assert MANIFEST["models"][name]["accuracy"][task] >= 0.90


def _median(base: str, finetuned: str) -> float:
    delta = da.load_delta(base=f"zoo:encoder/{base}", finetuned=f"zoo:encoder/{finetuned}")
    return torch.cat([tensor.flatten().abs() for tensor in delta.values()]).median().item()


@pytest.mark.parametrize(("base", "finetuned"), [("base", "strings"), ("code-cpt", "code")])
def test_fine_tuning_deltas_are_small(base: str, finetuned: str) -> None:
    assert _median(base, finetuned) <= 0.0045


def test_the_delta_through_continual_pretraining_is_large() -> None:
    assert _median("base", "code") >= 5 * _median("code-cpt", "code")
    assert _median("base", "code") >= 5 * _median("base", "strings")


def test_heads_are_outside_the_delta() -> None:
    delta = da.load_delta(base="zoo:encoder/base", finetuned="zoo:encoder/strings")
    assert all(name.startswith(("bert.embeddings.", "bert.encoder.")) for name in delta)
    layers = {name.split(".")[3] for name in delta if name.startswith("bert.encoder.layer.")}
    assert layers == {"0", "1", "2"}


def test_the_encoders_are_small_enough() -> None:
    sizes = [path.stat().st_size for path in FAMILY.rglob("*") if path.is_file()]
    assert sum(sizes) <= 4_000_000
