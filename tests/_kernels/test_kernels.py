"""The compiled inner loops against their twins in torch, on every device there is, and both against the rule."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from delta_analysis._kernels import kernels, philox
from delta_analysis._kernels import torch_loops as torch_kernels
from delta_analysis._kernels.drop import inverse_keep
from delta_analysis._kernels.floats import HIGH, LOW
from delta_analysis._kernels.philox import RANGE

DEVICES = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
DTYPES = [torch.float32, torch.bfloat16]
KEY = philox.stream_key(3, "model.layers.0.w")
STARTS = [0, 1, 6, 255, 4099, 2**34 - 7, 2**34 + 2, 2**45 + 3]
"""First entries, most of them inside a block of four; from 2³⁴ on the high counter word is used."""
COUNTS = [0, 1, 3, 256, 1000]
KINDS = ["normal", "ties", "equal", "zeros", "special", "half width"]
RATES = [0.0, 2.0**-33, 2.0**-32, 1e-9, 0.3, 0.5, 0.999, 1 - 2.0**-32, 1 - 2.0**-33, 1 - 2.0**-53, 1.0]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1e-40, -3e-39, 3.4e38, -3.4e38, 1.0, -1.0]

# Random123, tests/kat_vectors: the first four numbers of the stream of key (0, 0).
FIRST_ANSWER = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]

FLOAT = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32), st.floats(-2, 2, width=16))


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
    """The bits, of a NaN the first one only: devices differ in the rest."""
    stored = tensor.detach().cpu().contiguous()
    whole = stored.view(torch.int32 if stored.dtype == torch.float32 else torch.int16).clone()
    whole[stored.isnan()] = -1
    return whole


def moved(value: float | torch.Tensor, device: str) -> float | torch.Tensor:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def both_drop(values: torch.Tensor, p: float | torch.Tensor, factor: float | None, start: int, device: str) -> None:
    """Assert that `drop` gives the same bits by compiled loops and in torch; likewise below."""
    compiled, other = torch.empty_like(values), torch.empty_like(values, device=device)
    kernels.drop(values, p, factor, KEY, start, compiled)
    torch_kernels.drop(values.to(device), moved(p, device), factor, KEY, start, other)  # type: ignore[arg-type]
    assert torch.equal(words(compiled), words(other))


def both_drop_below(values: torch.Tensor, cut: tuple[int, int, int], factor: float, start: int, device: str) -> None:
    compiled, other = torch.empty_like(values), torch.empty_like(values, device=device)
    kernels.drop_below(values, cut, factor, KEY, start, compiled)
    torch_kernels.drop_below(values.to(device), cut, factor, KEY, start, other)
    assert torch.equal(words(compiled), words(other))


def both_tied(values: torch.Tensor, start: int, size: int, window: tuple[int, int], device: str) -> None:
    compiled = kernels.tied(values, start, size=size, window=window, key=KEY)
    other = torch_kernels.tied(values.to(device), start, size=size, window=window, key=KEY)
    for one, two in zip(compiled, other, strict=True):
        assert np.array_equal(one, two)
        assert np.asarray(one).dtype == np.asarray(two).dtype


def sizes(values: torch.Tensor) -> list[int]:
    return (values.float().view(torch.int32).to(torch.int64) & 0x7FFFFFFF).tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("count", COUNTS)
def test_random_bits_are_the_stream(device: str, start: int, count: int) -> None:
    expected = torch.from_numpy(
        philox.random_bits(count, seed=3, name="model.layers.0.w", start=start).astype(np.int64)
    )
    for module, place in ((kernels, "cpu"), (torch_kernels, device)):
        drawn = module.random_bits(KEY, start, count, torch.device(place))
        assert drawn.dtype == torch.int64
        assert drawn.device == torch.device(place)
        assert torch.equal(drawn.cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_random_bits_in_torch_begin_with_the_published_answer(device: str) -> None:
    assert torch_kernels.random_bits((0, 0), 0, 4, torch.device(device)).tolist() == FIRST_ANSWER


@settings(deadline=None)
@given(
    key=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    start=st.one_of(st.integers(0, 2000), st.integers(2**34 - 20, 2**34 + 20), st.integers(2**40, 2**60)),
    count=st.integers(0, 30),
)
def test_random_bits_in_torch_for_any_key_and_start(key: tuple[int, int], start: int, count: int) -> None:
    expected = np.empty(count, dtype=np.uint32)
    philox.fill(key, start, expected)
    for device in DEVICES:
        assert torch_kernels.random_bits(key, start, count, torch.device(device)).tolist() == expected.tolist()


@settings(deadline=None)
@given(index=st.one_of(st.integers(0, 5000), st.integers(2**34 - 20, 2**34 + 20), st.integers(2**40, 2**60)))
def test_drop_at_one_position_draws_the_number_there(index: int) -> None:
    (number,) = kernels.random_bits(KEY, index, 1, torch.device("cpu")).tolist()
    p = torch.tensor([number, number + 1], dtype=torch.float64) / RANGE
    out = kernels.drop_at(torch.ones(2), p, 3.0, KEY, torch.tensor([index, index]))
    assert out.tolist() == [3.0, 0.0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [None, 1.0, 1 / 0.3])
def test_drop_with_one_probability(device: str, dtype: torch.dtype, kind: str, factor: float | None) -> None:
    for i, p in enumerate(RATES):
        both_drop(block(kind, 700).to(dtype), p, factor, STARTS[i % len(STARTS)], device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("factor", [None, 2.5])
def test_drop_with_a_probability_each(device: str, dtype: torch.dtype, start: int, factor: float | None) -> None:
    for i, kind in enumerate(KINDS):
        p = torch.rand(700, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        p[: 3 * len(RATES)] = torch.tensor(RATES * 3, dtype=torch.float64)
        both_drop(block(kind, 700).to(dtype), p, factor, start, device)


@settings(deadline=None)
@given(
    entries=st.lists(st.tuples(FLOAT, st.one_of(st.sampled_from(RATES), st.floats(0, 1))), max_size=40),
    start=st.one_of(st.integers(0, 600), st.sampled_from(STARTS)),
    dtype=st.sampled_from(DTYPES),
    factor=st.sampled_from([None, 1.0, 7.3]),
)
def test_drop_of_anything(
    entries: list[tuple[float, float]], start: int, dtype: torch.dtype, factor: float | None
) -> None:
    values = torch.tensor([value for value, _ in entries]).to(dtype)
    p = torch.tensor([rate for _, rate in entries], dtype=torch.float64)
    for device in DEVICES:
        both_drop(values, p, factor, start, device)
        both_drop(values, float(p[0]) if len(p) else 0.5, factor, start, device)


@pytest.mark.parametrize("factor", [None, 2.5])
@pytest.mark.parametrize("start", STARTS)
def test_probabilities_that_are_all_equal_drop_like_one(start: int, factor: float | None) -> None:
    values = block("normal", 1000)
    for p in RATES:
        one, each = torch.empty(1000), torch.empty(1000)
        kernels.drop(values, p, factor, KEY, start, one)
        kernels.drop(values, torch.full((1000,), p, dtype=torch.float64), factor, KEY, start, each)
        assert torch.equal(one, each)


@pytest.mark.parametrize("factor", [None, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_drop_at_scattered_positions_is_drop(kind: str, factor: float | None) -> None:
    values, start = block(kind, 2000), 2**34 - 900
    p = torch.rand(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = torch.empty(2000)
    kernels.drop(values, p, factor, KEY, start, whole)
    chosen = torch.randperm(2000, generator=torch.Generator().manual_seed(2))[:500]
    some = kernels.drop_at(values[chosen], p[chosen], factor, KEY, chosen + start)
    assert torch.equal(words(some), words(whole[chosen]))


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", ROWS, ids=lambda rows: str(tuple(rows.shape)))
def test_rank_sums_are_twice_scipys_mean_rank(device: str, rows: torch.Tensor) -> None:
    expected = np.array([2 * rankdata(row, method="average") for row in rows.abs().double().numpy()])
    for module, place in ((kernels, "cpu"), (torch_kernels, device)):
        sums = module.rank_sums(rows.to(place))
        assert sums.dtype == torch.float64
        assert np.array_equal(sums.cpu().numpy(), expected.reshape(rows.shape))


@settings(deadline=None)
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
    assert kernels.rank_sums(tensor).tolist() == expected
    for device in DEVICES:
        assert torch_kernels.rank_sums(tensor.to(device)).tolist() == expected


@pytest.mark.parametrize("unused", range(32))
def test_rank_sums_for_every_number_of_low_bits_that_are_zero(unused: int) -> None:
    for count in (600, 2500):
        drawn = torch.randint(0, 2**31, (1, count), generator=torch.Generator().manual_seed(unused))
        rows = ((drawn >> unused) << unused).to(torch.int32).view(torch.float32)
        expected = rankdata(sizes(rows[0]), method="average") * 2
        assert np.array_equal(kernels.rank_sums(rows)[0].numpy(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_counts_of_both_digits(device: str, dtype: torch.dtype, kind: str) -> None:
    for count in COUNTS:
        values = block(kind, count).to(dtype)
        high = np.bincount([size >> 16 for size in sizes(values)], minlength=HIGH)
        for module, place in ((kernels, "cpu"), (torch_kernels, device)):
            counted = module.count_high(values.to(place))
            assert counted.dtype == np.int64
            assert np.array_equal(counted, high)
        for digit in {size >> 16 for size in sizes(values)[:5]} | {0, HIGH - 1}:
            low = np.bincount([size & 0xFFFF for size in sizes(values) if size >> 16 == digit], minlength=LOW)
            for module, place in ((kernels, "cpu"), (torch_kernels, device)):
                counted = module.count_low(values.to(place), digit)
                assert counted.dtype == np.int64
                assert np.array_equal(counted, low)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [(0, RANGE), (0, 0), (RANGE // 3, RANGE // 2), (RANGE - 10**8, RANGE)])
def test_ties_and_their_numbers(device: str, dtype: torch.dtype, kind: str, window: tuple[int, int]) -> None:
    for start in STARTS:
        values = block(kind, 700).to(dtype)
        all_sizes = sizes(values)
        size = all_sizes[1]
        numbers = kernels.random_bits(KEY, start, 700, torch.device("cpu")).tolist()
        tied = [(number, start + i) for i, number in enumerate(numbers) if all_sizes[i] == size]
        inside = [(number, i) for number, i in tied if window[0] <= number < window[1]]
        below, found, positions = kernels.tied(values, start, size=size, window=window, key=KEY)
        assert below == sum(number < window[0] for number, _ in tied)
        assert list(zip(found.tolist(), positions.tolist(), strict=True)) == inside
        both_tied(values, start, size, window, device)


@pytest.mark.parametrize("device", DEVICES)
def test_ties_of_a_magnitude_that_no_entry_has(device: str) -> None:
    for count in COUNTS:
        both_tied(block("normal", count), 3, 7, (0, RANGE), device)
        assert kernels.tied(block("normal", count), 3, size=7, window=(0, RANGE), key=KEY)[0] == 0


def slow_drop_below(values: torch.Tensor, cut: tuple[int, int, int], start: int) -> list[bool]:
    numbers = kernels.random_bits(KEY, start, values.numel(), torch.device("cpu")).tolist()
    return [(size, numbers[i], start + i) < cut for i, size in enumerate(sizes(values))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_drop_below_a_cut(device: str, dtype: torch.dtype, kind: str) -> None:
    for start in STARTS:
        values = block(kind, 700).to(dtype)
        numbers = kernels.random_bits(KEY, start, 700, torch.device("cpu")).tolist()
        for i in (0, 256, 699):
            size = sizes(values)[i]
            places = [(0, 0), (numbers[i], start + i), (numbers[i], start + i + 1), (numbers[i] + 1, 0), (RANGE, 0)]
            for cut in [(size, *place) for place in places] + [(size + 1, 0, 0), (0, 0, 0), (HIGH * LOW, 0, 0)]:
                both_drop_below(values, cut, 1.7, start, device)
                out = torch.empty_like(values)
                kernels.drop_below(values, cut, 1.0, KEY, start, out)
                dropped = torch.tensor(slow_drop_below(values, cut, start))
                assert torch.equal(words(out), words(torch.where(dropped, 0.0, values.float()).to(dtype)))


@settings(deadline=None)
@given(
    entries=st.lists(FLOAT, max_size=40),
    start=st.one_of(st.integers(0, 600), st.sampled_from(STARTS)),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_drop_below_of_anything(entries: list[float], start: int, dtype: torch.dtype, data: st.DataObject) -> None:
    values = torch.tensor(entries).to(dtype)
    size = data.draw(st.one_of(st.integers(0, HIGH * LOW), st.sampled_from([*sizes(values), 0])))
    breaks = size < HIGH * LOW
    number = data.draw(st.integers(0, RANGE)) if breaks else 0
    position = data.draw(st.integers(start, start + len(entries))) if breaks else 0
    for device in DEVICES:
        both_drop_below(values, (size, number, position), 1 / 0.7, start, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_positions_between_two_magnitudes(dtype: torch.dtype, kind: str) -> None:
    values = block(kind, 700).to(dtype)
    for low, high in [(0, HIGH * LOW), (sizes(values)[0], sizes(values)[0] + 1), (1, 0x3F000000), (5, 5)]:
        expected = [9 + i for i, size in enumerate(sizes(values)) if low <= size < high]
        assert kernels.positions_between(values, low, high, 9).tolist() == expected


@settings(deadline=None)
@given(
    rows=st.integers(1, 12).flatmap(
        lambda n: st.lists(
            st.lists(st.tuples(st.sampled_from(SPECIAL), st.integers(0, 3)), min_size=n, max_size=n),
            min_size=1,
            max_size=4,
        )
    ),
    data=st.data(),
)
def test_least_of_rows_are_the_first_in_sorted_order(rows: list[list[tuple[float, int]]], data: st.DataObject) -> None:
    values = torch.tensor([[value for value, _ in row] for row in rows])
    numbers = torch.tensor([[number * (2**32 - 1) // 3 for _, number in row] for row in rows])
    count = data.draw(st.integers(0, len(rows[0])))
    sizes = (values.view(torch.int32) & 0x7FFFFFFF).tolist()
    for row, least in enumerate(torch_kernels.least_of_rows(values, numbers, count)):
        order = sorted(range(len(rows[0])), key=lambda i: (sizes[row][i], int(numbers[row, i]), i))
        assert sorted(torch.nonzero(least)[:, 0].tolist()) == sorted(order[:count])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_drop_the_least_of_rows(device: str, kind: str) -> None:
    for start, row in itertools.product(STARTS, (1, 7, 300)):
        values = block(kind, 4 * row)
        numbers = kernels.random_bits(KEY, start, 4 * row, torch.device("cpu")).tolist()
        for count in {0, 1, row // 2, row - 1, row}:
            least = torch.zeros(4 * row, dtype=torch.bool)
            for begin in range(0, 4 * row, row):
                size = sizes(values[begin : begin + row])
                order = sorted(range(row), key=lambda i: (size[i], numbers[begin + i], i))
                least[[begin + i for i in order[:count]]] = True
            expected = torch.where(least, 0.0, values * float(np.float32(1.7)))
            for module, place in ((kernels, "cpu"), (torch_kernels, device)):
                out = torch.empty_like(values, device=place)
                module.drop_least(values.to(place), row, count, 1.7, KEY, start, out)
                assert torch.equal(words(out), words(expected))


@settings(deadline=None)
@given(rows=st.integers(1, 4), entries=st.lists(FLOAT, min_size=1, max_size=12), data=st.data())
def test_drop_the_least_of_anything(rows: int, entries: list[float], data: st.DataObject) -> None:
    values = torch.tensor(entries * rows)
    count = data.draw(st.integers(0, len(entries)))
    start = data.draw(st.sampled_from(STARTS))
    compiled = torch.empty_like(values)
    kernels.drop_least(values, len(entries), count, 1 / 0.7, KEY, start, compiled)
    for device in DEVICES:
        other = torch.empty_like(values, device=device)
        torch_kernels.drop_least(values.to(device), len(entries), count, 1 / 0.7, KEY, start, other)
        assert torch.equal(words(compiled), words(other))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("power", [1, 2])
def test_power_sums_by_exponent(device: str, dtype: torch.dtype, kind: str, power: int) -> None:
    for count in COUNTS:
        values = block(kind, count).to(dtype)
        expected = np.zeros((2, 256), dtype=np.int64)
        for size in sizes(values):
            exponent, fraction = divmod(size, 2**23)
            term = (fraction + 2**23 * (exponent > 0)) ** power
            low, high = (term, 0) if power == 1 else (term % 2**24, term // 2**24)
            expected[:, exponent] += low, high
        for module, place in ((kernels, "cpu"), (torch_kernels, device)):
            sums = module.power_sums(values.to(place), power)
            assert (sums.dtype, sums.device.type) == (torch.int64, "cpu")
            assert np.array_equal(sums.numpy(), expected)
