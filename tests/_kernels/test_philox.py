"""Philox4x32-10 against its published vectors and a reference in plain integers."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from delta_analysis._kernels.philox import philox, random_bits, stream_key

MASK = 0xFFFFFFFF
WORD = st.integers(0, MASK)
COUNTER_LIMIT = 2**34
"""The first element whose block number needs the high counter word."""

# Random123, tests/kat_vectors: counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


def slow_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 of Salmon et al. 2011 as it is written there: ten rounds, the key raised between them."""
    for turn in range(10):
        left, right = ((key[0] + turn * 0x9E3779B9) & MASK, (key[1] + turn * 0xBB67AE85) & MASK)
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = (high1 ^ counter[1] ^ left, low1, high0 ^ counter[3] ^ right, low0)
    return counter


def fast_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(word) for word in philox(*(np.uint64(word) for word in (*counter, *key))))


def slow_key(seed: int, name: str) -> tuple[int, int]:
    high, low = divmod(
        int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little"), 2**32
    )
    return low, high


def slow_bits(start: int, count: int, key: tuple[int, int]) -> list[int]:
    return [slow_philox((i // 4 % 2**32, i // 4 // 2**32, 0, 0), key)[i % 4] for i in range(start, start + count)]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_published_known_answers(counter: str, key: str, answer: str) -> None:
    assert fast_philox(words(counter), words(key)) == words(answer)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_the_reference_itself_gives_the_published_answers(counter: str, key: str, answer: str) -> None:
    assert slow_philox(words(counter), words(key)) == words(answer)


@given(counter=st.tuples(WORD, WORD, WORD, WORD), key=st.tuples(WORD, WORD))
def test_equals_the_reference_for_any_counter_and_key(counter: tuple[int, ...], key: tuple[int, ...]) -> None:
    assert fast_philox(counter, key) == slow_philox(counter, key)


@given(seed=st.integers(-(2**70), 2**70), name=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_key_is_the_hash_of_seed_and_name(seed: int, name: str) -> None:
    assert stream_key(seed, name) == slow_key(seed, name)


def test_key_of_a_fixed_stream_never_changes() -> None:
    # Typed in: a hash library or an encoding that changes would change every mask.
    assert stream_key(0, "model.norm.weight") == (0x5C49E304, 0x64E11BA5)


def test_key_tells_the_seed_from_a_number_in_the_name() -> None:
    assert stream_key(1, "1/w") != stream_key(11, "w")
    assert stream_key(12, "w") != stream_key(1, "2/w")


@given(
    seed=st.integers(0, 2**32),
    name=st.text("abc.0", max_size=8),
    start=st.one_of(
        st.integers(0, 40),
        st.integers(COUNTER_LIMIT - 20, COUNTER_LIMIT + 20),
        st.integers(2**40, 2**60),
    ),
    count=st.integers(0, 30),
)
def test_lane_and_counter_of_each_number(seed: int, name: str, start: int, count: int) -> None:
    drawn = random_bits(count, seed=seed, name=name, start=start)
    assert drawn.dtype == np.uint32
    assert drawn.tolist() == slow_bits(start, count, slow_key(seed, name))


def test_high_counter_word_is_used_past_two_to_the_34_elements() -> None:
    start = COUNTER_LIMIT - 6
    drawn = random_bits(12, seed=5, name="w", start=start)
    key = slow_key(5, "w")
    assert drawn.tolist() == slow_bits(start, 12, key)
    assert tuple(drawn[6:10].tolist()) == slow_philox((0, 1, 0, 0), key)
    assert drawn[6:].tolist() != random_bits(6, seed=5, name="w").tolist()


@given(cuts=st.lists(st.integers(0, 500), max_size=8), start=st.sampled_from([0, 3, COUNTER_LIMIT - 250]))
def test_chunks_of_any_size_give_the_same_stream(cuts: list[int], start: int) -> None:
    whole = random_bits(500, seed=2, name="layer", start=start)
    edges = [0, *sorted(cuts), 500]
    chunks = [
        random_bits(stop - begin, seed=2, name="layer", start=start + begin)
        for begin, stop in itertools.pairwise(edges)
    ]
    assert np.array_equal(np.concatenate(chunks), whole)


@pytest.mark.parametrize("position", range(4))
def test_a_byte_of_a_stream_is_uniform(position: int) -> None:
    """Chi-square over 256 values of each byte; false alarm rate 1e-6."""
    counts = np.bincount(random_bits(400_000, seed=0, name="w").view(np.uint8)[position::4], minlength=256)
    expected = 400_000 / 256
    assert ((counts - expected) ** 2 / expected).sum() < chi2.isf(1e-6, 255)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, "w"), (1, "w")),
        ((0, "w"), (0, "v")),
        ((0, "layers.0.w"), (0, "layers.1.w")),
        ((1, "1.w"), (11, "w")),
    ],
)
def test_streams_of_other_seeds_and_names_are_independent(one: tuple[int, str], other: tuple[int, str]) -> None:
    """Chi-square of the 16 × 16 table of top four bits, at equal and at shifted positions.

    Both a copy of the stream and a copy shifted by a lane would show; false alarm rate 1e-6 a shift.
    """
    n = 100_000
    first = random_bits(n, seed=one[0], name=one[1]) >> 28
    for shift in range(5):
        second = random_bits(n, seed=other[0], name=other[1], start=shift) >> 28
        counts = np.bincount(16 * first + second, minlength=256)
        assert ((counts - n / 256) ** 2 / (n / 256)).sum() < chi2.isf(1e-6, 255)
