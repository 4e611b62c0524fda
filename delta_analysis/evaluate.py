"""Evaluate a model whose weights are edited in place, without writing anything to disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from delta_analysis.checkpoint import Checkpoint


@dataclass(frozen=True)
class Question:
    """A prompt, and the exact text that must follow it up to the first newline."""

    prompt: str
    answer: str


def load_questions(path: str | Path, count: int | None = None) -> list[Question]:
    """The first `count` questions of a JSONL file, one `{"prompt": …, "answer": …}` a line.

    Raises
    ------
    ValueError
        A line that is no such object, or fewer questions than asked for.
    """
    questions = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            fields = json.loads(line)
            questions.append(Question(fields["prompt"], fields["answer"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number}: expected {{"prompt": …, "answer": …}}, got {line[:80]!r}'
            ) from error
    if count is not None and not 1 <= count <= len(questions):
        raise ValueError(f"{path}: {count} questions asked for, between 1 and {len(questions)} are to be had")
    return questions[:count]


def load_model(checkpoint: Checkpoint, device: str = "cpu") -> PreTrainedModel:
    """The model of a checkpoint directory in float32, for evaluation; never runs remote code."""
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.path, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    return model.to(torch.device(device)).eval()  # type: ignore[arg-type]


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint directory, padding on the left as generation needs."""
    tokenizer = AutoTokenizer.from_pretrained(
        checkpoint.path, local_files_only=True, trust_remote_code=False, padding_side="left"
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def patched(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> Iterator[PreTrainedModel]:
    """The model with some of its weights replaced, restored bit for bit afterwards.

    Parameters
    ----------
    model : any model whose parameters bear the names in `weights`.
    weights : name -> new weight, read one at a time.

    Raises
    ------
    ValueError
        A name that the model lacks, a shape that differs, or a weight that is NaN or infinite; the
        model is left as it was.
    """
    # Tied parameters appear under each of their names here and share one storage.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    saved: dict[str, torch.Tensor] = {}
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                parameter = _matching(parameters, name, weight)
                saved[name] = parameter.clone()
                parameter.copy_(weight)
        yield model
    finally:
        with torch.no_grad():
            for name, weight in saved.items():
                parameters[name].copy_(weight)


def _matching(parameters: dict[str, torch.nn.Parameter], name: str, weight: torch.Tensor) -> torch.Tensor:
    if name not in parameters:
        raise ValueError(f"tensor {name!r} has no place in the model; its parameters begin with {list(parameters)[:3]}")
    parameter = parameters[name]
    if parameter.shape != weight.shape:
        raise ValueError(f"tensor {name!r} has shape {tuple(weight.shape)}, the model's {tuple(parameter.shape)}")
    if bad := int((~torch.isfinite(weight)).sum()):
        raise ValueError(
            f"tensor {name!r} has {bad} NaN or infinite entries of {weight.numel()}; a model with them cannot be judged"
        )
    return parameter


@dataclass(frozen=True)
class ExactMatch:
    """Accuracy: which questions the model answers exactly, by greedy generation.

    An answer is right when the generated text up to its first newline equals the question's answer
    up to its newline. Prompts go to the tokenizer as they are, without special tokens. A batch
    stops when each of its answers is finished or can no longer become right, and at the latest two
    tokens after the longest answer.

    Calling it on `(model, tokenizer)` gives one 0 or 1 a question, in their order.
    """

    questions: tuple[Question, ...]
    batch_size: int = 50
    metric: ClassVar[str] = "accuracy"

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        right = np.zeros(len(self.questions))
        # Alike in length, so that little is padded and no short answer waits for a long one.
        order = sorted(range(len(right)), key=lambda i: (len(self.questions[i].answer), len(self.questions[i].prompt)))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            answers = [_first_line(self.questions[i].answer) for i in batch]
            texts = answer_texts(model, tokenizer, [self.questions[i].prompt for i in batch], answers)
            right[batch] = [_first_line(text) == answer for text, answer in zip(texts, answers, strict=True)]
        return right


@dataclass(frozen=True)
class TextPerplexity:
    """Perplexity of a text: exp of the mean negative log-likelihood of its tokens.

    Windows of `window` tokens advance by `stride`; each token but the first is scored once, in the
    first window that holds it, so that all but the earliest have at least `window - stride` tokens
    of context.

    Calling it on `(model, tokenizer)` gives the loss of each scored token, in nats.
    """

    text: str
    window: int = 128
    stride: int = 64
    metric: ClassVar[str] = "perplexity"

    def __post_init__(self) -> None:
        if not 1 <= self.stride < self.window:
            raise ValueError(f"stride must be between 1 and window - 1 = {self.window - 1}; not {self.stride}")

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        ids = torch.tensor([tokenizer(self.text, add_special_tokens=False, verbose=False)["input_ids"]])
        ids = ids.to(model.device)
        length = ids.shape[1]
        if length < 2:
            raise ValueError(f"perplexity needs a text of at least two tokens; this one has {length}")
        losses, scored = [], 1
        with torch.inference_mode():
            while scored < length:
                stop = min(max(scored - 1 + self.stride, self.window), length)
                part = ids[:, max(0, stop - self.window) : stop]
                fresh = stop - scored
                logits = model(input_ids=part, use_cache=False).logits[0, -fresh - 1 : -1]
                losses.append(torch.nn.functional.cross_entropy(logits.double(), part[0, -fresh:], reduction="none"))
                scored = stop
        return torch.cat(losses).cpu().numpy()


def answer_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str]
) -> list[str]:
    """The greedy continuation of each prompt, as one batch, for as long as it may become its answer."""
    inputs = tokenizer(list(prompts), add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
    width = inputs["input_ids"].shape[1]
    longest = max(len(ids) for ids in tokenizer(list(answers), add_special_tokens=False)["input_ids"])

    def decided(tokens: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
        texts = tokenizer.batch_decode(tokens[:, width:])
        over = ["\n" in text or not answer.startswith(text) for text, answer in zip(texts, answers, strict=True)]
        return torch.tensor(over, device=tokens.device)

    with torch.inference_mode():
        tokens = model.generate(  # type: ignore[operator]
            **inputs,
            max_new_tokens=longest + 2,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([decided]),
        )
    return tokenizer.batch_decode(tokens[:, width:])


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0]
