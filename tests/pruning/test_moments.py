"""Laws of pruners: Φ of Kearns and Saul, and means and variances of pruned entries against the pruners themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

import delta_analysis as da
from delta_analysis.pruning.moments import Law, Lawful, expected_factor

SIGMAS = 6
"""Width of the statistical bounds: a right law fails one with probability 2e-9."""
SEEDS = 2000
PRUNERS: list[Lawful] = [
    da.Dare(0.3),
    da.Dare(0.9, "none"),
    da.Dare(0.8, 4.0),
    da.MagPrune(0.5),
    da.MagPrune(0.8, window=0.1, within="tensor"),
    da.MagPrune(0.3, window=0.6),
    da.MagPrune(0.6, rescale="none"),
    da.MagPrune(0.7, rescale=2.0),
]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(1, 100))
def test_mean_and_variance_are_those_of_two_values(drop: float, factor: float) -> None:
    law = Law(drop, factor)
    values, chances = np.array([0, factor]), np.array([drop, 1 - drop])
    mean = values @ chances
    assert law.bias == pytest.approx(mean - 1)
    assert law.variance == pytest.approx((values - mean) ** 2 @ chances, abs=1e-9)


@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
def test_mean_and_variance_are_those_of_the_pruner(pruner: Lawful) -> None:
    delta = normal(5, 8)
    law = pruner.law(delta, name="w")
    pruned = torch.stack([pruner(delta, name="w", seed=seed) for seed in range(SEEDS)])  # type: ignore[operator]
    moved = (pruned - delta).double() / delta
    variance = torch.as_tensor(law.variance).expand(delta.shape)
    kept = (pruned != 0).double().mean(dim=0)
    drop = torch.as_tensor(law.drop, dtype=torch.float64).expand(delta.shape)
    # Entries whose probability is 0 or 1 have no error at all.
    wide = SIGMAS * (drop * (1 - drop) / SEEDS).sqrt() + 1e-6
    assert ((kept - (1 - drop)).abs() <= wide).all()
    bias = torch.as_tensor(law.bias, dtype=torch.float64)
    assert ((moved.mean(dim=0) - bias).abs() <= SIGMAS * (variance / SEEDS).sqrt() + 1e-6).all()
    assert ((moved - bias).square().mean() / variance.mean()).item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("rank", ["row", "tensor"])
def test_magprunes_probabilities_fall_with_the_magnitude(rank: str) -> None:
    delta = normal(4, 9)
    delta[2, 3] = -delta[2, 5]
    sizes = delta.abs().double().numpy()
    ranks = rankdata(sizes, axis=1) if rank == "row" else rankdata(sizes).reshape(sizes.shape)
    place = (ranks - 1) / ((9 if rank == "row" else 36) - 1)
    law = da.MagPrune(0.6, window=0.5, within=rank).law(delta, name="w")  # type: ignore[arg-type]
    assert isinstance(law.drop, torch.Tensor)
    assert law.drop.dtype == torch.float64
    np.testing.assert_allclose(law.drop.numpy(), 0.6 + 0.5 * (0.5 - place), rtol=1e-6)
    np.testing.assert_allclose(torch.as_tensor(law.bias).numpy(), 0, atol=1e-12)
    assert law.drop.mean().item() == pytest.approx(0.6)


RANKS = st.sampled_from(["row", "tensor"])
SHAPES = st.sampled_from([(1,), (7,), (3, 5)])


@settings(deadline=None)
@given(st.floats(0, 0.999), st.floats(0, 0.999), RANKS, SHAPES)
def test_probabilities_stay_within_0_and_1(p: float, share: float, rank: str, shape: tuple[int, ...]) -> None:
    law = da.MagPrune(p, window=share * min(2 * p, 2 * (1 - p)), within=rank).law(normal(*shape), name="w")  # type: ignore[arg-type]
    drop, variance = map(torch.as_tensor, (law.drop, law.variance))
    assert drop.shape == shape
    # Up to rounding.
    assert ((drop >= -1e-15) & (drop <= 1)).all()
    assert (variance >= -1e-15).all()


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_nothing_is_left_to_chance_at_drop_rates_0_and_1(p: float) -> None:
    delta = normal(3, 4)
    for pruner in (da.Dare(p), da.Dare(p, "none"), da.Dare(p, "l2"), da.MagPrune(p), da.MagPrune(p, rescale="l1")):
        law = pruner.law(delta, name="w")
        assert not torch.as_tensor(law.variance).any()
        assert (torch.as_tensor(law.bias) == -p).all()


def test_factors_that_restore_a_norm_are_ratios_of_mean_norms() -> None:
    delta = normal(20, 30)
    assert da.Dare(0.9, "l1").law(delta, name="w").factor == pytest.approx(10)
    assert da.Dare(0.9, "l2").law(delta, name="w").factor == pytest.approx(10**0.5)
    for power, rescale in ((1, "l1"), (2, "l2")):
        law = da.MagPrune(0.8, rescale=rescale).law(delta, name="w")
        kept = np.mean(
            [
                float(da.MagPrune(0.8, rescale="none")(delta, name="w", seed=seed).abs().double().pow(power).sum())
                for seed in range(500)
            ]
        )
        whole = float(delta.abs().double().pow(power).sum())
        assert law.factor == pytest.approx((whole / kept) ** (1 / power), rel=0.01)


def test_a_norm_of_zero_asks_for_no_factor() -> None:
    zeros = torch.zeros(3, 4)
    assert da.Dare(0.5, "l2").law(zeros, name="w") == (0.5, 1.0)
    assert expected_factor("l1", normal(3, 4), torch.ones(3, 4, dtype=torch.float64), 1.0) == 1
    assert torch.equal(
        torch.as_tensor(expected_factor("inverse_keep", zeros, torch.tensor([0.5, 1.0]), 0.75)),
        torch.tensor([2.0, 1.0]),
    )


def test_pruners_that_are_not_random_have_no_law() -> None:
    assert isinstance(da.Dare(0.5), Lawful)
    assert isinstance(da.MagPrune(0.5), Lawful)
    assert not isinstance(da.Magnitude(0.5), Lawful)
