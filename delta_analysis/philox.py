"""Random numbers named by (seed, tensor): Philox4x32-10, the same on every machine and in any order.

Philox is a counter-based generator: number i is a pure function of a key and of i, so that any part
of a stream can be drawn without the rest. Source: Salmon, Moraes, Dror and Shaw, "Parallel random
numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import hashlib

import numba
import numpy as np

ROUNDS = 10
LANES = 4
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def stream_key(seed: int, name: str) -> tuple[int, int]:
    """The two 32-bit words of the key of tensor `name` under `seed`."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


@numba.njit(cache=True)
def philox(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Four 32-bit words for a counter and a key, all held in uint64."""
    for _ in range(ROUNDS):
        product0 = _MULTIPLIERS[0] * c0
        product1 = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _HALF) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0 = (k0 + _WEYL[0]) & _LOW
        k1 = (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


@numba.njit(cache=True, nogil=True)
def _fill(out, start, k0, k1):  # type: ignore[no-untyped-def]
    zero = np.uint64(0)
    position = start
    end = start + len(out)
    while position < end:
        block = position // LANES
        words = philox(np.uint64(block) & _LOW, np.uint64(block) >> _HALF, zero, zero, k0, k1)
        for lane in range(position % LANES, LANES):
            if position < end:
                out[position - start] = words[lane]
                position += 1


def random_bits(count: int, *, seed: int, name: str, start: int = 0) -> np.ndarray:
    """Numbers `start` to `start + count` of the stream of tensor `name` under `seed`.

    Number i is lane `i % 4` of Philox4x32-10 at counter `(low word of i // 4, high word, 0, 0)`.

    Returns
    -------
    uint32 array of shape (count,), uniform over all 32-bit values.

    Examples
    --------
    >>> whole = random_bits(10, seed=0, name="w")
    >>> bool((whole[3:7] == random_bits(4, seed=0, name="w", start=3)).all())
    True
    """
    k0, k1 = stream_key(seed, name)
    out = np.empty(count, dtype=np.uint32)
    _fill(out, start, np.uint64(k0), np.uint64(k1))
    return out
