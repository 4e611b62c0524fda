"""Counts and sums of a delta's entries, which add up over any split of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, reduce

import numpy as np
import torch

from delta_analysis._kernels import ALONE, BESIDE, BUCKETS, READABLE, SUBTRACT, entries, map_blocks, tally_piece

THRESHOLDS = (0.0002, 0.001, 0.002, 0.005, 0.01, 0.03)
"""Reference lines of the papers for |δ|; descriptions, not limits (facts of DARE, 4.6 and abstract)."""
DECILES = tuple(range(10, 100, 10))
MAGNITUDE_QUANTILES = {"abs_p50": 0.5, "abs_p90": 0.9, "abs_p99": 0.99, "abs_p999": 0.999}
GRID = 2**20
"""Float64 sums are formed over this many consecutive entries of a tensor, wherever it is cut for reading."""
PIECE = 2**18
"""Entries that are read and tallied at once, so that they are still in the cache."""
DIGITS = {torch.float64: 23, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
"""Binary digits after the point that an entry keeps; the delta itself is float32."""
_SIGN = BUCKETS // 2
_LIMITS = np.array(
    [1, *(np.float32(t).view(np.uint32) + (float(np.float32(t)) < t) for t in THRESHOLDS)], dtype=np.uint32
)
"""Magnitude bits: below the first is zero alone, below the others are the float32 values below a threshold."""


@dataclass(frozen=True, eq=False)
class Tally:
    """Counts, sums and a histogram of the entries of one or many tensors.

    Entries that are NaN or infinite, or whose base is, are counted in `nonfinite` and left out of all the rest.
    Tallies of different entries are added, in any order and from any split at the grid, with the
    same result to the last bit, since sums are rounded once, at the end.

    Attributes
    ----------
    below : below[i] counts |δ| < THRESHOLDS[i].
    buckets, counts : the float32 bits of counts[i] entries begin with the 16 bits buckets[i].
    sums : float64 (blocks, 4), of each block of the grid the number of finite entries, Σ δ,
        Σ (δ - mean of the block)² and Σ base².
    digits : the fewest binary digits after the point in which any of the weights was stored.
    """

    numel: int
    nonfinite: int
    zeros: int
    low: float
    high: float
    below: np.ndarray
    buckets: np.ndarray
    counts: np.ndarray
    sums: np.ndarray
    digits: int

    def __add__(self, other: Tally) -> Tally:
        buckets = np.union1d(self.buckets, other.buckets)
        counts = np.zeros(len(buckets), dtype=np.int64)
        for part in (self, other):
            counts[np.searchsorted(buckets, part.buckets)] += part.counts
        return Tally(
            self.numel + other.numel,
            self.nonfinite + other.nonfinite,
            self.zeros + other.zeros,
            min(self.low, other.low),
            max(self.high, other.high),
            self.below + other.below,
            buckets,
            counts,
            np.concatenate([self.sums, other.sums]),
            min(self.digits, other.digits),
        )

    @property
    def finite(self) -> int:
        return self.numel - self.nonfinite

    @property
    def magnitude_max(self) -> float:
        return max(abs(self.low), abs(self.high))

    @property
    def mean(self) -> float:
        return math.fsum(self.sums[:, 1]) / max(self.finite, 1)

    @property
    def centred_sum(self) -> float:
        """Σ (δ - mean)² over all entries."""
        n, total, centred, _ = self.sums.T
        steps = np.divide(total, n, out=np.zeros_like(n), where=n > 0) - self.mean
        return math.fsum(centred) + math.fsum(n * steps * steps)

    @property
    def base_square_sum(self) -> float:
        return math.fsum(self.sums[:, 3])

    @property
    def storage_step(self) -> float:
        """Distance of neighbouring numbers of the coarser storage at the rms of the base; NaN without a base."""
        square = self.base_square_sum / max(self.finite, 1)
        if not (0 < square < math.inf):
            return math.nan
        # frexp's exponent is that of a mantissa in [1/2, 1), one more than that of a number in [1, 2).
        step = math.ldexp(1.0, math.frexp(math.sqrt(square))[1] - 1 - self.digits)
        # Below 2^-14 the steps of float16 shrink no more.
        return max(step, 2.0**-24) if self.digits == DIGITS[torch.float16] else step

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """For each share q the smallest value with at least q of the entries at or below it, within 0.4%."""
        values = bucket_middles()[self.buckets]
        order = np.argsort(values, kind="stable")
        return _rank_values(self.counts[order], values[order], shares, self.low, self.high)

    def magnitude_quantiles(self, shares: Sequence[float]) -> list[float]:
        """The same of |δ|."""
        folded, where = np.unique(self.buckets & (_SIGN - 1), return_inverse=True)
        counts = np.bincount(where, weights=self.counts, minlength=len(folded)).astype(np.int64)
        return _rank_values(counts, bucket_middles()[folded], shares, 0.0, self.magnitude_max)

    def row(self) -> dict[str, float]:
        """The statistics of `value_ranges`, NaN where there is no finite entry."""
        n = self.finite or math.nan
        variance = self.centred_sum / n
        square = variance + self.mean * self.mean
        base_square = self.base_square_sum / n
        deciles = self.quantiles([decile / 100 for decile in DECILES])
        magnitudes = self.magnitude_quantiles(list(MAGNITUDE_QUANTILES.values()))
        return {
            "numel": self.numel,
            "nonfinite": self.nonfinite,
            "zero_share": self.zeros / n,
            "min": self.low if self.finite else math.nan,
            **{f"p{decile}": value for decile, value in zip(DECILES, deciles, strict=True)},
            "max": self.high if self.finite else math.nan,
            "mean": self.mean if self.finite else math.nan,
            "std": math.sqrt(variance),
            "rms": math.sqrt(square),
            **dict(zip(MAGNITUDE_QUANTILES, magnitudes, strict=True)),
            "abs_max": self.magnitude_max if self.finite else math.nan,
            **{f"share_below_{t}": int(c) / n for t, c in zip(THRESHOLDS, self.below, strict=True)},
            "relative_rms": math.sqrt(square / base_square) if base_square > 0 else math.nan,
            "storage_step": self.storage_step,
        }


@cache
def bucket_middles() -> np.ndarray:
    """Middle value of each bucket; the bucket of zero is zero itself."""
    bits = np.arange(BUCKETS, dtype=np.uint32) << np.uint32(16)
    middles = (bits | np.uint32(0x8000)).view(np.float32)
    # Buckets of infinities and NaNs stay empty, since such entries are never counted in them.
    middles = np.where(np.isfinite(middles), middles, 0.0).astype(np.float64)
    middles[[0, _SIGN]] = 0.0
    return middles


def _rank_values(
    counts: np.ndarray, values: np.ndarray, shares: Sequence[float], low: float, high: float
) -> list[float]:
    if not len(counts):
        return [math.nan] * len(shares)
    cumulative = np.cumsum(counts)
    ranks = [max(math.ceil(q * cumulative[-1]), 1) for q in shares]
    return np.clip(values[np.searchsorted(cumulative, ranks)], low, high).tolist()


Piece = tuple[torch.Tensor, torch.Tensor | None]
"""Entries of the fine-tuned side, and those of the base beside them, if any; flat, of any floating dtype."""


def tally_blocks(blocks: Iterable[Iterable[Piece]], *, subtract: bool, digits: int) -> Tally:
    """Tally blocks of the grid, each given in pieces of `PIECE` entries but for its last.

    `subtract` says whether the base is subtracted or only measured.
    """
    numel, sums = 0, []
    below, extremes = np.zeros(2 + len(THRESHOLDS), dtype=np.int64), np.array([np.inf, -np.inf], dtype=np.float32)
    histogram = np.zeros(BUCKETS, dtype=np.uint32)
    for pieces in blocks:
        sums.append(np.zeros(4))
        for finetuned, base in pieces:
            use = ALONE if base is None else SUBTRACT if subtract else BESIDE
            words = _words(finetuned)
            other = words[:0] if base is None else _words(base)
            tally_piece(words, other, use, _LIMITS, below, extremes, sums[-1], histogram)
            numel += finetuned.numel()
    buckets = np.flatnonzero(histogram)
    nonfinite, zeros, *_ = map(int, below)
    # A sum with zero makes zero of its negative.
    low, high = (float(each) + 0.0 for each in extremes)
    return Tally(
        numel, nonfinite, zeros, low, high, below[2:], buckets, histogram[buckets].astype(np.int64),
        np.array(sums).reshape(-1, 4), digits,
    )  # fmt: skip


def _words(piece: torch.Tensor) -> np.ndarray:
    return entries(piece if piece.dtype in READABLE else piece.to(torch.float32))


def tally_tensor(delta: torch.Tensor, base: torch.Tensor | None = None, *, digits: int = 23) -> Tally:
    """Tally a tensor in memory, of any shape, with the base's beside it, if any."""
    beside = None if base is None else base.detach().cpu().reshape(-1)

    def work(values: torch.Tensor, start: int) -> Tally:
        def pieces() -> Iterator[Piece]:
            for first in range(0, values.numel(), PIECE):
                last = min(first + PIECE, values.numel())
                yield values[first:last], None if beside is None else beside[start + first : start + last]

        return tally_blocks([pieces()], subtract=False, digits=digits)

    parts = map_blocks(delta.detach().cpu(), work, block=GRID, multiple=GRID, dtypes=(*READABLE, torch.float64))
    return reduce(Tally.__add__, parts, tally_blocks([], subtract=False, digits=digits))
