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
from itertools import pairwise
from math import inf

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from delta_analysis.evaluation.tokens import beginning


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
    choices: np.ndarray = draft_logits(model, batch).argmax(dim=-1).cpu().numpy()
    return choices


@torch.inference_mode()
def draft_logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits after each of the kept positions, (rows, kept, vocabulary)."""
    ids = batch.ids.to(model.device)
    if not batch.prefix:
        return model(input_ids=ids, use_cache=False, logits_to_keep=batch.kept).logits
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:1, : batch.prefix], past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(len(ids))
    rest = ids[:, batch.prefix :]
    return model(input_ids=rest, past_key_values=cache, use_cache=True, logits_to_keep=batch.kept).logits


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


PASS = 64
"""What a forward pass costs besides its tokens, in tokens (measured on small models)."""


MOST_LOGITS = 2**27
"""Entries of the largest array of logits: half a gigabyte in float32."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows that a model reads together, the last token repeated on the right, where causal attention never looks.

    Attributes
    ----------
    places : which of the rows these are.
    ids : (rows, width) token ids.
    prefix : tokens that all begin with and that the model is to read once; 0 for none.
    kept : last positions whose logits are wanted, the same for all rows.
    """

    places: tuple[int, ...]
    ids: torch.Tensor
    prefix: int
    kept: int


def batches(
    rows: Sequence[list[int]],
    starts: Sequence[int],
    *,
    batch_size: int,
    vocabulary: int,
    shared: bool,
) -> list[Batch]:
    """Batches of at most `batch_size` rows with the fewest tokens to compute, each row in one of them.

    With the rows in order, the best cut is found by dynamic programming. A pass over r rows of width
    w costs `PASS + r·w` tokens; if the c tokens that all begin with are read once, `2·PASS + c + r·(w - c)`.
    The better of two orders is taken: alike in their beginning, or alike in length.

    Parameters
    ----------
    rows : token ids of each row.
    starts : for each row, how many tokens its prompt has, at least 1; logits are wanted from the
        prompt's last token on, so that no prefix reaches that far.
    batch_size : at least 1.
    vocabulary : logits a position, of which a batch of several rows has at most `MOST_LOGITS`.
    shared : whether common prefixes may be read once.

    Examples
    --------
    >>> rows = [[1] * 300 + [i, 7, 8] for i in range(2, 5)]
    >>> [(batch.places, batch.prefix, batch.kept) for batch in
    ...  batches(rows, [301] * 3, batch_size=20, vocabulary=9, shared=True)]
    [((0, 1, 2), 300, 3)]
    """
    lengths = [len(row) for row in rows]
    orders = [sorted(range(len(rows)), key=lambda i: lengths[i])]
    if shared:
        orders.append(sorted(range(len(rows)), key=lambda i: rows[i]))
    cuts = []
    for order in orders:
        common = [_common(rows[i], rows[j]) if shared else 0 for i, j in pairwise(order)]
        cost, parts = _best_cut(
            [lengths[i] for i in order], [starts[i] for i in order], common, batch_size, MOST_LOGITS // vocabulary
        )
        cuts.append((cost, [(order[begin:end], prefix) for begin, end, prefix in parts]))
    made = []
    for places, prefix in min(cuts, key=lambda cut: cut[0])[1]:
        width = max(lengths[i] for i in places)
        ids = torch.tensor([rows[i] + rows[i][-1:] * (width - lengths[i]) for i in places])
        made.append(Batch(tuple(places), ids, prefix, width - min(starts[i] for i in places) + 1))
    return made


def _best_cut(
    lengths: list[int], starts: list[int], common: list[int], batch_size: int, most_kept: int
) -> tuple[float, list[tuple[int, int, int]]]:
    """The least cost, and the (begin, end, prefix) of each part that has it; `common[i]` is of rows i and i + 1."""
    costs, last = [0.0], [(0, 0, 0)]
    for end in range(1, len(lengths) + 1):
        best, part = inf, (0, 0, 0)
        width, first, prefix = 0, starts[end - 1], lengths[end - 1]
        for begin in range(end - 1, max(end - batch_size, 0) - 1, -1):
            count = end - begin
            width, first = max(width, lengths[begin]), min(first, starts[begin])
            prefix = min(prefix, first - 1, common[begin] if count > 1 else first - 1)
            if count > 1 and count * (width - first + 1) > most_kept:
                break
            plain = costs[begin] + PASS + count * width
            once = plain + PASS - (count - 1) * prefix
            if min(plain, once) < best:
                best, part = min(plain, once), (begin, end, prefix if once < plain else 0)
        costs.append(best)
        last.append(part)
    parts = []
    end = len(lengths)
    while end:
        parts.append(last[end])
        end = last[end][0]
    return costs[-1], parts[::-1]


def _common(first: list[int], second: list[int]) -> int:
    """How many tokens both begin with."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
