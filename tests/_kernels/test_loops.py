"""The compiled inner loops against plain references of their rules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata

from delta_analysis._kernels import (
    HIGH,
    LOW,
    RANGE,
    count_high,
    count_low,
    drop_at,
    drop_below,
    drop_least,
    drop_randomly,
    inverse_keep,
    philox,
    positions_between,
    power_sums,
    rank_sums,
    tied,
)

NAME, SEED = "model.layers.0.w", 3
KEY = philox.stream_key(SEED, NAME)
DTYPES = [torch.float32, torch.bfloat16]
STARTS = [0, 1, 6, 255, 4099, 2**34 - 7, 2**34 + 2, 2**45 + 3]
"""First entries, most of them inside a block of four; from 2³⁴ on the high counter word is used."""
RATES = [0.0, 2.0**-33, 2.0**-32, 1e-9, 0.3, 0.5, 0.999, 1 - 2.0**-32, 1 - 2.0**-33, 1 - 2.0**-53, 1.0]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1e-40, -3e-39, 3.4e38, -3.4e38, 1.0, -1.0]
CASES = [
    ("normal", 700, torch.float32, 0),
    ("normal", 1000, torch.bfloat16, 2**34 - 7),
    ("ties", 1000, torch.float32, 255),
    ("ties", 700, torch.bfloat16, 1),
    ("equal", 700, torch.float32, 4099),
    ("equal", 256, torch.bfloat16, 2**45 + 3),
    ("zeros", 300, torch.float32, 6),
    ("special", 700, torch.float32, 2**34 + 2),
    ("special", 700, torch.bfloat16, 3),
    ("half width", 700, torch.float32, 2),
    ("normal", 3, torch.float32, 5),
    ("normal", 0, torch.float32, 1),
]
"""What is in a block, how much, how it is stored, and where in its tensor it begins: every pair of values once."""

FLOAT = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32), st.floats(-2, 2, width=16))
START = st.one_of(st.integers(0, 600), st.sampled_from(STARTS))
DTYPE = st.sampled_from(DTYPES)


def block(kind: str, count: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=rng)
    if kind == "ties":
        return (3 * values).round()
    if kind == "equal":
        return torch.full((count,), -0.7)
    if kind == "zeros":
        return torch.zeros(count)
    if kind == "special":
        return torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (count,), generator=rng)]
    return values.bfloat16().float() if kind == "half width" else values


def words(tensor: torch.Tensor) -> torch.Tensor:
    """The bits, of a NaN one only: conversions may differ in the rest."""
    whole = tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16).clone()
    whole[tensor.isnan()] = -1
    return whole


def sizes(values: torch.Tensor) -> list[int]:
    return (values.float().view(torch.int32).to(torch.int64) & 0x7FFFFFFF).tolist()


def numbers(start: int, count: int) -> list[int]:
    return philox.random_bits(count, seed=SEED, name=NAME, start=start).tolist()


def masked(values: torch.Tensor, dropped: list[bool], factor: float | torch.Tensor) -> torch.Tensor:
    """Zero where dropped, else the float32 product, rounded once to the dtype."""
    scaled = values.float() * (factor if isinstance(factor, torch.Tensor) else float(np.float32(factor)))
    return torch.where(torch.tensor(dropped, dtype=torch.bool), 0.0, scaled).to(values.dtype)


def check_drop(values: torch.Tensor, p: list[float], factor: float | None, start: int) -> None:
    """`drop_randomly` and `drop_at` with a probability for each entry, and with one for all."""
    count, drawn = values.numel(), numbers(start, values.numel())
    rates, out = torch.tensor(p, dtype=torch.float64), torch.empty_like(values)
    scale = (1 / (1 - rates)).float() if factor is None else factor
    expected = masked(values, [u < round(rate * RANGE) for u, rate in zip(drawn, p, strict=True)], scale)
    drop_randomly(values, rates, factor, KEY, start, out)
    assert torch.equal(words(out), words(expected))
    if values.dtype == torch.float32:
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(2))[: count // 3]
        some = drop_at(values[chosen], rates[chosen], factor, KEY, chosen + start)
        assert torch.equal(words(some), words(expected[chosen]))
    for rate in p[:12]:
        drop_randomly(values, rate, factor, KEY, start, out)
        dropped = [u < round(rate * RANGE) for u in drawn]
        assert torch.equal(words(out), words(masked(values, dropped, inverse_keep(rate) if factor is None else factor)))


@pytest.mark.parametrize(("kind", "count", "dtype", "start"), CASES)
@pytest.mark.parametrize("factor", [None, 1 / 0.3])
def test_drop_by_the_rule(kind: str, count: int, dtype: torch.dtype, start: int, factor: float | None) -> None:
    random = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count)).tolist()
    check_drop(block(kind, count).to(dtype), [*RATES, *random][:count], factor, start)


@given(
    entries=st.lists(st.tuples(FLOAT, st.one_of(st.sampled_from(RATES), st.floats(0, 1))), max_size=40),
    start=START,
    dtype=DTYPE,
    factor=st.sampled_from([None, 1.0, 7.3]),
)
def test_drop_of_anything(
    entries: list[tuple[float, float]], start: int, dtype: torch.dtype, factor: float | None
) -> None:
    check_drop(torch.tensor([value for value, _ in entries]).to(dtype), [rate for _, rate in entries], factor, start)


@given(index=st.one_of(st.integers(0, 5000), st.integers(2**34 - 20, 2**34 + 20), st.integers(2**40, 2**60)))
def test_an_entry_falls_when_its_number_is_below_the_threshold_and_not_at_it(index: int) -> None:
    (number,) = numbers(index, 1)
    for above, kept in ((0, 3.0), (1, 0.0)):
        p, out = (number + above) / RANGE, torch.empty(1)
        for each in (p, torch.tensor([p], dtype=torch.float64)):
            drop_randomly(torch.ones(1), each, 3.0, KEY, index, out)
            assert out.item() == kept
        assert drop_at(torch.ones(1), torch.tensor([p], dtype=torch.float64), 3.0, KEY, torch.tensor([index])) == kept


def test_inverse_keep_by_hand() -> None:
    assert [inverse_keep(p) for p in (0.0, 0.5, 0.75, 1.0)] == [1.0, 2.0, 4.0, 1.0]


ROWS = [
    block("normal", 3000).view(3, 1000),
    block("normal", 6000).view(2, 3000),
    block("half width", 4000).view(2, 2000),
    block("half width", 900).view(30, 30),
    block("ties", 5000).view(1, 5000),
    block("ties", 60).view(12, 5),
    block("equal", 2100).view(1, 2100),
    block("zeros", 40).view(4, 10),
    block("normal", 2**15).view(1, 2**15),
    torch.cat([block("normal", 1500), torch.zeros(1500)]).view(1, 3000),
    torch.tensor([[1.0], [-2.0], [0.0]]),
    torch.tensor([[-0.0, 0.0, -1e-45, 1e-45, math.inf, -math.inf, 3e38]]),
    torch.empty(0, 5),
    torch.empty(3, 0),
    (2.0 ** torch.randint(-140, 120, (2, 1500), generator=torch.Generator().manual_seed(0)).double()).float(),
]


@pytest.mark.parametrize("rows", ROWS, ids=lambda rows: str(tuple(rows.shape)))
def test_rank_sums_are_twice_scipys_mean_rank(rows: torch.Tensor) -> None:
    expected = np.array([2 * rankdata(row, method="average") for row in rows.abs().double().numpy()])
    sums = rank_sums(rows)
    assert sums.dtype == torch.float64
    assert np.array_equal(sums.numpy(), expected.reshape(rows.shape))


@given(
    rows=st.integers(0, 8).flatmap(lambda n: st.lists(st.lists(FLOAT, min_size=n, max_size=n), min_size=1, max_size=4)),
    half=st.booleans(),
)
def test_rank_sums_of_anything(rows: list[list[float]], half: bool) -> None:
    tensor = torch.tensor(rows, dtype=torch.float32)
    tensor = tensor.bfloat16().float() if half else tensor
    # By counting, with NaNs above everything, in the order of their bits.
    expected = [
        [sum(b < a for b in row) + sum(b <= a for b in row) + 1 for a in row]
        for row in (sizes(each.reshape(-1)) for each in tensor)
    ]
    assert rank_sums(tensor).tolist() == expected


@pytest.mark.parametrize("unused", [0, 1, 7, 8, 10, 15, 16, 17, 21, 24, 31])
def test_rank_sums_where_the_lowest_bits_are_zero(unused: int) -> None:
    for count in (600, 2500):
        drawn = torch.randint(0, 2**31, (1, count), generator=torch.Generator().manual_seed(unused))
        rows = ((drawn >> unused) << unused).to(torch.int32).view(torch.float32)
        assert np.array_equal(rank_sums(rows)[0].numpy(), 2 * rankdata(sizes(rows[0]), method="average"))


@pytest.mark.parametrize(("kind", "count", "dtype", "start"), CASES)
def test_counts_sums_and_places_of_magnitudes(kind: str, count: int, dtype: torch.dtype, start: int) -> None:
    values = block(kind, count).to(dtype)
    found = sizes(values)
    assert np.array_equal(count_high(values), np.bincount([size >> 16 for size in found], minlength=HIGH))
    for digit in {size >> 16 for size in found[:5]} | {0, HIGH - 1}:
        low = [size & 0xFFFF for size in found if size >> 16 == digit]
        assert np.array_equal(count_low(values, digit), np.bincount(low, minlength=LOW))
    for low, high in [(0, HIGH * LOW), (1, 0x3F000000), (5, 5), *((size, size + 1) for size in found[:1])]:
        expected = [start + i for i, size in enumerate(found) if low <= size < high]
        assert positions_between(values, low, high, start).tolist() == expected
    for power in (1, 2):
        sums = np.zeros((2, 256), dtype=np.int64)
        for size in found:
            exponent, fraction = divmod(size, 2**23)
            term = (fraction + 2**23 * (exponent > 0)) ** power
            sums[:, exponent] += (term, 0) if power == 1 else (term % 2**24, term // 2**24)
        assert np.array_equal(power_sums(values, power).numpy(), sums)


@pytest.mark.parametrize(("kind", "count", "dtype", "start"), CASES)
def test_ties_and_their_numbers(kind: str, count: int, dtype: torch.dtype, start: int) -> None:
    values, drawn = block(kind, count).to(dtype), numbers(start, count)
    found = sizes(values)
    for size in {7, *found[1:2]}:
        ties = [(number, start + i) for i, number in enumerate(drawn) if found[i] == size]
        for window in [(0, RANGE), (0, 0), (RANGE // 3, RANGE // 2), (RANGE - 10**8, RANGE)]:
            below, inside, positions = tied(values, start, size=size, window=window, key=KEY)
            assert below == sum(number < window[0] for number, _ in ties)
            expected = [(number, i) for number, i in ties if window[0] <= number < window[1]]
            assert list(zip(inside.tolist(), positions.tolist(), strict=True)) == expected


def check_drop_below(values: torch.Tensor, threshold: tuple[int, int, int], start: int) -> None:
    places = zip(sizes(values), numbers(start, values.numel()), range(start, start + values.numel()), strict=True)
    out = torch.empty_like(values)
    drop_below(values, threshold, 1.7, KEY, start, out)
    assert torch.equal(words(out), words(masked(values, [place < threshold for place in places], 1.7)))


@pytest.mark.parametrize(("kind", "count", "dtype", "start"), CASES)
def test_drop_below_a_threshold(kind: str, count: int, dtype: torch.dtype, start: int) -> None:
    values, drawn = block(kind, count).to(dtype), numbers(start, count)
    check_drop_below(values, (HIGH * LOW, 0, 0), start)
    for i in {0, count // 3, count - 1} if count else ():
        size = sizes(values)[i]
        places = [(0, 0), (drawn[i], start + i), (drawn[i], start + i + 1), (drawn[i] + 1, 0), (RANGE, 0)]
        for threshold in [(size, *place) for place in places] + [(size + 1, 0, 0), (0, 0, 0)]:
            check_drop_below(values, threshold, start)


@given(entries=st.lists(FLOAT, max_size=40), start=START, dtype=DTYPE, data=st.data())
def test_drop_below_of_anything(entries: list[float], start: int, dtype: torch.dtype, data: st.DataObject) -> None:
    values = torch.tensor(entries).to(dtype)
    size = data.draw(st.one_of(st.integers(0, HIGH * LOW), st.sampled_from([*sizes(values), 0])))
    breaks = size < HIGH * LOW
    number = data.draw(st.integers(0, RANGE)) if breaks else 0
    check_drop_below(values, (size, number, data.draw(st.integers(start, start + 40)) if breaks else 0), start)


@given(rows=st.integers(1, 4), entries=st.lists(FLOAT, min_size=1, max_size=12), start=START, data=st.data())
def test_drop_the_least_of_rows(rows: int, entries: list[float], start: int, data: st.DataObject) -> None:
    check_drop_least(torch.tensor(entries * rows), len(entries), data.draw(st.integers(0, len(entries))), start)


@pytest.mark.parametrize(("kind", "row"), [("normal", 300), ("ties", 300), ("equal", 7), ("special", 300), ("ties", 1)])
def test_drop_the_least_of_long_rows(kind: str, row: int) -> None:
    for count in {0, 1, row // 2, row - 1, row}:
        check_drop_least(block(kind, 4 * row), row, count, STARTS[count % len(STARTS)])


def check_drop_least(values: torch.Tensor, row: int, count: int, start: int) -> None:
    drawn, found = numbers(start, values.numel()), sizes(values)
    dropped: list[bool] = []
    for begin in range(0, values.numel(), row):
        order = sorted(range(begin, begin + row), key=lambda i: (found[i], drawn[i], i))
        dropped += [i in order[:count] for i in range(begin, begin + row)]
    out = torch.empty_like(values)
    drop_least(values, row, count, 1.7, KEY, start, out)
    assert torch.equal(words(out), words(masked(values, dropped, 1.7)))
