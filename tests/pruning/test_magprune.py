"""MAGPRUNE: against its formula in exact arithmetic, and what it does to a delta on average."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from delta_analysis._kernels import rank_sums
from delta_analysis.pruning import Dare, Magnitude, MagPrune
from delta_analysis.pruning.magprune import WIDEST, checked_window
from tests.pruning.reference import (
    DTYPES,
    RATE,
    RESCALES,
    SIGMAS,
    normal,
    slow_kept,
    slow_probabilities,
    tensors,
    words,
)

FALSE_ALARM = 1e-6


@given(
    tensor=tensors(),
    drop_rate=RATE,
    share=st.one_of(st.sampled_from([None, 0.0, 1.0]), st.floats(0, 1)),
    within=st.sampled_from(["row", "tensor"]),
    seed=st.integers(0, 99),
)
def test_magprune_against_the_formula(
    tensor: torch.Tensor, drop_rate: float, share: float | None, within: str, seed: int
) -> None:
    room = 2 * min(drop_rate, 1 - drop_rate)
    width = (WIDEST if share is None else share) * room
    if drop_rate + width / 2 >= 1:
        share, width = 0.0, 0.0
    pruned = MagPrune(drop_rate, "widest" if share is None else width, within)(tensor, name="w", seed=seed)
    assert (pruned.dtype, pruned.shape) == (tensor.dtype, tensor.shape)
    probabilities = slow_probabilities(tensor, drop_rate, width, within)
    kept = slow_kept(tensor.numel(), probabilities, name="w", seed=seed)
    factors = [float(1 / (1 - p)) if keep else 0.0 for p, keep in zip(probabilities, kept, strict=True)]
    expected = (tensor.float() * torch.tensor(factors).view(tensor.shape)).to(tensor.dtype)
    assert torch.equal(pruned != 0, expected != 0)
    torch.testing.assert_close(pruned, expected, rtol=max(1e-6, torch.finfo(tensor.dtype).eps), atol=1e-7)


@given(
    rates=st.lists(st.floats(0, 1), min_size=2, max_size=5),
    within=st.sampled_from(["row", "tensor"]),
    fixed=st.booleans(),
)
def test_magprune_masks_of_one_window_are_nested_over_drop_rates(rates: list[float], within: str, fixed: bool) -> None:
    """Also of the widest one, under which every probability grows with the drop rate."""
    room = min((2 * min(rate, 1 - rate) for rate in rates if 0 < rate < 1 - 1e-9), default=0.0)
    window = 0.9 * room if fixed else "widest"
    # At 0 and 1 there is no window, so that a fixed one only compares the rates between.
    between = sorted(rate for rate in rates if not fixed or 0 < rate < 1 - 1e-9)
    kept = [MagPrune(rate, window, within)(normal(4, 60), name="w", seed=0) != 0 for rate in between]
    for gentle, harsh in itertools.pairwise(kept):
        assert not (harsh & ~gentle).any()


@pytest.mark.parametrize("within", ["row", "tensor"])
@pytest.mark.parametrize("rescale", RESCALES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_window_zero_is_dare(dtype: torch.dtype, rescale: str | float, within: str) -> None:
    tensor = normal(50, 60).to(dtype)
    for p in (0.0, 1e-9, 0.3, 0.5, 0.9, 0.999, 1.0):
        dare = Dare(p, rescale)(tensor, name="w", seed=0)
        assert torch.equal(words(MagPrune(p, 0, within, rescale)(tensor, name="w", seed=0)), words(dare))


@pytest.mark.parametrize("drop_rate", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("within", ["row", "tensor"])
def test_equal_entries_are_dropped_with_probability_p(drop_rate: float, within: str) -> None:
    """Ranking ties by their own random numbers would drop .863 at .9."""
    n = 400_000
    pruned = MagPrune(drop_rate, within=within)(torch.ones(100, n // 100), name="w", seed=0)
    assert torch.equal(words(pruned), words(MagPrune(drop_rate, 0)(torch.ones(100, n // 100), name="w", seed=0)))
    dropped = int((pruned == 0).sum())
    assert abs(dropped - n * drop_rate) < SIGMAS * math.sqrt(n * drop_rate * (1 - drop_rate))


@pytest.mark.parametrize(("drop_rate", "window"), [(0.5, "widest"), (0.9, "widest"), (0.3, 0.14), (0.3, 0.6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("within", ["row", "tensor"])
def test_keep_probability_at_each_decile_of_ranks(
    drop_rate: float, window: str | float, dtype: torch.dtype, within: str
) -> None:
    """Exact bounds from the binomial of each decile's mean probability, 1e-6 for all ten and the total."""
    shape = (50, 10_000)
    pruner = MagPrune(drop_rate, window, within)
    tensor = normal(*shape).to(dtype)
    kept = (pruner(tensor, name="w", seed=0) != 0).double()
    order = tensor.float().abs().reshape(1 if within == "tensor" else 50, -1).argsort(dim=1)
    by_decile = kept.reshape(order.shape).gather(1, order).reshape(order.shape[0], 10, -1).sum(dim=(0, 2))
    n = tensor.numel() // 10
    for decile, count in enumerate(by_decile.tolist()):
        keep = 1 - drop_rate - pruner.width * (0.5 - (decile + 0.5) / 10)
        assert binom.ppf(FALSE_ALARM / 22, n, keep) <= count <= binom.isf(FALSE_ALARM / 22, n, keep)
    total = kept.sum().item()
    assert binom.ppf(FALSE_ALARM / 22, 10 * n, 1 - drop_rate) <= total
    assert total <= binom.isf(FALSE_ALARM / 22, 10 * n, 1 - drop_rate)


