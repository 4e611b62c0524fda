"""Perplexity of a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from delta_analysis._errors import checked_number
from delta_analysis.evaluation.protocol import Evaluation, Kind, Outcomes, Prepared
from delta_analysis.evaluation.tokens import beginning


@dataclass(frozen=True)
class TextPerplexity:
    """Perplexity of a text: exp of the mean negative log-likelihood of its tokens.

    Windows of `window` tokens advance by `stride`; each token but the first is scored once, in the
    first window that holds it, so that all but the earliest have at least `window - stride` tokens
    of context. Calling it on `(model, tokenizer)` gives `perplexity`: the loss of each scored token,
    in nats.

    Parameters
    ----------
    text : at least two tokens; read after the tokenizer's beginning-of-text token if it adds one.
    window : tokens that the model reads at once.
    stride : at least 1, at most `window - 1`.
    name : what tables call the evaluation.

    Raises
    ------
    ValueError
        A stride out of range; when prepared or called, a text of fewer than two tokens.

    Examples
    --------
    >>> TextPerplexity("It was the best of times").protocol
    'Perplexity of a text of 24 characters: exp of the mean loss of its tokens but the first, in windows of 128 tokens
    that advance by 64. Intervals resample blocks of neighbours.'
    """

    kind: ClassVar[Kind] = "perplexity"

    text: str
    window: int = 128
    stride: int = 64
    name: str = "perplexity"

    def __post_init__(self) -> None:
        checked_number("stride", self.stride, 1, self.window, high_open=True, whole=True)

    @property
    def protocol(self) -> str:
        """What is measured, on what, and in which windows."""
        return (
            f"Perplexity of a text of {len(self.text):,} characters: exp of the mean loss of its tokens but the first, "
            f"in windows of {self.window} tokens that advance by {self.stride}. "
            "Intervals resample blocks of neighbours."
        )

    @property
    def texts(self) -> tuple[str, ...]:
        """The paragraphs of the text."""
        return tuple(part for part in self.text.split("\n\n") if part.strip())

    def prepared(self, untouched: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
        """The same evaluation with its tokens at hand."""
        own = tokenizer(self.text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = torch.tensor([beginning(tokenizer) + own])
        if ids.shape[1] < 2:
            raise ValueError(f"perplexity needs a text of at least two tokens; this one has {ids.shape[1]}")

        def judge(model: PreTrainedModel, _: PreTrainedTokenizerBase) -> Outcomes:
            return {"perplexity": _losses(model, ids.to(model.device), self.window, self.stride)}

        return Prepared(self, judge)

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Outcomes:
        return self.prepared(model, tokenizer)(model, tokenizer)


def _losses(model: PreTrainedModel, ids: torch.Tensor, window: int, stride: int) -> np.ndarray:
    """The loss of each of the (1, length) tokens but the first."""
    length = ids.shape[1]
    losses, scored = [], 1
    with torch.inference_mode():
        while scored < length:
            stop = min(max(scored + stride, window), length)
            part = ids[:, max(0, stop - window) : stop]
            fresh = stop - scored
            logits = model(input_ids=part, use_cache=False).logits[0, -fresh - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits.double(), part[0, -fresh:], reduction="none"))
            scored = stop
    return torch.cat(losses).cpu().numpy()
