"""Texts as batches of tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from delta_analysis.evaluation import tokens as module
from delta_analysis.evaluation.tokens import text_means, token_batches
from delta_analysis.zoo.tokenizer import MASK_ID, character_tokenizer, encode, masking_tokenizer

SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
DECODER = LlamaForCausalLM(LlamaConfig(vocab_size=97, max_position_embeddings=60, pad_token_id=0, **SIZES)).eval()
CLASSIFIER = BertForSequenceClassification(BertConfig(vocab_size=98, max_position_embeddings=40, **SIZES)).eval()
TEXTS = st.lists(st.text("abc 12", min_size=1, max_size=30), min_size=1, max_size=30)


@settings(deadline=None, max_examples=30)
@given(texts=TEXTS, most_texts=st.integers(1, 8), most_tokens=st.integers(1, 40))
def test_every_text_is_in_one_batch_whole_or_cut(texts: list[str], most_texts: int, most_tokens: int) -> None:
    found: dict[int, list[int]] = {}
    for batch in token_batches(
        tuple(texts), DECODER, character_tokenizer(), most_tokens=most_tokens, most_texts=most_texts
    ):
        assert len(batch.places) <= most_texts
        assert batch.ids.shape == batch.mask.shape == (len(batch.places), max(batch.lengths))
        assert batch.mask.sum(1).tolist() == batch.lengths
        assert not batch.ids[batch.mask == 0].any()
        parts = batch.tokens(batch.ids).split(batch.lengths)
        assert not found.keys() & set(batch.places)
        found |= {place: part.tolist() for place, part in zip(batch.places, parts, strict=True)}
    assert found == {i: encode(text)[:most_tokens].tolist() for i, text in enumerate(texts)}


def test_texts_of_like_length_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKENS_A_BATCH", 12)
    texts = ("aaaa", "a", "aaaaaaaaaaaaaaaa", "aaaa", "aa", "aaaa", "aaaaa")
    batches = list(token_batches(texts, DECODER, character_tokenizer()))
    assert [batch.places for batch in batches] == [[1, 4, 0], [3, 5], [6], [2]]


def test_a_text_is_cut_to_the_shortest_of_the_limits() -> None:
    text = ("x" * 200,)
    short, long = masking_tokenizer(), character_tokenizer()  # 48 and 128 tokens
    assert next(token_batches(text, CLASSIFIER, short)).lengths == [40]
    assert next(token_batches(text, DECODER, short)).lengths == [48]
    assert next(token_batches(text, DECODER, long)).lengths == [60]
    assert next(token_batches(text, DECODER, long, most_tokens=7)).lengths == [7]


def test_a_tokenizer_without_a_limit_cuts_nothing() -> None:
    tokenizer = character_tokenizer()
    tokenizer.model_max_length = int(1e30)
    assert next(token_batches(("x" * 50,), DECODER, tokenizer)).lengths == [50]


def test_a_classifier_reads_special_tokens_and_a_decoder_does_not() -> None:
    tokenizer = masking_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<mask> $A <mask>", special_tokens=[("<mask>", MASK_ID)]
    )
    inner = encode("ab").tolist()
    assert next(token_batches(("ab",), DECODER, tokenizer)).ids.tolist() == [inner]
    assert next(token_batches(("ab",), CLASSIFIER, tokenizer)).ids.tolist() == [[MASK_ID, *inner, MASK_ID]]
    cut = next(token_batches(("abcdef",), CLASSIFIER, tokenizer, most_tokens=4))
    assert cut.ids.tolist() == [[MASK_ID, *inner, MASK_ID]]


@pytest.mark.parametrize("model", [DECODER, CLASSIFIER], ids=["decoder", "classifier"])
def test_the_shared_tokenizer_stays_as_it_is(model: LlamaForCausalLM | BertForSequenceClassification) -> None:
    tokenizer = character_tokenizer()
    assert next(token_batches(("abcdef",), model, tokenizer, most_tokens=3)).lengths == [3]
    assert tokenizer.backend_tokenizer.truncation is None
    assert tokenizer.backend_tokenizer.padding is None
    assert len(tokenizer.backend_tokenizer.encode("abcdef").ids) == 6


def test_padding_is_what_the_model_takes_for_it() -> None:
    model = BertForSequenceClassification(BertConfig(vocab_size=98, pad_token_id=7, **SIZES))
    assert next(token_batches(("a", "bcd"), model, character_tokenizer())).ids[0, 1:].tolist() == [7, 7]
    model.config.pad_token_id = None
    tokenizer = character_tokenizer()
    assert next(token_batches(("a", "bcd"), model, tokenizer)).ids[0, 1:].tolist() == [0, 0]
    tokenizer.pad_token = "z"
    (pad,) = encode("z").tolist()
    assert next(token_batches(("a", "bcd"), model, tokenizer)).ids[0, 1:].tolist() == [pad, pad]


def test_a_text_without_tokens_is_named() -> None:
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        list(token_batches(("a", "", "b"), DECODER, character_tokenizer()))


def test_inputs_are_what_the_models_take() -> None:
    for model in (DECODER, CLASSIFIER):
        batch = next(token_batches(("ab", "abc"), model, character_tokenizer()))
        with torch.inference_mode():
            assert model(**batch.inputs(model)).logits.isfinite().all()


def test_means_of_texts() -> None:
    values = torch.tensor([[1.0, 2, 3, 10, 7, 9], [0, 0, 3, 1, 1, 2]])
    means = text_means(values, [3, 1, 2])
    assert means.dtype == torch.float64
    np.testing.assert_array_equal(means, [[2, 10, 8], [1, 1, 1.5]])
