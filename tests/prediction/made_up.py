"""Tables of tolerances along a known line, and what they foretell fitted row by row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import expit
from scipy.special import logit as scipy_logit

from delta_analysis.prediction.predict import LOGITS
from delta_analysis.sweeps.tolerance import HIGHEST, LOWEST

SCOPES = ("all", "attention", "mlp")
INTERCEPT, SLOPE = -1.5, -0.8


def made_up(
    spread: float = 0.0, *, pair_spread: float = 0.0, pairs: int = 14, seed: int = 0, predictors: Sequence[str] = ()
) -> pd.DataFrame:
    """Pairs in three scopes whose tolerance follows `good` along the line, off by a normal error of `spread`.

    Two pairs each share a fine-tune. `fair` is `good` with an error, `bad` and all other predictors
    have nothing to do with it. Each pair also has an error common to its scopes.
    """
    rng = np.random.default_rng(seed)
    pair = np.repeat(np.arange(pairs), len(SCOPES))
    x = rng.uniform(-5, 0, len(pair)) + np.repeat(rng.uniform(-2, 0, pairs), len(SCOPES))
    y = (
        INTERCEPT
        + SLOPE * x
        + spread * rng.normal(size=len(x))
        + np.repeat(pair_spread * rng.normal(size=pairs), len(SCOPES))
    )
    others = {name: np.exp(rng.uniform(-5, 0, len(x))) for name in ("bad", *predictors)}
    return pd.DataFrame(
        {
            "base": [f"base {k}" for k in pair],
            "finetuned": [f"tuned {k // 2}" for k in pair],
            "scope": SCOPES * pairs,
            "numel": 220_000,
            "tolerated": np.clip(expit(y), LOWEST, HIGHEST),
            "reading": "measured",
            "good": np.exp(x),
            "fair": np.exp(x + rng.normal(size=len(x))),
            **others,
        }
    )


def measured(table: pd.DataFrame) -> np.ndarray:
    return scipy_logit(table["tolerated"].to_numpy())


def foretold_by_others(table: pd.DataFrame, predictor: str, by: Sequence[str] = ("base", "finetuned")) -> np.ndarray:
    """Row by row, with numpy.polyfit on the inner rows of other groups."""
    found = []
    for _, row in table.iterrows():
        others = table[(table[list(by)] != row[list(by)]).any(axis=1)]
        inner = others[others["reading"] == "measured"]
        line = np.polyfit(np.log(inner[predictor]), measured(inner), 1)
        found.append(np.clip(np.polyval(line, np.log(row[predictor])), *LOGITS))
    return np.array(found)


def censored(table: pd.DataFrame) -> pd.DataFrame:
    """The same with two bounds at each end of the search."""
    ordered = table["tolerated"].sort_values().index
    table.loc[ordered[:2], ["tolerated", "reading"]] = [LOWEST, "at most"]
    table.loc[ordered[-2:], ["tolerated", "reading"]] = [HIGHEST, "at least"]
    return table
