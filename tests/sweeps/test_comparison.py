"""Leads between methods, on outcomes made up so that the answer is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy import stats

from delta_analysis.sweeps.comparison import best_methods, lead, paired_difference


def rows(method: str, drop_rate: float, outcomes: np.ndarray, kind: str = "score") -> list[dict[str, object]]:
    return [
        {
            "pair": "a → b",
            "method": method,
            "drop_rate": drop_rate,
            "seed": i,
            "metric": "accuracy",
            "kind": kind,
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


@pytest.mark.parametrize("compare", [lambda cells: lead(cells, "DARE", "MP"), best_methods], ids=["lead", "best"])
def test_methods_are_compared_by_one_metric(cells: pd.DataFrame, compare: Callable[[pd.DataFrame], object]) -> None:
    at = cells[cells["drop_rate"].isin([0.0, 0.5])]
    with pytest.raises(ValueError, match="compared by one metric; these cells have accuracy, kl, give those of one"):
        compare(pd.concat([at, at.assign(metric="kl")], ignore_index=True))


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


def test_a_lead_in_perplexity_counts_blocks_of_tokens() -> None:
    """The second method loses a whole block of 64 tokens or none: 1.96 standard errors of block means."""
    rng = np.random.default_rng(0)
    worse = np.repeat(rng.normal(0.3, 0.1, size=60), 64)
    untouched = rng.gamma(2, size=len(worse))
    cells = pd.DataFrame(
        [
            *rows("DARE", 0.0, untouched[None], "perplexity"),
            *rows("DARE", 0.5, untouched[None], "perplexity"),
            *rows("MP", 0.5, (untouched + worse)[None], "perplexity"),
        ]
    )
    ahead = lead(cells, "DARE", "MP")
    kept = np.exp(-worse.mean())
    assert ahead.value == pytest.approx(1 - kept)
    assert ahead.high - ahead.value == pytest.approx(1.96 * kept * worse.std() / np.sqrt(60), rel=0.1)


def test_each_pair_is_judged_by_itself(cells: pd.DataFrame) -> None:
    turned = cells.replace({"DARE": "MP", "MP": "DARE"}).assign(pair="c → d")
    both = best_methods(pd.concat([cells, turned], ignore_index=True))
    assert both["pair"].tolist() == ["a → b"] * 2 + ["c → d"] * 2
    pd.testing.assert_frame_equal(both.head(2), best_methods(cells))
    assert both.loc[2, ["method", "second", "clear"]].tolist() == ["MP", "DARE", True]


@settings(deadline=None, max_examples=30)
@given(
    first=npst.arrays(np.int8, (3, 12), elements=st.integers(0, 1)),
    second=npst.arrays(np.int8, (3, 12), elements=st.integers(0, 1)),
)
def test_a_lead_turned_round_changes_its_sign(first: np.ndarray, second: np.ndarray) -> None:
    cells = pd.DataFrame([*rows("none", 0.0, np.ones((1, 12))), *rows("A", 0.5, first), *rows("B", 0.5, second)])
    ahead, behind = lead(cells, "A", "B"), lead(cells, "B", "A")
    assert ahead.value == pytest.approx(first.mean() - second.mean())
    assert ahead.low <= ahead.value <= ahead.high
    assert behind == pytest.approx((-ahead.value, -ahead.high, -ahead.low))
    assert lead(cells, "A", "A") == (0, 0, 0)


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


@settings(deadline=None, max_examples=50)
@given(
    one=npst.arrays(float, (3, 8), elements=st.integers(0, 1)),
    other=npst.arrays(float, (3, 8), elements=st.integers(0, 1)),
)
def test_a_difference_turned_round_changes_its_sign(one: np.ndarray, other: np.ndarray) -> None:
    found, turned = paired_difference(one, other), paired_difference(other, one)
    assert found.value == pytest.approx(one.mean() - other.mean())
    assert found.low <= found.value <= found.high
    assert turned == pytest.approx((-found.value, -found.high, -found.low))
    assert paired_difference(one, one) == (0, 0, 0)
    # A shift of both alike cancels.
    assert paired_difference(one + 5, other + 5) == pytest.approx(found)
    # Without masks it is the paired t-test's error with 1.96.
    paired = paired_difference(one[:1], other[:1])
    half = 1.96 * stats.sem(one[0] - other[0])
    assert (paired.low, paired.high) == pytest.approx((paired.value - half, paired.value + half), abs=1e-4)


def test_a_difference_under_masks_has_students_error_too() -> None:
    """Differences of .1, .2 and .6 on items that all differ alike: mean .3, over masks Student's t alone."""
    one, other = np.repeat([[0.1], [0.2], [0.6]], 50, axis=1), np.zeros((1, 50))
    found = paired_difference(one, other)
    low, high = stats.t.interval(0.95, 2, loc=0.3, scale=stats.sem([0.1, 0.2, 0.6]))
    assert found == pytest.approx((0.3, low, high))
    # A row that no mask changes stands for as many as the other has.
    assert paired_difference(one, np.zeros((3, 50))) == found
    assert paired_difference(other, one) == pytest.approx((-0.3, -high, -low))
    # Masks on which both change alike leave no error.
    assert paired_difference(one + 1, one) == pytest.approx((1, 1, 1))


def test_errors_over_items_and_over_masks_add_in_squares() -> None:
    items, masks = np.tile([0.0, 1.0], 50), np.array([[0.1], [-0.1], [0.3], [0.1]])
    both = paired_difference(items + masks, np.zeros((1, 100)))
    by_items = paired_difference(items[None], np.zeros((1, 100)))
    by_masks = paired_difference(np.repeat(masks, 100, axis=1), np.zeros((1, 100)))
    halves = [each.high - each.value for each in (by_items, by_masks)]
    assert both.high - both.value == pytest.approx(np.hypot(halves[0], halves[1]))
    assert min(halves) > 0


def test_intervals_of_differences_cover_the_truth() -> None:
    """Of 400 differences that are .2 in truth, over masks and items, about 95% have it inside."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        shared = rng.normal(size=60)
        drawn = 0.2 + rng.normal(scale=0.1, size=(3, 1)) + rng.normal(scale=0.5, size=60)
        found = paired_difference(shared + drawn, shared[None])
        inside += found.low <= 0.2 <= found.high
    assert 0.93 < inside / 400 <= 1


def test_several_looks_share_the_five_percent() -> None:
    one, other = np.random.default_rng(0).random((2, 3, 40))
    for only in (slice(1), slice(3)):
        halves = [
            found.high - found.value for found in (paired_difference(one[only], other[only], looks=n) for n in (1, 4))
        ]
        assert halves[1] > halves[0]
    # Over items alone, of which the normal quantile at 1 - .025 / 4 is known.
    looked = paired_difference(one[:1], other[:1], looks=4)
    assert looked.high - looked.value == pytest.approx(2.4977 * stats.sem(one[0] - other[0]), rel=1e-4)
    by_mask = paired_difference(np.repeat([[0.0], [1.0], [5.0]], 9, axis=1), np.zeros((1, 9)), looks=2)
    assert (by_mask.low, by_mask.high) == pytest.approx(stats.t.interval(0.975, 2, loc=2, scale=stats.sem([0, 1, 5])))
