"""The character tokenizer of the embedded models: 97 ids, and a mask for the encoder; no token is added to a text."""

from __future__ import annotations

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

PAD, MASK = "<pad>", "<mask>"
ALPHABET = [PAD, *map(chr, range(ord(" "), ord("~") + 1)), "\n"]
MASK_ID = len(ALPHABET)
ENCODER_CONTEXT = 48
"""Characters that the encoder reads at once: a line."""


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one id a character; a character it does not know reads as `?`.

    The newline ends an answer, so it is the end-of-sequence token; padding is on the left, as
    generation needs it.
    """
    vocab = {token: i for i, token in enumerate(ALPHABET)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.normalizer = normalizers.Replace(Regex(r"[^\x20-\x7e\n]"), "?")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token="\n",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def masking_tokenizer() -> PreTrainedTokenizerFast:
    """The encoder's tokenizer: the same ids, then one for the mask; padding is on the right."""
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"mask_token": MASK})
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = ENCODER_CONTEXT
    return tokenizer


def encode(text: str) -> np.ndarray:
    """Ids of a text in the alphabet, the fast way for a whole corpus; equals the tokenizer's."""
    table = np.zeros(128, dtype=np.int64)
    for i, token in enumerate(ALPHABET[1:], start=1):
        table[ord(token)] = i
    return table[np.frombuffer(text.encode("ascii"), dtype=np.uint8)]
