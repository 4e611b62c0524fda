"""Value ranges of a delta: one pass over each tensor, partial results that add up.

Every number of a table comes from `Tally`, which holds counts and sums only: two tallies of
different entries are merged by adding them, so a group (a layer, the model) is the sum of its tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numba
import numpy as np
import pandas as pd
import torch

from delta_analysis._errors import one_of
from delta_analysis.delta import Delta
from delta_analysis.names import parse_name

THRESHOLDS = (0.0002, 0.001, 0.002, 0.005, 0.01, 0.03)
"""Reference lines of the papers for |δ|; descriptions, not limits (facts of DARE, 4.6 and abstract)."""
DECILES = tuple(range(10, 100, 10))
MAGNITUDE_QUANTILES = {"abs_p50": 0.5, "abs_p90": 0.9, "abs_p99": 0.99, "abs_p999": 0.999}
GROUPS = ("tensor", "layer", "module", "kind", "model")
Grouping = Literal["tensor", "layer", "module", "kind", "model"]

GRID = 2**20
"""Float64 sums are formed over this many consecutive entries of a tensor, then added in order."""
BUCKETS = 2**16
"""One bucket for each value of a float32's upper 16 bits: sign, exponent, 7 bits of mantissa."""
_SIGN = BUCKETS // 2


@dataclass(frozen=True, eq=False)
class Tally:
    """Counts, sums and a histogram of the entries of one or many tensors.

    Entries that are NaN or infinite are counted in `nonfinite` and left out of all the rest.
    `centred_sum` is Σ (δ - mean)²; `base_square_sum` is Σ base² over the same entries (0 without a
    base); `below[i]` counts |δ| < THRESHOLDS[i]; `histogram[b]` counts the entries whose float32
    bits begin with b.
    """

    numel: int
    nonfinite: int
    zeros: int
    low: float
    high: float
    mean: float
    centred_sum: float
    base_square_sum: float
    below: np.ndarray
    histogram: np.ndarray

    def __add__(self, other: Tally) -> Tally:
        # Means and centred sums are merged after Chan, Golub and LeVeque (1983): sums of squares
        # would lose the spread of weights that lie close around 1.
        finite = max(self.finite + other.finite, 1)
        step = other.mean - self.mean
        return Tally(
            self.numel + other.numel,
            self.nonfinite + other.nonfinite,
            self.zeros + other.zeros,
            min(self.low, other.low),
            max(self.high, other.high),
            self.mean + step * (other.finite / finite),
            self.centred_sum + other.centred_sum + step * step * (self.finite * other.finite / finite),
            self.base_square_sum + other.base_square_sum,
            self.below + other.below,
            self.histogram + other.histogram,
        )

    @property
    def finite(self) -> int:
        return self.numel - self.nonfinite

    def quantile(self, q: float) -> float:
        """The smallest value with at least a share q of the entries at or below it, within 0.4%."""
        order = np.concatenate([np.arange(BUCKETS - 1, _SIGN - 1, -1), np.arange(_SIGN)])
        return _rank_value(self.histogram[order], _bucket_middles()[order], q, self.low, self.high)

    def magnitude_quantile(self, q: float) -> float:
        """The same of |δ|."""
        folded = self.histogram[:_SIGN] + self.histogram[_SIGN:]
        return _rank_value(folded, _bucket_middles()[:_SIGN], q, 0.0, self.magnitude_max)

    @property
    def magnitude_max(self) -> float:
        return max(abs(self.low), abs(self.high))

    def row(self) -> dict[str, float]:
        """The statistics of `value_ranges`, NaN where there is no finite entry."""
        n = self.finite or np.nan
        variance = self.centred_sum / n
        square = variance + self.mean * self.mean
        base_square = self.base_square_sum / n
        return {
            "numel": self.numel,
            "nonfinite": self.nonfinite,
            "zero_share": self.zeros / n,
            "min": self.low if self.finite else np.nan,
            **{f"p{decile}": self.quantile(decile / 100) for decile in DECILES},
            "max": self.high if self.finite else np.nan,
            "mean": self.mean if self.finite else np.nan,
            "std": float(np.sqrt(variance)),
            "rms": float(np.sqrt(square)),
            **{key: self.magnitude_quantile(q) for key, q in MAGNITUDE_QUANTILES.items()},
            "abs_max": self.magnitude_max if self.finite else np.nan,
            **{f"share_below_{t}": int(c) / n for t, c in zip(THRESHOLDS, self.below, strict=True)},
            "relative_rms": float(np.sqrt(square / base_square)) if base_square > 0 else np.nan,
        }


