"""Perplexity, on a tiny model with random weights."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from delta_analysis.evaluation import TextPerplexity
from tests.evaluation.conftest import ids_of, tiny_model


def window_ends(length: int, window: int, stride: int) -> list[int]:
    """Where windows that advance by the stride end; the last ends with the text."""
    ends = [min(window, length)]
    while ends[-1] < length:
        ends.append(min(ends[-1] + stride, length))
    return ends


def slow_losses(model: LlamaForCausalLM, ids: list[int], window: int, stride: int) -> list[float]:
    """The loss of each token but the first, in the first window that holds it."""
    losses = []
    for position in range(1, len(ids)):
        end = next(end for end in window_ends(len(ids), window, stride) if end > position)
        begin = max(0, end - window)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[begin:position]]), use_cache=False).logits[0, -1].double()
        losses.append(float(logits.logsumexp(0) - logits[ids[position]]))
    return losses


TEXT = "the quick brown fox jumps over the lazy dog, and 12 + 34 = 46 while abc reversed is cba"


@pytest.mark.parametrize("length", [2, 3, 40, 64])
def test_perplexity_of_a_short_text_is_exp_of_its_mean_loss(
    answering_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, length: int
) -> None:
    ids = ids_of(tokenizer, TEXT[:length])
    with torch.no_grad():
        logits = answering_model(input_ids=torch.tensor([ids])).logits[0].double().numpy()
    by_hand = [
        math.log(sum(math.exp(x - max(row)) for x in row)) + max(row) - row[following]
        for row, following in zip(logits, ids[1:], strict=False)
    ]
    losses = TextPerplexity(TEXT[:length], window=64, stride=32)(answering_model, tokenizer)["perplexity"]
    assert losses.dtype == np.float64
    assert losses == pytest.approx(by_hand, rel=1e-6)
    with torch.no_grad():
        mean = answering_model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert math.exp(losses.mean()) == pytest.approx(math.exp(float(mean)), rel=1e-4)


class Endless(AssertionError):
    """More windows than the text has tokens."""


def recording_model(model: LlamaForCausalLM, parts: list[list[int]]) -> SimpleNamespace:
    """The model as far as an evaluation of texts sees it; writes down each window and stops a loop without end."""

    class Recording(SimpleNamespace):
        def __call__(self, *, input_ids: torch.Tensor, **options: Any) -> Any:
            if len(parts) > 200:
                raise Endless
            parts.append(input_ids[0].tolist())
            return model(input_ids=input_ids, **options)

    return Recording(device=model.device)


WINDOWS = [(8, 4), (8, 7), (8, 3), (8, 2), (8, 1), (20, 10), (2, 1), (86, 43), (87, 40), (64, 32)]


@pytest.mark.parametrize(("window", "stride"), WINDOWS)
def test_perplexity_of_a_long_text_scores_each_token_once(
    answering_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, window: int, stride: int
) -> None:
    ids = ids_of(tokenizer, TEXT)
    losses = TextPerplexity(TEXT, window, stride)(answering_model, tokenizer)["perplexity"]
    assert len(losses) == len(ids) - 1
    assert losses == pytest.approx(slow_losses(answering_model, ids, window, stride), rel=1e-4)


@pytest.mark.parametrize(("window", "stride"), WINDOWS)
def test_windows_advance_by_the_stride(
    answering_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, window: int, stride: int
) -> None:
    parts: list[list[int]] = []
    TextPerplexity(TEXT, window, stride)(recording_model(answering_model, parts), tokenizer)
    ids = ids_of(tokenizer, TEXT)
    ends = window_ends(len(ids), window, stride)
    assert parts == [ids[max(0, end - window) : end] for end in ends]


@pytest.mark.parametrize("text", ["", "a"])
def test_text_too_short_to_be_scored(
    answering_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    with pytest.raises(ValueError, match=rf"at least two tokens; this one has {len(text)}"):
        TextPerplexity(text)(answering_model, tokenizer)


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 9), (8, 0), (8, -1), (1, 1), (0, 1)])
def test_bad_stride(window: int, stride: int) -> None:
    with pytest.raises(ValueError, match=rf"stride must be a whole number in \[1, {window}\); not {stride}"):
        TextPerplexity(TEXT, window, stride)


def test_prepared_perplexity_scores_each_model_it_is_called_on(
    answering_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    evaluation = TextPerplexity(TEXT, 20, 10, "sentence")
    ready = evaluation.prepared(answering_model, tokenizer)
    for model in (answering_model, tiny_model(seed=1)):
        expected = evaluation(model, tokenizer)["perplexity"].tolist()
        assert ready(model, tokenizer)["perplexity"].tolist() == expected
    assert (ready.name, ready.protocol, ready.texts) == ("sentence", evaluation.protocol, (TEXT,))
    again = ready.prepared(answering_model, tokenizer)
    assert again(answering_model, tokenizer)["perplexity"].tolist() == (
        evaluation(answering_model, tokenizer)["perplexity"].tolist()
    )


def test_perplexity_says_what_is_measured() -> None:
    protocol = TextPerplexity(TEXT * 20, 64, 32).protocol
    assert f"{len(TEXT * 20):,} characters" in protocol
    assert "windows of 64 tokens that advance by 32" in protocol


def test_texts_are_the_paragraphs() -> None:
    assert TextPerplexity("one\ntwo\n\n\n\nthree").texts == ("one\ntwo", "three")


def test_perplexity_is_equal_by_value() -> None:
    assert len({TextPerplexity("a b"), TextPerplexity("a b"), TextPerplexity("a b", name="other")}) == 2
