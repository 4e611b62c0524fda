"""A table of two pairs, as `drop_curve` makes it."""

from __future__ import annotations

import pandas as pd
import pytest

RATES = (0.0, 0.1, 0.5, 0.9, 1.0)


@pytest.fixture
def curve() -> pd.DataFrame:
    rows = [
        {"pair": pair, "method": "DARE", "metric": "accuracy", "drop_rate": p, "value": v, "low": v - 0.05, "high": v}
        for pair, values in {"a → b": (1, 0.9, 0.8, 0.5, 0.1), "c → d": (1, 0.7, 0.2, 0.0, 0.0)}.items()
        for p, v in zip(RATES, values, strict=True)
    ]
    return pd.DataFrame(rows)
