"""Train one stage: batches that depend on (seed, step) alone, so a resumed run is the same run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from delta_analysis.checkpoints import written_whole
from delta_analysis.zoo import corpus
from delta_analysis.zoo.recipe import Shape, Stage

TEXT_SIZE = 12_000_000
EXAMPLE_COUNT = 25_600
SAVE_EVERY = 250
IGNORE = -100

Batch = dict[str, torch.Tensor]
"""Arguments of the model's forward pass: `input_ids` (batch, length), `labels`, perhaps a mask."""


@dataclass(frozen=True)
class Architecture:
    """What training has to know of a kind of model.

    Attributes
    ----------
    new_model : (shape, seed) -> an untrained model.
    load_parent : (directory of the parent, stage) -> the model that the stage starts from.
    text_batches : (text, stage, length) -> step -> a batch to pre-train on.
    examples : (task, count, seed) -> pairs of a text and what is to be learnt of it.
    example_batches : (pairs, stage) -> step -> a batch to fine-tune on.
    tokenizer : -> the tokenizer saved beside each model.
    pace : name of a parameter -> how many times the stage's learning rate it learns at.
    tasks : names of the tasks that have held-out questions.
    questions : (task, count) -> the questions of a task, as their file holds them.
    accuracies : (directory of a model, folder of the questions) -> what is measured -> accuracy.
    """

    new_model: Callable[[Shape, int], PreTrainedModel]
    load_parent: Callable[[Path, Stage], PreTrainedModel]
    text_batches: Callable[[str, Stage, int], Callable[[int], Batch]]
    examples: Callable[[str, int, int], list[tuple[str, Any]]]
    example_batches: Callable[[list[tuple[str, Any]], Stage], Callable[[int], Batch]]
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    pace: Callable[[str], float]
    tasks: tuple[str, ...]
    questions: Callable[[str, int], list[dict[str, Any]]]
    accuracies: Callable[[Path, Path], dict[str, float]]


def stage_data(stage: Stage, length: int, architecture: Architecture) -> tuple[Callable[[int], Batch], str]:
    """The batches of a stage and the SHA-256 of the text behind them."""
    if stage.data in corpus.TEXTS:
        text = corpus.TEXTS[stage.data](TEXT_SIZE, stage.seed)
        return architecture.text_batches(text, stage, length), hashlib.sha256(text.encode()).hexdigest()
    pairs = architecture.examples(stage.data, EXAMPLE_COUNT, stage.seed)
    digest = hashlib.sha256("".join(f"{text}{label}" for text, label in pairs).encode()).hexdigest()
    return architecture.example_batches(pairs, stage), digest


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up, constant, then linear to zero over the last `decay_share` of the steps."""
    rise = (step + 1) / stage.warmup
    fall = (stage.steps - step) / (stage.decay_share * stage.steps)
    return stage.learning_rate * min(1.0, rise, fall)


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path, record: dict[str, Any]
) -> None:
    """Write the model in float16 with its tokenizer and training record, whole or not at all."""
    stored = type(model)(model.config)
    stored.load_state_dict(model.state_dict())
    with written_whole(directory) as folder:
        stored.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        shutil.rmtree(directory, ignore_errors=True)


def train_stage(stage: Stage, shape: Shape, family: Path, architecture: Architecture) -> None:
    """Train `stage` in the directory of its family, from where a killed run left off."""
    if stage.parent is None:
        model = architecture.new_model(shape, stage.seed)
    else:
        model = architecture.load_parent(family / stage.parent, stage)
    batch, corpus_hash = stage_data(stage, shape.max_position_embeddings, architecture)
    paces: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        paces.setdefault(architecture.pace(name), []).append(parameter)
    groups = [{"params": parameters, "pace": pace} for pace, parameters in paces.items()]
    optimizer = torch.optim.AdamW(groups, stage.learning_rate, betas=(0.9, 0.98), weight_decay=stage.weight_decay)
    losses: list[float] = []
    state_file = family / f".{stage.name}.state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]

    trail = stage.trail_steps()
    pretraining = stage.data in corpus.TEXTS
    progress = tqdm(range(len(losses), stage.steps), stage.name, stage.steps, initial=len(losses))
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = group["pace"] * learning_rate(stage, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=pretraining):
            loss = model(**batch(step), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), stage.gradient_clip)
        optimizer.step()
        losses.append(round(loss.item(), 4))
        done = step + 1
        if done % 20 == 0:
            progress.set_postfix(loss=f"{np.mean(losses[-100:]):.3f}", refresh=False)
        if done in trail or done == stage.steps:
            record = {
                "stage": dataclasses.asdict(stage),
                "shape": dataclasses.asdict(shape),
                "step": done,
                "corpus_sha256": corpus_hash,
                "loss": float(np.mean(losses[-100:]).round(4)),
            }
            save_model(model, architecture.tokenizer(), family / trail.get(done, stage.name), record)
        elif done % SAVE_EVERY == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
            with written_whole(state_file) as partial:
                torch.save(state, partial)
    state_file.unlink(missing_ok=True)
