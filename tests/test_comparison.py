"""Leads between methods, on outcomes made up so that the answer is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from delta_analysis.comparison import best_methods, lead


def rows(method: str, drop_rate: float, outcomes: np.ndarray, metric: str = "accuracy") -> list[dict[str, object]]:
    return [
        {
            "pair": "a → b",
            "method": method,
            "drop_rate": drop_rate,
            "seed": i,
            "metric": metric,
            "outcomes": row.tolist(),
        }
        for i, row in enumerate(outcomes)
    ]


def answers(share: float, seeds: int = 3, items: int = 200) -> np.ndarray:
    return np.tile(np.arange(items) < share * items, (seeds, 1)).astype(float)


@pytest.fixture
def cells() -> pd.DataFrame:
    return pd.DataFrame(
        [
            *rows("DARE", 0.0, answers(0.8, seeds=1)),
            *rows("DARE", 0.5, answers(0.6)),
            *rows("MP", 0.5, answers(0.4, seeds=1)),
            *rows("drop only", 0.5, answers(0.2)),
            *rows("DARE", 0.9, answers(0.2)),
            *rows("MP", 0.9, answers(0.2, seeds=1)),
            *rows("DARE", 1.0, answers(0.0, seeds=1)),
        ]
    )


def test_lead_is_the_difference_of_kept_shares(cells: pd.DataFrame) -> None:
    at = cells[cells["drop_rate"].isin([0.0, 0.5])]
    ahead = lead(at, "DARE", "MP")
    assert ahead.value == pytest.approx((0.6 - 0.4) / 0.8)
    assert 0 < ahead.low < ahead.value < ahead.high
    behind = lead(at, "MP", "DARE")
    np.testing.assert_allclose(behind, (-ahead.value, -ahead.high, -ahead.low))


def test_methods_are_compared_on_the_same_items(cells: pd.DataFrame) -> None:
    # Items that both answer cancel: only the 40 that differ of 200 make the lead uncertain.
    at = cells[cells["drop_rate"].isin([0.0, 0.5])]
    ahead = lead(at, "DARE", "MP")
    sigma = np.sqrt(0.2 * 0.8 / 200) / 0.8
    assert ahead.high - ahead.low == pytest.approx(2 * 1.96 * sigma, rel=0.25)


def test_best_method_at_each_inner_drop_rate(cells: pd.DataFrame) -> None:
    best = best_methods(cells)
    assert best["drop_rate"].tolist() == [0.5, 0.9]
    assert best.loc[0, ["method", "second", "clear"]].tolist() == ["DARE", "MP", True]
    assert best.loc[0, "kept"] == pytest.approx(0.75)
    assert best.loc[0, "lead"] == pytest.approx(0.25)
    assert not best.loc[1, "clear"]
    assert best.loc[1, "lead"] == 0


def test_smaller_losses_win_where_the_metric_is_perplexity() -> None:
    losses = np.linspace(1, 2, 100)[None]
    cells = pd.DataFrame(
        [
            *rows("DARE", 0.0, losses, "perplexity"),
            *rows("DARE", 0.5, np.add(losses, [[0.14], [0.15], [0.16]]), "perplexity"),
            *rows("MP", 0.5, losses + 0.5, "perplexity"),
        ]
    )
    best = best_methods(cells)
    assert best.loc[0, "method"] == "DARE"
    assert best.loc[0, "kept"] == pytest.approx(np.exp(-0.15))
    assert best.loc[0, "lead"] == pytest.approx(np.exp(-0.15) - np.exp(-0.5))
    assert best.loc[0, "clear"]


def test_few_masks_that_differ_leave_a_lead_open() -> None:
    # Leads of .08, .245 and .085 over masks: mean .137, Student's half width .233.
    first = np.stack([answers(share, seeds=1, items=1000)[0] for share in (0.58, 0.745, 0.585)])
    cells = pd.DataFrame(
        [
            *rows("DARE", 0.0, np.ones((1, 1000))),
            *rows("MAGPRUNE", 0.9, first),
            *rows("DARE", 0.9, answers(0.5, seeds=3, items=1000)),
        ]
    )
    ahead = lead(cells, "MAGPRUNE", "DARE")
    assert ahead.value == pytest.approx(0.137, abs=1e-3)
    assert ahead.high - ahead.value == pytest.approx(0.234, abs=4e-3)
    assert not best_methods(cells)["clear"].any()
