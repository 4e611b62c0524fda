"""Metrics and their bootstrap intervals, against closed forms and a slow reference."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm
from scipy.stats import t as t_distribution

from delta_analysis.sweeps.intervals import (
    ERROR,
    FEWEST_BLOCKS,
    MEAN,
    PERPLEXITY,
    Interval,
    Metric,
    Resamples,
    kept_interval,
    metric_interval,
    metric_of,
    percentile_interval,
    resampled_means,
    seed_stretch,
    two_way_resamples,
)


def slow_means(outcomes: np.ndarray, resamples: Resamples) -> list[float]:
    """Each weighted mean, term by term."""
    items = np.repeat(resamples.items, resamples.block, axis=1)[:, : outcomes.shape[1]]
    return [
        sum(
            seed_weights[s] * item_weights[i] * outcomes[s, i]
            for s in range(outcomes.shape[0])
            for i in range(outcomes.shape[1])
        )
        / (seed_weights.sum() * item_weights.sum())
        for seed_weights, item_weights in zip(resamples.seeds, items, strict=True)
    ]


def draws(resamples: Resamples) -> np.ndarray:
    """How often each seed is drawn: its weight without the stretch."""
    return 1 + (resamples.seeds - 1) / seed_stretch(resamples.seeds.shape[1])


def test_what_a_metric_is_stands_in_the_table() -> None:
    for kind, metric in (("score", MEAN), ("perplexity", PERPLEXITY), ("error", ERROR)):
        assert metric_of(pd.DataFrame({"metric": ["whatever"], "kind": [kind]})) is metric
    assert metric_of(pd.DataFrame({"metric": ["perplexity"]})) is MEAN
    assert (MEAN.block, PERPLEXITY.block) == (1, 64)


def test_accuracy_is_the_mean_and_keeps_its_ratio() -> None:
    assert MEAN.value(np.array([0.0, 0.25, 1.0])).tolist() == [0.0, 0.25, 1.0]
    shares = MEAN.kept_share(np.array([0.8, 0.4, 0.0, 0.9]), np.array([0.8, 0.8, 0.8, 0.6]))
    assert shares == pytest.approx([1.0, 0.5, 0.0, 1.5])
    assert MEAN.kept_share(np.array([0.005]), np.array([0.01])) == pytest.approx([0.5])


def test_accuracy_share_of_an_untouched_model_without_right_answers_is_finite() -> None:
    # Under pytest a division by zero would be a warning, and so an error.
    assert MEAN.kept_share(np.array([0.0]), np.array([0.0])).tolist() == [0.0]


def test_perplexity_is_exp_of_the_mean_and_keeps_its_inverse_ratio() -> None:
    means, untouched = np.array([0.0, 1.0, 2.5]), np.array([1.0, 1.0, 1.0])
    assert PERPLEXITY.value(means) == pytest.approx([1.0, math.e, math.exp(2.5)])
    assert PERPLEXITY.kept_share(means, untouched) == pytest.approx([math.e, 1.0, math.e / math.exp(2.5)])


@settings(deadline=None)
@given(n_seeds=st.integers(1, 8), n_items=st.integers(1, 50), count=st.integers(1, 40))
def test_weights_are_counts_of_draws(n_seeds: int, n_items: int, count: int) -> None:
    resamples = two_way_resamples(n_seeds, n_items, count=count)
    assert resamples.seeds.sum(axis=1) == pytest.approx(np.full(count, n_seeds))
    assert np.array_equal(resamples.items, resamples.items.round())
    for weights, n in ((draws(resamples), n_seeds), (resamples.items, n_items)):
        assert weights.shape == (count, n)
        assert weights == pytest.approx(weights.round(), abs=1e-9)
        assert (weights.round() >= 0).all()
        assert weights.sum(axis=1) == pytest.approx(np.full(count, n))


def test_the_stretch_is_that_of_students_interval() -> None:
    """A normal interval of a bootstrap's deviation, stretched, is t · s / √n."""
    values = np.random.default_rng(9).normal(size=4)
    student = t_distribution.interval(0.95, 3, values.mean(), values.std(ddof=1) / 2)
    half = norm.ppf(0.975) * seed_stretch(4) * values.std() / 2
    assert (values.mean() - half, values.mean() + half) == pytest.approx(student)
    assert seed_stretch(1) == 1
    assert seed_stretch(10_000) == pytest.approx(1, abs=1e-3)


def test_every_seed_and_item_is_drawn_equally_often() -> None:
    count = 20_000
    resamples = two_way_resamples(5, 40, count=count)
    for weights, n in ((draws(resamples), 5), (resamples.items, 40)):
        # One count has mean 1 and variance 1 - 1/n; six sigma.
        assert weights.mean(axis=0) == pytest.approx(np.ones(n), abs=6 * math.sqrt((1 - 1 / n) / count))
        assert weights.var(axis=0) == pytest.approx(np.full(n, 1 - 1 / n), rel=0.15)


