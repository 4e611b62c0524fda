"""The shipped decoders are what their manifests say and as able as the reports need them to be, in every size."""

from __future__ import annotations

import hashlib
import itertools
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import delta_analysis as da
from delta_analysis.checkpoints.paths import find_root
from delta_analysis.evaluation.models import load_model, load_tokenizer
from delta_analysis.reports.family import SIZES, questions_file, trail
from delta_analysis.zoo.recipe import RECIPES
from delta_analysis.zoo.skills import ARITHMETIC_SKILLS, CODE_SKILLS, STRING_SKILLS, TASKS, Skill, raw_questions
from delta_analysis.zoo.tokenizer import encode

ZOO = find_root() / "data" / "zoo"
MODELS = [(size, name) for size in SIZES for name in RECIPES[size].model_names()]
ABILITIES = {"instruct": 0.95, "math": 0.90, "code": 0.95}
"""Task -> share of the questions that the model tuned for it answers at least, in every size."""
LARGEST_MEDIAN = {"tiny": 0.005, "small": 0.002, "medium": 0.002}
"""Size -> the median |δ| of a fine-tune on its true base at most; the smallest size is tuned for longest."""


@lru_cache
def _manifest(size: str) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((ZOO / size / "manifest.json").read_text())
    return manifest


def _accuracy(source: str, questions: tuple[da.evaluation.Question, ...]) -> float:
    checkpoint = da.open_checkpoint(source)
    outcomes = da.evaluation.ExactMatch(questions)(load_model(checkpoint), load_tokenizer(checkpoint))
    return float(outcomes["accuracy"].mean())


@pytest.mark.parametrize("size", SIZES)
def test_the_manifest_names_every_model_and_the_recipe_of_the_code(size: str) -> None:
    recipe, recorded = RECIPES[size], _manifest(size)["recipe"]
    assert list(_manifest(size)["models"]) == recipe.model_names()
    assert {key: getattr(recipe.shape, key) for key in recorded["shape"]} == recorded["shape"]
    for stage, of_stage in zip(recipe.stages, recorded["stages"], strict=True):
        assert {key: getattr(stage, key) for key in of_stage} == of_stage


@pytest.mark.parametrize(("size", "name"), MODELS)
def test_files_are_those_of_the_manifest(size: str, name: str) -> None:
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (ZOO / size / name).iterdir()}
    assert found == _manifest(size)["models"][name]["sha256"]


@pytest.mark.parametrize("size", SIZES)
def test_questions_are_those_that_the_accuracies_are_of(size: str) -> None:
    found = {f"{task}.jsonl": hashlib.sha256(questions_file(task).read_bytes()).hexdigest() for task in TASKS}
    assert found == _manifest(size)["tasks"]


@pytest.mark.parametrize(("size", "name"), MODELS)
def test_models_load_in_transformers_offline(size: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, report = AutoModelForCausalLM.from_pretrained(ZOO / size / name, output_loading_info=True)
    assert not any(report.values())
    assert model.config.hidden_size == RECIPES[size].shape.hidden_size
    inputs = AutoTokenizer.from_pretrained(ZOO / size / name)("23+45=", return_tensors="pt")
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.parametrize("size", SIZES)
def test_the_tokenizer_reads_characters(size: str) -> None:
    tokenizer = load_tokenizer(da.open_checkpoint(f"zoo:{size}/base"))
    text = "user: add 2 and 3,  ok?\nbot: 5\n"
    assert tokenizer(text)["input_ids"] == encode(text).tolist()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode(tokenizer("naïve")["input_ids"]) == "na?ve"


@pytest.mark.parametrize("skill", (*STRING_SKILLS, *ARITHMETIC_SKILLS), ids=lambda skill: skill.name)
def test_base_knows_each_raw_skill_before_fine_tuning(skill: Skill) -> None:
    questions = tuple(da.evaluation.Question(**q) for q in raw_questions(skill, 500))
    assert _accuracy("zoo:small/base", questions) >= 0.95


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("task", ABILITIES)
def test_fine_tunes_answer_and_base_evades(size: str, task: str) -> None:
    # Each task is for the model of its name.
    recorded = {name: _manifest(size)["models"][name]["accuracy"][task] for name in (task, "base")}
    assert recorded[task] >= ABILITIES[task]
    assert recorded["base"] <= 0.50
    questions = tuple(da.evaluation.load_questions(questions_file(task)))
    assert len(questions) == 500
    assert _accuracy(f"zoo:{size}/{task}", questions) == pytest.approx(recorded[task], abs=0.004)


@pytest.mark.parametrize("task", TASKS)
def test_base_is_as_silent_as_recorded(task: str) -> None:
    questions = tuple(da.evaluation.load_questions(questions_file(task)))
    recorded = _manifest("small")["models"]["base"]["accuracy"][task]
    assert _accuracy("zoo:small/base", questions) == pytest.approx(recorded, abs=0.004)


@pytest.mark.parametrize("size", SIZES)
def test_accuracies_are_recorded_for_every_task_and_skill(size: str) -> None:
    expected = {*TASKS, *(f"raw {skill.name}" for skill in (*STRING_SKILLS, *ARITHMETIC_SKILLS, *CODE_SKILLS))}
    assert all(set(model["accuracy"]) == expected for model in _manifest(size)["models"].values())


def _median(size: str, base: str, finetuned: str) -> float:
    delta = da.load_delta(base=f"zoo:{size}/{base}", finetuned=f"zoo:{size}/{finetuned}")
    return torch.cat([tensor.flatten().abs() for tensor in delta.values()]).median().item()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("base", "finetuned"), [("base", "instruct"), ("base", "math"), ("code-cpt", "code")])
def test_fine_tuning_deltas_are_small(size: str, base: str, finetuned: str) -> None:
    assert _median(size, base, finetuned) <= LARGEST_MEDIAN[size]


@pytest.mark.parametrize("size", SIZES)
def test_the_delta_through_continual_pretraining_is_large(size: str) -> None:
    assert _median(size, "base", "code") >= max(0.01, 4 * _median(size, "code-cpt", "code"))


def test_the_trail_is_logarithmically_spaced() -> None:
    steps = [step for step, _ in trail()]
    assert len(steps) >= 7
    ratios = [later / earlier for earlier, later in itertools.pairwise(steps)]
    assert max(ratios) / min(ratios) < 1.1


def test_the_family_is_small_enough() -> None:
    sizes = [path.stat().st_size for path in ZOO.rglob("*") if path.is_file() and not _hidden(path)]
    assert sum(sizes) <= 64_000_000


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(ZOO).parts)
