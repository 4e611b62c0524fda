"""Numbers that might foretell how much of a delta can be dropped: of the noise in its layers, and of its values."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd

from delta_analysis.deltas import Delta, value_ranges
from delta_analysis.prediction.layers import delta_noise, within

SUMMARIES = ("largest", "rss", "sum", "mean", "median")
"""How the noise shares of layers are brought into one number; rss is the root of the sum of squares."""
NOISE = tuple(f"noise_{summary}" for summary in SUMMARIES)
"""Of N/Y, the noise base over the output energy of each layer, which needs inputs."""
NORMS = tuple(f"norms_{summary}" for summary in SUMMARIES)
"""Of the same without inputs, ‖D‖²/‖W‖²."""
VALUES = ("abs_p50", "abs_p99", "abs_max", "rms", "relative_rms", "share_above_0.002")
"""Of the values alone: the papers' rule of thumb speaks of median, maximum and the share below 0.002."""
LEAST_SHARE = 1e-7
"""A share of zero has no logarithm; this stands for it."""


def noise_predictors(noise: pd.DataFrame, tensors: Collection[str], *, prefix: str = "noise") -> dict[str, float]:
    """Summaries of the noise shares of some tensors, from a table of `layer_noise` with one pruner.

    A tensor with two uses counts twice; missing values if none of the tensors has a share.

    Examples
    --------
    >>> noise = pd.DataFrame({"tensor": ["a", "b", "c"], "noise_share": [3.0, 4.0, 9.0]})
    >>> noise_predictors(noise, ["a", "b"])["noise_rss"]
    5.0
    """
    shares = noise.loc[noise["tensor"].isin(tensors), "noise_share"].dropna().to_numpy()
    if not len(shares):
        return {f"{prefix}_{summary}": np.nan for summary in SUMMARIES}
    found = (shares.max(), np.sqrt((shares**2).sum()), shares.sum(), shares.mean(), np.median(shares))
    return {f"{prefix}_{summary}": float(value) for summary, value in zip(SUMMARIES, found, strict=True)}


def value_predictors(part: Delta) -> dict[str, float]:
    """The predictors of `VALUES`, as in `value_ranges`; a share of 0 above 0.002 is given as `LEAST_SHARE`.

    Examples
    --------
    >>> from delta_analysis import load_delta
    >>> found = value_predictors(load_delta(base="zoo:tiny/base", finetuned="zoo:tiny/math"))
    >>> found["abs_p50"] < found["rms"] < found["abs_max"]
    True
    """
    row = value_ranges(part, by="model").iloc[0]
    above = max(1.0 - row["share_below_0.002"], LEAST_SHARE)
    return {name: float(row[name]) for name in VALUES[:-1]} | {VALUES[-1]: above}


def delta_predictors(
    delta: Delta, scopes: Sequence[str] = ("all",), inputs: Sequence[str] | None = None
) -> pd.DataFrame:
    """All predictors of a delta in each scope.

    Parameters
    ----------
    delta : as from `load_delta`.
    scopes : as `in_scope` takes them.
    inputs : texts, as in `layer_noise`; without them the columns of `NOISE` are missing values.

    Returns
    -------
    DataFrame, one row a scope: `scope`; `NOISE`, `NORMS` and `VALUES`. A scope none of whose tensors
    is met by inputs has missing values in `NOISE`.

    Raises
    ------
    ValueError
        A scope that selects nothing; no text; a NaN or infinite entry of the delta.

    Warns
    -----
    UserWarning
        As `tally_delta`.

    Examples
    --------
    >>> from delta_analysis import load_delta
    >>> delta = load_delta(base="zoo:tiny/base", finetuned="zoo:tiny/math")
    >>> delta_predictors(delta, ["all", "mlp"], ["2 plus 3 is 5"])["noise_sum"].is_monotonic_decreasing
    True
    """
    norms = delta_noise(delta)
    noise = norms.iloc[:0] if inputs is None else delta_noise(delta, inputs)
    rows = []
    for scope in scopes:
        part = within(delta, scope)
        found = noise_predictors(noise, part), noise_predictors(norms, part, prefix="norms"), value_predictors(part)
        rows.append({"scope": scope, **found[0], **found[1], **found[2]})
    return pd.DataFrame(rows)