def test_resampled_means_against_the_reference() -> None:
    outcomes = np.random.default_rng(0).normal(size=(4, 7))
    resamples = two_way_resamples(4, 7, count=50)
    assert resampled_means(outcomes, resamples) == pytest.approx(slow_means(outcomes, resamples), abs=1e-12)


def test_means_leave_the_range_of_a_few_outcomes_but_not_that_of_their_kind() -> None:
    """Three numbers may lie on one side of their mean; no share of right answers lies outside 0 to 1."""
    resamples = two_way_resamples(3, 1)
    signed, positive = (resampled_means(np.array([[low], [1.0], [3.0]]), resamples) for low in (-0.5, 0.5))
    assert signed.min() < -0.5
    assert positive.min() == 0
    assert min(signed.max(), positive.max()) > 3
    shares = resampled_means(np.array([[0.0], [1.0], [1.0]]), resamples)
    assert (shares.min(), shares.max()) == (0, 1)


def test_one_row_ignores_the_seeds() -> None:
    row = np.random.default_rng(1).normal(size=(1, 25))
    resamples = two_way_resamples(6, 25)
    means = resampled_means(row, resamples)
    assert means == pytest.approx(resamples.items @ row[0] / 25)
    assert means == pytest.approx(resampled_means(np.repeat(row, 6, axis=0), resamples))
    shuffled = resamples._replace(seeds=resamples.seeds[::-1] * 3)
    assert np.array_equal(resampled_means(row, shuffled), means)


def test_outcomes_of_the_same_seeds_and_items_stay_paired() -> None:
    rng = np.random.default_rng(2)
    better = rng.random((5, 60))
    worse = better - rng.random((5, 60))
    resamples = two_way_resamples(5, 60)
    assert (resampled_means(better, resamples) > resampled_means(worse, resamples)).all()
    shifted = resampled_means(better + 2, resamples) - resampled_means(better, resamples)
    assert shifted == pytest.approx(np.full(1000, 2.0))


