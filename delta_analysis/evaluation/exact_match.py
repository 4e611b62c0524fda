"""Accuracy of generated answers, by exact match."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from delta_analysis._errors import checked_number
from delta_analysis.evaluation.generation import Plan, matches, plan
from delta_analysis.evaluation.protocol import SPEED, Evaluation, Kind, Outcomes, Prepared


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
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").rstrip().split("\n"), start=1):
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


@dataclass(frozen=True)
class ExactMatch:
    """Accuracy: which questions the model answers exactly, by greedy generation.

    An answer is right when the generated text, up to its first newline or end-of-sequence token,
    equals the question's answer up to its newline. Generation goes on for as long as the answer can
    still become right. Calling it on `(model, tokenizer)` gives `accuracy`: 0 or 1 a question, in
    their order.

    Parameters
    ----------
    questions : the items.
    name : what tables call the evaluation.
    chat_template : whether a prompt is the user's message of a chat, in the tokenizer's template;
        without, it goes to the tokenizer as it is, after the beginning-of-text token if the tokenizer
        adds one. No other special tokens are added.
    batch_size : questions that the model reads together at most; at least 1. Does not change outcomes
        but for rounding.

    Raises
    ------
    ValueError
        A batch size below 1; when prepared or called, a tokenizer without the chat template asked for.

    Examples
    --------
    >>> ExactMatch((Question("2+2=", "4"), Question("2+3=", "5")), name="sums").protocol
    'Accuracy on 2 questions: exact match of the greedily generated line; prompts as they are, after the
    beginning-of-text token if the tokenizer adds one. Intervals resample the questions.'
    """

    kind: ClassVar[Kind] = "score"

    questions: tuple[Question, ...]
    name: str = "exact match"
    chat_template: bool = False
    batch_size: int = field(default=64, metadata=SPEED)

    def __post_init__(self) -> None:
        if not self.questions:
            raise ValueError("there is no question to judge a model on; expected at least one")
        checked_number("batch_size", self.batch_size, 1, whole=True)

    @property
    def protocol(self) -> str:
        """What is measured, on what, and how prompts are written."""
        prompts = (
            "each prompt a user's message in the tokenizer's chat template"
            if self.chat_template
            else "prompts as they are, after the beginning-of-text token if the tokenizer adds one"
        )
        return (
            f"Accuracy on {len(self.questions):,} questions: exact match of the greedily generated line; {prompts}. "
            "Intervals resample the questions."
        )

    @property
    def texts(self) -> tuple[str, ...]:
        """The questions with their answers."""
        return tuple(question.prompt + question.answer for question in self.questions)

    def prepared(self, untouched: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
        """The same evaluation with its tokens and batches at hand."""
        made = self.planned(untouched, tokenizer)

        def judge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Outcomes:
            return {"accuracy": matches(model, tokenizer, made)}

        return Prepared(self, judge)

    def planned(self, untouched: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Plan:
        """The answers as drafts in tokens, and the batches to check them in."""
        prompts = [question.prompt for question in self.questions]
        if self.chat_template:
            prompts = [_chat(tokenizer, prompt) for prompt in prompts]
        answers = [question.answer.split("\n", 1)[0] for question in self.questions]
        return plan(untouched, tokenizer, prompts, answers, self.batch_size)

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Outcomes:
        return self.prepared(model, tokenizer)(model, tokenizer)


def _chat(tokenizer: PreTrainedTokenizerBase, message: str) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template; evaluate with chat_template=False, "
            "or put a chat_template into its tokenizer_config.json"
        )
    return str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False
        )
    )
