"""Greedy generation that is told what to look for, and stops when it can no longer find it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList


def answer_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str]
) -> list[str]:
    """The greedy continuation of each prompt, for as long as it may become its answer.

    Speculative decoding with the right answer as the draft: one forward pass over prompt and draft
    tells the model's own choice after every prefix of the draft. The draft's tokens that the model
    chooses itself, and its first choice that differs, are what token-by-token generation produces.
    Where the text is still undecided then (the same characters in other tokens), generation goes on.

    Source: Leviathan, Kalman and Matias, "Fast inference from transformers via speculative
    decoding", ICML 2023, in its greedy form.
    """
    starts: list[list[int]] = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    drafts: list[list[int]] = tokenizer([f"{a}\n" for a in answers], add_special_tokens=False)["input_ids"]
    texts = []
    for start, draft, own, answer in zip(starts, drafts, _own_choices(model, starts, drafts), answers, strict=True):
        agreed = next((i for i, token in enumerate(draft) if token != own[i]), len(draft))
        generated = own[: agreed + 1]
        if _may_become(_text(model, tokenizer, start, generated), answer):
            generated = _continue(model, tokenizer, start, generated, answer)
        texts.append(_text(model, tokenizer, start, generated))
    return texts


def _own_choices(model: PreTrainedModel, starts: list[list[int]], drafts: list[list[int]]) -> list[list[int]]:
    """The model's greedy token after each prefix of each draft, the empty and the whole one included."""
    rows = [start + draft for start, draft in zip(starts, drafts, strict=True)]
    width = max(map(len, rows))
    # Padding stands on the right, where causal attention never looks.
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    kept = width - min(map(len, starts)) + 1
    with torch.inference_mode():
        choices = model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits.argmax(dim=-1).tolist()
    offset = width - kept
    return [
        own[len(start) - 1 - offset : len(row) - offset] for own, start, row in zip(choices, starts, rows, strict=True)
    ]


def _continue(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, start: list[int], generated: list[int], answer: str
) -> list[int]:
    """All tokens generated after `start` when plain generation goes on until the text is decided."""
    ids = torch.tensor([start + generated], device=model.device)

    def decided(tokens: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
        text = _text(model, tokenizer, start, tokens[0, len(start) :].tolist())
        return torch.tensor([not _may_become(text, answer)], device=tokens.device)

    with torch.inference_mode():
        tokens = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=len(answer.encode()) + 1,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([decided]),
        )
    whole: list[int] = tokens[0, len(start) :].tolist()
    return whole


def _may_become(text: str, answer: str) -> bool:
    # A character that is not complete yet decodes to a replacement mark.
    return "\n" not in text and answer.startswith(text.rstrip("\ufffd"))


def _text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, start: list[int], generated: list[int]) -> str:
    """What the generated tokens add to the text; an end-of-sequence token ends it as a newline does.

    Both are decoded together, since a token may read differently at the beginning of a text.
    """
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = ends if isinstance(ends, list) else [ends]
    stop = next((i for i, token in enumerate(generated) if token in ends), None)
    before = str(tokenizer.decode(start, clean_up_tokenization_spaces=False))
    whole = str(tokenizer.decode(start + generated[:stop], clean_up_tokenization_spaces=False))
    return whole[len(before) :] + ("" if stop is None else "\n")
