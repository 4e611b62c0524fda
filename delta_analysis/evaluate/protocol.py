"""What an evaluation is: a model and its tokenizer in, outcomes of items out."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPEED = {"speed": True}
"""Metadata of a field that changes no outcome but for rounding, and so is no part of a cell's content."""

Outcomes = dict[str, np.ndarray]
"""Metric -> one outcome an item (a question, a token, a prompt), from whose mean the metric follows."""


class Evaluation(Protocol):
    """Judges a model: a frozen dataclass of plain values, such as `ExactMatch(questions)`.

    Attributes
    ----------
    name : what tables call it.
    protocol : what is measured, on what, and what its intervals resample; a sentence or two for a report.
    texts : what it is judged on, as a model reads it.
    """

    @property
    def name(self) -> str: ...
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
