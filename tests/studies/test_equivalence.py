"""Damage as a shift of DARE's drop rate, on curves of known shape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from scipy.special import logit as scipy_logit

from delta_analysis.studies.causes import between, equivalent_shift, matched_rate, rate_keeping
from delta_analysis.sweeps.intervals import Interval

RATES = (0.1, 0.3, 0.5, 0.7, 0.9)
N = 400


def cells(
    outcomes: Mapping[float, np.ndarray], *, pair: str = "a → b", method: str = "DARE", kind: str = "score"
) -> pd.DataFrame:
    """Drop rate -> outcomes (seeds, items), as rows of a sweep; seeds in no order."""
    rows = [
        {"pair": pair, "method": method, "kind": kind, "drop_rate": rate, "seed": seed, "outcomes": row.tolist()}
        for rate, matrix in outcomes.items()
        for seed, row in reversed(list(enumerate(matrix)))
    ]
    return pd.DataFrame(rows)


def right(share: float, *, items: int = N) -> np.ndarray:
    """The first of the items are right."""
    return (np.arange(items) < round(share * items)).astype(float)


def curve(shares: Sequence[float], *, seeds: int = 3) -> dict[float, np.ndarray]:
    """Outcomes at drop rate 0, all right, and of the given shares at `RATES`."""
    return {0.0: np.ones((1, N))} | {
        p: np.tile(right(share), (seeds, 1)) for p, share in zip(RATES, shares, strict=True)
    }


# Linear on log(p/(1-p)), so that looking up is exact between the rates too.
SLOPE = 0.15
SHARES = [0.5 - SLOPE * scipy_logit(p) for p in RATES]


@pytest.mark.parametrize("rate", RATES)
def test_dare_against_itself_is_no_shift(rate: float) -> None:
    reference = curve(SHARES)
    found = equivalent_shift(cells(reference), cells({rate: reference[rate]}), rate)
    assert found == pytest.approx((0, 0, 0), abs=1e-12)


@pytest.mark.parametrize("drop_rate", [0.2, 0.5, 0.6])
@pytest.mark.parametrize("like", RATES)
def test_an_edit_that_does_as_much_as_another_rate(like: float, drop_rate: float) -> None:
    reference = curve(SHARES)
    edited = cells({drop_rate: reference[like]}, method="edit")
    expected = scipy_logit(like) - scipy_logit(drop_rate)
    assert equivalent_shift(cells(reference), edited, drop_rate) == pytest.approx((expected,) * 3, abs=1e-12)


@pytest.mark.parametrize("share", [0.2, 0.325, 0.6, 0.75])
def test_between_the_rates_the_curve_is_linear_on_its_scale(share: float) -> None:
    edited = cells({0.5: right(share)[None]}, method="edit")
    value = equivalent_shift(cells(curve(SHARES)), edited, 0.5).value
    # To half an item of rounding in the curve.
    assert value == pytest.approx((0.5 - share) / SLOPE, abs=2 / N / SLOPE)


def test_beyond_the_ends_the_shift_is_infinite() -> None:
    reference = cells(curve([0.9, 0.8, 0.6, 0.4, 0.2]))
    for share, end in ((1.0, -math.inf), (0.0, math.inf)):
        edited = cells({0.5: right(share)[None]}, method="edit")
        assert equivalent_shift(reference, edited, 0.5) == (end, end, end)
    for share, rate in ((0.9, 0.1), (0.2, 0.9)):
        edited = cells({0.5: right(share)[None]}, method="edit")
        assert equivalent_shift(reference, edited, 0.5).value == pytest.approx(scipy_logit(rate))


def test_an_interval_may_reach_beyond_an_end_on_one_side() -> None:
    """An edit that is drawn anew as good as the first rate: with other items it is better as often as worse."""
    rng = np.random.default_rng(0)
    reference = curve([0.9, 0.8, 0.6, 0.4, 0.2]) | {0.1: (rng.random((3, N)) < 0.9).astype(float)}
    edited = (rng.random((3, N)) < reference[0.1].mean() - 0.01).astype(float)
    found = equivalent_shift(cells(reference), cells({0.1: edited}, method="edit"), 0.1)
    assert found.low == -math.inf
    assert 0 < found.high < scipy_logit(0.3) - scipy_logit(0.1)


def test_rates_at_the_ends_are_no_part_of_the_curve() -> None:
    reference = curve(SHARES)
    with_end = reference | {1.0: np.zeros((1, N))}
    edited = cells({0.5: right(0.0)[None]}, method="edit")
    assert equivalent_shift(cells(with_end), edited, 0.5) == equivalent_shift(cells(reference), edited, 0.5)


def test_where_a_curve_has_a_value_more_than_once_the_nearest_rate_counts() -> None:
    """Odds on log(p/(1-p)) between the rates, on every stretch of a curve that falls, rises and falls again."""
    shares = (0.9, 0.6, 0.8, 0.3, 0.1)
    reference, scale = cells(curve(shares)), scipy_logit(np.array(RATES))
    for share in (0.85, 0.75, 0.65, 0.45):
        edited = right(share)[None]
        crossings = [
            a + (u - share) / (u - v) * (b - a)
            for a, b, u, v in zip(scale, scale[1:], shares, shares[1:], strict=False)
            if min(u, v) <= share <= max(u, v)
        ]
        for rate in RATES:
            expected = min((place - scipy_logit(rate) for place in crossings), key=abs)
            found = equivalent_shift(reference, cells({rate: edited}, method="edit"), rate)
            assert found.value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("share", "drop_rate", "rate"),
    [(1.0, 0.1, 0.1), (1.0, 0.2, 0.2), (1.0, 0.6, 0.3), (0.0, 0.6, 0.7), (0.0, 0.8, 0.8), (0.0, 0.95, 0.9)],
)
def test_on_a_plateau_the_nearest_rate_counts(share: float, drop_rate: float, rate: float) -> None:
    reference = cells(curve([1.0, 1.0, 0.5, 0.0, 0.0]))
    edited = cells({drop_rate: right(share)[None]}, method="edit")
    expected = scipy_logit(rate) - scipy_logit(drop_rate)
    assert equivalent_shift(reference, edited, drop_rate).value == pytest.approx(expected, abs=1e-12)


def test_another_pair_is_compared_with_its_own_untouched_model() -> None:
    """A derived model that is right half as often, and loses half of that."""
    reference = curve(SHARES)
    own = {0.0: right(0.5)[None], 0.5: right(0.25)[None]}
    found = equivalent_shift(cells(reference), cells(own, pair="derived"), 0.5)
    assert found.value == pytest.approx(0, abs=1e-12)
    # By the untouched model of the reference a quarter would be left.
    without = equivalent_shift(cells(reference), cells({0.5: own[0.5]}, pair="derived"), 0.5)
    assert without.value == pytest.approx((0.5 - 0.25) / SLOPE, abs=2 / N / SLOPE)


def test_perplexity_keeps_the_probability_of_a_token() -> None:
    """Losses that grow by log 2 keep half; the curve of the means is all that counts for its value."""
    rng = np.random.default_rng(0)
    losses = rng.exponential(size=(1, N))
    reference = {0.0: losses} | {
        p: np.tile(losses - math.log(share), (2, 1)) for p, share in zip(RATES, SHARES, strict=True)
    }
    for share in (0.4, 0.5, 0.6):
        edited = cells({0.5: losses - math.log(share)}, method="edit", kind="perplexity")
        found = equivalent_shift(cells(reference, kind="perplexity"), edited, 0.5)
        # The same loss everywhere added leaves nothing to the items.
        assert found == pytest.approx(((0.5 - share) / SLOPE,) * 3, abs=1e-9)


@pytest.mark.parametrize("method_shift", [0.0, 1.0])
def test_the_interval_covers_a_known_shift(method_shift: float) -> None:
    """Curve and edit drawn independently: seeds move the logit of the accuracy, items are Bernoulli."""
    rng, covered, trials = np.random.default_rng(1), 0, 150
    seeds, items = 5, 120

    def drawn(place: float) -> np.ndarray:
        moved = place + 0.2 * rng.standard_normal((seeds, 1))
        return (rng.random((seeds, items)) < expit(-2 * moved)).astype(float)

    rates = expit(np.array([-3.0, -2, -1, 0, 1, 2, 3]))
    for _ in range(trials):
        reference = {0.0: np.ones((1, items))} | {float(p): drawn(scipy_logit(p)) for p in rates}
        found = equivalent_shift(cells(reference), cells({0.5: drawn(method_shift)}, method="edit"), 0.5)
        covered += found.low <= method_shift <= found.high
    assert covered >= 0.88 * trials


@pytest.mark.parametrize(("kept", "rate"), [(0.5, 0.5), (0.05, 0.9), (0.99, 0.1), (0.71, 0.3), (0.25, 0.7)])
def test_the_rate_keeping_a_share_is_the_one_nearest_to_a_share(kept: float, rate: float) -> None:
    reference = cells(curve([0.9, 0.7, 0.5, 0.3, 0.1]) | {1.0: np.zeros((1, N))})
    assert rate_keeping(reference, kept=kept) == rate


def test_the_rate_keeping_a_share_of_a_perplexity() -> None:
    start = np.full((1, 100), 1.0)
    reference = {0.0: start, 0.2: start + 0.1, 0.6: start + math.log(2), 0.9: start + 3}
    assert rate_keeping(cells(reference, kind="perplexity")) == 0.6


def test_the_rate_keeping_a_share_needs_an_untouched_model_that_answers() -> None:
    with pytest.raises(ValueError, match="include drop rate 0"):
        rate_keeping(cells({0.5: np.ones((1, 3))}))
    with pytest.raises(ValueError, match="always wrong"):
        rate_keeping(cells({0.0: np.zeros((1, 3)), 0.5: np.zeros((1, 3))}))


@given(rate=st.floats(0.001, 0.999), ratio=st.floats(1e-4, 1e4))
def test_matched_rates_make_the_same_noise(rate: float, ratio: float) -> None:
    matched = matched_rate(rate, ratio)
    assert 0 < matched < 1
    assert matched / (1 - matched) * ratio == pytest.approx(rate / (1 - rate), rel=1e-6)
    assert matched_rate(matched, 1 / ratio) == pytest.approx(rate, rel=1e-6)
    assert (matched < rate) == (ratio > 1) or ratio == pytest.approx(1)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (Interval(0.9, 0.5, 1.5), "holds"),
        (Interval(0.9, 0.49, 1.1), "cannot tell"),
        (Interval(0.9, 0.5, 1.51), "cannot tell"),
        (Interval(0.5, 0.4, 0.5), "cannot tell"),
        (Interval(0.3, 0.1, 0.49), "refuted"),
        (Interval(1.6, 1.5, 1.7), "cannot tell"),
        (Interval(1.6, 1.51, 1.7), "refuted"),
        (Interval(0.9, -9.0, 9.0), "cannot tell"),
        (Interval(0.9, 0.6, math.inf), "cannot tell"),
        (Interval(math.inf, math.inf, math.inf), "refuted"),
        (Interval(math.nan, math.nan, math.nan), "cannot tell"),
    ],
)
def test_verdicts_follow_the_interval(found: Interval, verdict: str) -> None:
    assert between(found, 0.5, 1.5) == verdict
    # Mirrored, and with one side open.
    assert between(Interval(-found.value, -found.high, -found.low), -1.5, -0.5) == verdict
    open_side = "holds" if found.low >= 0.5 else "refuted" if found.high < 0.5 else "cannot tell"
    assert between(found, 0.5, math.inf) == open_side
