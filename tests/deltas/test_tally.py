"""Statistics out of counts and sums, against numpy on all entries at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from delta_analysis.deltas.tally import DECILES, GRID, MAGNITUDE_QUANTILES, THRESHOLDS, Tally
from delta_analysis.deltas.tally import tally_tensor as tally

SHARES = [f"share_below_{threshold}" for threshold in THRESHOLDS]
EXACT = ["numel", "nonfinite", "zero_share", "min", "max", "abs_max", *SHARES]
MOMENTS = ["mean", "std", "rms", "relative_rms", "storage_step"]
QUANTILES = [*(f"p{decile}" for decile in DECILES), *MAGNITUDE_QUANTILES]
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


def order_statistic(values: np.ndarray, q: Fraction) -> float:
    return float(np.sort(values)[max(math.ceil(q * len(values)), 1) - 1])


def by_hand(values: np.ndarray, base: np.ndarray | None = None) -> dict[str, float]:
    """Every statistic of a row, out of all entries at once, in float64."""
    values = values.reshape(-1).astype(np.float64)
    finite = np.isfinite(values) & (True if base is None else np.isfinite(base.reshape(-1)))
    x = values[finite]
    row = {
        "numel": len(values),
        "nonfinite": int((~finite).sum()),
        "zero_share": (x == 0).mean(),
        "min": x.min(),
        **{f"p{decile}": order_statistic(x, Fraction(decile, 100)) for decile in DECILES},
        "max": x.max(),
        "mean": x.mean(),
        "std": x.std(),
        "rms": math.sqrt((x**2).mean()),
        "abs_p50": order_statistic(abs(x), Fraction(1, 2)),
        "abs_p90": order_statistic(abs(x), Fraction(9, 10)),
        "abs_p99": order_statistic(abs(x), Fraction(99, 100)),
        "abs_p999": order_statistic(abs(x), Fraction(999, 1000)),
        "abs_max": abs(x).max(),
        **{column: (abs(x) < threshold).mean() for column, threshold in zip(SHARES, THRESHOLDS, strict=True)},
        "relative_rms": math.nan,
        "storage_step": math.nan,
    }
    if base is not None:
        used = base.reshape(-1).astype(np.float64)[finite]
        size = math.sqrt((used**2).mean())
        row["relative_rms"] = row["rms"] / size
        row["storage_step"] = float(np.spacing(np.float32(size)))
    return row


def assert_rows_agree(found: dict[str, float], expected: dict[str, float]) -> None:
    assert set(found) == set(expected)
    for column in EXACT:
        assert found[column] == pytest.approx(expected[column], rel=1e-15, abs=0), column
    for column in MOMENTS:
        # Of values of both signs the mean is small by cancellation: it is exact relative to them.
        slack = 1e-12 * expected["rms"] if column == "mean" else 0
        assert found[column] == pytest.approx(expected[column], rel=1e-12, abs=slack, nan_ok=True), column
    for column in QUANTILES:
        assert found[column] == pytest.approx(expected[column], rel=0.005, abs=0), column


def assert_same_counts(found: Tally, expected: Tally) -> None:
    for count in ("numel", "nonfinite", "zeros", "low", "high"):
        assert getattr(found, count) == getattr(expected, count), count
    np.testing.assert_array_equal(found.below, expected.below)
    np.testing.assert_array_equal(found.buckets, expected.buckets)
    np.testing.assert_array_equal(found.counts, expected.counts)


def float32(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))


def sparse(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.where(rng.random(size) < 0.85, 0.0, rng.normal(scale=0.01, size=size))


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, size: rng.normal(scale=0.002, size=size),
    "wide normal": lambda rng, size: rng.normal(scale=1e6, size=size),
    "laplace": lambda rng, size: rng.laplace(scale=0.005, size=size),
    "lognormal": lambda rng, size: rng.lognormal(mean=-6, sigma=2, size=size),
    "negative lognormal": lambda rng, size: -rng.lognormal(mean=-6, sigma=2, size=size),
    "many zeros": sparse,
    "student t": lambda rng, size: rng.standard_t(1.5, size=size),
}


@pytest.mark.parametrize(("name", "size"), list(zip(DISTRIBUTIONS, [1, 2, 10, 999, 20_000, 17_001, 3], strict=True)))
def test_all_statistics_agree_with_numpy(name: str, size: int) -> None:
    rng = np.random.default_rng(size)
    values, base = float32(DISTRIBUTIONS[name](rng, size)), float32(rng.normal(size=size))
    assert_rows_agree(tally(values, base).row(), by_hand(values.numpy(), base.numpy()))


@pytest.mark.parametrize(
    "distribution",
    [scipy.stats.norm(scale=0.002), scipy.stats.laplace(scale=0.01), scipy.stats.norm(loc=-3.0, scale=0.5)],
    ids=["normal", "laplace", "shifted normal"],
)
def test_statistics_agree_with_closed_forms(distribution: scipy.stats.rv_continuous) -> None:
    n = 200_000
    row = tally(float32(distribution.ppf((np.arange(n) + 0.5) / n))).row()
    scale = distribution.std()
    assert row["mean"] == pytest.approx(distribution.mean(), abs=1e-4 * scale)
    assert row["std"] == pytest.approx(scale, rel=1e-3)
    assert row["rms"] == pytest.approx(math.hypot(distribution.mean(), scale), rel=1e-3)
    for decile in DECILES:
        assert row[f"p{decile}"] == pytest.approx(distribution.ppf(decile / 100), rel=0.005, abs=1e-4 * scale)
    for column, threshold in zip(SHARES, THRESHOLDS, strict=True):
        below = distribution.cdf(threshold) - distribution.cdf(-threshold)
        assert row[column] == pytest.approx(below, abs=2 / n)
    if distribution.mean() == 0:
        for column, q in MAGNITUDE_QUANTILES.items():
            assert row[column] == pytest.approx(distribution.ppf((1 + q) / 2), rel=0.006, abs=0)


@given(values=st.lists(FLOATS, min_size=1, max_size=60))
def test_quantiles_are_near_the_order_statistics(values: list[float]) -> None:
    x = np.array(values)
    found = tally(float32(x))
    percents = (1, 10, 25, 50, 75, 90, 99, 100)
    shares = [percent / 100 for percent in percents]
    for quantiles, entries in ((found.quantiles(shares), x), (found.magnitude_quantiles(shares), abs(x))):
        expected = [order_statistic(entries, Fraction(percent, 100)) for percent in percents]
        assert quantiles == pytest.approx(expected, rel=0.005, abs=0)


@given(values=st.lists(FLOATS, min_size=1, max_size=60))
def test_quantiles_rise_and_stay_within_the_range(values: list[float]) -> None:
    row = tally(torch.tensor(values)).row()
    signed = [row["min"], *(row[f"p{decile}"] for decile in DECILES), row["max"]]
    magnitudes = [0.0, *(row[column] for column in MAGNITUDE_QUANTILES), row["abs_max"]]
    assert signed == sorted(signed)
    assert magnitudes == sorted(magnitudes)
    assert (row["min"], row["max"], row["abs_max"]) == (min(values), max(values), max(map(abs, values)))


@given(values=st.lists(FLOATS | st.sampled_from([0.0, -0.0]), min_size=1, max_size=60))
def test_moments_and_shares_are_those_of_float64(values: list[float]) -> None:
    x = np.array(values)
    row = tally(float32(x)).row()
    assert row["mean"] == pytest.approx(math.fsum(x) / len(x), abs=1e-12 * np.abs(x).mean(), rel=0)
    assert row["rms"] == pytest.approx(math.sqrt(math.fsum(x**2) / len(x)), rel=1e-12, abs=0)
    assert row["zero_share"] == pytest.approx((x == 0).mean(), rel=1e-15, abs=0)
    for column, threshold in zip(SHARES, THRESHOLDS, strict=True):
        assert row[column] == pytest.approx((np.abs(x) < threshold).mean(), rel=1e-15, abs=0)


def test_a_row_by_hand() -> None:
    row = tally(torch.tensor([[3.0, -4.0], [0.0, 0.001]]), torch.tensor([[1.0, 2.0], [2.0, 4.0]])).row()
    assert (row["numel"], row["nonfinite"], row["zero_share"]) == (4, 0, 0.25)
    assert (row["min"], row["max"], row["abs_max"]) == (-4.0, 3.0, 4.0)
    # 0.001 in float32 is above 0.001, so it is below 0.002 and not below 0.001.
    assert [row[column] for column in SHARES] == [0.25, 0.25, 0.5, 0.5, 0.5, 0.5]
    assert row["relative_rms"] == pytest.approx(1.0, rel=1e-7, abs=0)


def test_all_equal_entries_have_that_value_as_every_quantile() -> None:
    value = float(np.float32(-0.1))
    row = tally(torch.full((1000,), value)).row()
    for column in ("min", "max", "mean", *(f"p{decile}" for decile in DECILES)):
        assert row[column] == pytest.approx(value, rel=1e-12, abs=0)
    for column in ("rms", "abs_max"):
        assert row[column] == pytest.approx(-value, rel=1e-12, abs=0)
    assert row["std"] == pytest.approx(0.0, abs=1e-15)
    for column in MAGNITUDE_QUANTILES:
        assert row[column] == pytest.approx(-value, rel=0.005, abs=0)


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
def test_the_spread_of_norm_weights_around_one_is_that_of_float64(spread: float) -> None:
    # Σx²/n - mean² loses the digits that such weights, a model's own with base=None, have in common.
    weights = float32(1 + spread * np.random.default_rng(0).normal(size=4096))
    assert tally(weights).row()["std"] == pytest.approx(weights.numpy().astype(np.float64).std(), rel=1e-11, abs=0)


@pytest.mark.parametrize("values", [torch.zeros(7), -torch.zeros(7)], ids=["plus", "minus"])
def test_zeros_of_either_sign_are_zero_in_every_statistic(values: torch.Tensor) -> None:
    row = tally(values, torch.ones(7)).row()
    assert row["zero_share"] == 1.0
    assert [row[column] for column in SHARES] == [1.0] * len(SHARES)
    rest = ["min", "max", "mean", "std", "rms", "abs_max", "relative_rms", *QUANTILES]
    assert [row[column] for column in rest] == [0.0] * len(rest)


@pytest.mark.parametrize(
    ("values", "nonfinite"),
    [(torch.empty(0, 3), 0), (torch.tensor([torch.nan, torch.inf]), 2)],
    ids=["empty", "nothing finite"],
)
def test_without_a_finite_entry_all_statistics_are_missing(values: torch.Tensor, nonfinite: int) -> None:
    row = tally(values, torch.ones_like(values)).row()
    assert (row.pop("numel"), row.pop("nonfinite")) == (nonfinite, nonfinite)
    assert set(row) == set(EXACT + MOMENTS + QUANTILES) - {"numel", "nonfinite"}
    assert all(math.isnan(value) for value in row.values())


def test_a_part_without_entries_changes_no_group() -> None:
    values, base = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0])
    empty = tally(torch.empty(0), torch.empty(0))
    for merged in (empty + tally(values, base), tally(values, base) + empty):
        assert merged.row() == tally(values, base).row()


@pytest.mark.parametrize(
    "view",
    [
        torch.arange(12.0).reshape(3, 4).T,
        torch.arange(24.0)[::2],
        torch.ones(1).expand(12),
        torch.arange(12.0).reshape(2, 3, 2),
        torch.arange(12.0).requires_grad_(),
        torch.arange(12.0, dtype=torch.bfloat16),
    ],
    ids=["transposed", "strided", "expanded", "3-d", "with gradient", "bfloat16"],
)
def test_any_layout_is_tallied(view: torch.Tensor) -> None:
    plain = torch.tensor(view.flatten().tolist())
    assert_same_counts(tally(view), tally(plain))
    assert tally(view, view).row() == tally(plain, plain).row()


def test_shares_below_are_of_magnitudes_in_float64() -> None:
    exact = [np.float32(threshold) for threshold in THRESHOLDS]
    values = torch.tensor([sign * each for each in exact for sign in (1, -1)])
    row = tally(values).row()
    for column, threshold in zip(SHARES, THRESHOLDS, strict=True):
        assert row[column] == pytest.approx(np.mean([float(each) < threshold for each in exact]))


def test_relative_rms_by_hand() -> None:
    delta = torch.tensor([3.0, 4.0])
    assert tally(delta, torch.tensor([30.0, 40.0])).row()["relative_rms"] == pytest.approx(0.1, rel=1e-15, abs=0)
    assert tally(-delta, torch.tensor([0.0, 5.0])).row()["relative_rms"] == pytest.approx(1.0, rel=1e-15, abs=0)
    assert math.isnan(tally(delta).row()["relative_rms"])
    assert math.isnan(tally(delta, torch.zeros(2)).row()["relative_rms"])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_entries_that_are_not_finite_are_left_out(bad: float) -> None:
    values, base = np.random.default_rng(0).normal(size=(2, 500)).astype(np.float32)
    base[7] = 1e6  # Left out too, since the delta there is.
    with_bad = values.copy()
    with_bad[[0, 7, 499]] = bad
    found = tally(torch.from_numpy(with_bad), torch.from_numpy(base))
    kept = np.delete(np.arange(500), [0, 7, 499])
    assert (found.numel, found.nonfinite, found.finite) == (500, 3, 497)
    expected = {**by_hand(values[kept], base[kept]), "numel": 500, "nonfinite": 3}
    assert_rows_agree(found.row(), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_entries_whose_base_is_not_finite_are_left_out(bad: float, dtype: torch.dtype) -> None:
    # More than a run of the kernel; at one place both sides are bad, which counts once.
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    base = torch.randn(5000, generator=torch.Generator().manual_seed(1)).to(dtype)
    base[[0, 7, 4096, 4999]] = bad
    values[7] = torch.nan
    row = tally(values, base).row()
    assert row["nonfinite"] == 4
    assert_rows_agree(row, by_hand(values.numpy(), base.float().numpy()))


@given(
    values=st.lists(FLOATS | st.sampled_from([0.0, math.nan, math.inf, -math.inf]), max_size=60),
    cut=st.integers(0, 60),
)
def test_counts_of_the_parts_add_up_for_any_split(values: list[float], cut: int) -> None:
    x = torch.tensor(values)
    merged, whole = tally(x[:cut], x[:cut]) + tally(x[cut:], x[cut:]), tally(x, x)
    assert_same_counts(merged, whole)
    rows = merged.row(), whole.row()
    for column in (*EXACT, *QUANTILES):
        assert rows[0][column] == pytest.approx(rows[1][column], rel=0, abs=0, nan_ok=True), column
    # Blocks of another grid round differently, by a few units of the last place of the sum of magnitudes.
    slack = 1e-13 * rows[1]["rms"] if whole.finite else 0
    assert rows[0]["mean"] == pytest.approx(rows[1]["mean"], rel=0, abs=slack, nan_ok=True)
    assert rows[0]["rms"] == pytest.approx(rows[1]["rms"], rel=1e-13, abs=0, nan_ok=True)


@pytest.fixture(scope="module")
def long() -> torch.Tensor:
    """More than two grid blocks."""
    return torch.randn(2 * GRID + 12_345, generator=torch.Generator().manual_seed(0)) * 0.01


def test_a_split_at_the_grid_gives_the_same_statistics_to_the_last_bit(long: torch.Tensor) -> None:
    base = long.roll(1)
    whole = tally(long, base)
    merged = tally(long[: 2 * GRID], base[: 2 * GRID]) + tally(long[2 * GRID :], base[2 * GRID :])
    assert_same_counts(merged, whole)
    assert merged.row() == whole.row()


def test_a_long_tensor_agrees_with_numpy(long: torch.Tensor) -> None:
    assert_rows_agree(tally(long, long * 2).row(), by_hand(long.numpy(), 2 * long.numpy()))


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6), data=st.data())
def test_blocks_merged_in_any_order_give_the_same_bits(sizes: list[int], data: st.DataObject) -> None:
    rng = np.random.default_rng(sum(sizes))
    blocks = [tally(float32(rng.normal(size=size)), float32(rng.normal(size=size))) for size in sizes]
    shuffled = data.draw(st.permutations(blocks))
    cut = data.draw(st.integers(0, len(sizes) - 1))
    ahead, behind = shuffled[: cut + 1], shuffled[cut + 1 :]
    merged = sum(behind[1:], behind[0]) + sum(ahead[1:], ahead[0]) if behind else sum(ahead[1:], ahead[0])
    # A repr tells every float apart, and is the same for every NaN.
    assert repr(merged.row()) == repr(sum(blocks[1:], blocks[0]).row())


@pytest.mark.parametrize(
    ("base", "digits", "step"),
    [
        ([1.0, -1.0], 7, 2.0**-7),
        ([0.02, 0.02], 7, 2.0**-13),  # 0.02 lies between 2⁻⁶ and 2⁻⁵
        ([0.02, 0.02], 10, 2.0**-16),
        ([0.02, 0.02], 23, 2.0**-29),
        ([1e-6, 1e-6], 10, 2.0**-24),  # the smallest float16 above zero
        ([1e-6, 1e-6], 7, 2.0**-27),
        ([0.0, 2.0], 7, 2.0**-7),  # the rms is √2
        ([0.0, 0.0], 7, math.nan),
    ],
)
def test_the_storage_step_by_hand(base: list[float], digits: int, step: float) -> None:
    found = tally(torch.ones(2), torch.tensor(base), digits=digits).storage_step
    assert found == step or (math.isnan(found) and math.isnan(step))


def test_a_group_has_the_coarsest_of_its_storages() -> None:
    fine, coarse = (tally(torch.ones(2), torch.ones(2), digits=digits) for digits in (23, 7))
    assert (fine + coarse).storage_step == (coarse + fine).storage_step == 2.0**-7
