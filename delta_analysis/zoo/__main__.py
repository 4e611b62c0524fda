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

from delta_analysis.checkpoints import find_root, sha256
from delta_analysis.zoo.decoder import LLAMA
from delta_analysis.zoo.encoder import BERT
from delta_analysis.zoo.recipe import RECIPES, Recipe, Stage
from delta_analysis.zoo.skills import QUESTIONS
from delta_analysis.zoo.train import Architecture, train_stage

ARCHITECTURES = {"llama": LLAMA, "bert": BERT}


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
    write_questions(ARCHITECTURES[recipe.architecture], arguments.out / "tasks")
    write_manifest(recipe, family, arguments.out / "tasks")


def train_family(recipe: Recipe, family: Path) -> None:
    """Train the stages that are missing or that the recipe has since changed, and what descends from them."""
    renewed: set[str] = set()
    for stage in recipe.stages:
        if is_trained(stage, family) and stage.parent not in renewed:
            print(f"{stage.name}: already trained")
            continue
        train_stage(stage, recipe.shape, family, ARCHITECTURES[recipe.architecture])
        renewed.add(stage.name)


def is_trained(stage: Stage, family: Path) -> bool:
    """Whether the stage's model is there and was trained by this very recipe."""
    record = family / stage.name / "training.json"
    return record.exists() and json.loads(record.read_text())["stage"] == dataclasses.asdict(stage)


def write_questions(architecture: Architecture, folder: Path) -> None:
    """The held-out questions of each task, one JSON object a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in architecture.tasks:
        lines = [json.dumps(question) for question in architecture.questions(task, QUESTIONS)]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n")


def write_manifest(recipe: Recipe, family: Path, tasks: Path) -> None:
    """`manifest.json` of a size: recipe, and for each model its training, accuracies and file hashes."""
    architecture = ARCHITECTURES[recipe.architecture]
    models = {}
    for name in recipe.model_names():
        models[name] = {
            **json.loads((family / name / "training.json").read_text()),
            "accuracy": architecture.accuracies(family / name, tasks),
            "sha256": {path.name: sha256(path) for path in sorted((family / name).iterdir())},
        }
        print(f"{name}: {models[name]['accuracy']}", flush=True)
    manifest = {
        "recipe": dataclasses.asdict(recipe),
        "python": platform.python_version(),
        "tasks": {f"{task}.jsonl": sha256(tasks / f"{task}.jsonl") for task in sorted(architecture.tasks)},
        "models": models,
    }
    (family / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    main()
