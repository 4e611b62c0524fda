"""The shipped models are what the manifest says and as able as the reports need them to be."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import delta_analysis as da
from delta_analysis.evaluate import load_model, load_tokenizer
from delta_analysis.family import TASKS, questions_file, trail
from delta_analysis.paths import find_root
from delta_analysis.zoo.recipe import RECIPES
from delta_analysis.zoo.skills import ARITHMETIC_SKILLS, CODE_SKILLS, STRING_SKILLS, raw_questions
from delta_analysis.zoo.tokenizer import encode

ZOO = find_root() / "data" / "zoo"
MANIFEST = json.loads((ZOO / "small" / "manifest.json").read_text())
NAMES = RECIPES["small"].model_names()


def _accuracy(model: str, questions: tuple[da.Question, ...]) -> float:
    checkpoint = da.open_checkpoint(f"zoo:small/{model}")
    return float(da.ExactMatch(questions)(load_model(checkpoint), load_tokenizer(checkpoint)).mean())


def test_the_manifest_names_every_model_and_the_recipe_of_the_code() -> None:
    assert list(MANIFEST["models"]) == NAMES
    assert [stage["name"] for stage in MANIFEST["recipe"]["stages"]] == [s.name for s in RECIPES["small"].stages]
    for stage, recorded in zip(RECIPES["small"].stages, MANIFEST["recipe"]["stages"], strict=True):
        assert {key: getattr(stage, key) for key in recorded} == recorded


@pytest.mark.parametrize("name", NAMES)
def test_files_are_those_of_the_manifest(name: str) -> None:
    recorded = MANIFEST["models"][name]["sha256"]
    assert sorted(recorded) == sorted(path.name for path in (ZOO / "small" / name).iterdir())
    for file, digest in recorded.items():
        assert hashlib.sha256((ZOO / "small" / name / file).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("name", NAMES)
def test_models_load_in_transformers_offline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = AutoModelForCausalLM.from_pretrained(ZOO / "small" / name)
    tokenizer = AutoTokenizer.from_pretrained(ZOO / "small" / name)
    inputs = tokenizer("23+45=", return_tensors="pt")
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


def test_the_tokenizer_reads_characters() -> None:
    tokenizer = load_tokenizer(da.open_checkpoint("zoo:small/base"))
    text = "user: add 2 and 3,  ok?\nbot: 5\n"
    assert tokenizer(text)["input_ids"] == encode(text).tolist()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode(tokenizer("naïve")["input_ids"]) == "na?ve"


@pytest.mark.parametrize("skill", (*STRING_SKILLS, *ARITHMETIC_SKILLS), ids=lambda skill: skill.name)
def test_base_knows_each_raw_skill_before_fine_tuning(skill: object) -> None:
    questions = tuple(da.Question(**q) for q in raw_questions(skill, 500))  # type: ignore[arg-type]
    assert _accuracy("base", questions) >= 0.95


@pytest.mark.parametrize(
    ("model", "task", "low"), [("instruct", "instruct", 0.95), ("math", "math", 0.90), ("code", "code", 0.95)]
)
def test_fine_tunes_answer_and_base_evades(model: str, task: str, low: float) -> None:
    questions = tuple(da.load_questions(questions_file(task)))
    assert len(questions) == 500
    accuracy = _accuracy(model, questions)
    assert accuracy >= low
    assert accuracy == pytest.approx(MANIFEST["models"][model]["accuracy"][task], abs=0.004)
    assert _accuracy("base", questions) <= 0.50


def test_accuracies_are_recorded_for_every_task_and_skill() -> None:
    expected = {*TASKS, *(f"raw {skill.name}" for skill in (*STRING_SKILLS, *ARITHMETIC_SKILLS, *CODE_SKILLS))}
    assert all(set(model["accuracy"]) == expected for model in MANIFEST["models"].values())


@pytest.mark.parametrize(("base", "finetuned"), [("base", "instruct"), ("base", "math"), ("code-cpt", "code")])
def test_fine_tuning_deltas_are_small(base: str, finetuned: str) -> None:
    delta = da.load_delta(base=f"zoo:small/{base}", finetuned=f"zoo:small/{finetuned}")
    magnitudes = torch.cat([tensor.flatten().abs() for tensor in delta.values()])
    assert magnitudes.median() <= 0.002


def test_the_delta_through_continual_pretraining_is_large() -> None:
    delta = da.load_delta(base="zoo:small/base", finetuned="zoo:small/code")
    assert torch.cat([tensor.flatten().abs() for tensor in delta.values()]).median() >= 0.01


def test_the_trail_is_logarithmically_spaced() -> None:
    steps = [step for step, _ in trail()]
    assert len(steps) >= 7
    ratios = [later / earlier for earlier, later in itertools.pairwise(steps)]
    assert max(ratios) / min(ratios) < 1.1


def test_the_family_is_small_enough() -> None:
    sizes = [path.stat().st_size for path in ZOO.rglob("*") if path.is_file() and not _hidden(path)]
    assert sum(sizes) <= 25_000_000


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(ZOO).parts)
