"""Keeping in proportion to magnitude: the scale against water filling, and the least variance against the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

import delta_analysis as da
from delta_analysis import plots
from delta_analysis._kernels.philox import random_bits
from delta_analysis.prediction.layers import delta_noise
from delta_analysis.pruning import Dare, MagPrune, bind
from delta_analysis.pruning.moments import Law, Lawful
from delta_analysis.pruning.proportional import KeepInProportion, Proportional, find_scale
from delta_analysis.sweeps import Edit
from tests.pruning.reference import DTYPES, RATE, SIGMAS, normal
from tests.tiny_family import NORM, QUERY, UP, Reads, make_family

BUCKET = 1 / 512
"""How much of the bucket in which probabilities reach 1 may be dropped beyond the drop rate."""
ROUNDED = 1e-9
"""Relative, of a scale of ten digits."""


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Of one size or of many, with zeros and ties or without, nearly equal, and of any dtype."""
    entry = draw(
        st.sampled_from(
            [
                st.floats(-2, 2, width=16),
                st.floats(1, 1.0078125, width=32),
                st.sampled_from([0.0, 1.0, -1.0, 1.0078125, 3.0]),
                st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False),
            ]
        )
    )
    values = draw(st.lists(entry, max_size=30))
    dtype = draw(st.sampled_from(DTYPES))
    return torch.tensor(values).to(dtype).nan_to_num(1.0, 1.0, -1.0)


def sizes_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().abs().double().reshape(-1).numpy()


def slow_scale(sizes: np.ndarray, drop_rate: float) -> float:
    """Water filling: with the largest m kept for certain, the others share what is left in proportion."""
    kept, falling = (1 - drop_rate) * len(sizes), np.sort(sizes[sizes > 0])[::-1]
    if len(falling) <= kept:
        return math.inf
    for m in range(len(falling)):
        scale = (kept - m) / falling[m:].sum()
        if scale * falling[m] <= 1 + 1e-12:
            return float(scale)
    raise AssertionError("no level fits")