@given(n_seeds=st.integers(1, 4), n_items=st.integers(1, 300), block=st.integers(1, 80))
@settings(deadline=None)
def test_blocks_of_neighbours_are_drawn_together(n_seeds: int, n_items: int, block: int) -> None:
    resamples = two_way_resamples(n_seeds, n_items, block=block, count=30)
    assert resamples.block == max(min(block, n_items // FEWEST_BLOCKS), 1)
    # As many blocks as there are, the last one short where items leave it so.
    n_blocks = math.ceil(n_items / resamples.block)
    assert resamples.items.shape == (30, n_blocks)
    assert resamples.items.sum(axis=1).tolist() == [n_blocks] * 30
    outcomes = -np.random.default_rng(n_items).random(size=(n_seeds, n_items))
    assert resampled_means(outcomes, resamples) == pytest.approx(slow_means(outcomes, resamples), abs=1e-11)
    assert resampled_means(np.full((n_seeds, n_items), 0.3), resamples) == pytest.approx(np.full(30, 0.3))


def test_spread_of_a_block_bootstrap_is_that_of_the_block_means() -> None:
    """Tokens that are alike in each block of 64 count once a block: 64 times the variance of the plain bootstrap."""
    means = np.random.default_rng(6).normal(size=25)
    losses = np.repeat(means, 64)[None]
    variances = [
        resampled_means(losses, two_way_resamples(1, 1600, block=block, count=2000)).var() for block in (1, 64)
    ]
    assert variances == pytest.approx([means.var() / 1600, means.var() / 25], rel=0.12)


def test_perplexity_interval_covers_the_truth_where_losses_of_neighbours_are_alike() -> None:
    """Losses that follow an AR(1) process of coefficient 0.8, 2500 tokens: 39 blocks and a short one.

    100 repetitions: the share covered has a standard error of 0.025. Its tokens taken as independent,
    the interval covers about 0.49: it is 3 times too narrow.
    """
    rng = np.random.default_rng(7)
    noise = rng.normal(size=(100, 2600))
    for i in range(1, 2600):
        noise[:, i] += 0.8 * noise[:, i - 1]
    plain = Metric(PERPLEXITY.value, PERPLEXITY.kept_share)
    intervals = {
        metric: [metric_interval(metric, 3 + row[None, 100:]) for row in noise] for metric in (PERPLEXITY, plain)
    }
    covered = {m: np.mean([one.low <= math.exp(3) <= one.high for one in ones]) for m, ones in intervals.items()}
    assert 0.85 < covered[PERPLEXITY] < 0.985
    assert covered[plain] < 0.65


@pytest.mark.parametrize("n_tokens", [2, 5, 40, 64, 65, 127, 300])
def test_a_short_text_has_an_interval_too(n_tokens: int) -> None:
    losses = np.random.default_rng(8).gamma(2, size=(1, n_tokens))
    interval = metric_interval(PERPLEXITY, losses)
    assert interval.low < interval.value < interval.high


def test_spread_is_the_sum_of_the_spread_of_seeds_and_of_items() -> None:
    """For effects that add up it is stretch² · var(seeds)/S + var(items)/n; within 5 sigma of 20 000 samples."""
    rng = np.random.default_rng(3)
    seeds, items = rng.normal(size=(6, 1)), rng.normal(size=(1, 50))
    resamples = two_way_resamples(6, 50, count=20_000)
    by_seed, by_item = seed_stretch(6) ** 2 * seeds.var() / 6, items.var() / 50
    cases = {
        "seeds": (np.broadcast_to(seeds, (6, 50)), by_seed),
        "items": (np.broadcast_to(items, (6, 50)), by_item),
        "both": (seeds + items, by_seed + by_item),
    }
    for outcomes, variance in cases.values():
        assert resampled_means(outcomes, resamples).var() == pytest.approx(variance, rel=0.05)


def test_percentile_interval_is_the_central_95_percent() -> None:
    samples = np.random.default_rng(0).permutation(np.arange(1001.0))
    assert percentile_interval(3, samples) == Interval(3.0, pytest.approx(25.0), pytest.approx(975.0))


def test_interval_of_one_seed_is_that_of_the_binomial() -> None:
    outcomes = np.zeros((1, 200))
    outcomes[0, :140] = 1
    interval = metric_interval(MEAN, outcomes)
    assert interval.value == pytest.approx(0.7)
    # Resampling items at 0.7 draws Binomial(200, 0.7) / 200; two steps of 1/200 for 1000 resamples.
    assert interval.low == pytest.approx(binom.ppf(0.025, 200, 0.7) / 200, abs=0.0101)
    assert interval.high == pytest.approx(binom.ppf(0.975, 200, 0.7) / 200, abs=0.0101)


def test_perplexity_interval_is_exp_of_that_of_the_mean_loss() -> None:
    losses = np.random.default_rng(4).gamma(2, size=(3, 80))
    mean = metric_interval(Metric(lambda x: x, PERPLEXITY.kept_share, block=PERPLEXITY.block), losses)
    interval = metric_interval(PERPLEXITY, losses)
    assert interval.value == pytest.approx(math.exp(losses.mean()))
    # Quantiles interpolate between two samples, before or after exp.
    assert np.log(interval) == pytest.approx(np.array(mean), abs=1e-3)
    assert interval.low < interval.value < interval.high


def test_interval_of_outcomes_that_never_differ_is_a_point() -> None:
    assert metric_interval(MEAN, np.zeros((1, 30))) == (0, 0, 0)
    assert metric_interval(PERPLEXITY, np.full((2, 30), 2.0)) == pytest.approx((math.exp(2),) * 3)


def test_perplexity_too_large_for_a_float_is_infinite_and_not_a_warning() -> None:
    losses = 900.0 + np.arange(10).reshape(2, 5)
    assert metric_interval(PERPLEXITY, losses) == (math.inf, math.inf, math.inf)


@pytest.mark.parametrize(("n_seeds", "n_items"), [(1, 1), (2, 1000), (3, 49), (5, 30), (7, 200), (20, 7)])
def test_accuracy_never_passes_one(n_seeds: int, n_items: int) -> None:
    # Weights such as 3/49 do not add up to 1 exactly; a low end of 1.0000000000000007 would exclude the value.
    assert metric_interval(MEAN, np.ones((n_seeds, n_items))) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("seed_spread", "item_spread"), [(0.2, 0.0), (0.0, 0.3), (0.15, 0.3)], ids=["seeds", "items", "seeds and items"]
)
def test_interval_covers_the_true_accuracy_about_95_times_in_100(seed_spread: float, item_spread: float) -> None:
    """Bernoulli outcomes of probability 0.5 + seed effect + item effect, both symmetric, 20 seeds × 80 items.

    400 repetitions: the share covered has a standard error of 0.011. Resampling seeds or items alone
    covers 0.42 and 0.36 where the other matters, and 0.84 where both do.
    """
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(400):
        effects = rng.choice([-seed_spread, seed_spread], (20, 1)) + rng.choice([-item_spread, item_spread], (1, 80))
        outcomes = rng.random((20, 80)) < 0.5 + effects
        interval = metric_interval(MEAN, outcomes)
        covered += interval.low <= 0.5 <= interval.high
    assert 0.90 < covered / 400 < 0.985


@pytest.mark.parametrize("n_items", [1, 60])
@pytest.mark.parametrize("n_seeds", [3, 5, 10])
def test_interval_of_few_seeds_covers_the_mean_of_all_masks(n_seeds: int, n_items: int) -> None:
    """Masks that differ as a normal distribution does, and items that differ a little.

    600 repetitions: the share covered has a standard error of 0.009. A plain bootstrap of three seeds
    covers 0.75; so would one that kept to the range of three outcomes.
    """
    rng = np.random.default_rng(10)
    covered = 0
    for _ in range(600):
        outcomes = 5 + 0.1 * rng.normal(size=(n_seeds, 1)) + 0.02 * rng.normal(size=(1, n_items)) * (n_items > 1)
        interval = metric_interval(MEAN, outcomes)
        covered += interval.low <= 5 <= interval.high
    assert 0.91 < covered / 600 < 0.98


@pytest.mark.parametrize("n_seeds", [3, 5])
def test_interval_of_few_seeds_covers_an_accuracy(n_seeds: int) -> None:
    """80 right or wrong answers of which the share that is right differs by 0.15 from mask to mask."""
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(400):
        outcomes = rng.random((n_seeds, 80)) < 0.6 + 0.15 * rng.normal(size=(n_seeds, 1))
        interval = metric_interval(MEAN, outcomes)
        covered += interval.low <= 0.6 <= interval.high
    assert covered / 400 > 0.92


@settings(deadline=None)
@given(n_seeds=st.integers(1, 5), n_items=st.integers(1, 80), seed=st.integers(0, 99))
def test_beside_an_untouched_model_that_is_always_right_the_share_is_the_accuracy(
    n_seeds: int, n_items: int, seed: int
) -> None:
    outcomes = np.random.default_rng(seed).integers(0, 2, size=(n_seeds, n_items)).astype(float)
    kept = kept_interval(MEAN, outcomes, np.ones((1, n_items)))
    assert kept == pytest.approx(metric_interval(MEAN, outcomes), abs=1e-12)


@pytest.mark.parametrize("metric", [MEAN, PERPLEXITY], ids=["mean", "perplexity"])
def test_an_edit_that_changes_nothing_keeps_all(metric: Metric) -> None:
    """Items are drawn alike on both sides: however much they differ, their spread cancels."""
    untouched = np.random.default_rng(0).exponential(size=(1, 300))
    assert kept_interval(metric, np.tile(untouched, (3, 1)), untouched) == pytest.approx((1, 1, 1))


def test_kept_share_of_items_that_are_lost_alike() -> None:
    untouched = np.random.default_rng(0).exponential(size=(1, 300))
    assert kept_interval(MEAN, untouched / 4, untouched) == pytest.approx((0.25,) * 3)
    assert kept_interval(PERPLEXITY, untouched + math.log(4), untouched) == pytest.approx((0.25,) * 3)


def test_kept_share_of_what_is_never_right_is_finite() -> None:
    assert kept_interval(MEAN, np.zeros((3, 20)), np.zeros((1, 20))) == (0, 0, 0)


@pytest.mark.parametrize(("metric", "block"), [(MEAN, 1), (PERPLEXITY, 64)], ids=["mean", "perplexity"])
def test_kept_interval_is_that_of_ratios_on_the_same_draws(metric: Metric, block: int) -> None:
    rng = np.random.default_rng(3)
    untouched, outcomes = rng.exponential(size=(1, 640)), rng.exponential(2, size=(4, 640))
    resamples = two_way_resamples(4, 640, block=block)
    alone = resamples._replace(seeds=np.ones((len(resamples.seeds), 1)))
    means = [np.array(slow_means(each, drawn)) for each, drawn in ((outcomes, resamples), (untouched, alone))]
    shares = means[0] / means[1] if metric is MEAN else np.exp(means[1] - means[0])
    value, low, high = kept_interval(metric, outcomes, untouched)
    assert (low, high) == pytest.approx(tuple(np.quantile(shares, [0.025, 0.975])))
    ratio = outcomes.mean() / untouched.mean()
    assert value == pytest.approx(ratio if metric is MEAN else math.exp(untouched.mean() - outcomes.mean()))


def test_kept_interval_covers_the_true_share_about_95_times_in_100() -> None:
    """Items right with a chance of their own, of which an edit keeps 70%, more or less by seed."""
    rng, trials, covered = np.random.default_rng(5), 300, 0
    for _ in range(trials):
        untouched = (rng.random((1, 150)) < 0.8).astype(float)
        by_seed = 0.7 + 0.05 * rng.standard_normal((5, 1))
        outcomes = untouched * (rng.random((5, 150)) < by_seed)
        kept = kept_interval(MEAN, outcomes, untouched)
        covered += kept.low <= 0.7 <= kept.high
    assert binom.ppf(1e-4, trials, 0.95) <= covered
