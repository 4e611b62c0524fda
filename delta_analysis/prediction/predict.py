"""A line through tolerated drop rates against the noise in the layers, which report 05 judges as a predictor.

`foresight` foretells without it: a line fitted on this family does not travel to other models.

The line is fitted on the embedded family, whose tolerated drop rates were measured (`reports.calibration`).
Dropping makes noise of energy `p/(1-p) · N` in a layer; if a model breaks when this passes some share τ of
the output Y, then `log(p/(1-p)) = log τ - log(N/Y)`: a line of slope -1 in the logarithm of the predictor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from delta_analysis.checkpoints import find_root
from delta_analysis.deltas import Delta
from delta_analysis.sweeps import CONFIDENCE, HIGHEST, LOWEST, inverse_logit, logit

WITH_INPUTS, WITHOUT_INPUTS = "noise_rss", "norms_rss"
"""Root of the sum of squares over layers of N/Y, and of ‖D‖²/‖W‖²: of all tried in report 05, those that err least."""
LOGITS = logit(LOWEST), logit(HIGHEST)
TENFOLD = 10.0


class Line(NamedTuple):
    """`log(p/(1-p)) = intercept + slope · log(predictor)`."""

    intercept: float
    slope: float

    def at(self, values: pd.Series | np.ndarray | float) -> np.ndarray:
        """The foretold log(p/(1-p)), within the range in which tolerances are sought."""
        return np.clip(self.intercept + self.slope * np.log(values), *LOGITS)


def calibration_file() -> Path:
    return find_root() / "data" / "reference" / "tolerances.csv"


@lru_cache(maxsize=1)
def _calibration() -> pd.DataFrame:
    return pd.read_csv(calibration_file())


def calibration_table() -> pd.DataFrame:
    """The measured tolerances of the embedded family with their predictors, one row a pair and scope.

    Columns: `base, finetuned, kind, task, numel, base_hash, finetuned_hash, scope`; `untouched`, the
    accuracy; `tolerated, low, high`, for DARE, and `reading`, whether `tolerated` is `measured` or a bound;
    the predictors; `group`, the size, `trail` or `encoder`. The committed table was searched in [0.001, 0.999]
    for 95% of the untouched accuracy, not of what lies above the floor.
    """
    return _calibration().copy()


def fit_line(table: pd.DataFrame, predictor: str) -> Line:
    """Least squares over the rows whose tolerance is not at an end of the search, where it is only a bound.

    Rows whose predictor is 0 or missing are left out too.
    """
    usable = table[table[predictor].gt(0)]
    return _fitted(*_points(usable, predictor))


def _points(table: pd.DataFrame, predictor: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logarithms of a predictor, log(p/(1-p)) of the tolerances, and which of these are no bounds."""
    tolerated = table["tolerated"].to_numpy()
    inner = table["reading"].eq("measured").to_numpy()
    return np.log(table[predictor].to_numpy()), np.log(tolerated / (1 - tolerated)), inner


def _fitted(x: np.ndarray, y: np.ndarray, some: np.ndarray) -> Line:
    slope, intercept = np.polyfit(x[some], y[some], 1)
    return Line(float(intercept), float(slope))


def left_out(table: pd.DataFrame, predictor: str, *, by: Sequence[str] = ("base", "finetuned")) -> pd.Series:
    """The log(p/(1-p)) of each row foretold by the line through all rows of other pairs (by `by`).

    Missing where the predictor is 0 or missing.
    """
    usable = table[table[predictor].gt(0)]
    x, y, inner = _points(usable, predictor)
    groups = usable.groupby(list(by), sort=False).ngroup().to_numpy()
    foretold = np.full(len(usable), np.nan)
    for group in range(groups.max(initial=-1) + 1):
        own = groups == group
        foretold[own] = _fitted(x, y, inner & ~own).at(np.exp(x[own]))
    return pd.Series(foretold, usable.index).reindex(table.index)


@dataclass(frozen=True)
class ForetoldDropRate:
    """A foretold tolerated drop rate.

    Attributes
    ----------
    tolerated, low, high : the drop rate up to which DARE is expected to keep 95% of the ability, with
        its 95% interval: the errors that the same predictor made on fine-tunes it was not fitted on.
    predictor, value : what it was foretold from.
    outside : in which respects the delta lies outside of what the predictor was fitted on, one sentence
        each; the interval does not cover what they may do.
    """

    tolerated: float
    low: float
    high: float
    predictor: str
    value: float
    outside: tuple[str, ...]


def foretell(delta: Delta, predictor: str, value: float, table: pd.DataFrame) -> ForetoldDropRate:
    """What a predictor that has a value foretells of a delta, by the line through a table of `calibration_table`."""
    usable = table[table[predictor].gt(0)]
    errors = usable["tolerated"].map(logit) - left_out(usable, predictor, by=["finetuned"])
    foretold = float(fit_line(usable, predictor).at(value))
    tail = (1 - CONFIDENCE) / 2
    ends = np.clip(foretold + np.quantile(errors, [tail, 1 - tail]), *LOGITS)
    low, high = min(foretold, ends[0]), max(foretold, ends[1])
    outside = tuple(_outside(delta, usable, predictor, value))
    if not LOGITS[0] < foretold < LOGITS[1]:
        outside += ("the rate that is foretold lies at an end of the range in which tolerances were sought: a bound",)
    return ForetoldDropRate(inverse_logit(foretold), inverse_logit(low), inverse_logit(high), predictor, value, outside)


def _outside(delta: Delta, table: pd.DataFrame, predictor: str, value: float) -> list[str]:
    """In which respects a delta lies outside of the table."""
    found = []
    low, high = table[predictor].min(), table[predictor].max()
    # The table is rounded.
    if not 0.999 * low <= value <= 1.001 * high:
        found.append(f"its {predictor} is {value:.3g}, and {low:.3g} to {high:.3g} where the line was fitted")
    numel = sum(math.prod(match.shape) for match in delta.compared.values())
    low, high = table["numel"].min(), table["numel"].max()
    if not low / TENFOLD <= numel <= high * TENFOLD:
        found.append(
            f"it has {numel / 1e6:.3g} million entries, and the models that were measured {low / 1e6:.2g} to "
            f"{high / 1e6:.2g} million"
        )
    return found
