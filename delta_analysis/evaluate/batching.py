"""Cut rows of tokens into batches that cost little, where rows may begin alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

import torch

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
