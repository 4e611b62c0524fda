"""Value ranges of a delta as tables: by tensor, by group of tensors, and as a histogram."""

from __future__ import annotations

from concurrent.futures import Executor
from functools import reduce
from typing import Any, Literal, TextIO

import numpy as np
import pandas as pd

from delta_analysis._errors import checked_number, one_of
from delta_analysis.deltas.delta import Delta
from delta_analysis.deltas.streaming import Tallies, tally_delta
from delta_analysis.deltas.tally import Tally, bucket_middles

GROUPS = ("tensor", "place", "layer", "module", "kind", "model")
Grouping = Literal["tensor", "place", "layer", "module", "kind", "model"]
LABELS = ("tensor", "layer", "module", "kind", "shape")


def value_ranges(
    delta: Delta | Tallies,
    *,
    by: Grouping = "tensor",
    executor: Executor | None = None,
    progress: TextIO | None = None,
) -> pd.DataFrame:
    """How large the entries of a delta are, by tensor or by group of tensors.

    Parameters
    ----------
    delta : as from `load_delta`, which is read once for each call, or what `tally_delta` found in it.
    by : one row a `tensor`, `place` (a module of a layer: one tensor, or all experts of a layer),
        `layer`, `module` (the same place in every layer), `kind` (linear, embedding, norm, bias),
        or one row for the `model`.
    executor, progress : as in `tally_delta`.

    Returns
    -------
    DataFrame with columns `tensor, layer, module, kind, shape` (missing where a group spans many;
    layer -1 is outside the stack); `tensors`, how many were merged; `numel`; `nonfinite`, how many
    entries are NaN or infinite on either side (left out of all that follows); `zero_share`; the signed order
    statistics `min, p10 … p90, max`; `mean, std, rms`; `abs_p50, abs_p90, abs_p99, abs_p999,
    abs_max` of |δ|; `share_below_<t>`, the share of |δ| < t; `relative_rms`, rms of the delta over
    rms of the base; `storage_step`, the distance of neighbouring numbers in the coarser of the two
    sides' storage dtypes (float32 at the finest) at the rms of the base, of a group the largest of
    its tensors', missing for what was computed. Moments are exact to float64, quantiles within
    0.4% of the order statistic of rank ceil(q·n).

    Warns
    -----
    UserWarning
        As `tally_delta`.

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
    found = _tallies(delta, executor=executor, progress=progress)
    labels = list(LABELS)
    if by == "tensor":
        table = found.tensors.copy()
        table.insert(len(labels), "tensors", 1)
        return table.astype({"layer": "Int64"})
    keys = {"place": ["layer", "module"], "model": np.zeros(len(found.tensors))}.get(by, by)
    rows = []
    for _, group in found.tensors.groupby(keys, sort=False):
        shared = {label: group[label].iloc[0] if len(set(group[label])) == 1 else None for label in labels}
        cells = group[["layer", "module", "kind"]].drop_duplicates().itertuples(index=False, name=None)
        merged = reduce(Tally.__add__, (found.cells[cell] for cell in cells))
        # Of weights of several sizes and dtypes the largest step.
        rows.append({**shared, "tensors": len(group), **merged.row(), "storage_step": group["storage_step"].max()})
    return pd.DataFrame(rows).astype({"layer": "Int64"})


def _tallies(delta: Delta | Tallies, **how: Any) -> Tallies:
    return delta if isinstance(delta, Tallies) else tally_delta(delta, **how)


def magnitude_histogram(delta: Delta | Tallies, *, bins_per_decade: int = 10) -> pd.DataFrame:
    """How |δ| is distributed over a logarithmic axis, for the whole delta.

    Parameters
    ----------
    delta : as from `load_delta`, or what `tally_delta` found in it.
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
    checked_number("bins_per_decade", bins_per_decade, 1, whole=True)
    whole = reduce(Tally.__add__, _tallies(delta).cells.values())
    magnitudes = np.abs(bucket_middles()[whole.buckets])
    filled = magnitudes > 0
    logs, weights = np.log10(magnitudes[filled]), whole.counts[filled]
    first, last = (np.floor(logs.min()), np.ceil(logs.max())) if len(logs) else (-1.0, 0.0)
    edges = np.linspace(first, last, round((last - first) * bins_per_decade) + 1)
    share = np.histogram(logs, bins=edges, weights=weights)[0] / max(whole.finite, 1)
    return pd.DataFrame(
        {"low": 10 ** edges[:-1], "high": 10 ** edges[1:], "share": share, "density": share * bins_per_decade}
    )
