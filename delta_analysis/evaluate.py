"""Evaluate a model whose weights are edited in place, without writing anything to disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from delta_analysis._errors import CheckpointError
from delta_analysis.checkpoint import Checkpoint, tokenizer_folder
from delta_analysis.generation import answer_texts


@dataclass(frozen=True)
class Question:
    """A prompt, and the exact text that must follow it up to the first newline."""

    prompt: str
    answer: str


def load_questions(path: str | Path, count: int | None = None) -> list[Question]:
    """The first `count` questions of a JSONL file (all, if it has fewer), one object a line.

    A line is `{"prompt": …, "answer": …}`.

    Raises
    ------
    ValueError
        A line that is no such object, or whose prompt is empty.
    """
    questions = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n"), start=1):
        try:
            fields = json.loads(line)
            question = Question(fields["prompt"], fields["answer"])
            if not (isinstance(question.prompt, str) and isinstance(question.answer, str)):
                raise TypeError("prompt and answer must be text")
            if not question.prompt:
                raise ValueError("an empty prompt")
            questions.append(question)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number}: expected {{"prompt": …, "answer": …}}, got {line[:80]!r} ({error})'
            ) from error
    return questions[:count]


def load_model(checkpoint: Checkpoint, device: str = "cpu") -> PreTrainedModel:
    """The model of a checkpoint directory in float32, for evaluation; never runs remote code.

    Raises
    ------
    CheckpointError
        A directory that transformers cannot load, or that lacks weights of its own architecture.
    """
    if checkpoint.path is None or checkpoint.is_difference:
        raise CheckpointError(f"{checkpoint.source}: is no model on disk; evaluation needs a checkpoint directory")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: cannot be loaded as a language model ({_first_line(str(error))}); "
            "evaluation needs a directory with config.json and weights of one architecture"
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise CheckpointError(
            f"{checkpoint.path}: lacks {len(missing)} weights of its architecture, first {missing[0]!r}; "
            "they would be random, fetch the whole checkpoint"
        )
    # Greedy means greedy: a checkpoint's penalties and sampling settings would change the answers.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model.to(torch.device(device)).eval()


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint directory.

    Raises
    ------
    CheckpointError
        A directory without a tokenizer that transformers can load.
    """
    folder = tokenizer_folder(checkpoint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: has no tokenizer that can be loaded ({_first_line(str(error))}); "
            "copy tokenizer.json and tokenizer_config.json beside the weights"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def patched(
    model: PreTrainedModel, weights: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
) -> Iterator[PreTrainedModel]:
    """The model with some of its weights replaced, restored bit for bit afterwards.

    Parameters
    ----------
    model : any model whose parameters bear the names in `weights`.
    weights : name -> new weight, or pairs of both, read one at a time.

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
            for name, weight in weights.items() if isinstance(weights, Mapping) else weights:
                parameter = _matching(parameters, name, weight)
                saved[name] = parameter.clone()
                parameter.copy_(weight)
        yield model
    finally:
        with torch.no_grad():
            # In reverse, since a tied weight may have been saved twice, the second time already patched.
            for name, weight in reversed(saved.items()):
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

    An answer is right when the generated text, up to its first newline or end-of-sequence token,
    equals the question's answer up to its newline. Prompts go to the tokenizer as they are, without
    special tokens. Generation goes on for as long as the answer can still become right.

    Calling it on `(model, tokenizer)` gives one 0 or 1 a question, in their order.
    """

    questions: tuple[Question, ...]
    batch_size: int = 20
    metric: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; not {self.batch_size}")

    @property
    def texts(self) -> tuple[str, ...]:
        """The questions with their answers."""
        return tuple(question.prompt + question.answer for question in self.questions)

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        right = np.zeros(len(self.questions))
        # Alike in length, so that little is padded.
        order = sorted(range(len(right)), key=lambda i: len(self.questions[i].prompt + self.questions[i].answer))
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

    @property
    def texts(self) -> tuple[str, ...]:
        """The paragraphs of the text."""
        return tuple(part for part in self.text.split("\n\n") if part.strip())

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        ids = torch.tensor([tokenizer(self.text, add_special_tokens=False, verbose=False)["input_ids"]])
        ids = ids.to(model.device)
        length = ids.shape[1]
        if length < 2:
            raise ValueError(f"perplexity needs a text of at least two tokens; this one has {length}")
        losses, scored = [], 1
        with torch.inference_mode():
            while scored < length:
                stop = min(max(scored + self.stride, self.window), length)
                part = ids[:, max(0, stop - self.window) : stop]
                fresh = stop - scored
                logits = model(input_ids=part, use_cache=False).logits[0, -fresh - 1 : -1]
                losses.append(torch.nn.functional.cross_entropy(logits.double(), part[0, -fresh:], reduction="none"))
                scored = stop
        return torch.cat(losses).cpu().numpy()


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0]