def _bucket_middles() -> np.ndarray:
    """Middle value of each bucket; the bucket of zero is zero itself."""
    bits = np.arange(BUCKETS, dtype=np.uint32) << np.uint32(16)
    middles = (bits | np.uint32(0x8000)).view(np.float32)
    # Buckets of infinities and NaNs stay empty, since such entries are never counted in them.
    middles = np.where(np.isfinite(middles), middles, 0.0).astype(np.float64)
    middles[[0, _SIGN]] = 0.0
    return middles


def _rank_value(counts: np.ndarray, values: np.ndarray, q: float, low: float, high: float) -> float:
    cumulative = np.cumsum(counts)
    if cumulative[-1] == 0:
        return float("nan")
    rank = max(int(np.ceil(q * cumulative[-1])), 1)
    return float(np.clip(values[np.searchsorted(cumulative, rank)], low, high))


@numba.njit(cache=True, nogil=True)
def _tally_block(values, base, thresholds, below, histogram):  # type: ignore[no-untyped-def]
    """Fill `below` and `histogram`; return nonfinite, zeros, low, high, mean, Σ (δ - mean)², Σ base²."""
    bits = values.view(np.uint32)
    nonfinite, zeros = 0, 0
    low, high, total, base_square_sum = np.inf, -np.inf, 0.0, 0.0
    for i in range(len(values)):
        value = np.float64(values[i])
        if not np.isfinite(value):
            nonfinite += 1
            continue
        zeros += value == 0
        low = min(low, value)
        high = max(high, value)
        total += value
        base_square_sum += np.float64(base[i]) * np.float64(base[i])
        histogram[bits[i] >> 16] += 1
        for t in range(len(thresholds)):
            below[t] += abs(value) < thresholds[t]
    mean = total / max(len(values) - nonfinite, 1)
    centred_sum = 0.0
    for i in range(len(values)):
        if np.isfinite(values[i]):
            distance = np.float64(values[i]) - mean
            centred_sum += distance * distance
    return nonfinite, zeros, low, high, mean, centred_sum, base_square_sum


def tally(delta: torch.Tensor, base: torch.Tensor | None = None) -> Tally:
    """Tally a tensor of any shape, with the base tensor it was subtracted from, if any."""
    values = delta.detach().to(torch.float32).reshape(-1).numpy()
    base_values = np.zeros_like(values) if base is None else base.detach().to(torch.float32).reshape(-1).numpy()
    return reduce(
        Tally.__add__,
        (
            _tally_slice(values[start : start + GRID], base_values[start : start + GRID])
            for start in range(0, max(len(values), 1), GRID)
        ),
    )


def _tally_slice(values: np.ndarray, base: np.ndarray) -> Tally:
    below = np.zeros(len(THRESHOLDS), dtype=np.int64)
    histogram = np.zeros(BUCKETS, dtype=np.int64)
    nonfinite, zeros, low, high, *sums = _tally_block(values, base, np.array(THRESHOLDS), below, histogram)
    mean, centred_sum, base_square_sum = sums
    return Tally(len(values), nonfinite, zeros, low, high, mean, centred_sum, base_square_sum, below, histogram)


def tally_tensors(delta: Delta) -> Iterator[tuple[str, tuple[int, ...], Tally]]:
    """Name, shape and tally of each tensor of a delta, in one pass."""
    for name in delta:
        tensor, base = delta.read(name)
        result = tally(tensor, base)
        if result.nonfinite:
            warnings.warn(
                f"{delta.finetuned.source}: tensor {name!r} has {result.nonfinite} NaN or infinite entries of "
                f"{result.numel}; they are counted in column nonfinite and left out of every statistic",
                stacklevel=2,
            )
        yield name, tuple(tensor.shape), result


