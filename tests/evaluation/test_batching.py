"""Batches of rows that begin alike, against all cuts there are."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_analysis.evaluation import generation as batching
from delta_analysis.evaluation.generation import PASS, Batch, batches

VOCABULARY = 97


@st.composite
def rows_and_starts(draw: st.DrawFn, most: int = 12) -> tuple[list[list[int]], list[int]]:
    """Rows of which many begin with the same tokens, long enough to be worth a pass of their own."""
    headers = [[7] * 40, [7] * 40 + [8] * 60, [9] * 100, [5]]
    rows = draw(
        st.lists(
            st.builds(list.__add__, st.sampled_from(headers), st.lists(st.integers(1, 2), max_size=6)),
            min_size=1,
            max_size=most,
        )
    )
    return rows, [draw(st.integers(max(1, len(row) - 8), len(row))) for row in rows]


def common_prefix(rows: list[list[int]]) -> int:
    return len(list(itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))))


def price(rows: list[list[int]], starts: list[int], *, shared: bool) -> int:
    """The tokens that a batch computes, the cheaper way."""
    width = max(map(len, rows))
    prefix = min(common_prefix(rows), min(starts) - 1)
    plain = PASS + len(rows) * width
    return min(plain, 2 * PASS + prefix + len(rows) * (width - prefix)) if shared else plain


def paid(made: list[Batch]) -> int:
    return sum(
        (2 * PASS if batch.prefix else PASS) + batch.prefix + len(batch.places) * (batch.ids.shape[1] - batch.prefix)
        for batch in made
    )


@given(case=rows_and_starts(), batch_size=st.integers(1, 12), shared=st.booleans())
def test_each_row_is_in_one_batch_as_it_was(
    case: tuple[list[list[int]], list[int]], batch_size: int, shared: bool
) -> None:
    rows, starts = case
    made = batches(rows, starts, batch_size=batch_size, vocabulary=VOCABULARY, shared=shared)
    assert sorted(i for batch in made for i in batch.places) == list(range(len(rows)))
    for batch in made:
        inside = [rows[i] for i in batch.places]
        assert 1 <= len(inside) <= batch_size
        assert batch.ids.shape == (len(inside), max(map(len, inside)))
        for ids, row in zip(batch.ids.tolist(), inside, strict=True):
            assert ids == row + row[-1:] * (len(ids) - len(row))
        first = min(starts[i] for i in batch.places)
        assert batch.ids.shape[1] - batch.kept == first - 1
        assert batch.prefix <= min(common_prefix(inside), first - 1)
        assert shared or batch.prefix == 0


@settings(deadline=None, max_examples=60)
@given(case=rows_and_starts(most=7), batch_size=st.integers(1, 7), shared=st.booleans())
def test_no_cut_of_either_order_costs_less(
    case: tuple[list[list[int]], list[int]], batch_size: int, shared: bool
) -> None:
    rows, starts = case
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    by_beginning = sorted(range(len(rows)), key=lambda i: rows[i])
    cheapest = min(
        sum(
            price([rows[i] for i in order[a:b]], [starts[i] for i in order[a:b]], shared=shared)
            for a, b in itertools.pairwise((0, *inner, len(order)))
        )
        for order in (by_length, by_beginning)[: 1 + shared]
        for count in range(len(order))
        for inner in itertools.combinations(range(1, len(order)), count)
        if all(b - a <= batch_size for a, b in itertools.pairwise((0, *inner, len(order))))
    )
    assert paid(batches(rows, starts, batch_size=batch_size, vocabulary=VOCABULARY, shared=shared)) == cheapest


def test_rows_that_begin_alike_are_read_together() -> None:
    rows = [[kind] * 100 + [i, i] for i in range(5) for kind in (1, 2)]
    made = batches(rows, [101] * 10, batch_size=20, vocabulary=VOCABULARY, shared=True)
    assert [(sorted(batch.places), batch.prefix, batch.kept) for batch in made] == [
        ([0, 2, 4, 6, 8], 100, 2),
        ([1, 3, 5, 7, 9], 100, 2),
    ]


def test_prefix_stops_before_the_last_token_of_a_prompt() -> None:
    same = [[3] * 200] * 4
    [batch] = batches(same, [200, 150, 200, 200], batch_size=4, vocabulary=VOCABULARY, shared=True)
    assert (batch.prefix, batch.kept) == (149, 51)


@pytest.mark.parametrize(("most", "sizes"), [(5, [1] * 6), (2 * 11 * 97, [2] * 3), (4 * 11 * 97, [2, 4]), (10**9, [6])])
def test_logits_of_a_batch_are_bounded(most: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "MOST_LOGITS", most)
    made = batches([[3] * 20] * 6, [10] * 6, batch_size=6, vocabulary=VOCABULARY, shared=False)
    assert sorted(len(batch.places) for batch in made) == sizes
    assert all(len(batch.places) == 1 or len(batch.places) * batch.kept * VOCABULARY <= most for batch in made)


def test_no_rows_make_no_batches() -> None:
    assert batches([], [], batch_size=4, vocabulary=VOCABULARY, shared=True) == []
