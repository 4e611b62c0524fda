"""Random numbers named by (seed, tensor): Philox4x32-10, the same on every machine and in any order.

Philox is a counter-based generator: number i is a pure function of a key and of i, so that any part
of a stream can be drawn without the rest. Source: Salmon, Moraes, Dror and Shaw, "Parallel random
numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import hashlib
import operator

import numba
import numpy as np

RANGE = 2**32
"""Random numbers are below this; an entry is dropped when its number is below round(p · RANGE)."""
ROUNDS = 10
LANES = 4
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF
GROUP = 64
"""Blocks of four numbers that are computed side by side, so that the compiler vectorises."""
_LOW = np.uint64(LOW)
_HALF = np.uint64(32)
_M0, _M1 = (np.uint64(m) for m in MULTIPLIERS)
_W0, _W1 = (np.uint64(w) for w in WEYL)

Key = tuple[int, int]


def stream_key(seed: int, name: str) -> Key:
    """The two 32-bit words of the key of tensor `name` under `seed`, an integer (1.0 is a TypeError)."""
    digest = hashlib.blake2b(f"{operator.index(seed)}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


@numba.njit(cache=True, inline="always")
def _round(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    product0 = _M0 * (c0 & _LOW)
    product1 = _M1 * (c2 & _LOW)
    return (product1 >> _HALF) ^ c1 ^ k0, product1, (product0 >> _HALF) ^ c3 ^ k1, product0


@numba.njit(cache=True)
def schedule(k0, k1):  # type: ignore[no-untyped-def]
    """The keys of the ten rounds, two words each."""
    k = np.empty(2 * ROUNDS, dtype=np.uint64)
    for i in range(ROUNDS):
        k[2 * i] = (k0 + np.uint64(i) * _W0) & _LOW
        k[2 * i + 1] = (k1 + np.uint64(i) * _W1) & _LOW
    return (
        (k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7], k[8], k[9]),
        (k[10], k[11], k[12], k[13], k[14], k[15], k[16], k[17], k[18], k[19]),
    )


# The rounds are written out: a loop over them inside the loop over blocks would not vectorise.
@numba.njit(cache=True, inline="always")
def _five_rounds(c0, c1, c2, c3, k):  # type: ignore[no-untyped-def]
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k[0], k[1])
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k[2], k[3])
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k[4], k[5])
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k[6], k[7])
    return _round(c0, c1, c2, c3, k[8], k[9])


@numba.njit(cache=True, inline="always")
def _ten_rounds(c0, c1, c2, c3, keys):  # type: ignore[no-untyped-def]
    c0, c1, c2, c3 = _five_rounds(c0, c1, c2, c3, keys[0])
    c0, c1, c2, c3 = _five_rounds(c0, c1, c2, c3, keys[1])
    return c0 & _LOW, c1 & _LOW, c2 & _LOW, c3 & _LOW


@numba.njit(cache=True)
def philox(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Four 32-bit words for a counter and a key, all held in uint64."""
    return _ten_rounds(c0, c1, c2, c3, schedule(k0, k1))


@numba.njit(cache=True, inline="always")
def draw(first, keys, words, numbers):  # type: ignore[no-untyped-def]
    """Put the numbers of `GROUP` blocks, from block `first` on, into `numbers`; `words` is working memory."""
    zero = np.uint64(0)
    for j in range(GROUP):
        block = np.uint64(first) + np.uint64(j)
        w0, w1, w2, w3 = _ten_rounds(block & _LOW, block >> _HALF, zero, zero, keys)
        words[0, j], words[1, j], words[2, j], words[3, j] = w0, w1, w2, w3
    for j in range(GROUP):
        numbers[4 * j] = words[0, j]
        numbers[4 * j + 1] = words[1, j]
        numbers[4 * j + 2] = words[2, j]
        numbers[4 * j + 3] = words[3, j]


@numba.njit(cache=True, nogil=True)
def _fill(out, start, k0, k1):  # type: ignore[no-untyped-def]
    keys = schedule(k0, k1)
    words, numbers = np.empty((LANES, GROUP), dtype=np.uint32), np.empty(LANES * GROUP, dtype=np.uint32)
    position, end = start, start + len(out)
    while position < end:
        first = position // LANES
        draw(first, keys, words, numbers)
        stop = min(end, (first + GROUP) * LANES)
        source, target = numbers[position % LANES :], out[position - start : stop - start]
        # A loop, since assigning one slice to another is slow when compiled.
        for i in range(len(target)):
            target[i] = source[i]
        position = stop


@numba.njit(cache=True, inline="always")
def number_at(index, keys):  # type: ignore[no-untyped-def]
    """Number `index` of a stream alone."""
    block, zero = np.uint64(index) // np.uint64(LANES), np.uint64(0)
    return _ten_rounds(block & _LOW, block >> _HALF, zero, zero, keys)[index % LANES]


def random_bits(count: int, *, seed: int, name: str, start: int = 0) -> np.ndarray:
    """Numbers `start` to `start + count` of a stream: i is lane `i % 4` of Philox at counter `(i // 4, 0, 0)`."""
    out = np.empty(count, dtype=np.uint32)
    fill(stream_key(seed, name), start, out)
    return out


def fill(key: Key, start: int, out: np.ndarray) -> None:
    """Put numbers `start`, `start + 1`, … of the stream of a key into `out`."""
    _fill(out, start, np.uint64(key[0]), np.uint64(key[1]))
