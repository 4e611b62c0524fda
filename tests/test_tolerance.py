"""The tolerated drop rate: crossings by hand, bisection to known thresholds, intervals that hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import expit, ndtri
from scipy.special import logit as scipy_logit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from delta_analysis.intervals import MEAN, PERPLEXITY, Interval, Metric
from delta_analysis.pruning import Dare
from delta_analysis.sweep import Pair, sweep
from delta_analysis.tolerance import (
    KEPT_SHARE,
    RESOLUTION,
    crossing,
    inverse_logit,
    kept_shares,
    logit,
    measure_tolerance,
    next_rate,
    tolerated_interval,
)
from delta_analysis.zoo.tokenizer import character_tokenizer

EMBED = "model.embed_tokens.weight"
Outcomes = dict[float, np.ndarray]


def test_the_constants_are_those_of_the_definition() -> None:
    assert KEPT_SHARE == 0.95
    assert 0 < RESOLUTION <= 0.25


@pytest.mark.parametrize("p", [0.001, 0.2, 0.5, 0.9, 0.999])
def test_logit_and_its_inverse(p: float) -> None:
    assert logit(p) == pytest.approx(scipy_logit(p))
    assert inverse_logit(scipy_logit(p)) == pytest.approx(p)


@pytest.mark.parametrize(
    ("scale", "shares", "expected"),
    [
        ([0.0, 1.0, 2.0], [1.0, 0.96, 0.94], 1.5),
        ([0.0, 1.0], [1.0, 0.9], 0.5),
        ([-3.0, 1.0], [1.0, 0.0], -3 + 4 * 0.05),
        ([-1.0, 4.0], [0.96, 0.86], -0.5),
        ([0.0, 1.0, 2.0], [1.0, 0.97, 0.96], 2.0),
        ([0.0, 1.0, 2.0], [0.94, 0.5, 0.0], 0.0),
        ([0.0, 1.0, 2.0, 3.0], [1.0, 0.9, 1.0, 0.9], 0.5),
        ([0.0, 1.0, 2.0], [1.0, 0.95, 0.85], 1.0),
        ([0.0, 1.0, 2.0], [1.2, 1.05, 0.85], 1.5),
        ([0.3], [1.0], 0.3),
        ([0.3], [0.2], 0.3),
    ],
    ids=[
        "between two points",
        "in the middle",
        "close to the first",
        "uneven scale",
        "never falls",
        "begins below",
        "the first of two",
        "exactly 0.95 is kept",
        "better than untouched",
        "one kept",
        "one lost",
    ],
)
def test_crossing_by_hand(scale: list[float], shares: list[float], expected: float) -> None:
    assert crossing(scale, np.array(shares)) == pytest.approx(expected)


@settings(deadline=None)
@given(shares=st.lists(st.floats(0, 1.5), min_size=1, max_size=8))
def test_crossing_lies_between_the_last_kept_and_the_first_lost(shares: list[float]) -> None:
    scale = [float(i) for i in range(len(shares))]
    lost = next((i for i, share in enumerate(shares) if share < 0.95), None)
    value = crossing(scale, np.array(shares))
    if lost is None:
        assert value == scale[-1]
    else:
        assert max(lost - 1, 0) <= value <= lost


def test_kept_shares_are_in_order_of_drop_rate() -> None:
    outcomes = {
        0.9: np.array([[1, 0, 0, 0], [0, 0, 0, 0.0]]),
        0.0: np.array([[1, 1, 0, 0.0]]),
        0.5: np.array([[1, 1, 0, 0], [1, 0, 0, 0.0]]),
    }
    shares = kept_shares(MEAN, outcomes)
    assert list(shares) == [0.0, 0.5, 0.9]
    assert list(shares.values()) == pytest.approx([1.0, 0.75, 0.25])


def test_kept_shares_of_perplexity_are_ratios_of_token_probability() -> None:
    outcomes = {0.0: np.array([[1.0, 3.0]]), 0.5: np.array([[2.0, 4.0], [1.0, 3.0]])}
    assert kept_shares(PERPLEXITY, outcomes) == pytest.approx({0.0: 1.0, 0.5: math.exp(-0.5)})


@pytest.mark.parametrize(
    "outcomes",
    [{0.0: np.zeros((1, 5)), 0.5: np.zeros((2, 5))}, {0.5: np.ones((1, 5))}, {}],
    ids=["answers nothing", "no drop rate 0", "empty"],
)
@pytest.mark.parametrize("function", [kept_shares, next_rate, tolerated_interval])
def test_untouched_model_has_to_answer_something(function: Callable[..., object], outcomes: Outcomes) -> None:
    with pytest.raises(ValueError, match=r"untouched model \(drop rate 0\) that answers something"):
        function(MEAN, outcomes)


def test_perplexity_of_a_perfect_model_is_no_error() -> None:
    assert kept_shares(PERPLEXITY, {0.0: np.zeros((1, 3))}) == {0.0: 1.0}


def bisect(metric: Metric, outcomes: Outcomes, judge: Callable[[float], np.ndarray]) -> list[float]:
    """Evaluate whatever is asked for until nothing is; the rates in the order asked."""
    asked: list[float] = []
    while (rate := next_rate(metric, outcomes)) is not None:
        assert rate not in outcomes, "asked twice"
        assert 0.001 <= rate <= 0.999
        assert len(asked) < 20, "bisection does not end"
        outcomes[rate] = judge(rate)
        asked.append(rate)
    return asked


def accuracy_step(threshold: float) -> Callable[[float], np.ndarray]:
    return lambda rate: np.full((1, 10), float(rate <= threshold))


def loss_step(threshold: float) -> Callable[[float], np.ndarray]:
    # exp(-0.06) = 0.942: just lost.
    return lambda rate: np.full((1, 10), 2.0 if rate <= threshold else 2.06)


STARTS = {
    "untouched only": [0.0],
    "ends": [0.0, 1.0],
    "sweep": [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 1.0],
    "beyond the limits": [0.0, 0.0005, 0.5, 0.9999],
}
STEPS = [(MEAN, accuracy_step), (PERPLEXITY, loss_step)]


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize(("metric", "step"), STEPS, ids=["accuracy", "perplexity"])
@settings(deadline=None, max_examples=60)
@example(position=logit(0.002))
@example(position=0.0)
@example(position=logit(0.998))
@given(position=st.floats(logit(0.002), logit(0.998)))
def test_bisection_finds_a_known_threshold(
    metric: Metric, step: Callable[[float], Callable[[float], np.ndarray]], start: list[float], position: float
) -> None:
    threshold = inverse_logit(position)
    judge = step(threshold)
    outcomes = {rate: judge(rate) for rate in start}
    asked = bisect(metric, outcomes, judge)
    passing = max(rate for rate in outcomes if rate <= threshold)
    failing = min(rate for rate in outcomes if rate > threshold)
    assert logit(failing) - logit(passing) <= RESOLUTION
    # From 0.001 to 0.999 are 13.8 on the scale: two limits and seven halvings.
    assert len(asked) <= 9
    interval = tolerated_interval(metric, outcomes)
    assert passing <= interval.value * (1 + 1e-12)
    assert interval.value <= failing * (1 + 1e-12)
    assert abs(logit(interval.value) - position) <= RESOLUTION
    # Nothing varies, so the interval is the point.
    assert interval.low == pytest.approx(interval.value)
    assert interval.high == pytest.approx(interval.value)


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize(("metric", "step"), STEPS, ids=["accuracy", "perplexity"])
@pytest.mark.parametrize(("threshold", "limit"), [(0.0001, 0.001), (0.9995, 0.999), (1.0, 0.999)])
def test_thresholds_beyond_the_limits_are_reported_as_the_limits(
    metric: Metric,
    step: Callable[[float], Callable[[float], np.ndarray]],
    start: list[float],
    threshold: float,
    limit: float,
) -> None:
    judge = step(threshold)
    outcomes = {rate: judge(rate) for rate in start}
    asked = bisect(metric, outcomes, judge)
    assert limit in asked
    assert tolerated_interval(metric, outcomes) == pytest.approx((limit, limit, limit))


def test_bisection_halves_on_the_logit_scale() -> None:
    judge = accuracy_step(0.97)
    outcomes = {rate: judge(rate) for rate in (0.0, 0.9, 0.99)}
    (first, *_) = bisect(MEAN, outcomes, judge)
    assert first == pytest.approx(expit((scipy_logit(0.9) + scipy_logit(0.99)) / 2))


def test_narrow_bracket_asks_for_nothing() -> None:
    outcomes = {0.0: np.ones((1, 4)), 0.5: np.ones((3, 4)), expit(RESOLUTION - 0.001): np.zeros((3, 4))}
    assert next_rate(MEAN, outcomes) is None
    assert next_rate(MEAN, {**outcomes, expit(RESOLUTION - 0.001): np.ones((3, 4))}) == 0.999
    assert (
        next_rate(MEAN, {0.0: np.ones((1, 4)), 0.5: np.ones((3, 4)), expit(RESOLUTION + 0.001): np.zeros((3, 4))})
        is not None
    )


def test_first_failure_counts_although_a_higher_rate_passes() -> None:
    outcomes = {0.0: np.ones((1, 4)), 0.1: np.ones((2, 4)), 0.5: np.zeros((2, 4)), 0.9: np.ones((2, 4))}
    rate = next_rate(MEAN, outcomes)
    assert rate is not None
    assert 0.1 < rate < 0.5


def test_mean_over_seeds_decides() -> None:
    # 0.96 kept in the mean, although one of two seeds is below 0.95.
    lost_in_one = np.ones((2, 25))
    lost_in_one[0, :2] = 0
    shares = {0.0: np.ones((1, 25)), 0.999: lost_in_one}
    assert next_rate(MEAN, shares) is None
    assert tolerated_interval(MEAN, shares).value == pytest.approx(0.999)


def test_model_whose_loss_is_not_a_number_is_broken() -> None:
    losses = {0.0: np.full((1, 4), 2.0), 0.3: np.full((2, 4), 2.0), 0.5: np.full((2, 4), math.nan)}
    rate = next_rate(PERPLEXITY, losses)
    assert rate is not None
    assert 0.3 < rate < 0.5
    assert tolerated_interval(PERPLEXITY, losses).value <= 0.5


def test_interval_widens_with_the_noise_of_seeds() -> None:
    rng = np.random.default_rng(0)
    rates = [0.1, 0.3, 0.5, 0.7, 0.9]

    def width(spread: float) -> float:
        limits = scipy_logit(0.5) + spread * rng.normal(size=(8, 1)) + rng.normal(size=(1, 100)) * 0.1
        outcomes = {rate: (scipy_logit(rate) < limits).astype(float) for rate in rates}
        interval = tolerated_interval(MEAN, {0.0: np.ones((1, 100)), **outcomes})
        assert interval.low <= interval.value <= interval.high
        return logit(interval.high) - logit(interval.low)

    assert width(0.0) < width(1.0)


@pytest.mark.parametrize(
    ("n_seeds", "seed_spread", "item_spread"), [(5, 0.0, 0.8), (20, 0.5, 0.5)], ids=["items", "seeds and items"]
)
def test_interval_holds_the_true_crossing_at_about_the_nominal_rate(
    n_seeds: int, seed_spread: float, item_spread: float
) -> None:
    """An item is lost under a seed at logit(p) ~ normal: 2 + effects of seed, of item and of both together.

    0.95 is kept where 5% are lost, at 2 - 1.645 spreads. 200 repetitions: the share covered has a
    standard error of 0.02. Resampling seeds alone covers 0.35 of the first, items alone 0.64 of the
    second.
    """
    rng = np.random.default_rng(1)
    n_items = 150
    truth = 2 + ndtri(0.05) * math.hypot(seed_spread, item_spread, 0.3)
    covered = 0
    for _ in range(200):
        effects = [(seed_spread, (n_seeds, 1)), (item_spread, (1, n_items)), (0.3, (n_seeds, n_items))]
        limits = 2 + sum(spread * rng.normal(size=shape) for spread, shape in effects)
        answers = rng.random((1, n_items)) < 0.9

        def judge(rate: float, limits: np.ndarray = limits, answers: np.ndarray = answers) -> np.ndarray:
            return ((scipy_logit(rate) < limits) & answers).astype(float)

        outcomes = {0.0: answers.astype(float)} | {rate: judge(rate) for rate in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)}
        bisect(MEAN, outcomes, judge)
        interval = tolerated_interval(MEAN, outcomes)
        covered += logit(interval.low) <= truth <= logit(interval.high)
    assert 0.88 < covered / 200 < 0.99


