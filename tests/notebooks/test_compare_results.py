"""What the comparison of tables lets pass, and what it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.compare_results import differences


def table(**change: Any) -> pd.DataFrame:
    """A table of two rows."""
    outcomes = [np.array([1.0, 0.0]), None]
    return pd.DataFrame(
        {"pair": ["a", None], "value": [0.5, np.nan], "outcomes": outcomes, "seconds": [1.0, 2.0], **change}
    )


@pytest.mark.parametrize(
    "change",
    [{}, {"value": [0.5 * (1 + 1e-4), np.nan]}, {"seconds": [3, 4]}, {"outcomes": [np.array([0.0, 1.0]), None]}],
)
def test_rounding_time_and_order_of_items_pass(change: dict[str, Any]) -> None:
    assert differences(table(**change), table()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"pair": ["b", None]},
        {"pair": ["a", "a"]},
        {"value": [0.51, np.nan]},
        {"value": [0.5, 0.5]},
        {"outcomes": [np.array([1.0, 1.0]), None]},
        {"outcomes": [np.array([1.0, 0.0, 0.5]), None]},
        {"outcomes": [np.array([1.0, 0.0]), np.array([1.0])]},
        {"more": [1, 2]},
    ],
)
def test_other_values_do_not(change: dict[str, Any]) -> None:
    assert differences(table(**change), table())
