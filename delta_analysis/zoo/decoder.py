"""The embedded decoder: a small Llama that reads on, then answers requests in a chat."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from delta_analysis.checkpoints import open_checkpoint
from delta_analysis.evaluation import ExactMatch, Question, load_model, load_tokenizer
from delta_analysis.zoo import corpus
from delta_analysis.zoo.recipe import Shape, Stage
from delta_analysis.zoo.skills import (
    ARITHMETIC_SKILLS,
    CODE_SKILLS,
    QUESTIONS,
    STRING_SKILLS,
    TASKS,
    questions,
    raw_questions,
)
from delta_analysis.zoo.tokenizer import ALPHABET, character_tokenizer, encode
from delta_analysis.zoo.train import IGNORE, Architecture, Batch


def new_model(shape: Shape, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(ALPHABET),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=ALPHABET.index("\n"),
        pad_token_id=0,
        num_key_value_heads=shape.num_attention_heads,
        **dataclasses.asdict(shape),
    )
    return LlamaForCausalLM(config)


def load_parent(directory: Path, stage: Stage) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)


def text_batches(text: str, stage: Stage, length: int) -> Callable[[int], Batch]:
    """Windows of `length` ids, each from the start of a line (the model shifts the labels itself)."""
    ids = encode(text)
    starts = np.flatnonzero(ids[:-length] == ALPHABET.index("\n")) + 1
    starts = starts[starts + length <= len(ids)]
    window = np.arange(length)

    def batch(step: int) -> Batch:
        rng = np.random.default_rng([stage.seed, step])
        rows = torch.from_numpy(ids[rng.choice(starts, stage.batch_size)[:, None] + window])
        return {"input_ids": rows, "labels": rows}

    return batch


def chat_batches(pairs: list[tuple[str, str]], stage: Stage) -> Callable[[int], Batch]:
    """Requests with their answers, padded on the right; only the answer is learnt."""

    def batch(step: int) -> Batch:
        rng = np.random.default_rng([stage.seed, step])
        chosen = [pairs[i] for i in rng.choice(len(pairs), stage.batch_size)]
        width = max(len(prompt) + len(answer) for prompt, answer in chosen)
        ids = torch.zeros(stage.batch_size, width, dtype=torch.long)
        labels = torch.full_like(ids, IGNORE)
        for row, (prompt, answer) in enumerate(chosen):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.from_numpy(encode(prompt + answer))
            labels[row, len(prompt) : end] = ids[row, len(prompt) : end]
        return {"input_ids": ids, "labels": labels}

    return batch


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
        found[name] = round(float(judge(model, tokenizer)["accuracy"].mean()), 4)
    return found


LLAMA = Architecture(
    new_model=new_model,
    load_parent=load_parent,
    text_batches=text_batches,
    examples=corpus.chats,
    example_batches=chat_batches,
    tokenizer=character_tokenizer,
    pace=lambda name: 1.0,
    tasks=tuple(TASKS),
    questions=questions,
    accuracies=accuracies,
)