def law_of(pruner: Lawful, tensor: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The drop probability and the factor of every entry."""
    law = pruner.law(tensor, name="w")
    return tuple(np.broadcast_to(np.asarray(each, dtype=float), tensor.shape).reshape(-1) for each in law)  # type: ignore[return-value]


def error_of(pruner: Lawful, tensor: torch.Tensor) -> float:
    """The expected squared error, all of it variance for an unbiased pruner."""
    drop, factor = law_of(pruner, tensor)
    return float(((drop * (1 - drop) * factor**2) * sizes_of(tensor) ** 2).sum())


@given(tensor=tensors(), drop_rate=RATE)
def test_scale_against_water_filling(tensor: torch.Tensor, drop_rate: float) -> None:
    found, exact = find_scale([("w", tensor)], drop_rate), slow_scale(sizes_of(tensor), drop_rate)
    if math.isinf(exact) or exact == 0:
        assert found == exact
    else:
        assert abs(found / exact - 1) < 0.01
    drop, factor = law_of(Proportional(drop_rate), tensor)
    keep = np.minimum(1, found * sizes_of(tensor)) if math.isfinite(found) else np.sign(sizes_of(tensor))
    np.testing.assert_allclose(1 - drop, keep, atol=1e-15)
    np.testing.assert_allclose(factor[drop < 1], 1 / (1 - drop[drop < 1]))


@given(tensor=tensors(), drop_rate=RATE)
def test_mean_drop_probability_is_the_drop_rate(tensor: torch.Tensor, drop_rate: float) -> None:
    """Or the share of zeros where there are more of them; off by less than the one bucket lets it be."""
    if not tensor.numel():
        return
    drop, _ = law_of(Proportional(drop_rate), tensor)
    expected = max(drop_rate, float((sizes_of(tensor) == 0).mean()))
    assert expected - ROUNDED <= drop.mean() <= expected + BUCKET + ROUNDED


def test_scale_is_exact_where_no_bucket_holds_two_sizes() -> None:
    """Powers of two and a tie: levels by hand."""
    delta = torch.tensor([8.0, -4.0, 4.0, 2.0, -1.0, 1.0])
    for drop_rate, scale in ((0.5, 2 / 12), (1 / 3, 3 / 12), (1 / 6, 2 / 4), (5 / 6, 1 / 20), (0.0, math.inf)):
        assert find_scale([("w", delta)], drop_rate) == pytest.approx(scale, rel=ROUNDED)
        assert slow_scale(sizes_of(delta), drop_rate) == pytest.approx(scale)


@given(tensor=tensors(), drop_rate=st.floats(0.001, 0.999), window=st.floats(0, 1))
def test_no_unbiased_way_has_less_variance(tensor: torch.Tensor, drop_rate: float, window: float) -> None:
    """At the drop rate that the bucket leaves, DARE and MAGPRUNE with any window make no smaller error."""
    if not sizes_of(tensor).any():
        return
    proportional = Proportional(drop_rate)
    own = error_of(proportional, tensor)
    achieved = float(law_of(proportional, tensor)[0].mean())
    others: list[Lawful] = [Dare(achieved)]
    if achieved < 1 - 1e-6:
        width = 1.8 * window * min(achieved, 1 - achieved)
        others += [MagPrune(achieved, width, "row"), MagPrune(achieved, width, "tensor")]
    for other in others:
        assert law_of(other, tensor)[0].mean() == pytest.approx(achieved)
        assert own <= error_of(other, tensor) * (1 + 1e-6) + 1e-9 * float((sizes_of(tensor) ** 2).sum())


@pytest.mark.parametrize("drop_rate", [0.1, 0.5, 0.9, 0.99])
def test_on_deltas_of_real_shape_it_beats_both_at_the_same_drop_rate(drop_rate: float) -> None:
    plain = normal(200, 300)
    for delta in (plain, plain**3, plain.bfloat16()):
        proportional, magprune, dare = (
            error_of(each, delta) for each in (Proportional(drop_rate), MagPrune(drop_rate), Dare(drop_rate))
        )
        assert proportional < magprune < dare


def test_the_least_variance_is_that_of_a_numerical_search() -> None:
    sizes = np.array([3.0, 1.0, 0.5, 0.25, 0.125])
    for drop_rate in (0.3, 0.5, 0.8):
        found = minimize(
            lambda keep: float((sizes**2 * (1 / keep - 1)).sum()),
            np.full(5, 1 - drop_rate),
            method="SLSQP",
            bounds=[(1e-3, 1)] * 5,
            constraints={"type": "eq", "fun": lambda keep, p=drop_rate: keep.sum() - 5 * (1 - p)},
            options={"ftol": 1e-13, "maxiter": 500},
        )
        assert found.success
        drop, _ = law_of(Proportional(drop_rate), torch.tensor(sizes))
        np.testing.assert_allclose(1 - drop, found.x, atol=1e-4)


@pytest.mark.parametrize("drop_rate", [0.3, 0.9])
def test_unbiased_with_the_variance_of_the_law(drop_rate: float) -> None:
    delta, seeds = normal(400), 3000
    drawn = np.stack([Proportional(drop_rate)(delta, name="w", seed=seed).double().numpy() for seed in range(seeds)])
    keep = np.minimum(1, find_scale([("w", delta)], drop_rate) * sizes_of(delta))
    variance = sizes_of(delta) ** 2 * (1 / keep - 1)
    errors = drawn - delta.double().numpy()
    # Means over entries and seeds, whose spread is known from the entries' second and fourth moments.
    assert abs((errors.mean(axis=0) * sizes_of(delta)).sum()) < SIGMAS * math.sqrt(
        (variance * sizes_of(delta) ** 2).sum() / seeds
    )
    q = 1 / keep
    fourth = sizes_of(delta) ** 4 * (keep * (q - 1) ** 4 + (1 - keep))
    spread = math.sqrt((fourth - variance**2).sum() / seeds)
    assert abs((errors**2).mean(axis=0).sum() - variance.sum()) < SIGMAS * spread
    assert np.abs(errors.mean(axis=0)[keep == 1]).max(initial=0) < 1e-6


@given(tensor=tensors(), drop_rate=RATE, seed=st.integers(0, 1000))
def test_random_numbers_are_those_of_dare(tensor: torch.Tensor, drop_rate: float, seed: int) -> None:
    drop, _ = law_of(Proportional(drop_rate), tensor)
    pruned = Proportional(drop_rate)(tensor, name="w", seed=seed)
    thresholds = np.round(drop * 2**32)
    kept = random_bits(tensor.numel(), name="w", seed=seed) >= thresholds
    values = torch.from_numpy(kept) * tensor.float() * torch.from_numpy(1 / np.maximum(1 - drop, 1e-300)).float()
    expected = torch.where(torch.from_numpy(kept), values, 0.0).to(tensor.dtype)
    assert torch.equal(pruned != 0, expected != 0)
    torch.testing.assert_close(pruned, expected, rtol=max(1e-6, torch.finfo(tensor.dtype).eps), atol=0)


@pytest.mark.parametrize("drop_rate", [1e-17, 2.0**-53, 1e-15, 1e-12])
def test_a_tiny_drop_rate_changes_hardly_anything(drop_rate: float) -> None:
    for seed in range(20):
        delta = normal(97, seed=seed)
        torch.testing.assert_close(Proportional(drop_rate)(delta, name="w", seed=seed), delta, rtol=1e-5, atol=0)


def test_zeros_are_dropped_first_and_count() -> None:
    delta = torch.cat([torch.zeros(60), normal(40)])
    for drop_rate in (0.0, 0.3, 0.6):
        # At least as many zeros as there are entries to drop: all others stay as they are.
        assert torch.equal(Proportional(drop_rate)(delta, name="w", seed=0), delta)
    drop, _ = law_of(Proportional(0.8), delta)
    assert drop.mean() == pytest.approx(0.8, abs=BUCKET)
    assert (drop[:60] == 1).all()
    assert 1 - drop[60:].mean() == pytest.approx(0.5, abs=BUCKET * 2.5)
    zeros = Proportional(0.5)(torch.zeros(5, 3), name="w", seed=0)
    assert torch.equal(zeros, torch.zeros(5, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("drop_rate", [0.1, 0.5, 0.9])
def test_of_equal_entries_it_is_dare(dtype: torch.dtype, drop_rate: float) -> None:
    delta = torch.full((30, 40), -0.375, dtype=dtype)
    drop, _ = law_of(Proportional(drop_rate), delta)
    np.testing.assert_allclose(drop, drop_rate, rtol=1e-8)
    # Thresholds differ by the rounding of the scale at most, which no number of these falls into.
    expected = Dare(drop_rate)(delta, name="w", seed=5)
    torch.testing.assert_close(Proportional(drop_rate)(delta, name="w", seed=5), expected, rtol=1e-6, atol=0)


def test_a_single_entry_falls_with_probability_p() -> None:
    for seed in range(20):
        dare = Dare(0.7)(torch.tensor(3.0), name="w", seed=seed)
        torch.testing.assert_close(Proportional(0.7)(torch.tensor(3.0), name="w", seed=seed), dare)


@pytest.fixture(scope="module")
def large() -> dict[str, torch.Tensor]:
    """Of several blocks: without ties, with many, and of half width."""
    plain = normal(300, 2000)
    return {"plain": plain, "ties": (plain * 4).round(), "half": plain.bfloat16()}


def test_strides_and_cuts_into_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = normal(40, 30)
    expected = Proportional(0.6)(tensor, name="w", seed=1)
    assert torch.equal(Proportional(0.6)(tensor.T.contiguous().T, name="w", seed=1), expected)
    monkeypatch.setattr("delta_analysis.pruning.proportional._SUMMED", 7)
    assert torch.equal(Proportional(0.6)(tensor, name="w", seed=1), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_is_refused_by_name(dtype: torch.dtype, bad: float) -> None:
    tensor = torch.tensor([1.0, bad, 2.0], dtype=dtype)
    for call in (partial(Proportional(0.5), seed=0), Proportional(0.5).law):
        with pytest.raises(ValueError, match=r"tensor 'model\.w' has NaN or infinite entries"):
            call(tensor, name="model.w")
    with pytest.raises(ValueError, match="tensor 'b' has NaN"):
        Proportional(0.5, "model").over({"a": torch.ones(2), "b": tensor, "c": tensor}, 0)


def test_its_rescale_is_its_own_and_its_colour_one() -> None:
    with pytest.raises(ValueError, match="rescale must be 'inverse_keep', .* not 'none'"):
        Proportional(0.5, rescale="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'x\.w' is one"):
        Proportional(0.5, "model").law(torch.ones(3), name="x.w")
    methods = [Proportional(0.5).method, Proportional(0.5, "model").method]
    assert set(plots.method_colours(methods).values()) == {plots.METHOD_COLOURS["proportional"]}


def family(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of very different sizes."""
    return {"b": normal(20, 30, seed=seed), "a": 0.01 * normal(50), "c": torch.zeros(4), "d": 5 * normal(3, 3, 3)}


@pytest.mark.parametrize("drop_rate", [0.0, 0.05, 0.5, 0.9, 1.0])
def test_the_whole_model_has_one_scale_whatever_the_order(drop_rate: float) -> None:
    given = family()
    pruner = Proportional(drop_rate, "model")
    prune = bind(pruner, given, 3)
    assert isinstance(prune, KeepInProportion)
    assert prune == bind(pruner, dict(reversed(given.items())), 3)
    together = torch.cat([tensor.reshape(-1) for tensor in given.values()])
    assert prune.scale == find_scale([("all", together)], drop_rate)
    drop = np.concatenate([law_of(prune, tensor)[0] for tensor in given.values()])
    # Four of the entries are zero, and dropped whatever the rate.
    assert drop.mean() == pytest.approx(max(drop_rate, 4 / len(together)), abs=BUCKET)
    for name, tensor in given.items():
        apart = KeepInProportion(prune.scale)(tensor, name=name, seed=3)
        assert torch.equal(prune(tensor, name=name, seed=3), apart)


def test_tensors_of_small_entries_lose_more_over_the_model() -> None:
    prune = bind(Proportional(0.5, "model"), family(), 0)
    assert isinstance(prune, KeepInProportion)
    drop = {name: float(law_of(prune, tensor)[0].mean()) for name, tensor in family().items()}
    assert drop["a"] > 0.95
    assert drop["d"] < 0.15
    assert drop["c"] == 1
    apart = {name: float(law_of(Proportional(0.5), tensor)[0].mean()) for name, tensor in family().items()}
    assert apart == pytest.approx({"a": 0.5, "b": 0.5, "c": 1, "d": 0.5}, abs=BUCKET)


def test_over_the_model_the_error_is_least_of_all(large: dict[str, torch.Tensor]) -> None:
    given = {"small": 0.1 * large["plain"], "large": large["ties"]}

    def total(of: Mapping[str, Law]) -> float:
        return sum(
            float(np.sum(np.asarray(law.variance) * sizes_of(given[name]).reshape(given[name].shape) ** 2))
            for name, law in of.items()
        )

    model = bind(Proportional(0.9, "model"), given, 0)
    assert isinstance(model, KeepInProportion)
    laws = [
        {name: each.law(tensor, name=name) for name, tensor in given.items()}
        for each in (model, Proportional(0.9), MagPrune(0.9), Dare(0.9))
    ]
    errors = [total(each) for each in laws]
    assert errors == sorted(errors)


def test_an_empty_model_is_nothing_to_prune() -> None:
    assert bind(Proportional(0.5, "model"), {}, 0) == KeepInProportion(math.inf)


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_within_a_delta(scope: str) -> None:
    delta = da.load_delta(base="zoo:tiny/base", finetuned="zoo:tiny/instruct")
    pruned = delta.pruned(da.Proportional(0.9, scope), seed=2)  # type: ignore[arg-type]
    summary = pruned.summary()
    numel = summary["tensor"].map({name: tensor.numel() for name, tensor in delta.items()})
    achieved = float((summary["achieved_drop_rate"] * numel).sum() / numel.sum())
    n = int(numel.sum())
    assert abs(achieved - 0.9) < SIGMAS * math.sqrt(0.09 / n) + BUCKET
    if scope == "tensor":
        name = next(iter(delta))
        assert torch.equal(pruned[name], Proportional(0.9)(delta[name], name=name, seed=2))
    else:
        assert summary["achieved_drop_rate"].max() - summary["achieved_drop_rate"].min() > 0.1
        scale = find_scale(sorted(delta.items()), 0.9)
        for name in list(delta)[:3]:
            assert torch.equal(pruned[name], KeepInProportion(scale)(delta[name], name=name, seed=2))


def test_the_noise_in_layers_is_that_of_the_law() -> None:
    """Without inputs energies are squared norms: the error of each tensor is its summed variance."""
    delta = da.load_delta(base="zoo:tiny/base", finetuned="zoo:tiny/instruct")
    pruners = (Proportional(0.9), Proportional(0.9, "model"), MagPrune(0.9), Dare(0.9))
    noise = delta_noise(delta, pruners=pruners)
    model = bind(pruners[1], delta, 0)
    assert isinstance(model, KeepInProportion)
    for method, each in (("proportional", pruners[0]), ("proportional by model", model)):
        own = noise[noise["method"] == method].set_index("tensor")["error"]
        for name in list(delta)[:4]:
            assert own[name] == pytest.approx(error_of(each, delta[name]), rel=1e-6)
    sums = noise.groupby("method")["error"].sum()
    assert sums["proportional by model"] < sums["proportional"] < sums["MAGPRUNE"] < sums["DARE"]


def test_in_a_sweep_over_a_scope(tmp_path: Path) -> None:
    """The model is that of the tensors in scope; what is judged are the base's weights plus the pruned delta."""
    family = make_family(tmp_path)
    edits = [Edit(Proportional(0.6, scope), "linear") for scope in ("tensor", "model")]  # type: ignore[arg-type]
    cells = da.sweep([family.pair()], [da.Dare(0), *edits], [Reads((UP, QUERY, NORM))], [0, 1], tmp_path / "out")
    linear = {name: tensor for name, tensor in family.delta.items() if tensor.dim() == 2 and ".layers." in name}
    for edit in edits:
        for seed in (0, 1):
            prune = bind(edit.pruner, linear, seed)
            delta = {name: prune(tensor, name=name, seed=seed) for name, tensor in linear.items()} | {
                NORM: family.delta[NORM]
            }
            expected = torch.cat([(family.base_weights[name] + delta[name]).reshape(-1) for name in (UP, QUERY, NORM)])
            own = cells[(cells["method"] == edit.pruner.method) & (cells["seed"] == seed)]
            assert own["outcomes"].iloc[0] == pytest.approx(expected.double().tolist())