@given(tensor=tensors(), drop_rate=st.floats(0.01, 0.99), within=st.sampled_from(["row", "tensor"]))
def test_mean_of_the_probabilities_is_the_drop_rate(tensor: torch.Tensor, drop_rate: float, within: str) -> None:
    pruner = MagPrune(drop_rate, within=within)
    found = slow_probabilities(tensor, drop_rate, pruner.width, within)
    assert not found or sum(found) == Fraction(drop_rate) * len(found)
    row = tensor.reshape(1, -1) if within == "tensor" or tensor.dim() < 2 else tensor.flatten(1)
    if tensor.numel():
        sums = rank_sums(row.float().contiguous())
        ours = pruner.probabilities(row.shape[1], sums)
        assert float(ours.mean()) == pytest.approx(drop_rate, abs=1e-12)
        assert ours.reshape(-1).tolist() == pytest.approx([float(p) for p in found], abs=1e-12)


@pytest.mark.parametrize("within", ["row", "tensor"])
@pytest.mark.parametrize("drop_rate", [0.5, 0.9])
def test_magprune_is_unbiased_with_the_variance_of_the_formula(drop_rate: float, within: str) -> None:
    """Each entry is δ/(1-p_i) when kept, in a binomial number of 4000 seeds; 1e-6 over all entries.

    So its mean is δ and its variance p_i/(1-p_i)·δ². The chi-square of all counts is within 6 sigma.
    """
    n_seeds = 4000
    delta = normal(4, 25, seed=1)
    pruner = MagPrune(drop_rate, within=within)
    samples = torch.stack([pruner(delta, name="w", seed=seed) for seed in range(n_seeds)]).reshape(n_seeds, -1)
    keep = np.array([float(1 - p) for p in slow_probabilities(delta, drop_rate, pruner.width, within)])
    scaled = torch.from_numpy(1 / keep) * delta.reshape(-1).double()
    kept = samples != 0
    torch.testing.assert_close(samples.double(), torch.where(kept, scaled, 0.0), rtol=1e-6, atol=0)
    counts = kept.sum(dim=0).numpy()
    assert (binom.ppf(FALSE_ALARM / 200, n_seeds, keep) <= counts).all()
    assert (counts <= binom.isf(FALSE_ALARM / 200, n_seeds, keep)).all()
    z = (counts - n_seeds * keep) / np.sqrt(n_seeds * keep * (1 - keep))
    assert abs((z**2).mean() - 1) < SIGMAS * math.sqrt(2.1 / len(keep))
    relative = (samples.double().numpy() / delta.reshape(-1).double().numpy()).mean(axis=0)
    assert abs((relative - 1).mean()) < SIGMAS * math.sqrt(((1 - keep) / keep).sum() / n_seeds) / len(keep)


@pytest.mark.parametrize(
    ("one", "other"),
    [((0, "w"), (1, "w")), ((0, "w"), (0, "v")), ((0, "l.0.w"), (0, "l.1.w")), ((1, "1.w"), (11, "w"))],
)
def test_masks_of_other_seeds_and_tensors_are_independent(one: tuple[int, str], other: tuple[int, str]) -> None:
    """Products of (kept - its probability) at equal and shifted positions: 5 sigma, 6e-7 a shift."""
    n, pruner = 100_000, MagPrune(0.5)
    tensor = normal(n)
    (ranks,) = rank_sums(tensor[None])
    keep = 1 - 0.5 - pruner.width * (0.5 - (ranks / 2 - 1) / (n - 1))
    first, second = ((pruner(tensor, name=name, seed=seed) != 0).double() - keep for seed, name in (one, other))
    for shift in range(5):
        a, b = first[: n - shift], second[shift:]
        spread = float(((keep * (1 - keep))[: n - shift] * (keep * (1 - keep))[shift:]).sum()) ** 0.5
        assert abs(float((a * b).sum())) < 5 * spread


