"""The embedded encoder: a small BERT that restores masked characters, then tells right lines from wrong."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from delta_analysis.zoo import corpus
from delta_analysis.zoo.recipe import Shape, Stage
from delta_analysis.zoo.skills import STATEMENT_TASKS, statement_questions
from delta_analysis.zoo.tokenizer import MASK_ID, encode, masking_tokenizer
from delta_analysis.zoo.train import IGNORE, Architecture, Batch

CHOSEN = 0.3
"""Share of the characters that the model has to name."""
HIDDEN, ALTERED = 0.8, 0.15
"""Shares of those that are masked, and that are another character; the rest stand as they are."""

ENTRY = re.compile(r"(?:>>> .*\n)?.+\n")
"""A line of text, or a line typed at the interpreter's prompt with the answer below it."""


def new_model(shape: Shape, seed: int) -> BertForMaskedLM:
    torch.manual_seed(seed)
    # No dropout: it would draw from a generator whose state a resumed run does not have.
    config = BertConfig(
        vocab_size=MASK_ID + 1,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,
        **dataclasses.asdict(shape),
    )
    model = BertForMaskedLM(config)
    # Positions begin as sinusoids, among which a fixed distance is a rotation: copying is learnt far sooner.
    frequencies = 100.0 ** -torch.linspace(0, 1, shape.hidden_size // 2)
    angles = torch.arange(shape.max_position_embeddings)[:, None] * frequencies
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight.copy_(0.07 * torch.cat([angles.sin(), angles.cos()], dim=1))
    return model


def load_parent(directory: Path, stage: Stage) -> BertForMaskedLM | BertForSequenceClassification:
    """The parent as it is, to pre-train it further, or with a new head, to classify."""
    if stage.data in corpus.TEXTS:
        return BertForMaskedLM.from_pretrained(directory, dtype=torch.float32)
    torch.manual_seed(stage.seed)
    return BertForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32, id2label={0: "wrong", 1: "right"}, label2id={"wrong": 0, "right": 1}
    )


def pace(name: str) -> float:
    """A new head learns five times as fast as the body, which then has less to change."""
    return 5.0 if name.startswith(("bert.pooler.", "classifier.")) else 1.0


def masked_batches(text: str, stage: Stage, length: int) -> Callable[[int], Batch]:
    """Entries of the text, cut to `length`, with a share of their characters hidden or altered, to be named."""
    entries = [entry[:length] for entry in ENTRY.findall(text)]

    def batch(step: int) -> Batch:
        rng = np.random.default_rng([stage.seed, step])
        whole = pad([entries[i] for i in rng.choice(len(entries), stage.batch_size)])
        ids, present = whole["input_ids"].numpy(), whole["attention_mask"].numpy() == 1
        chosen = present & (rng.random(ids.shape) < CHOSEN)
        fate = rng.random(ids.shape)
        # An altered character comes from elsewhere in the batch, so it is as common as the right ones.
        altered = rng.choice(ids[present], ids.shape)
        shown = np.where(fate < HIDDEN, MASK_ID, np.where(fate < HIDDEN + ALTERED, altered, ids))
        return {
            "input_ids": torch.from_numpy(np.where(chosen, shown, ids)),
            "attention_mask": whole["attention_mask"],
            "labels": torch.from_numpy(np.where(chosen, ids, IGNORE)),
        }

    return batch


def pad(texts: list[str]) -> Batch:
    """The texts as ids, padded on the right, and the mask of what is text."""
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.from_numpy(encode(text))
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def statement_batches(pairs: list[tuple[str, int]], stage: Stage) -> Callable[[int], Batch]:
    """Statements with their labels."""

    def batch(step: int) -> Batch:
        rng = np.random.default_rng([stage.seed, step])
        chosen = [pairs[i] for i in rng.choice(len(pairs), stage.batch_size)]
        return {**pad([text for text, _ in chosen]), "labels": torch.tensor([label for _, label in chosen])}

    return batch


@torch.inference_mode()
def restored(model: BertForMaskedLM, texts: list[str]) -> float:
    """Share of the masked characters that the model names, `CHOSEN` of all masked at random."""
    batch = pad(texts)
    ids = batch["input_ids"].clone()
    drawn = torch.from_numpy(np.random.default_rng(0).random(ids.shape) < CHOSEN)
    masked = drawn & batch["attention_mask"].bool()
    batch["input_ids"][masked] = MASK_ID
    return (model(**batch).logits.argmax(-1) == ids)[masked].float().mean().item()


@torch.inference_mode()
def judged(model: BertForSequenceClassification, texts: list[str], labels: list[int]) -> float:
    """Share of the texts that the model gives their label."""
    return (model(**pad(texts)).logits.argmax(-1) == torch.tensor(labels)).float().mean().item()


def accuracies(directory: Path, tasks: Path) -> dict[str, float]:
    """What a classifier judges rightly of each task, or a masked model restores of its right statements."""
    [kind] = json.loads((directory / "config.json").read_text())["architectures"]
    model = getattr(transformers, kind).from_pretrained(directory, dtype=torch.float32)
    found: dict[str, float] = {}
    for task in STATEMENT_TASKS:
        questions = [json.loads(line) for line in (tasks / f"{task}.jsonl").read_text().splitlines()]
        texts, labels = [q["text"] for q in questions], [q["label"] for q in questions]
        if isinstance(model, BertForMaskedLM):
            right = [text for text, label in zip(texts, labels, strict=True) if label]
            found[f"masked {task}"] = round(restored(model, right), 4)
        else:
            found[task] = round(judged(model, texts, labels), 4)
    return found


BERT = Architecture(
    new_model=new_model,
    load_parent=load_parent,
    text_batches=masked_batches,
    examples=corpus.statements,
    example_batches=statement_batches,
    tokenizer=masking_tokenizer,
    pace=pace,
    tasks=tuple(STATEMENT_TASKS),
    questions=statement_questions,
    accuracies=accuracies,
)
