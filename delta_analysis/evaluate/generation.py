"""Greedy generation that is told what to look for, and stops when it can no longer find it.

Speculative decoding with the right answer as the draft: one forward pass over prompt and draft tells
the model's own choice after every prefix of the draft. The draft's tokens that the model chooses
itself, and its first choice that differs, are what token-by-token generation writes. Where the text
is still undecided then (the same characters in other tokens), the rest of the answer is the next draft.

Source: Leviathan, Kalman and Matias, "Fast inference from transformers via speculative decoding",
ICML 2023, in its greedy form.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from delta_analysis.evaluate.batching import Batch, batches
from delta_analysis.evaluate.beginning import beginning


@dataclass(frozen=True, eq=False)
class Draft:
    """What a model writes after a prompt if it answers rightly.

    Attributes
    ----------
    place : of the prompt among all.
    prompt : its tokens, and what was generated after them so far.
    before : the prompt's tokens alone, as text.
    written : how many tokens were generated so far.
    tokens : which may come next.
    answer : the text that must be generated before a newline.
    right : whether it is, once all `tokens` are generated; None if more must be known.
    """

    place: int
    prompt: list[int]
    before: str
    written: int
    tokens: list[int]
    answer: str
    right: bool | None


@dataclass(frozen=True, eq=False)
class Plan:
    """Drafts, the batches to check them in, and what is needed to go on where a draft fails."""

    drafts: tuple[Draft, ...]
    batches: tuple[Batch, ...]
    ends: frozenset[int]
    batch_size: int


def plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    batch_size: int,
) -> Plan:
    """All that can be known before any weight is: tokens, and batches that read shared beginnings once.

    Raises
    ------
    ValueError
        A prompt without any token.
    """
    ends = model.generation_config.eos_token_id if model.generation_config else None
    # A chat model may end its turn with a token that only its tokenizer knows as the end.
    listed = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    known = frozenset(end for end in listed if end is not None)
    first = beginning(tokenizer)
    drafts = []
    for place, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        start, whole, alone = _ids(tokenizer, [prompt, f"{prompt}{answer}\n", f"{answer}\n"])
        if not start:
            raise ValueError(f"prompt {prompt!r} has no tokens; a model needs at least one to go on from")
        # In the tokens that it has after the prompt, unless some of them span the seam.
        tokens = whole[len(start) :] if whole[: len(start)] == start else alone
        if start[: len(first)] != first:
            start = first + start
        draft = Draft(place, start, _decode(tokenizer, start), 0, tokens, answer, None)
        drafts.append(replace(draft, right=_is_right(_text(tokenizer, known, draft, tokens), answer)))
    return _plan(model, drafts, known, batch_size)


def matches(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan) -> np.ndarray:
    """For each prompt, whether the greedy continuation, up to its first newline or end, is the answer: 0 or 1."""
    matched = np.zeros(len(plan.drafts))
    while plan.drafts:
        undecided = []
        for batch in plan.batches:
            drafts = [plan.drafts[i] for i in batch.places]
            for draft, chosen in zip(drafts, _generated(_choices(model, batch), batch, drafts), strict=True):
                right = draft.right if chosen == draft.tokens else None
                if right is None:
                    text = _text(tokenizer, plan.ends, draft, chosen)
                    right = _is_right(text, draft.answer)
                if right is not None:
                    matched[draft.place] = right
                elif draft.written + len(chosen) <= len(draft.answer.encode()):
                    undecided.append(_next_draft(tokenizer, draft, chosen, text))
        plan = _plan(model, undecided, plan.ends, plan.batch_size)
    return matched


def _plan(model: PreTrainedModel, drafts: Sequence[Draft], ends: frozenset[int], batch_size: int) -> Plan:
    made = batches(
        # The last token of a draft is only looked for, never read.
        [draft.prompt + draft.tokens[:-1] for draft in drafts],
        [len(draft.prompt) for draft in drafts],
        batch_size=batch_size,
        vocabulary=model.config.get_text_config().vocab_size,
        shared=_keeps_keys_and_values(model),
    )
    return Plan(tuple(drafts), tuple(made), ends, batch_size)


def _keeps_keys_and_values(model: PreTrainedModel) -> bool:
    """Whether keys and values are all that the model needs to know of earlier tokens, so that rows may share them."""
    if model._is_stateful or "past_key_values" not in inspect.signature(model.forward).parameters:
        return False
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _choices(model: PreTrainedModel, batch: Batch) -> np.ndarray:
    """The model's greedy token after each of the kept positions, (rows, kept)."""
    ids = batch.ids.to(model.device)
    with torch.inference_mode():
        if batch.prefix:
            cache = DynamicCache(config=model.config)
            model(input_ids=ids[:1, : batch.prefix], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(len(ids))
            rest = ids[:, batch.prefix :]
            logits = model(input_ids=rest, past_key_values=cache, use_cache=True, logits_to_keep=batch.kept).logits
        else:
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=batch.kept).logits
        choices: np.ndarray = logits.argmax(dim=-1).cpu().numpy()
    return choices


def _generated(choices: np.ndarray, batch: Batch, drafts: Sequence[Draft]) -> Iterator[list[int]]:
    """What greedy generation writes after each prompt: the draft, or as much as it agrees with and the next token."""
    width = batch.ids.shape[1]
    for row, draft in zip(choices.tolist(), drafts, strict=True):
        own = row[len(draft.prompt) - 1 - width :][: max(len(draft.tokens), 1)]
        agreed = next((i for i, token in enumerate(draft.tokens) if token != own[i]), len(own))
        yield own[: agreed + 1]


def _next_draft(tokenizer: PreTrainedTokenizerBase, draft: Draft, chosen: list[int], text: str) -> Draft:
    """The rest of the answer, after what has been generated of it."""
    [tokens] = _ids(tokenizer, [draft.answer[len(text.rstrip("\ufffd")) :] + "\n"])
    return replace(draft, prompt=draft.prompt + chosen, written=draft.written + len(chosen), tokens=tokens, right=None)


def _is_right(text: str, answer: str) -> bool | None:
    """Whether a generated text is the answer and a newline; None while it may become it."""
    if "\n" in text:
        return text.split("\n", 1)[0] == answer
    # A character that is not complete yet decodes to a replacement mark.
    return None if answer.startswith(text.rstrip("\ufffd")) else False


def _text(tokenizer: PreTrainedTokenizerBase, ends: frozenset[int], draft: Draft, chosen: list[int]) -> str:
    """What the generated tokens add to the prompt; an end-of-sequence token ends it as a newline does.

    Both are decoded together, since a token may read differently at the beginning of a text.
    """
    stop = next((i for i, token in enumerate(chosen) if token in ends), None)
    whole = _decode(tokenizer, draft.prompt + chosen[:stop])
    return whole[len(draft.before) :] + ("" if stop is None else "\n")


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
