"""Effects of the claims on merges, from small results whose answers are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from delta_analysis.reports.claims.effects import EFFECTS
from delta_analysis.reports.claims.measures import NotMeasuredError
from delta_analysis.studies.rescaling import validation_and_test
from delta_analysis.sweeps.intervals import Interval

ITEMS, SEEDS = 40, 3
TASKS = ("one", "two")


def cells(share: float, *, seeds: int = 1, **labels: Any) -> list[dict[str, Any]]:
    """Cells under some masks, each with the same questions answered rightly."""
    right = (np.arange(ITEMS) < round(share * ITEMS)).astype(float)
    return [{"metric": "accuracy", "seed": seed, "outcomes": right, **labels} for seed in range(seeds)]


def merged(way: str, p: float, share: float, promised: float, scaling: float = 1.0) -> list[dict[str, Any]]:
    """A way at one drop rate, equally good at both tasks; Fisher information is drawn even where nothing is dropped."""
    labels: dict[str, Any] = {"table": "merge", "role": "at each drop rate", "way": way, "promised": promised}
    setting: dict[str, Any] = {"by": f"{way}({scaling})", "prune": f"drop({p})", "weights": "()", "drop_rate": p}
    return [
        row
        for task in TASKS
        for row in cells(share, seeds=SEEDS if p or way == "Fisher" else 1, evaluation=task, **labels, **setting)
    ]


def results() -> pd.DataFrame:
    rows = merged("task arithmetic", 0.0, 0.8, 0.8) + merged("task arithmetic", 0.5, 0.7, 0.9)
    # What promised less does not count, however good it turns out to be.
    rows += merged("task arithmetic", 0.9, 1.0, 0.1)
    for way in ("average", "Fisher", "RegMean"):
        rows += merged(way, 0.0, 0.5, 0.5) + merged(way, 0.5, 0.5, 0.5)
    rows += merged("TIES", 0.0, 0.5, 0.5) + merged("TIES", 0.5, 0.6, 0.5)
    rows += merged("TIES, trimmed", 0.0, 0.9, 0.9) + merged("TIES, trimmed", 0.5, 0.4, 0.5)
    rows += merged("DELLA", 0.5, 0.9, 0.9)
    for own, other in (TASKS, TASKS[::-1]):
        rows += cells(0.8, table="single", way=f"tuned for {own}", own_task=own, evaluation=own)
        rows += cells(
            0.3 if own == "one" else 0.2, table="single", way=f"tuned for {own}", own_task=own, evaluation=other
        )
    for steps, alone, merge, plain in ((10, 0.0, 0.1, 0.1), (100, 0.2, 0.6, 0.5), (1000, 0.3, 0.7, 0.5)):
        rows += trail(steps, **{"before merging": alone, "task arithmetic": merge, "TIES, sum": plain})
        rows += trail(steps, **dict.fromkeys(("slack 1", "slack 3", "slack 10", "slack ∞"), 0.1))
    rows += trail(10, **{"fine-tuned afterwards": 0.05})
    # After the decay of the learning rate; one slack is better than the others and worse than none.
    rows += trail(10_000, **{"before merging": 0.4, "task arithmetic": 0.9, "TIES, sum": 0.6, "slack 3": 0.5})
    rows += trail(10_000, **dict.fromkeys(("slack 1", "slack 10", "slack ∞"), 0.2))
    rows += trail(10_000, "another", **{"before merging": 0.0, "task arithmetic": 1.0, "TIES, sum": 0.0})
    return pd.DataFrame(rows)


def trail(steps: int, fine_tune: str = "first", **shares: float) -> list[dict[str, Any]]:
    labels: dict[str, Any] = {"table": "trail", "steps": steps, "fine_tune": fine_tune}
    found = []
    for way, share in shares.items():
        found += cells(share, way=way, evaluation="new", **labels)
        # On the fine-tune's own task, which these claims are not about.
        found += cells(0.5, way=way, evaluation="one", **labels)
    return found


@pytest.mark.parametrize(
    ("claim", "value"),
    [
        # The DARE merge answers 0.7 of both tasks; sources 0.8 of their own and 0.3 or 0.2 of the other.
        ("merge-gains", 0.4),
        ("merge-retains", 0.7 / 0.8),
        ("merge-surpasses", -0.1),
        # Of five methods one loses 0.1 and one gains it.
        ("dare-helps-merging", 0.0),
        ("dare-helps-ties-most", 0.1),
        ("della-over-dare", 0.2),
        ("della-over-ties", 0.5),
        ("della-over-unpruned", 0.1),
        ("merge-brings-tasks", 0.5),
        ("merge-over-ct-then-sft", 0.05),
        # 0.1 → 0.6 → 0.7 at 10, 100 and 1000 steps.
        ("merge-saturates", -0.4),
    ],
)
def test_effects_are_differences_of_the_shares(claim: str, value: float) -> None:
    effect = EFFECTS[claim](results())
    assert isinstance(effect, Interval)
    assert effect.low <= effect.value <= effect.high
    assert effect.value == pytest.approx(value, abs=1e-9)


def test_slack_is_chosen_on_one_half_and_judged_on_the_other() -> None:
    _, test = validation_and_test(ITEMS)
    # At the end slack 3 is the best and answers the first half of the questions, without slack it is the first 0.6.
    expected = np.mean(test < 0.5 * ITEMS) - np.mean(test < 0.6 * ITEMS)
    assert EFFECTS["slack-helps"](results()).value == pytest.approx(expected)


def test_intervals_shrink_with_the_questions_that_differ() -> None:
    wide = EFFECTS["merge-brings-tasks"](results())
    same = results()
    at_end = (same["table"] == "trail") & (same["way"] == "task arithmetic") & (same["steps"] == 10_000)
    alone = same[(same["table"] == "trail") & (same["way"] == "before merging") & (same["steps"] == 10_000)]
    first = at_end & (same["fine_tune"] == "first") & (same["evaluation"] == "new")
    own = alone[(alone["fine_tune"] == "first") & (alone["evaluation"] == "new")]["outcomes"].iloc[0]
    same.loc[first, "outcomes"] = pd.Series([own], index=same.index[first])
    assert tuple(EFFECTS["merge-brings-tasks"](same)) == (0.0, 0.0, 0.0)
    assert wide.low < wide.value < wide.high


@pytest.mark.parametrize(
    ("claim", "table", "way"),
    [
        ("della-over-ties", "merge", "DELLA"),
        ("merge-brings-tasks", "trail", None),
        ("merge-over-ct-then-sft", "trail", "fine-tuned afterwards"),
        ("slack-helps", "trail", "slack 1"),
    ],
)
def test_what_was_not_measured_is_said(claim: str, table: str, way: str | None) -> None:
    rows = results()
    without = rows[(rows["table"] != table) | ((rows["way"] != way) if way else False)]
    with pytest.raises(NotMeasuredError, match=way or "no continually pre-trained"):
        EFFECTS[claim](without)


def test_saturation_takes_three_stops_before_the_last() -> None:
    rows = results()
    with pytest.raises(NotMeasuredError, match="fewer than four"):
        EFFECTS["merge-saturates"](rows[(rows["table"] != "trail") | (rows["steps"] != 100)])
