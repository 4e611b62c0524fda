"""An evaluation with all at hand that no edit of the model changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from delta_analysis.evaluate.protocol import Evaluation, Outcomes


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
    def protocol(self) -> str:
        return self.evaluation.protocol

    @property
    def texts(self) -> tuple[str, ...]:
        return self.evaluation.texts

    def prepared(self, untouched: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
        return self.evaluation.prepared(untouched, tokenizer)

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Outcomes:
        return self.judge(model, tokenizer)
