"""Rates and factors by layer, and the low-rank part kept whole: against numerical searches and drawn masks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar

import delta_analysis as da
from delta_analysis.prediction.layers import delta_noise
from delta_analysis.pruning import Dare, Magnitude, MagPrune, Pruner
from delta_analysis.studies.mitigation import LowRankResidual, PerTensor, allot, factors_by_layer
from tests.tiny_family import NORM, QUERY, UP, Reads, make_family

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(), (0,), (1,), (50,), (6, 7), (3, 4, 5), (0, 3), (40, 60)]
SIGMAS = 6
"""Width of the statistical bounds: a right operator fails one with probability 2e-9."""
TENSORS = st.lists(st.tuples(st.integers(1, 10_000), st.floats(1e-8, 1e3)), min_size=1, max_size=8)
RATES = st.floats(0.001, 0.999)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def table(shares: Mapping[str, float | list[float]]) -> pd.DataFrame:
    """Noise base as a share of the output, a row a use of a tensor."""
    return pd.DataFrame(
        [
            {"tensor": name, "noise_share": share}
            for name, given in shares.items()
            for share in (given if isinstance(given, list) else [given])
        ]
    )


def kept_by(pruner: PerTensor) -> np.ndarray:
    return np.array([1 - each.drop_rate for _, each in pruner.pruners])


def named(tensors: list[tuple[int, float]]) -> tuple[dict[str, int], dict[str, float]]:
    """Names -> numbers of entries, and names -> noise."""
    return {f"w{i}": n for i, (n, _) in enumerate(tensors)}, {f"w{i}": a for i, (_, a) in enumerate(tensors)}


@settings(deadline=None)
@given(tensors=TENSORS, drop_rate=RATES, rule=st.sampled_from(["least", "equal"]))
def test_the_budget_is_met(tensors: list[tuple[int, float]], drop_rate: float, rule: str) -> None:
    numel, noise = named(tensors)
    pruner = allot(table(noise), numel, drop_rate, rule=rule)
    assert [name for name, _ in pruner.pruners] == list(numel)
    n = np.array(list(numel.values()))
    assert n @ kept_by(pruner) == pytest.approx((1 - drop_rate) * n.sum(), rel=1e-9)
    assert pruner.drop_rate == drop_rate
    assert pruner.method == f"DARE, {rule} noise"


@settings(deadline=None)
@given(tensors=TENSORS, drop_rate=RATES)
def test_equal_noise_is_equal(tensors: list[tuple[int, float]], drop_rate: float) -> None:
    numel, noise = named(tensors)
    pruner = allot(table(noise), numel, drop_rate, rule="equal")
    p = np.array([each.drop_rate for _, each in pruner.pruners])
    made = np.array(list(noise.values())) * p / (1 - p)
    # Near 0 and 1 the rate itself is only known to rounding.
    clear = (p > 1e-6) & (p < 1 - 1e-6)
    assert made[clear] == pytest.approx(made[clear].mean() if clear.any() else 0, rel=1e-6)


@settings(deadline=None)
@given(tensors=TENSORS, drop_rate=RATES)
def test_least_noise_is_in_proportion_to_the_root_below_the_cap(
    tensors: list[tuple[int, float]], drop_rate: float
) -> None:
    numel, noise = named(tensors)
    k = kept_by(allot(table(noise), numel, drop_rate))
    roots = np.sqrt(np.array(list(noise.values())) / np.array(list(numel.values())))
    whole = k == 1
    ratio = k[~whole] / roots[~whole]
    if len(ratio):
        assert ratio == pytest.approx(ratio.mean(), rel=1e-6)
        # What is kept whole would be kept at more than 1.
        assert (roots[whole] * ratio.mean() >= 1 - 1e-6).all()


@pytest.mark.parametrize("drop_rate", [0.2, 0.5, 0.9, 0.99])
def test_least_noise_against_a_numerical_search(drop_rate: float) -> None:
    numel = {"a": 100, "b": 400, "c": 50, "d": 1000}
    noise = {"a": 0.5, "b": 0.01, "c": 1.0, "d": 0.2}
    n, a = (np.array(list(each.values()), dtype=float) for each in (numel, noise))
    found = minimize(
        lambda k: float((a * (1 / k - 1)).sum()),
        np.full(4, 1 - drop_rate),
        method="SLSQP",
        bounds=[(1e-4, 1)] * 4,
        constraints={"type": "eq", "fun": lambda k: (n @ k) / n.sum() - (1 - drop_rate)},
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    assert found.success
    keep = kept_by(allot(table(noise), numel, drop_rate))
    assert keep == pytest.approx(found.x, abs=2e-3)
    assert (a * (1 / keep - 1)).sum() <= found.fun * (1 + 1e-9)


def test_the_uses_of_a_tied_tensor_add_up() -> None:
    numel = {"embed": 300, "w": 100}
    for rule in ("least", "equal"):
        tied = allot(table({"embed": [0.1, 0.3], "w": 0.2}), numel, 0.7, rule=rule)
        assert tied == allot(table({"w": 0.2, "embed": 0.1 + 0.3}), numel, 0.7, rule=rule)
        assert tied != allot(table({"embed": 0.1, "w": 0.2}), numel, 0.7, rule=rule)


def test_what_makes_no_noise_is_dropped_first() -> None:
    numel, noise = {"zero": 100, "w": 100}, table({"zero": 0.0, "w": 0.2})
    for rule in ("least", "equal"):
        assert kept_by(allot(noise, numel, 0.6, rule=rule)) == pytest.approx([0, 0.8])
        # All that makes noise is just as much as is to be kept.
        assert kept_by(allot(noise, numel, 0.5, rule=rule)) == pytest.approx([0, 1])


def test_more_than_there_is_noise_for_cannot_be_kept() -> None:
    numel = {"zero": 100, "w": 100}
    for rule in ("least", "equal"):
        with pytest.raises(ValueError, match="tensors with noise have 100 entries, fewer than the 140 to be kept"):
            allot(table({"zero": 0.0, "w": 0.2}), numel, 0.3, rule=rule)
        with pytest.raises(ValueError, match="tensors with noise have 0 entries, fewer than the 20 to be kept"):
            allot(table({"zero": 0.0, "w": 0.0}), numel, 0.9, rule=rule)


def test_wrong_allotments_are_refused() -> None:
    noise, numel = table({"a": 0.1}), {"a": 10}
    with pytest.raises(ValueError, match="rule must be one of 'least', 'equal'; not 'most'"):
        allot(noise, numel, 0.5, rule="most")
    for bad in (0, 1, 1.0):
        with pytest.raises(ValueError, match="leaves nothing to allot"):
            allot(noise, numel, bad)
    for bad in (-0.5, 2, "0.5", math.nan):
        with pytest.raises(ValueError, match="drop_rate must be a number"):
            allot(noise, numel, bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="noise has no share for tensor 'b', one of 2 that it lacks"):
        allot(noise, numel | {"b": 3, "c": 4}, 0.5)


@pytest.mark.parametrize("bad", [math.nan, -0.1])
def test_a_tensor_without_a_share_is_refused(bad: float) -> None:
    numel = {"a": 10, "b": 10}
    with pytest.raises(ValueError, match="noise has no share for tensor 'b', one of 1 that it lacks"):
        allot(table({"a": 0.1, "b": bad}), numel, 0.5)
    # One use without output beside one that has it.
    tied = allot(table({"a": 0.1, "b": [math.nan, 0.3]}), numel, 0.5)
    assert tied == allot(table({"a": 0.1, "b": 0.3}), numel, 0.5)


def test_allotted_rates_lower_the_foretold_noise_of_a_real_delta() -> None:
    """By `layer_noise` itself, with the allotment as a pruner."""
    delta = da.load_delta(base="zoo:tiny/base", finetuned="zoo:tiny/code")
    noise = delta_noise(delta)
    numel = {name: tensor.numel() for name, tensor in delta.items()}
    least, equal = (allot(noise, numel, 0.9, rule=rule) for rule in ("least", "equal"))
    found = delta_noise(delta, pruners=(Dare(0.9), least, equal))
    shares = found.groupby("method")["error_share"]
    assert shares.sum()["DARE, least noise"] < shares.sum()["DARE, equal noise"]
    assert shares.sum()["DARE, least noise"] < 0.95 * shares.sum()["DARE"]
    own = found[found["method"] == "DARE, equal noise"]["error_share"]
    assert own[own > 0].to_numpy() == pytest.approx(own.max(), rel=1e-6)
    achieved = delta.pruned(least, seed=0).summary()
    dropped = float((achieved["achieved_drop_rate"] * achieved["tensor"].map(numel)).sum())
    # Thousands of tensors' entries: binomial, and no tensor's rate differs from its own by more.
    assert abs(dropped / sum(numel.values()) - 0.9) < SIGMAS * math.sqrt(0.09 / sum(numel.values()))


def sums(**gains: tuple[float, float]) -> pd.DataFrame:
    """Signal and noise of tensors."""
    return pd.DataFrame([{"tensor": name, "signal": s, "noise": n} for name, (s, n) in gains.items()])


def factors(pruner: PerTensor) -> list[float]:
    return [float(each.rescale) for _, each in pruner.pruners]  # type: ignore[arg-type]


@given(drop_rate=st.floats(0, 0.999), signal=st.floats(1e-6, 1e6), noise=st.floats(1e-6, 1e6))
def test_a_weight_of_0_is_dare(drop_rate: float, signal: float, noise: float) -> None:
    (factor,) = factors(factors_by_layer(sums(w=(signal, noise)), drop_rate, 0.0))
    assert factor == pytest.approx(1 / (1 - drop_rate))


@settings(deadline=None)
@given(
    drop_rate=st.floats(0.01, 0.99),
    signal=st.floats(0.01, 100),
    noise=st.floats(0.01, 100),
    weight=st.sampled_from([0.1, 1.0, 5.0]),
)
def test_the_factor_minimises_lost_signal_and_noise(
    drop_rate: float, signal: float, noise: float, weight: float
) -> None:
    """With a weight of 1 the squared error of the output; the search knows nothing of the closed form."""
    p = drop_rate
    found = minimize_scalar(
        lambda f: ((1 - p) * f - 1) ** 2 * signal + weight * p * (1 - p) * f**2 * noise,
        bounds=(1, 1 / (1 - p)),
        method="bounded",
        options={"xatol": 1e-10},
    )
    (factor,) = factors(factors_by_layer(sums(w=(signal, noise)), p, weight))
    assert factor == pytest.approx(found.x, rel=1e-3)
    assert 1 <= factor <= 1 / (1 - p) * (1 + 1e-12)


def test_a_weight_of_1_is_the_least_error_that_layer_noise_foretells() -> None:
    delta = da.load_delta(base="zoo:tiny/base", finetuned="zoo:tiny/instruct")
    texts = ["reverse abc\n", "what is 23 plus 45?\n"]
    noise = delta_noise(delta, texts)
    best = factors_by_layer(noise, 0.9, 1.0)
    assert best.method == "drop × factors by layer, weight 1"
    # A tied embedding has one factor for both uses, each by its share of its layer's output.
    error = delta_noise(delta, texts, pruners=(best, Dare(0.9), Dare(0.9, 3.0), Dare(0.9, "none")))
    by_tensor = error.pivot_table(index="tensor", columns="method", values="error_share", aggfunc="sum")
    for method in by_tensor.columns:
        assert (by_tensor[best.method] <= by_tensor[method] * (1 + 1e-9)).all()


def test_the_uses_of_a_tied_tensor_share_a_factor() -> None:
    tied = pd.concat([sums(e=(1.0, 2.0)), sums(e=(3.0, 2.0))])
    assert factors_by_layer(tied, 0.5, 1.0) == factors_by_layer(sums(e=(4.0, 4.0)), 0.5, 1.0)
    # Each counts by its share of the output of its layer, where there is one.
    scaled = tied.assign(output=[10.0, 0.1])
    expected = factors_by_layer(sums(e=(0.1 + 30.0, 0.2 + 20.0)), 0.5, 1.0)
    assert factors(factors_by_layer(scaled, 0.5, 1.0)) == pytest.approx(factors(expected))
    assert factors_by_layer(tied.assign(output=0.0), 0.5, 1.0) == factors_by_layer(tied, 0.5, 1.0)


def test_wrong_factors_are_refused() -> None:
    noise = sums(w=(1.0, 1.0))
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="weight must be a number of at least 0"):
            factors_by_layer(noise, 0.5, bad)
    delta = da.load_delta(base="zoo:tiny/base", finetuned="zoo:tiny/code")
    with pytest.raises(ValueError, match="noise has no signal; factors by layer need a table of layer_noise with inp"):
        factors_by_layer(delta_noise(delta), 0.5, 1.0)
    for rate, message in ((1, "nothing is left"), (-0.1, "must be a number in"), (1.5, "must be a number in")):
        with pytest.raises(ValueError, match=f"drop_rate.*{message}"):
            factors_by_layer(noise, rate, 1.0)


def test_each_tensor_has_a_pruner_of_its_own() -> None:
    pruner = PerTensor("by hand", 0.5, (("a", Dare(0.3)), ("b", MagPrune(0.9)), ("c", Magnitude(0.5))))
    tensor = normal(20, 30)
    for name, own in pruner.pruners:
        assert torch.equal(pruner(tensor, name=name, seed=4), own(tensor, name=name, seed=4))
    for name, known in (("a", Dare(0.3)), ("b", MagPrune(0.9))):
        for one, other in zip(pruner.law(tensor, name=name), known.law(tensor, name=name), strict=True):
            np.testing.assert_array_equal(one, other)
    assert not torch.equal(pruner(tensor, name="a", seed=4), pruner(tensor, name="a", seed=5))
    assert (pruner.method, pruner.rescale, pruner.random) == ("by hand", "by tensor", True)
    assert not PerTensor("by hand", 0.5, (("c", Magnitude(0.5)),)).random
    for call in (lambda: pruner(tensor, name="d", seed=0), lambda: pruner.law(tensor, name="d")):
        with pytest.raises(ValueError, match="tensor 'd' has no pruner of its own; 'by hand' was made for"):
            call()


def test_in_a_sweep(tmp_path: Path) -> None:
    """The weights that are judged are the base's plus the delta that each way leaves."""
    family = make_family(tmp_path)
    numel = {name: tensor.numel() for name, tensor in family.delta.items()}
    shares = {name: 0.01 * (i + 1) for i, name in enumerate(numel)}
    pruners: list[Pruner] = [allot(table(shares), numel, 0.5), LowRankResidual(0.5)]
    names = (UP, QUERY, NORM)
    cells = da.sweep([family.pair()], [Dare(0), *pruners], [Reads(names)], [0, 1], tmp_path / "out")
    for pruner in pruners:
        for seed in (0, 1):
            whole = [family.base_weights[name] + pruner(family.delta[name], name=name, seed=seed) for name in names]
            own = cells[(cells["method"] == pruner.method) & (cells["seed"] == seed)]
            expected = torch.cat([weight.reshape(-1) for weight in whole]).double()
            assert own["outcomes"].iloc[0] == pytest.approx(expected.tolist(), abs=1e-6)
            assert own["drop_rate"].iloc[0] == 0.5


