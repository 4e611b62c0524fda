"""Texts as batches of tokens, and evaluations that judge models batch by batch."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from delta_analysis._errors import checked_number
from delta_analysis.evaluation.protocol import Evaluation, Outcomes, Prepared

TOKENS_A_BATCH = 2048
"""Padding included; one text that is longer is a batch of its own."""


Held = tuple[torch.Tensor, ...]
"""What an evaluation keeps of a batch, such as the outputs of the untouched model."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Texts alike in length, so that little is padded.

    Attributes
    ----------
    places : where each stands among all the texts.
    lengths : how many tokens each has.
    ids : (texts, longest) token ids, padded on the right.
    mask : (texts, longest) 1 where there is a token, 0 where there is padding.
    """

    places: list[int]
    lengths: list[int]
    ids: torch.Tensor
    mask: torch.Tensor

    def inputs(self, model: PreTrainedModel) -> dict[str, torch.Tensor | bool]:
        """The arguments of a forward pass."""
        inputs: dict[str, torch.Tensor | bool] = {
            "input_ids": self.ids.to(model.device),
            "attention_mask": self.mask.to(model.device),
        }
        return inputs | {"use_cache": False} if model.can_generate() else inputs

    def tokens(self, values: torch.Tensor) -> torch.Tensor:
        """Of values (texts, longest, …), those at tokens, one text after the other: (tokens, …)."""
        return values[self.mask.to(values.device).bool()]


def token_batches(
    texts: tuple[str, ...],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    most_tokens: int = sys.maxsize,
    most_texts: int = sys.maxsize,
) -> Iterator[Batch]:
    """The texts in batches of at most `most_texts`, the shortest first.

    A model that generates text reads a text after its `beginning`; any other, such as a classifier,
    reads it with the special tokens of its tokenizer. Texts are cut to `most_tokens`, or to what the model or its
    tokenizer can take, if that is less.

    Raises
    ------
    ValueError
        A text without tokens.
    """
    most = min(
        most_tokens,
        tokenizer.model_max_length,
        getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize,
    )
    # Truncation is a state of the tokenizer, which other threads may be using.
    own = copy.deepcopy(tokenizer)
    decoder = model.can_generate()
    start = beginning(tokenizer) if decoder else []
    rows: list[list[int]] = own(
        list(texts), add_special_tokens=not decoder, truncation=True, max_length=int(most) - len(start)
    )["input_ids"]
    if [] in rows:
        raise ValueError(f"text {rows.index([])} has no tokens; expected at least one: drop it")
    rows = [start + row for row in rows]
    groups: list[list[int]] = [[]]
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        count = len(groups[-1])
        if count == most_texts or (count and (count + 1) * len(rows[i]) > TOKENS_A_BATCH):
            groups.append([])
        groups[-1].append(i)
    for places in groups:
        parts = [torch.tensor(rows[i]) for i in places]
        ids = pad_sequence(parts, batch_first=True, padding_value=_pad_id(model, tokenizer))
        mask = pad_sequence([torch.ones_like(part) for part in parts], batch_first=True)
        yield Batch(places, [len(part) for part in parts], ids.to(model.device), mask.to(model.device))


def _pad_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The model's own, by which a classifier finds the end of a text, or else the tokenizer's."""
    own = getattr(model.config.get_text_config(), "pad_token_id", None)
    return int(own if own is not None else tokenizer.pad_token_id or 0)


def text_means(values: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Of values (…, tokens), the mean over each text, given the texts' lengths: (…, texts) in float64."""
    return torch.stack([part.mean(-1) for part in values.double().split(lengths, dim=-1)], dim=-1)


def by_batch(
    evaluation: Evaluation,
    batches: Sequence[tuple[Batch, Held]],
    judge: Callable[[PreTrainedModel, Batch, Held], dict[str, torch.Tensor]],
) -> Prepared:
    """The evaluation made ready: `judge` gives each metric's outcomes of a batch, from what is kept of it."""

    @torch.inference_mode()
    def outcomes(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Outcomes:
        found: Outcomes = {}
        for batch, held in batches:
            for metric, values in judge(model, batch, held).items():
                found.setdefault(metric, np.empty(len(evaluation.texts)))[batch.places] = values.cpu().numpy()
        return found

    return Prepared(evaluation, outcomes)


def check_texts(texts: tuple[str, ...], most_tokens: int) -> None:
    """Refuse what leaves nothing to judge."""
    if not texts:
        raise ValueError("there is no text to judge a model on; expected at least one")
    checked_number("most_tokens", most_tokens, 1, whole=True)


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's beginning-of-text token if it puts one before every text, as Llama's and Gemma's do.

    Other special tokens are left out: what is judged is what the model writes next.
    """
    first = tokenizer("", add_special_tokens=True)["input_ids"][:1]
    return first if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else []
