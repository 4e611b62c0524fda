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
    for start, draft, own in zip(starts, drafts, _own_choices(model, starts, drafts), strict=True):
        agreed = next((i for i, token in enumerate(draft) if token != own[i]), len(draft))
        texts.append(_decode(model, tokenizer, own[: agreed + 1]))
        start.extend(own[: agreed + 1])
    for i, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        if _may_become(text, answer):
            texts[i] += _continue(model, tokenizer, starts[i], text, answer)
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
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, answer: str
) -> str:
    """What follows `ids` by plain generation, until the whole text is decided."""
    start = torch.tensor([ids], device=model.device)

    def decided(tokens: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
        generated = _decode(model, tokenizer, tokens[0, len(ids) :].tolist())
        return torch.tensor([not _may_become(text + generated, answer)], device=tokens.device)

    with torch.inference_mode():
        tokens = model.generate(  # type: ignore[operator]
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=len(answer) + 1,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([decided]),
        )
    return _decode(model, tokenizer, tokens[0, len(ids) :].tolist())


def _may_become(text: str, answer: str) -> bool:
    return "\n" not in text and answer.startswith(text)


def _decode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """The text of generated tokens; an end-of-sequence token ends it as a newline does."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = ends if isinstance(ends, list) else [ends]
    stop = next((i for i, token in enumerate(tokens) if token in ends), None)
    text = str(tokenizer.decode(tokens[:stop]))
    return text if stop is None else text + "\n"