def best_part(delta: torch.Tensor, rank: int) -> np.ndarray:
    """The nearest matrix of a rank, by numpy in float64."""
    left, values, right = np.linalg.svd(delta.double().numpy(), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


@pytest.mark.parametrize(("dtype", "shape"), [*zip(DTYPES * 2, SHAPES, strict=True)], ids=str)
def test_shape_and_dtype_are_kept(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = normal(*shape).to(dtype)
    before = tensor.clone()
    for drop_rate in (0.0, 0.5, 1.0):
        pruned = LowRankResidual(drop_rate)(tensor, name="w", seed=0)
        assert (pruned.shape, pruned.dtype) == (tensor.shape, dtype)
        if drop_rate == 0:
            assert torch.equal(pruned, tensor)
        if drop_rate == 1:
            assert not pruned.any()
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("drop_rate", [0.3, 0.9, 0.99])
def test_without_a_share_and_on_all_but_matrices_it_is_dare(drop_rate: float) -> None:
    for tensor, pruner in (
        (normal(60, 80), LowRankResidual(drop_rate, 0)),
        (normal(500), LowRankResidual(drop_rate)),
        (normal(20, 5, 5), LowRankResidual(drop_rate)),
        # Too little to keep for a single pair of vectors.
        (normal(1, 4), LowRankResidual(drop_rate, 1.0)),
    ):
        assert torch.equal(pruner(tensor, name="w", seed=1), Dare(drop_rate)(tensor, name="w", seed=1))


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("drop_rate", [0.2, 0.7, 0.9])
def test_numbers_kept_are_those_of_the_budget(drop_rate: float, share: float) -> None:
    """A low-rank part of the rank of the formula, plus the residual dropped by DARE at what is left of it."""
    rows, columns = 80, 120
    delta = normal(rows, columns)
    kept = (1 - drop_rate) * rows * columns
    rank = math.floor(share * kept / (rows + columns))
    assert rank >= 1
    pruned = LowRankResidual(drop_rate, share)(delta, name="w", seed=3)
    low = best_part(delta, rank)
    rate = 1 - (kept - rank * (rows + columns)) / (rows * columns)
    residual = Dare(rate)(delta - torch.from_numpy(low).float(), name="w", seed=3)
    torch.testing.assert_close(pruned.double(), torch.from_numpy(low) + residual.double(), rtol=1e-3, atol=1e-3)
    numbers = rank * (rows + columns) + int((residual != 0).sum())
    assert abs(numbers - kept) < SIGMAS * math.sqrt(rows * columns * rate * (1 - rate)) + 1


def rounding(delta: torch.Tensor, drop_rate: float, share: float) -> float:
    """What rounding may leave of an entry kept whole: an SVD in float32 errs by eps · the largest singular value.

    What the low-rank part misses by it is the residual, which DARE multiplies where it keeps it. The margin of 4 is for
    the constant of the error bound, which depends on the library and the machine.
    """
    rows, columns = delta.shape
    kept = (1 - drop_rate) * rows * columns
    residual_kept = kept - math.floor(share * kept / (rows + columns)) * (rows + columns)
    amplified = rows * columns / residual_kept
    return 4 * torch.finfo(torch.float32).eps * float(torch.linalg.matrix_norm(delta, 2)) * amplified


def test_a_delta_of_low_rank_is_kept_whole() -> None:
    delta = normal(60, 3) @ normal(3, 90, seed=1)
    for drop_rate, share in ((0.5, 0.5), (0.8, 0.5), (0.9, 1.0)):
        pruned, bound = LowRankResidual(drop_rate, share)(delta, name="w", seed=0), rounding(delta, drop_rate, share)
        assert bound < 0.01 * delta.std()
        torch.testing.assert_close(pruned, delta, rtol=0, atol=bound)
    # Of what may be kept at 0.9, half is rank 1 only.
    assert (LowRankResidual(0.9)(delta, name="w", seed=0) - delta).abs().max() > 0.1


def test_it_is_unbiased() -> None:
    delta, seeds = normal(30, 40), 2000
    pruner = LowRankResidual(0.7)
    drawn = torch.stack([pruner(delta, name="w", seed=seed) for seed in range(seeds)]).double()
    rank = int(0.5 * 0.3 * 1200 / 70)
    rate = 1 - (0.3 * 1200 - rank * 70) / 1200
    residual = delta.double() - torch.from_numpy(best_part(delta, rank))
    spread = (rate / (1 - rate) / seeds) ** 0.5 * residual.abs()
    errors = (drawn.mean(dim=0) - delta.double()) / spread
    assert float((errors**2).mean()) == pytest.approx(1, abs=SIGMAS * math.sqrt(3 / errors.numel()))


def test_low_rank_parameters() -> None:
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"share must be a number in \[0, 1\]"):
            LowRankResidual(0.5, bad)
    with pytest.raises(ValueError, match="drop_rate must be a number"):
        LowRankResidual(2)
    assert LowRankResidual(0.5).method == "rank + residual, 50%"
    assert LowRankResidual(0.5, 0.25).method == "rank + residual, 25%"
    assert [LowRankResidual(p).random for p in (0, 0.5, 1)] == [False, True, False]
