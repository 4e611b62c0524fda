"""What an evaluation is: a model and its tokenizer in, outcomes of items out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPEED = {"speed": True}
"""Metadata of a field that changes no outcome but for rounding, and so is no part of a cell's content."""


Outcomes = dict[str, np.ndarray]
"""Metric -> one outcome an item (a question, a token, a prompt), from whose mean the metric follows."""


Kind = Literal["score", "perplexity", "error"]
"""What a metric is: a mean of which more is better; losses of tokens, whose mean's exp is its value, and less is
better; an error, a mean of which less is better and that is 0 for the untouched model."""


class Evaluation(Protocol):
    """Judges a model: a frozen dataclass of plain values, such as `ExactMatch(questions)`.

    Attributes
    ----------
    name : what tables call it.
    kind : what its metrics are.
    protocol : what is measured, on what, and what its intervals resample; a sentence or two for a report.
    texts : what it is judged on, as a model reads it.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def protocol(self) -> str: ...
    @property
    def texts(self) -> tuple[str, ...]: ...

    def prepared(self, untouched: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
        """The same evaluation with all at hand that no edit of the model changes.

        Such as tokens, batches, and what the untouched model gives, for an evaluation that compares
        with it. Several threads may share what is returned.
        """
        ...

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Outcomes: ...


@dataclass(frozen=True, eq=False)
class Prepared:
    """An evaluation made ready.

    Attributes
    ----------
    evaluation : the evaluation as it was.
    judge : gives the outcomes of a model, from what is at hand.
    """

    evaluation: Evaluation
    judge: Callable[[PreTrainedModel, PreTrainedTokenizerBase], Outcomes]

    @property
    def name(self) -> str:
        return self.evaluation.name

    @property
    def kind(self) -> Kind:
        return self.evaluation.kind

    @property
    def protocol(self) -> str:
        return self.evaluation.protocol

    @property
    def texts(self) -> tuple[str, ...]:
        return self.evaluation.texts

    def prepared(self, untouched: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
        return self.evaluation.prepared(untouched, tokenizer)

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Outcomes:
        return self.judge(model, tokenizer)
