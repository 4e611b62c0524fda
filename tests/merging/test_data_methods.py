"""Fisher-weighted means and regression means against their definitions, least squares and each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_analysis.deltas.delta import load_delta
from delta_analysis.merging.average import Average
from delta_analysis.merging.fisher import Fisher
from delta_analysis.merging.methods import MergeMethod, Parts
from delta_analysis.merging.regmean import RegMean
from delta_analysis.merging.statistics import gather

INPUTS, OUTPUTS = 5, 3
METHODS: tuple[MergeMethod, ...] = (Fisher(), RegMean())


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parts(
    deltas: Sequence[torch.Tensor],
    statistics: Sequence[torch.Tensor] | None = None,
    weights: Sequence[float] | None = None,
) -> Parts:
    shares = tuple(weights or [1.0] * len(deltas))
    return Parts(
        "w", tuple(deltas), shares, torch.zeros_like(deltas[0]), None if statistics is None else tuple(statistics)
    )


def moments(x: torch.Tensor) -> torch.Tensor:
    """Of a weight (outputs, inputs)."""
    return (x.T @ x / len(x)).double()[None]


DELTAS = [normal(OUTPUTS, INPUTS, seed=seed) for seed in (1, 2, 3)]
WEIGHTS = (1.0, 0.25, 2.0)


def mean(weights: Sequence[float] = (1.0, 1.0, 1.0)) -> torch.Tensor:
    return Average()(parts(DELTAS, weights=weights))


@settings(deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(st.floats(0.01, 100), min_size=1, max_size=4),
    st.floats(-3, 3),
    st.floats(1e-9, 10),
    st.floats(1e-30, 1e10),
)
def test_fisher_is_the_mean_weighted_by_information(
    seed: int, weights: list[float], scaling: float, floor: float, unit: float
) -> None:
    deltas = [normal(OUTPUTS, INPUTS, seed=seed + k) for k in range(len(weights))]
    known = [normal(OUTPUTS, INPUTS, seed=seed - 1 - k).square() * unit for k in range(len(weights))]
    values, shares = (np.stack([each.double().numpy() for each in side]) for side in (deltas, known))
    shares = (shares + floor * shares.mean()) * np.array(weights)[:, None, None]
    expected = scaling * (shares * values).sum(0) / shares.sum(0)
    merged = Fisher(scaling, floor)(parts(deltas, known, weights))
    assert merged.dtype == torch.float32
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_fisher_of_one_model_that_knows_is_that_model() -> None:
    known = [torch.ones(OUTPUTS, INPUTS), torch.zeros(OUTPUTS, INPUTS), torch.zeros(OUTPUTS, INPUTS)]
    torch.testing.assert_close(Fisher(floor=1e-12)(parts(DELTAS, known)), DELTAS[0])
    # Where none knows anything, it is the mean.
    known[0][1] = 0
    merged = Fisher()(parts(DELTAS, known, WEIGHTS))
    torch.testing.assert_close(merged[1], mean(WEIGHTS)[1])
    torch.testing.assert_close(merged[0], DELTAS[0][0], rtol=1e-4, atol=1e-4)


def test_fisher_of_models_is_the_mean_of_models_less_the_base() -> None:
    base, known = normal(OUTPUTS, INPUTS), [normal(OUTPUTS, INPUTS, seed=9 + k).square() + 0.1 for k in range(3)]
    models = sum(information * (base + delta) for information, delta in zip(known, DELTAS, strict=True)) / sum(known)
    torch.testing.assert_close(Fisher(floor=1e-12)(parts(DELTAS, known)), models - base)


def test_fisher_merges_tensors_of_any_shape_in_blocks() -> None:
    deltas, known = [normal(700, 800, seed=k) for k in (1, 2)], [normal(700, 800, seed=k).square() for k in (3, 4)]
    expected = (deltas[0] * known[0] + deltas[1] * known[1]) / (known[0] + known[1])
    torch.testing.assert_close(Fisher(floor=1e-12)(parts(deltas, known)), expected, rtol=1e-4, atol=1e-5)
    vectors, scalars = ([each[i] for each in deltas] for i in (0, (0, 0)))
    assert Fisher()(parts(vectors, [each[0] for each in known])).shape == (800,)
    assert Fisher()(parts(scalars, [each[0, 0] for each in known])).shape == ()


def outer(statistics: Sequence[torch.Tensor], *, transposed: bool) -> list[torch.Tensor]:
    """As they are for a weight (inputs, outputs)."""
    return [each.transpose(0, 1) for each in statistics] if transposed else list(statistics)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, OUTPUTS), (INPUTS, 1), (INPUTS, OUTPUTS), (INPUTS, INPUTS)])
def test_regmean_is_the_solution_of_least_squares(inputs: int, outputs: int, transposed: bool) -> None:
    base = normal(outputs, inputs)
    deltas = [normal(outputs, inputs, seed=k) for k in (1, 2, 3)]
    data = [normal(7 + k, inputs, seed=10 + k) * (1 + k) for k in range(3)]
    # Each model's outputs on its data, all rows of a model as one, by its weight.
    scales = [(weight / len(x)) ** 0.5 for weight, x in zip(WEIGHTS, data, strict=True)]
    rows = torch.cat([scale * x for scale, x in zip(scales, data, strict=True)]).double()
    wanted = [scale * x @ (base + delta).T for scale, x, delta in zip(scales, data, deltas, strict=True)]
    model = torch.linalg.lstsq(rows, torch.cat(wanted).double()).solution
    given_deltas = [each.T.contiguous() for each in deltas] if transposed else deltas
    statistics = outer([moments(x) for x in data], transposed=transposed)
    merged = RegMean(shrink=1.0, ridge=0.0)(parts(given_deltas, statistics, WEIGHTS))
    assert merged.dtype == torch.float32 and merged.is_contiguous()
    torch.testing.assert_close(merged.T if transposed else merged, (model.T - base).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_regmean_shrinks_and_has_a_ridge(transposed: bool) -> None:
    known = [moments(normal(9, INPUTS, seed=k)) for k in (4, 5, 6)]
    level = np.mean([np.diag(each[0].numpy()) for each in known])
    left, right = np.zeros((INPUTS, INPUTS)), np.zeros((INPUTS, OUTPUTS))
    for weight, each, delta in zip(WEIGHTS, known, DELTAS, strict=True):
        matrix = each[0].numpy()
        matrix = np.where(np.eye(INPUTS) > 0, matrix, 0.7 * matrix) + 0.01 * level * np.eye(INPUTS)
        left += weight * matrix
        right += weight * matrix @ delta.double().numpy().T
    deltas = [each.T for each in DELTAS] if transposed else DELTAS
    before = [each.clone() for each in known]
    merged = RegMean(-2.0, shrink=0.7, ridge=0.01)(parts(deltas, outer(known, transposed=transposed), WEIGHTS))
    expected = -2 * np.linalg.inv(left) @ right
    np.testing.assert_allclose(merged if transposed else merged.T, expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(one, other) for one, other in zip(known, before, strict=True))


@pytest.mark.parametrize("amount", [1e-6, 0.5])
def test_regmean_without_correlations_is_fisher(amount: float) -> None:
    # Of outputs with Gaussian noise the moments' diagonal is the Fisher information.
    known = [moments(normal(9, INPUTS, seed=k) * k) for k in (4, 5, 6)]
    diagonals = [each[0].diagonal().float().expand(OUTPUTS, INPUTS) for each in known]
    by_regression = RegMean(shrink=0.0, ridge=amount)(parts(DELTAS, known, WEIGHTS))
    torch.testing.assert_close(by_regression, Fisher(floor=amount)(parts(DELTAS, diagonals, WEIGHTS)))


def test_equal_statistics_give_the_mean() -> None:
    same = moments(normal(9, INPUTS))
    torch.testing.assert_close(RegMean()(parts(DELTAS, [same] * 3, WEIGHTS)), mean(WEIGHTS))
    even = normal(OUTPUTS, INPUTS).square()
    torch.testing.assert_close(Fisher()(parts(DELTAS, [even] * 3, WEIGHTS)), mean(WEIGHTS))


def test_a_large_ridge_or_floor_gives_the_mean() -> None:
    known = [moments(normal(9, INPUTS, seed=k) * 10**k) for k in (0, 1, 2)]
    torch.testing.assert_close(RegMean(ridge=1e12)(parts(DELTAS, known, WEIGHTS)), mean(WEIGHTS))
    even = [normal(OUTPUTS, INPUTS, seed=k).square() * 100**k for k in (0, 1, 2)]
    torch.testing.assert_close(Fisher(floor=1e12)(parts(DELTAS, even, WEIGHTS)), mean(WEIGHTS))


def test_equal_deltas_are_left_as_they_are() -> None:
    known = [moments(normal(9, INPUTS, seed=k)) for k in (4, 5, 6)]
    torch.testing.assert_close(RegMean(2.0)(parts(DELTAS[:1] * 3, known)), 2 * DELTAS[0])
    even = [normal(OUTPUTS, INPUTS, seed=k).square() for k in (4, 5, 6)]
    torch.testing.assert_close(Fisher(2.0)(parts(DELTAS[:1] * 3, even)), 2 * DELTAS[0])


@pytest.mark.parametrize("method", METHODS, ids=lambda each: each.label)
def test_tensors_of_which_the_data_says_nothing_get_the_mean(method: MergeMethod) -> None:
    method = dataclasses.replace(method, scaling=0.5)  # type: ignore[type-var]
    silent = torch.zeros(OUTPUTS, INPUTS) if method.statistic == "fisher" else torch.zeros(1, INPUTS, INPUTS)
    for statistics in (None, [silent] * 3):
        torch.testing.assert_close(method(parts(DELTAS, statistics, WEIGHTS)), mean(WEIGHTS) / 2)


def test_moments_of_too_few_inputs_need_a_ridge_or_less_correlation() -> None:
    known = [moments(normal(2, INPUTS, seed=k)) for k in (4, 5)]
    both = parts(DELTAS[:2], known)
    with pytest.raises(ValueError, match="tensor 'w': the moments of its 5 inputs are singular.*raise ridge"):
        RegMean(shrink=1.0, ridge=0.0)(both)
    for method in (RegMean(shrink=1.0, ridge=1e-6), RegMean(shrink=0.9, ridge=0.0)):
        assert method(both).isfinite().all()
    # An input that is always zero, and one of another unit, which is no lack of data.
    dead = normal(9, INPUTS)
    dead[:, 0] = 0
    with pytest.raises(ValueError, match="singular"):
        RegMean(ridge=0.0)(parts(DELTAS[:1], [moments(dead)]))
    torch.testing.assert_close(RegMean()(parts(DELTAS[:1], [moments(dead)])), DELTAS[0])
    unlike = normal(9, INPUTS) * torch.tensor([1e-3, 1.0, 1.0, 1.0, 1e3])
    torch.testing.assert_close(RegMean(ridge=0.0)(parts(DELTAS[:1], [moments(unlike)])), DELTAS[0])


@pytest.mark.parametrize("weights", [(1.0, 1.0, -0.5), (0.0, 0.0, 0.0)])
@pytest.mark.parametrize("method", METHODS, ids=lambda each: each.label)
def test_weights_of_a_mean_are_not_negative(method: MergeMethod, weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="weights .* at least 0, not all of them 0"):
        method(parts(DELTAS, weights=weights))


def test_regmean_of_fine_tunes_keeps_their_outputs_better_than_the_mean() -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    deltas = [load_delta(base="zoo:tiny/base", finetuned=f"zoo:tiny/{each}") for each in ("instruct", "math")]
    data = [[{"input_ids": torch.randint(1, 96, (20, 30), generator=torch.Generator().manual_seed(k))}] for k in (0, 1)]
    known = [gather("moments", delta, batches)[name] for delta, batches in zip(deltas, data, strict=True)]
    tensors = [delta[name] for delta in deltas]

    def error(merged: torch.Tensor) -> float:
        missed = [(merged - each).double() for each in tensors]
        return sum(float(torch.einsum("oi,ij,oj", d, m[0], d)) for d, m in zip(missed, known, strict=True))

    plain, best = (error(RegMean(ridge=ridge)(parts(tensors, known))) for ridge in (1e9, 1e-6))
    assert error(Average()(parts(tensors))) == pytest.approx(plain)
    assert best < plain
    assert error(RegMean(shrink=1.0)(parts(tensors, known))) <= best