def value_ranges(delta: Delta, *, by: Grouping = "tensor") -> pd.DataFrame:
    """How large the entries of a delta are, by tensor or by group of tensors.

    Parameters
    ----------
    delta : as from `load_delta`.
    by : one row a `tensor`, `layer`, `module` (the same place in every layer), `kind` (linear,
        embedding, norm, bias), or one row for the `model`.

    Returns
    -------
    DataFrame with columns `tensor, layer, module, kind, shape` (missing where a group spans many;
    layer -1 is outside the stack); `tensors`, how many were merged; `numel`; `nonfinite`, how many
    entries are NaN or infinite (left out of all that follows); `zero_share`; the signed order
    statistics `min, p10 … p90, max`; `mean, std, rms`; `abs_p50, abs_p90, abs_p99, abs_p999,
    abs_max` of |δ|; `share_below_<t>`, the share of |δ| < t; `relative_rms`, rms of the delta over
    rms of the base. Moments are exact to float64, quantiles within 0.4% of the order statistic of
    rank ceil(q·n).

    Warns
    -----
    UserWarning
        NaN or infinite entries, with the tensor and their number.

    Source: the deciles are those of DARE's appendix, the thresholds its descriptive limits
    (arXiv 2311.03099, abstract of v1 and v3, section 4.6).

    Examples
    --------
    >>> from delta_analysis import load_delta
    >>> delta = load_delta(base="zoo:small/base", finetuned="zoo:small/instruct")
    >>> value_ranges(delta, by="model")["numel"].item() == sum(t.numel() for t in delta.values())
    True
    """
    if by not in GROUPS:
        raise ValueError(one_of("by", by, GROUPS))
    rows = []
    for name, shape, result in tally_tensors(delta):
        layer, module, kind = parse_name(name, len(shape))
        rows.append(
            {"tensor": name, "layer": layer, "module": module, "kind": kind, "shape": str(shape), "tally": result}
        )
    return _table(rows, by)


def _table(rows: list[dict[str, object]], by: Grouping) -> pd.DataFrame:
    labels = ("tensor", "layer", "module", "kind", "shape")
    frame = pd.DataFrame(rows, columns=[*labels, "tally"])
    keys = frame[by] if by != "model" else pd.Series("model", index=frame.index)
    table = []
    for _, group in frame.groupby(keys, sort=False):
        shared = {label: group[label].iloc[0] if len(set(group[label])) == 1 else None for label in labels}
        merged = reduce(Tally.__add__, group["tally"])
        table.append({**shared, "tensors": len(group), **merged.row()})
    return pd.DataFrame(table).astype({"layer": "Int64"})


def magnitude_histogram(delta: Delta, *, bins_per_decade: int = 10) -> pd.DataFrame:
    """How |δ| is distributed over a logarithmic axis, for the whole delta.

    Parameters
    ----------
    delta : as from `load_delta`.
    bins_per_decade : how many equal bins of log10 |δ| there are between 10^k and 10^(k+1).

    Returns
    -------
    DataFrame with columns `low, high` (the bin's edges); `share`, of all finite entries; `density`,
    share per decade. Entries that are exactly zero stand in no bin: the shares sum to 1 - zero share.

    Examples
    --------
    >>> from delta_analysis import load_delta
    >>> histogram = magnitude_histogram(load_delta(base=None, finetuned="zoo:small/base"))
    >>> bool(histogram["share"].sum() <= 1)
    True
    """
    if bins_per_decade < 1:
        raise ValueError(f"bins_per_decade must be at least 1; not {bins_per_decade!r}")
    whole = reduce(Tally.__add__, (result for _, _, result in tally_tensors(delta)))
    counts = (whole.histogram[:_SIGN] + whole.histogram[_SIGN:]).astype(np.float64)
    counts[0] = 0
    filled = np.flatnonzero(counts)
    logs = np.log10(_bucket_middles()[filled])
    first, last = (np.floor(logs.min()), np.ceil(logs.max())) if len(filled) else (-1.0, 0.0)
    edges = np.linspace(first, last, round((last - first) * bins_per_decade) + 1)
    share = np.histogram(logs, bins=edges, weights=counts[filled])[0] / max(whole.finite, 1)
    return pd.DataFrame(
        {"low": 10 ** edges[:-1], "high": 10 ** edges[1:], "share": share, "density": share * bins_per_decade}
    )
