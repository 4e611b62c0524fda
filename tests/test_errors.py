"""Checks of arguments."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from delta_analysis._errors import checked_number


@pytest.mark.parametrize(
    ("value", "rules", "found"),
    [
        (1, {"low": 0, "high": 1}, 1.0),
        (np.float32(0.5), {"low": 0.5, "high": 1, "high_open": True}, 0.5),
        (-3, {}, -3.0),
        (math.inf, {"low": 0, "high": math.inf}, math.inf),
        (np.int64(2), {"low": 1, "whole": True}, 2),
    ],
)
def test_a_number_within_its_bounds_comes_back_plain(value: object, rules: dict[str, Any], found: float) -> None:
    given = checked_number("x", value, **rules)
    assert (given, type(given)) == (found, type(found))


@pytest.mark.parametrize(
    ("value", "rules", "said"),
    [
        (1.5, {"low": 0, "high": 1}, "a number in [0, 1]; not 1.5"),
        (1, {"low": 0, "high": 1, "high_open": True}, "a number in [0, 1); not 1"),
        (0.0, {"low": 0, "high": 1, "low_open": True}, "a number in (0, 1]; not 0.0"),
        (math.nan, {"low": 0, "high": math.inf}, "a number of at least 0; not nan"),
        (math.inf, {"low": 0}, "a finite number of at least 0; not inf"),
        (0, {"low": 0, "low_open": True}, "a finite number above 0; not 0"),
        (-math.inf, {}, "a finite number; not -inf"),
        (True, {"low": 0, "high": 1}, "a number in [0, 1]; not True"),
        ("1", {}, "a finite number; not '1'"),
        (0, {"low": 1, "whole": True}, "a whole number of at least 1; not 0"),
        (2.0, {"low": 1, "whole": True}, "a whole number of at least 1; not 2.0"),
    ],
)
def test_what_is_none_is_refused_by_name(value: object, rules: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^x must be {re.escape(said)}$"):
        checked_number("x", value, **rules)
