"""Noise like that of DARE: equal to dropping where it is dropping, of the promised mean and variance elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import kstest, norm

import delta_analysis as da
from delta_analysis.pruning import Dare, Pruner
from delta_analysis.pruning.transforms import Change, Clipped, Permuted, Scaled, SignsRedrawn, Topless
from delta_analysis.reports.parameter_checks import choose_evaluation
from delta_analysis.studies.causes import Noise
from delta_analysis.sweeps.engine import useful_seeds
from delta_analysis.sweeps.pairs import Edit, Pair
from delta_analysis.sweeps.tolerance import HIGHEST, LOWEST, at_drop_rate
from tests.tiny_family import cells_of

SOURCES: tuple[Change | None, ...] = (None, Scaled(3.0), Clipped(0.25), Topless(0.25), Permuted(), SignsRedrawn())
KINDS = ("dropping", "gaussian")
# Small whole numbers, whose sums and doubles are exact.
WHOLE = torch.tensor([[1.0, -2.0, 3.0, -4.0], [5.0, -6.0, 7.0, 64.0]])
EPS = 2.0**-23


def added(noise: Noise, tensor: torch.Tensor, seed: int = 0, name: str = "w") -> torch.Tensor:
    return noise(tensor, name=name, seed=seed) - tensor


FINITE = st.lists(st.floats(-1e3, 1e3, width=32, allow_subnormal=False), min_size=1, max_size=30)


@given(values=FINITE, drop_rate=st.floats(0, 0.999), seed=st.integers(0, 99))
@example(values=[0.1, -0.3, 0.7] * 9, drop_rate=0.7, seed=0)
def test_noise_of_dropping_the_delta_is_dare(values: list[float], drop_rate: float, seed: int) -> None:
    """To the last bit of float32: the sum with the delta rounds once more; up to 0.5 that changes nothing."""
    tensor = torch.tensor(values)
    found, dare = (each(tensor, name="w", seed=seed) for each in (Noise(drop_rate), Dare(drop_rate)))
    assert torch.equal(found == 0, dare == 0)
    if drop_rate <= 0.5:
        assert torch.equal(found, dare)
    else:
        assert ((found - dare).abs() <= EPS * dare.abs()).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.label if source else "delta")
def test_at_drop_rate_0_nothing_is_added(kind: str, source: Change | None) -> None:
    noise = Noise(0.0, kind, source)  # type: ignore[arg-type]
    assert torch.equal(noise(WHOLE, name="w", seed=0), WHOLE)
    assert not noise.random


@pytest.mark.parametrize("drop_rate", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", [None, Scaled(3.0), Topless(0.125), Clipped(0.25)], ids=str)
def test_mean_and_variance_over_seeds(drop_rate: float, kind: str, source: Change | None) -> None:
    """The mean is δ and the variance `p/(1-p) d²`, within five standard errors."""
    seeds = 1500
    noise = Noise(drop_rate, kind, source)  # type: ignore[arg-type]
    drawn = torch.stack([noise(WHOLE, name="w", seed=seed) for seed in range(seeds)]).double()
    d = (WHOLE if source is None else source(WHOLE, name="w", seed=0)).double()
    odds = drop_rate / (1 - drop_rate)
    spread = odds**0.5 * d.abs()
    assert ((drawn.mean(0) - WHOLE).abs() <= 5 * spread / seeds**0.5 + 1e-6).all()
    # The fourth moment of the noise over the square of its variance.
    kurtosis = 3.0 if kind == "gaussian" else (drop_rate + odds**4 * (1 - drop_rate)) / odds**2
    error = 5 * ((kurtosis - 1) / seeds) ** 0.5
    squares = (drawn - WHOLE).square().mean(0)
    assert ((squares - spread**2).abs() <= error * spread**2 + 1e-9).all()


@pytest.mark.parametrize("kind", KINDS)
def test_noise_as_of_a_permuted_delta_has_one_variance_for_all(kind: str) -> None:
    """Over seeds every entry gets the mean square of the tensor."""
    noise = Noise(0.5, kind, Permuted())  # type: ignore[arg-type]
    squares = torch.stack([added(noise, WHOLE, seed) for seed in range(3000)]).double().square()
    standard_error = squares.std(0) / 3000**0.5
    assert ((squares.mean(0) - WHOLE.double().square().mean()).abs() <= 5 * standard_error).all()


def test_gaussian_noise_is_normal() -> None:
    tensor = torch.full((300, 200), 0.02)
    for drop_rate in (0.1, 0.9):
        z = added(Noise(drop_rate, "gaussian"), tensor).double().numpy() / (0.02 * np.sqrt(drop_rate / (1 - drop_rate)))
        # The sum with δ is rounded.
        assert kstest(z.ravel(), norm.cdf).pvalue > 0.01
        # Neighbours are independent: five standard errors of a correlation.
        assert abs(np.corrcoef(z[:, :-1].ravel(), z[:, 1:].ravel())[0, 1]) < 5 / np.sqrt(z.size)


def test_noise_is_paired_over_drop_rates_and_sources() -> None:
    """The same numbers under the same seed and name: only their size is another."""
    tensor = torch.linspace(-1, 1, 101)
    units = [
        added(Noise(p, "gaussian", source), tensor, seed=2) / (p / (1 - p)) ** 0.5 / scale
        for p in (0.1, 0.5, 0.9)
        for source, scale in ((None, 1.0), (Scaled(5.0), 5.0))
    ]
    for each in units[1:]:
        torch.testing.assert_close(each, units[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(added(Noise(0.5, "gaussian"), tensor, seed=3), units[2])
    assert not torch.allclose(added(Noise(0.5, "gaussian"), tensor, seed=2, name="v"), units[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.label if source else "delta")
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.float32, (4, 6)), (torch.float64, (5,)), (torch.float16, ()), (torch.bfloat16, (0,))],
    ids=str,
)
def test_shape_and_dtype_stay(kind: str, source: Change | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = tensor.clone()
    noise = Noise(0.7, kind, source)  # type: ignore[arg-type]
    found = noise(tensor, name="w", seed=0)
    assert (found.shape, found.dtype, found.device) == (tensor.shape, dtype, tensor.device)
    assert found.isfinite().all()
    assert torch.equal(tensor, before)
    assert torch.equal(found, noise(tensor, name="w", seed=0))
    if tensor.dim() == 2:
        assert torch.equal(noise(tensor.t().contiguous().t(), name="w", seed=0), found)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of 'dropping', 'gaussian'; not 'uniform'"):
        Noise(0.5, "uniform")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at 1 the variance of DARE's noise is infinite"):
        Noise(1.0)
    for drop_rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="drop_rate"):
            Noise(drop_rate)


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_for_the_tolerated_drop_rate_keeps_kind_and_source(kind: str) -> None:
    edit = Edit(Noise(0.5, kind, Scaled(2.0)), "mlp")  # type: ignore[arg-type]
    for rate in (0.0, LOWEST, HIGHEST):
        assert at_drop_rate(edit, rate) == replace(edit, pruner=Noise(rate, kind, Scaled(2.0)))  # type: ignore[arg-type]
    assert useful_seeds(edit.pruner, [3, 4]) == [3, 4]
    assert useful_seeds(at_drop_rate(edit, 0.0).pruner, [3, 4]) == [3]


def test_a_sweep_over_noise(tmp_path: Path) -> None:
    """Noise of dropping answers as DARE does; every kind and source has cells of its own, which are used again."""
    pair = Pair("base → code", "zoo:tiny/base", "zoo:tiny/code")
    noises = [Noise(0.3), Noise(0.3, source=Scaled(0.1)), Noise(0.3, source=Scaled(0.2)), Noise(0.3, "gaussian")]
    edits: list[Pruner] = [Dare(0.0), Noise(0.0, source=Scaled(0.1)), Dare(0.3), *noises]
    evaluation = choose_evaluation("code", 40)
    cells = da.sweep([pair], edits, [evaluation], [0], tmp_path)
    # Untouched is untouched; all else has a key of its own.
    assert len(cells_of(tmp_path)) == 1 + 1 + len(noises)
    outcomes = [np.array(each) for each in cells["outcomes"]]
    accuracies = cells["value"].to_numpy()
    np.testing.assert_array_equal(outcomes[0], outcomes[1])
    np.testing.assert_array_equal(outcomes[2], outcomes[3])
    # DARE breaks this pair at 0.3; noise of a tenth of the size does not.
    assert accuracies[0] > 0.9 > 0.7 > accuracies[2]
    assert accuracies[4] > 0.9
    assert accuracies[6] < 0.7
    assert cells["option_kind"].tolist()[3:] == ["dropping", "dropping", "dropping", "gaussian"]
    assert cells["option_source"].tolist()[4:6] == ["Scaled(factor=0.1)", "Scaled(factor=0.2)"]
    assert cells["method"].nunique() == 5
    written = {file: file.stat().st_mtime_ns for file in cells_of(tmp_path)}
    again = da.sweep([pair], edits[::-1], [evaluation], [0], tmp_path)
    assert {file: file.stat().st_mtime_ns for file in cells_of(tmp_path)} == written
    assert again["value"].tolist() == cells["value"].tolist()[::-1]
