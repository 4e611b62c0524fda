"""Items as margins: by how much the right choices of a model lead over their rivals, without generation.

A question is answered rightly while every token of the answer, the end included, is the first choice after
those before it; a text is classified rightly while the logit of its label is the largest. Of a text that is
judged by its perplexity, the losses of the tokens stand in for margins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from delta_analysis.evaluation.classification import Classification
from delta_analysis.evaluation.exact_match import ExactMatch
from delta_analysis.evaluation.generation import Plan, draft_logits
from delta_analysis.evaluation.perplexity import TextPerplexity
from delta_analysis.evaluation.protocol import Evaluation
from delta_analysis.evaluation.tokens import token_batches

MOST_RIVALS = 12
"""Of each decision, so many rivals have margins of their own: those nearest to the right choice at first."""


@dataclass(frozen=True)
class Decisions:
    """Logits of some decisions, (decisions, choices); the choices that are right, True; and how many each item has."""

    logits: torch.Tensor
    right: torch.Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Margins:
    """An evaluation as margins.

    Attributes
    ----------
    metric : what it measures, `accuracy` or `perplexity`.
    read : of a model, its margins (rows, rivals) and its outcomes (items,).
    starts : the row with which each item begins.
    """

    metric: str
    read: Callable[[PreTrainedModel], tuple[np.ndarray, np.ndarray]]
    starts: np.ndarray

    def outcomes(self, margins: np.ndarray) -> np.ndarray:
        """Outcomes (…, items) of margins (…, rows, rivals)."""
        if self.metric == "perplexity":
            return margins[..., 0]
        return np.minimum.reduceat(margins.min(axis=-1), self.starts, axis=-1) > 0


def margins_of(evaluation: Evaluation, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Margins:
    """The evaluation as margins; rivals are chosen by this model, the untouched one.

    Raises
    ------
    ValueError
        An evaluation that is neither `ExactMatch`, `Classification` nor `TextPerplexity`.
    """
    if isinstance(evaluation, TextPerplexity):
        judge = evaluation.prepared(model, tokenizer)

        def losses(judged: PreTrainedModel) -> tuple[np.ndarray, np.ndarray]:
            found = judge(judged, tokenizer)["perplexity"]
            return found[:, None], found

        return Margins("perplexity", losses, np.arange(len(losses(model)[1])))
    decide = _decisions(evaluation, model, tokenizer)
    rivals: list[torch.Tensor] = []
    lengths: list[int] = []
    for part in decide(model):
        others = part.logits.masked_fill(part.right, -torch.inf)
        rivals.append(others.topk(min(MOST_RIVALS, others.shape[-1] - 1)).indices)
        lengths += part.lengths

    def read(judged: PreTrainedModel) -> tuple[np.ndarray, np.ndarray]:
        led, least = [], []
        for part, chosen in zip(decide(judged), rivals, strict=True):
            best = part.logits.masked_fill(~part.right, -torch.inf).amax(-1)
            led.append((best[:, None] - part.logits.gather(-1, chosen)).float().cpu().numpy())
            least.append((best - part.logits.masked_fill(part.right, -torch.inf).amax(-1)).float().cpu().numpy())
        right = np.minimum.reduceat(np.concatenate(least), starts) > 0
        return np.concatenate(led), right.astype(np.float64)

    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(int)
    return Margins("accuracy", read, starts)


def first_items(evaluation: Evaluation, count: int) -> Evaluation:
    """The same evaluation on its first items, at most `count`; a text stays whole."""
    if isinstance(evaluation, ExactMatch):
        return replace(evaluation, questions=evaluation.questions[:count])
    if isinstance(evaluation, Classification):
        return replace(evaluation, examples=evaluation.examples[:count])
    return evaluation


Decide = Callable[[PreTrainedModel], Iterator[Decisions]]


def _decisions(evaluation: Evaluation, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Decide:
    if isinstance(evaluation, ExactMatch):
        return _of_answers(evaluation.planned(model, tokenizer), _endings(tokenizer))
    if isinstance(evaluation, Classification):
        return _of_labels(evaluation, model, tokenizer)
    raise ValueError(
        f"{type(evaluation).__name__} has no margins; expected ExactMatch, Classification or TextPerplexity"
    )


def _of_labels(evaluation: Classification, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Decide:
    evaluation.prepared(model, tokenizer)
    batches = list(token_batches(evaluation.texts, model, tokenizer, most_texts=evaluation.batch_size))
    labels = torch.tensor([example.label for example in evaluation.examples], device=model.device)

    @torch.inference_mode()
    def decide(judged: PreTrainedModel) -> Iterator[Decisions]:
        for batch in batches:
            logits = judged(**batch.inputs(judged)).logits.float()
            right = _only(labels[batch.places], logits.shape[-1])
            yield Decisions(logits, right, (1,) * len(logits))

    return decide


def _endings(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a line."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    return [i for i, text in enumerate(texts) if text.startswith("\n")]


def _of_answers(plan: Plan, newlines: list[int]) -> Decide:
    endings = sorted({*newlines, *plan.ends})

    @torch.inference_mode()
    def decide(judged: PreTrainedModel) -> Iterator[Decisions]:
        for batch in plan.batches:
            logits = draft_logits(judged, batch)
            width, kept = batch.ids.shape[1], logits.shape[1]
            rows, lengths, tokens = [], [], []
            for row, place in zip(logits, batch.places, strict=True):
                draft = plan.drafts[place]
                first = len(draft.prompt) - 1 - width + kept
                rows.append(row[first : first + len(draft.tokens)].float())
                lengths.append(len(draft.tokens))
                tokens += draft.tokens
            own = torch.cat(rows)
            right = _only(torch.tensor(tokens, device=own.device), own.shape[-1])
            ended = [i for i, token in enumerate(tokens) if token in endings]
            right[torch.tensor(ended, device=own.device)[:, None], torch.tensor(endings, device=own.device)] = True
            yield Decisions(own, right, tuple(lengths))

    return decide


def _only(chosen: torch.Tensor, choices: int) -> torch.Tensor:
    """(decisions, choices) that is True at the chosen ones."""
    return torch.zeros(len(chosen), choices, device=chosen.device).scatter_(1, chosen[:, None], 1).bool()
