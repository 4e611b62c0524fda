"""Drop within rows: the path for long rows against the ordinary one, and the least of rows against sorting."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_analysis._kernels.blocks import row_length
from delta_analysis._kernels.philox import stream_key
from delta_analysis.pruning import by_row as rows_module
from delta_analysis.pruning.by_row import drop_by_rank, drop_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KEY = stream_key(1, "w")
SPECIAL = [0.0, -0.0, 1e-45, -1e-40, math.inf, -math.inf, math.nan, 3e38, 1.0, -1.0]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ties(*shape: int) -> torch.Tensor:
    return (5 * normal(*shape)).round()


def special(count: int) -> torch.Tensor:
    return torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (count,), generator=torch.Generator().manual_seed(0))]


def words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def by_rank(tensor: torch.Tensor, row: int, factor: float | None, window: float = 0.3) -> torch.Tensor:
    """Probabilities from 0.8 + window/2 for the least to 0.8 - window/2 for the greatest."""
    return drop_by_rank(tensor, row, lambda sums: 0.8 + window * (0.5 - (sums / 2 - 1) / max(row - 1, 1)), factor, KEY)


TENSORS = [
    normal(2000),
    normal(3, 1000),
    normal(2, 30, 40),
    normal(20, 300).T,
    normal(300, 20).T,
    ties(4000),
    ties(7, 300),
    torch.cat([torch.zeros(2500), normal(700)]),
    torch.ones(3000),
    torch.zeros(2, 1000),
    special(3000),
    torch.cat([torch.full((900,), 1.0 + i * 2.0**-23) for i in range(4)]),  # all within one upper digit
    normal(12, 1),
    normal(1),
    torch.empty(0),
    torch.empty(4, 0),
    torch.tensor(2.0),
    normal(2**18 + 50) * 1e-3,
]


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda tensor: str(tuple(tensor.shape)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("long_row", "parts"), [(90, 8), (500, 2)])
def test_long_rows_give_the_same_bits_as_short_ones(
    monkeypatch: pytest.MonkeyPatch, tensor: torch.Tensor, dtype: torch.dtype, long_row: int, parts: int
) -> None:
    stored = tensor.to(dtype)
    if tensor.numel() > 10**5 and (long_row < 500 or dtype != torch.float32):
        stored = stored[:2000]
    monkeypatch.setattr(rows_module, "LONG_ROW", long_row)
    monkeypatch.setattr(rows_module, "PARTS", parts)
    for row in {stored.numel(), row_length(stored)}:
        for factor in (None, 2.5):
            split = by_rank(stored, row, factor)
            with monkeypatch.context() as whole:
                whole.setattr(rows_module, "LONG_ROW", 2**40)
                expected = by_rank(stored, row, factor)
            assert (split.shape, split.dtype) == (stored.shape, dtype)
            nan = expected.isnan()
            assert torch.equal(split.isnan(), nan)
            zero = torch.zeros((), dtype=dtype)
            assert torch.equal(words(torch.where(nan, zero, split)), words(torch.where(nan, zero, expected)))


@settings(deadline=None)
@given(
    values=st.lists(st.one_of(st.sampled_from(SPECIAL[:6]), st.floats(-4, 4, width=16)), min_size=3, max_size=60),
    dtype=st.sampled_from(DTYPES),
    long_row=st.integers(1, 20),
    parts=st.integers(1, 30),
)
def test_long_rows_of_anything(values: list[float], dtype: torch.dtype, long_row: int, parts: int) -> None:
    tensor = torch.tensor(values).to(dtype)
    expected = by_rank(tensor, len(values), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "LONG_ROW", min(long_row, len(values) - 1))
        patch.setattr(rows_module, "PARTS", parts)
        assert torch.equal(words(by_rank(tensor, len(values), None)), words(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_path_for_long_rows_is_taken_for_them_alone(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    calls = []
    monkeypatch.setattr(rows_module, "LONG_ROW", 100)
    for path in ("_drop_by_parts", "_drop_half_width"):
        monkeypatch.setattr(
            rows_module, path, lambda values, begin, *_, path=path: calls.append((path, len(values), begin))
        )
    for shape in ((3, 100), (2, 101)):
        by_rank(torch.zeros(shape, dtype=dtype), shape[1], None)
    path = "_drop_half_width" if dtype == torch.bfloat16 else "_drop_by_parts"
    assert calls == [(path, 101, 0), (path, 101, 101)]


def test_a_part_of_a_long_row_is_small_or_one_magnitude() -> None:
    for tensor in TENSORS[:-1]:
        values = tensor.reshape(-1)[:3000]
        sizes = values.float().view(torch.int32).to(torch.int64) & 0x7FFFFFFF
        for limit in (100, 1000, 10**6):
            before = 0
            for low, high, less, count in rows_module._parts(values, limit):
                assert count <= limit or high - low == 1
                assert count == int(((sizes >= low) & (sizes < high)).sum()) > 0
                assert less == before == int((sizes < low).sum())
                before += count
            assert before == values.numel()


def test_rows_are_whole_wherever_blocks_end(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = normal(50, 37)
    outcomes = []
    for block in (1, 37, 100, 10**6):
        monkeypatch.setattr(rows_module, "ROWS_BLOCK", block)
        seen: list[tuple[int, ...]] = []

        def probability(rows: torch.Tensor, seen: list[tuple[int, ...]] = seen) -> torch.Tensor:
            seen.append(tuple(rows.shape))
            return (rows.abs() / rows.abs().amax(dim=1, keepdim=True)).double() / 2

        outcomes.append((drop_rows(tensor, 37, probability, None, KEY), by_rank(tensor, 37, None)))
        assert sum(count for count, _ in seen) == 50
        assert {length for _, length in seen} == {37}
    assert all(torch.equal(a, b) for other in outcomes for a, b in zip(other, outcomes[0], strict=True))
