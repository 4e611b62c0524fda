"""Tiny models with random weights, and greedy generation the slow way."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from delta_analysis.zoo.tokenizer import character_tokenizer

MOST_NEW = 10


def tiny_model(*, seed: int = 0, tied: bool = False) -> LlamaForCausalLM:
    """A Llama whose weights are large enough for its output to depend on every character of a prompt."""
    tokenizer = character_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    if not tied:
        with torch.no_grad():
            model.lm_head.weight[tokenizer.eos_token_id] *= 2.5  # so that answers end now and then
    return model


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def slow_greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, most_new: int = MOST_NEW
) -> str:
    """What the model writes after the prompt up to a newline, one full forward pass a token; its end reads as one."""
    ids = ids_of(tokenizer, prompt)
    before = tokenizer.decode(ids)
    text = ""
    while len(ids) < most_new + len(ids_of(tokenizer, prompt)) and "\n" not in text:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
        ended = ids[-1] == model.config.eos_token_id
        text = tokenizer.decode(ids[:-1])[len(before) :] + "\n" if ended else tokenizer.decode(ids)[len(before) :]
    return text


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer()


@pytest.fixture(scope="session")
def answering_model() -> LlamaForCausalLM:
    """Shared, so a test that changes it has to change it back."""
    return tiny_model()
