"""The token that a decoder expects before a text."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's beginning-of-text token if it puts one before every text, as Llama's and Gemma's do.

    Other special tokens are left out: what is judged is what the model writes next.
    """
    first = tokenizer("", add_special_tokens=True)["input_ids"][:1]
    return first if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else []
