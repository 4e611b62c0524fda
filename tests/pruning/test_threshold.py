"""The threshold of magnitude pruning against plain sorting, over any number of tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from delta_analysis._kernels.philox import RANGE, random_bits
from delta_analysis.pruning import threshold as threshold_module
from delta_analysis.pruning.threshold import Threshold, find_threshold

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TIES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -0.5, 1e-45, float("inf"), -float("inf"), float("nan")])
ENTRIES = st.one_of(st.lists(TIES, max_size=25), st.lists(st.floats(width=32), max_size=10))
TENSORS = st.dictionaries(st.text("ab.1", max_size=4), st.tuples(ENTRIES, st.sampled_from(DTYPES)), max_size=5)

Place = tuple[int, int, str, int]


class Passes:
    """A factory of passes over some tensors that counts them."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.made = 0

    def __call__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.made += 1
        return iter(self.tensors.items())


def made(entries: dict[str, tuple[list[float], torch.dtype]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values, dtype=torch.float64).to(dtype) for name, (values, dtype) in entries.items()}


def places(tensors: Mapping[str, torch.Tensor], seed: int) -> list[Place]:
    """(magnitude, number, name, position) of every entry, from least to greatest."""
    found = []
    for name, tensor in tensors.items():
        sizes = tensor.reshape(-1).float().view(torch.int32).numpy() & 0x7FFFFFFF
        numbers = random_bits(tensor.numel(), seed=seed, name=name)
        found += [(size, u, name, i) for i, (size, u) in enumerate(zip(sizes.tolist(), numbers.tolist(), strict=True))]
    return sorted(found)


def below(threshold: Threshold, order: list[Place]) -> list[Place]:
    return [place for place in order if (place[0], place[1], place[3]) < threshold.of(place[2])]


@given(entries=TENSORS, seed=st.integers(0, 100), data=st.data())
def test_exactly_the_least_entries_lie_below(
    entries: dict[str, tuple[list[float], torch.dtype]], seed: int, data: st.DataObject
) -> None:
    tensors = made(entries)
    order = places(tensors, seed)
    count = data.draw(st.one_of(st.integers(0, len(order)), st.sampled_from([0, len(order)])))
    passes = Passes(tensors)
    threshold = find_threshold(passes, count / max(len(order), 1), seed=seed)
    assert passes.made <= 3
    assert below(threshold, order) == order[:count]


@given(entries=TENSORS, data=st.data())
def test_order_of_the_tensors_changes_nothing(
    entries: dict[str, tuple[list[float], torch.dtype]], data: st.DataObject
) -> None:
    tensors = made(entries)
    drop_rate = data.draw(st.floats(0, 1))
    shuffled = {name: tensors[name] for name in data.draw(st.permutations(list(tensors)))}
    assert find_threshold(shuffled.items, drop_rate, seed=1) == find_threshold(tensors.items, drop_rate, seed=1)


@pytest.mark.parametrize("window", [(0, 0), (RANGE, RANGE), (RANGE // 2, RANGE // 2 + 1)])
def test_a_window_without_the_rank_costs_a_pass_and_no_exactness(
    monkeypatch: pytest.MonkeyPatch, window: tuple[int, int]
) -> None:
    monkeypatch.setattr(threshold_module, "_window", lambda rank, ties: window)
    tensors = {"b": torch.ones(30), "a": torch.tensor([1.0, -1.0, 2.0, 0.0] * 5)}
    order = places(tensors, 4)
    for count in range(51):
        passes = Passes(tensors)
        assert below(find_threshold(passes, count / 50, seed=4), order) == order[:count]
        assert passes.made <= 4


def test_equal_numbers_are_told_apart_by_name_then_position(monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(values: torch.Tensor, start: int, *, size: int, window: tuple[int, int], key: object) -> tuple:
        positions = np.array([start + i for i, value in enumerate(values.tolist()) if value == 1], dtype=np.int64)
        numbers = positions % 2
        inside = (numbers >= window[0]) & (numbers < window[1])
        return int((numbers < window[0]).sum()), numbers[inside], positions[inside]

    monkeypatch.setattr(threshold_module, "tied", coarse)
    tensors = {"c": torch.ones(5), "a": torch.ones(7), "b": torch.ones(4)}
    order = sorted((0x3F800000, i % 2, name, i) for name, tensor in tensors.items() for i in range(len(tensor)))
    for count in range(17):
        assert below(find_threshold(tensors.items, count / 16, seed=0), order) == order[:count]


def test_many_ties_are_narrowed_to_a_window() -> None:
    """Nine sigma around the rank: 1e-18 that another pass is needed."""
    tensors = {"b": torch.zeros(150_000), "a": torch.zeros(100_000, dtype=torch.bfloat16), "c": torch.ones(10)}
    numbers = {name: random_bits(len(tensor), seed=2, name=name) for name, tensor in tensors.items()}
    for count in (1, 777, 125_000, 249_999):
        passes = Passes(tensors)
        threshold = find_threshold(passes, count / 250_010, seed=2)
        assert passes.made == 3
        assert threshold.magnitude == 0
        dropped = 0
        for name in "ab":
            _, number, position = threshold.of(name)
            tied = (numbers[name] == number) & (np.arange(len(numbers[name])) < position)
            dropped += int(((numbers[name] < number) | tied).sum())
        assert dropped == count


@pytest.mark.parametrize("ties", [1, 2, 50, 10**6, 10**12])
def test_windows_stay_among_the_numbers_and_narrow_with_the_ties(ties: int) -> None:
    for rank in {1, ties // 3 + 1, ties - 1 or 1}:
        low, high = threshold_module._window(rank, ties)
        assert 0 <= low <= rank / ties * RANGE <= high <= RANGE
        assert (high - low) / RANGE < 9 / ties**0.5 + 165 / ties


def test_whole_magnitudes_take_two_passes_and_nothing_takes_one() -> None:
    tensors = {"a": torch.tensor([1.0, 1.0, 3.0]), "b": torch.tensor([2.0, -3.0])}
    for count, most in ((0, 1), (2, 2), (3, 2), (5, 2), (1, 3), (4, 3)):
        passes = Passes(tensors)
        threshold = find_threshold(passes, count / 5, seed=0)
        assert passes.made <= most
        assert below(threshold, places(tensors, 0)) == places(tensors, 0)[:count]


def test_cut_by_hand() -> None:
    threshold = Threshold(7, 100, "m", 5)
    assert threshold.of("m") == (7, 100, 5)
    assert threshold.of("a") == (7, 101, 0)
    assert threshold.of("z") == (7, 100, 0)


def test_no_tensors() -> None:
    assert find_threshold(dict[str, torch.Tensor]().items, 0, seed=0).of("w") == (0, 0, 0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_cut(count: int) -> None:
    tensors = {name: torch.randint(-9, 9, (600_000,)).float() for name in "ab"}
    before = torch.get_num_threads()
    try:
        thresholds = []
        for threads in (1, count):
            torch.set_num_threads(threads)
            thresholds.append(
                [find_threshold(tensors.items, rank / 1_200_000, seed=0) for rank in (1, 500_000, 1_199_999)]
            )
    finally:
        torch.set_num_threads(before)
    assert thresholds[0] == thresholds[1]
    assert [a.magnitude <= b.magnitude for a, b in itertools.pairwise(thresholds[0])] == [True, True]
