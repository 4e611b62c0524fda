"""Train the embedded family: `python -m delta_analysis.zoo [--size small] [--out data/zoo]`.

One command trains every model of a size in order, skips those that are already there with the same
recipe, resumes one that was interrupted, and ends by writing the questions and the manifest.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from pathlib import Path

import transformers

from delta_analysis.checkpoint import open_checkpoint
from delta_analysis.evaluate import ExactMatch, Question, load_model, load_tokenizer
from delta_analysis.family import TASKS
from delta_analysis.paths import find_root, sha256
from delta_analysis.zoo.recipe import RECIPES, Recipe, Stage
from delta_analysis.zoo.skills import ARITHMETIC_SKILLS, CODE_SKILLS, STRING_SKILLS, questions, raw_questions
from delta_analysis.zoo.train import train_stage

QUESTIONS = 500


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m delta_analysis.zoo", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=sorted(RECIPES), default="small")
    parser.add_argument("--out", type=Path, default=find_root() / "data" / "zoo", help="folder of the family")
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.size]
    family = arguments.out / recipe.size
    family.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    train_family(recipe, family)
    write_questions(arguments.out / "tasks")
    write_manifest(recipe, family, arguments.out / "tasks")


def train_family(recipe: Recipe, family: Path) -> None:
    """Train the stages that are missing or that the recipe has since changed, and what descends from them."""
    renewed: set[str] = set()
    for stage in recipe.stages:
        if is_trained(stage, family) and stage.parent not in renewed:
            print(f"{stage.name}: already trained")
            continue
        train_stage(stage, recipe.shape, family)
        renewed.add(stage.name)


def is_trained(stage: Stage, family: Path) -> bool:
    """Whether the stage's model is there and was trained by this very recipe."""
    record = family / stage.name / "training.json"
    return record.exists() and json.loads(record.read_text())["stage"] == dataclasses.asdict(stage)


def write_questions(folder: Path) -> None:
    """The held-out questions of each task, one JSON object a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        lines = [json.dumps(question) for question in questions(task, QUESTIONS)]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n")


def write_manifest(recipe: Recipe, family: Path, tasks: Path) -> None:
    """`manifest.json` of a size: recipe, and for each model its training, accuracies and file hashes."""
    models = {}
    for name in recipe.model_names():
        models[name] = {
            **json.loads((family / name / "training.json").read_text()),
            "accuracy": accuracies(family / name, tasks),
            "sha256": {path.name: sha256(path) for path in sorted((family / name).iterdir())},
        }
        print(f"{name}: {models[name]['accuracy']}", flush=True)
    manifest = {
        "recipe": dataclasses.asdict(recipe),
        "python": platform.python_version(),
        "tasks": {path.name: sha256(path) for path in sorted(tasks.glob("*.jsonl"))},
        "models": models,
    }
    (family / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def accuracies(directory: Path, tasks: Path) -> dict[str, float]:
    """Exact match on the questions of each task and on each skill in its raw form, 500 questions each."""
    checkpoint = open_checkpoint(directory)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    sets: dict[str, list[dict[str, str]]] = {
        task: [json.loads(line) for line in (tasks / f"{task}.jsonl").read_text().splitlines()] for task in TASKS
    }
    for skill in (*STRING_SKILLS, *ARITHMETIC_SKILLS, *CODE_SKILLS):
        sets[f"raw {skill.name}"] = raw_questions(skill, QUESTIONS)
    found: dict[str, float] = {}
    for name, items in sets.items():
        judge = ExactMatch(tuple(Question(**item) for item in items))
        found[name] = round(float(judge(model, tokenizer).mean()), 4)
    return found


if __name__ == "__main__":
    main()