def test_rows_and_tensor_are_ranked_apart() -> None:
    tensor = normal(2, 20_000)
    tensor[1] *= 100
    by_row, by_tensor = (
        (MagPrune(0.5, within=within)(tensor, name="w", seed=0) != 0).double() for within in ("row", "tensor")
    )
    # By row each keeps a half; in the whole tensor the small row is the less kept one: means .725 and .275.
    assert by_row.mean(dim=1).tolist() == pytest.approx([0.5, 0.5], abs=0.03)
    assert by_tensor.mean(dim=1).tolist() == pytest.approx([0.275, 0.725], abs=0.03)
    assert (Magnitude(0.5, "row")(tensor, name="w", seed=0) != 0).sum(dim=1).tolist() == [10_000, 10_000]
    assert (Magnitude(0.5)(tensor, name="w", seed=0) != 0).sum(dim=1).min() < 500


def test_ranks_are_integers_whatever_the_dtype() -> None:
    # In bfloat16 ranks of 4096 entries would collapse to some hundreds, and those of fp16 end at 65504.
    tensor = torch.arange(1, 2049.0).half().repeat(40)
    sums = rank_sums(tensor.float()[None])
    assert sums.unique().numel() == 2048
    pruned = MagPrune(0.5, within="tensor")(tensor, name="w", seed=0)
    assert pruned.isfinite().all()
    assert pruned.dtype == torch.float16


@pytest.mark.parametrize(
    ("drop_rate", "window", "limit"),
    [
        (0.3, 0.61, "at most 0.6"),
        (0.3, 0.7, "at most 0.6"),
        (0.9, 0.2, "below 0.2"),
        (0.9, 0.25, "below 0.2"),
        (0.5, 1.0, "below 1"),
        (0.5, 3, "below 1"),
        (0.25, 0.50001, "at most 0.5"),
        (0.999, 0.01, "below 0.002"),
    ],
)
def test_too_wide_a_window_names_the_largest(drop_rate: float, window: float, limit: str) -> None:
    with pytest.raises(ValueError, match=rf"{limit}$") as raised:
        MagPrune(drop_rate, window)
    assert repr(window) in str(raised.value)
    assert repr(drop_rate) in str(raised.value)


@pytest.mark.parametrize(("drop_rate", "window"), [(0.3, 0.6), (0.9, 0.199), (0.5, 0.999), (0.25, 0.5), (0.01, 0)])
def test_windows_up_to_the_limit_are_allowed(drop_rate: float, window: float) -> None:
    checked_window(window, drop_rate)
    assert MagPrune(drop_rate, window)(normal(100), name="w", seed=0).isfinite().all()


@pytest.mark.parametrize("window", [0, 0.5, 1, 7.0, 1e300, "widest"])
def test_drop_rates_without_room_accept_any_window(window: float | str) -> None:
    tensor = normal(50)
    assert torch.equal(MagPrune(0, window)(tensor, name="w", seed=0), tensor)
    assert not MagPrune(1, window)(tensor, name="w", seed=0).any()
    assert MagPrune(0, window).width == MagPrune(1.0, window).width == 0


@pytest.mark.parametrize("window", [-0.1, math.nan, math.inf, -math.inf, "wide", "0.1", None, [0.1], True], ids=str)
@pytest.mark.parametrize("drop_rate", [0, 0.5, 1])
def test_window_of_no_known_form(drop_rate: float, window: object) -> None:
    with pytest.raises(ValueError, match="window, where not 'widest', must be a finite number of at least 0") as raised:
        MagPrune(drop_rate, window)  # type: ignore[arg-type]
    assert repr(window) in str(raised.value)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99])
def test_widest_window_is_nine_tenths_of_the_room(p: float) -> None:
    assert MagPrune(p).width == pytest.approx(1.8 * min(p, 1 - p))
    same = MagPrune(p, MagPrune(p).width)
    assert torch.equal(same(normal(9, 9), name="w", seed=0), MagPrune(p)(normal(9, 9), name="w", seed=0))


@pytest.mark.parametrize("drop_rate", [1 / 3, 0.1, 0.123456789, 2 / 7])
def test_the_limit_that_an_error_names_is_allowed(drop_rate: float) -> None:
    with pytest.raises(ValueError, match="it must be at most") as raised:
        MagPrune(drop_rate, window=0.99)
    MagPrune(drop_rate, window=float(str(raised.value).rsplit(" ", 1)[1]))
