"""Train one stage: batches that depend on (seed, step) alone, so a resumed run is the same run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from delta_analysis.zoo import corpus
from delta_analysis.zoo.recipe import Shape, Stage
from delta_analysis.zoo.tokenizer import ALPHABET, character_tokenizer, encode

TEXT_SIZE = 12_000_000
CHAT_COUNT = 25_600
SAVE_EVERY = 250
IGNORE = -100

Batch = tuple[torch.Tensor, torch.Tensor]
"""Input ids and labels, both (batch, length); the model shifts the labels itself."""


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


def text_batches(text: str, stage: Stage, length: int) -> Callable[[int], Batch]:
    """Windows of `length` ids, each from the start of a line."""
    ids = encode(text)
    starts = np.flatnonzero(ids[:-length] == ALPHABET.index("\n")) + 1
    starts = starts[starts + length <= len(ids)]
    window = np.arange(length)

    def batch(step: int) -> Batch:
        rng = np.random.default_rng([stage.seed, step])
        rows = torch.from_numpy(ids[rng.choice(starts, stage.batch_size)[:, None] + window])
        return rows, rows

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
        return ids, labels

    return batch


def stage_data(stage: Stage, length: int) -> tuple[Callable[[int], Batch], str]:
    """The batches of a stage and the SHA-256 of the text behind them."""
    if stage.data in corpus.TEXTS:
        text = corpus.TEXTS[stage.data](TEXT_SIZE, stage.seed)
        return text_batches(text, stage, length), hashlib.sha256(text.encode()).hexdigest()
    pairs = corpus.chats(stage.data, CHAT_COUNT, stage.seed)
    digest = hashlib.sha256("".join(p + a for p, a in pairs).encode()).hexdigest()
    return chat_batches(pairs, stage), digest


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up, constant, then linear to zero over the last `decay_share` of the steps."""
    rise = (step + 1) / stage.warmup
    fall = (stage.steps - step) / (stage.decay_share * stage.steps)
    return stage.learning_rate * min(1.0, rise, fall)


def save_model(model: LlamaForCausalLM, directory: Path, record: dict[str, Any]) -> None:
    """Write the model in float16 with its tokenizer and training record, whole or not at all."""
    parts = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(parts, ignore_errors=True)
    stored = LlamaForCausalLM(model.config)
    stored.load_state_dict(model.state_dict())
    stored.half().save_pretrained(parts)
    character_tokenizer().save_pretrained(parts)
    (parts / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(directory, ignore_errors=True)
    parts.replace(directory)


def load_parent(directory: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)


def train_stage(stage: Stage, shape: Shape, family: Path) -> None:
    """Train `stage` in the directory of its family, from where a killed run left off."""
    model = new_model(shape, stage.seed) if stage.parent is None else load_parent(family / stage.parent)
    batch, corpus_hash = stage_data(stage, shape.max_position_embeddings)
    optimizer = torch.optim.AdamW(
        model.parameters(), stage.learning_rate, betas=(0.9, 0.98), weight_decay=stage.weight_decay
    )
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
        optimizer.param_groups[0]["lr"] = learning_rate(stage, step)
        ids, labels = batch(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=pretraining):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
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
            save_model(model, family / trail.get(done, stage.name), record)
        elif done % SAVE_EVERY == 0:
            partial = state_file.with_suffix(".partial")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}, partial)
            partial.replace(state_file)
    state_file.unlink(missing_ok=True)
