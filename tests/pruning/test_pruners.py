"""DARE: which entries are dropped, what the rest becomes, and what it does to a delta on average."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_analysis._kernels.philox import random_bits
from delta_analysis.deltas.delta import load_delta
from delta_analysis.pruning import Dare
from delta_analysis.pruning.rescaling import uniform_factor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4), (2, 3, 1, 4), (0,), (3, 0, 2)]
RATES = st.floats(0, 1)
RESCALES = ["inverse_keep", "none", 1.0, 2.5]
SIGMAS = 6
"""Width of the statistical bounds: a right operator fails one with probability 2e-9."""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def slow_kept(count: int, drop_rate: float, *, name: str, seed: int) -> list[bool]:
    """The rule of the design, entry by entry, in exact arithmetic."""
    threshold = round(Fraction(drop_rate) * 2**32)
    return [int(u) >= threshold for u in random_bits(count, name=name, seed=seed)]


@settings(deadline=None)
@given(drop_rate=RATES, seed=st.integers(0, 2**40), name=st.text("abw.1", max_size=6))
def test_drop_rule_against_the_reference(drop_rate: float, seed: int, name: str) -> None:
    pruned = Dare(drop_rate, rescale="none")(torch.ones(50), name=name, seed=seed)
    assert (pruned == 1).tolist() == slow_kept(50, drop_rate, name=name, seed=seed)
    assert set(pruned.tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("offset", [-1, 0, 0.4, 0.6, 1])
def test_threshold_is_rounded_and_the_comparison_is_strict(offset: float) -> None:
    # Entry i falls when the threshold passes u_i: at u_i itself, or rounded down to it, it survives.
    for i, u in enumerate(random_bits(40, name="w", seed=0).tolist()):
        kept = Dare((u + offset) / 2**32, "none")(torch.ones(40), name="w", seed=0)
        assert bool(kept[i]) == (offset < 0.5)


@settings(deadline=None)
@given(rates=st.lists(RATES, min_size=2, max_size=6), seed=st.integers(0, 1000), rescale=st.sampled_from(RESCALES))
def test_masks_are_nested_over_drop_rates(rates: list[float], seed: int, rescale: str | float) -> None:
    kept = [Dare(rate, rescale)(torch.ones(200), name="w", seed=seed) != 0 for rate in sorted(rates)]
    for gentle, harsh in itertools.pairwise(kept):
        assert not (harsh & ~gentle).any()


@settings(deadline=None)
@given(rate=st.floats(0.001, 0.999), factor=st.floats(1, 100), seed=st.integers(0, 1000))
def test_rescale_variants_share_one_mask(rate: float, factor: float, seed: int) -> None:
    delta = torch.ones(200)
    dropped = Dare(rate, "none")(delta, name="w", seed=seed)
    for rescale, expected in (("inverse_keep", 1 / (1 - rate)), (factor, factor)):
        scaled = Dare(rate, rescale)(delta, name="w", seed=seed)
        torch.testing.assert_close(scaled, dropped * expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_shape_and_dtype_for_every_input(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    delta = torch.ones(shape, dtype=dtype)
    pruned = Dare(0.5)(delta, name="w", seed=3)
    assert pruned.dtype == dtype
    assert pruned.shape == delta.shape
    kept = slow_kept(math.prod(shape), 0.5, name="w", seed=3)
    assert pruned.reshape(-1).tolist() == [2.0 * keep for keep in kept]


def test_single_entry_falls_under_some_seeds_and_not_under_others() -> None:
    kept = [bool(Dare(0.5)(torch.tensor(1.0), name="w", seed=seed)) for seed in range(40)]
    assert kept == [slow_kept(1, 0.5, name="w", seed=seed)[0] for seed in range(40)]
    assert 0 < sum(kept) < 40


def test_entries_are_numbered_row_by_row_whatever_the_strides() -> None:
    delta = normal(40, 30)
    pruned = Dare(0.6)(delta, name="w", seed=1)
    assert torch.equal(Dare(0.6)(delta.T.contiguous().T, name="w", seed=1), pruned)
    assert torch.equal(Dare(0.6)(delta.reshape(-1), name="w", seed=1).reshape(40, 30), pruned)


@pytest.mark.parametrize("rescale", RESCALES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_survivors_are_the_float32_product_rounded_once(dtype: torch.dtype, rescale: str | float) -> None:
    delta = normal(1000).to(dtype)
    pruned = Dare(0.7, rescale)(delta, name="w", seed=0)
    factor = {"inverse_keep": 1 / (1 - 0.7), "none": 1.0}.get(str(rescale)) or float(rescale)
    expected = torch.from_numpy(delta.float().numpy() * np.float32(factor)).to(dtype)
    kept = torch.tensor(slow_kept(1000, 0.7, name="w", seed=0))
    assert torch.equal(pruned[kept], expected[kept])
    assert not pruned[~kept].any()


@pytest.mark.parametrize("rescale", ["inverse_keep", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_drop_rate_zero_gives_the_same_bits(dtype: torch.dtype, rescale: str) -> None:
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 6e-8, -1e-40, 65504.0])
    delta = torch.cat([normal(1000), special]).to(dtype)
    assert raw(Dare(0, rescale)(delta, name="w", seed=0)) == raw(delta)


@pytest.mark.parametrize("drop_rate", [1, 1.0, 1 - 2**-50])
@pytest.mark.parametrize("rescale", RESCALES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_drop_rate_one_gives_zeros(dtype: torch.dtype, rescale: str | float, drop_rate: float) -> None:
    delta = torch.tensor([1.0, -2.0, 0.0, math.inf, math.nan, 6e4], dtype=dtype)
    pruned = Dare(drop_rate, rescale)(delta, name="w", seed=0)
    assert pruned.tolist() == [0.0] * 6
    assert pruned.dtype == dtype


def test_factor_at_drop_rate_one_is_finite() -> None:
    assert [uniform_factor(rescale, 1) for rescale in RESCALES] == [1.0] * 4


def test_nan_stays_where_it_is() -> None:
    delta = normal(500)
    spoilt = delta.clone()
    spoilt[::3] = math.nan
    clean, pruned = (Dare(0.5)(tensor, name="w", seed=0) for tensor in (delta, spoilt))
    there = torch.zeros(500, dtype=torch.bool)
    there[::3] = True
    kept = torch.tensor(slow_kept(500, 0.5, name="w", seed=0))
    assert torch.equal(pruned[~there], clean[~there])
    assert torch.equal(pruned.isnan(), there & kept)
    assert not pruned[there & ~kept].any()


@pytest.mark.parametrize("drop_rate", [0, 0.5, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_is_left_as_it_was(dtype: torch.dtype, drop_rate: float) -> None:
    delta = normal(300).to(dtype)
    before = delta.clone()
    pruned = Dare(drop_rate)(delta, name="w", seed=0)
    pruned.fill_(7)
    assert raw(delta) == raw(before)


@pytest.mark.parametrize("drop_rate", [0.1, 0.5, 0.9])
def test_dare_is_unbiased_with_the_variance_of_the_formula(drop_rate: float) -> None:
    """Mean δ and variance p/(1-p)·δ² over 4000 seeds: each entry and all together within 6 sigma."""
    n_entries, n_seeds = 100, 4000
    delta = normal(n_entries, seed=1)
    pruner = Dare(drop_rate)
    samples = torch.stack([pruner(delta, name="w", seed=seed) for seed in range(n_seeds)]).double().numpy()
    variance = drop_rate / (1 - drop_rate) * delta.double().numpy() ** 2
    z = (samples.mean(axis=0) - delta.double().numpy()) / np.sqrt(variance / n_seeds)
    assert np.abs(z).max() < SIGMAS
    assert abs((z**2).mean() - 1) < SIGMAS * math.sqrt(2 / n_entries)
    ratio = samples.var(axis=0, ddof=1) / variance
    kurtosis = 3 + (1 - 6 * drop_rate * (1 - drop_rate)) / (drop_rate * (1 - drop_rate))
    spread = math.sqrt((kurtosis - 1 + 2 / n_seeds) / n_seeds)
    assert abs(ratio.mean() - 1) < SIGMAS * spread / math.sqrt(n_entries)


@pytest.mark.parametrize(("drop_rate", "cosine"), [(0.5, 0.7071), (0.9, 0.3162), (0.99, 0.1)])
@pytest.mark.parametrize("rescale", ["inverse_keep", "none"])
def test_cosine_to_the_original_is_the_root_of_the_keep_rate(drop_rate: float, cosine: float, rescale: str) -> None:
    n = 1_000_000
    delta = normal(n)
    pruned = Dare(drop_rate, rescale)(delta, name="w", seed=0)
    measured = float(torch.nn.functional.cosine_similarity(delta.double(), pruned.double(), dim=0))
    # The cosine is the root of the kept share of Σδ², of relative variance 3p/(n(1-p)) for normal δ.
    relative = SIGMAS / 2 * math.sqrt(3 * drop_rate / (n * (1 - drop_rate)))
    assert measured == pytest.approx(cosine, rel=relative)


@pytest.mark.parametrize("drop_rate", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("rescale", ["inverse_keep", "none"])
def test_relative_squared_error(drop_rate: float, rescale: str) -> None:
    """p/(1-p) for DARE, p for drop only, for entries of equal size."""
    n = 1_000_000
    delta = normal(n).sign()
    pruned = Dare(drop_rate, rescale)(delta, name="w", seed=0)
    error = float((pruned - delta).double().square().sum() / delta.double().square().sum())
    expected = drop_rate / (1 - drop_rate) if rescale == "inverse_keep" else drop_rate
    # With q the share dropped, DARE's error is q + (1 - q)·(p/(1-p))², drop only's is q.
    slope = abs(1 - (drop_rate / (1 - drop_rate)) ** 2) if rescale == "inverse_keep" else 1
    tolerance = SIGMAS * slope * math.sqrt(drop_rate * (1 - drop_rate) / n)
    assert abs(error - expected) < tolerance + 1e-6 * expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_in_a_thousand_survives_in_every_dtype(dtype: torch.dtype) -> None:
    # Peers that draw or compare in bfloat16 keep nothing here: 0.999 rounds to 1.
    n, drop_rate = 1_000_000, 0.999
    pruned = Dare(drop_rate)(torch.ones(n, dtype=dtype), name="w", seed=0)
    kept = int(torch.count_nonzero(pruned))
    assert abs(kept - n * 0.001) < SIGMAS * math.sqrt(n * 0.001 * 0.999)
    assert torch.equal(pruned.unique(), torch.tensor([0.0, 1000.0], dtype=dtype))


def test_masks_of_every_dtype_are_equal() -> None:
    delta = normal(10_000).sign()
    kept = [Dare(0.9)(delta.to(dtype), name="w", seed=0) != 0 for dtype in DTYPES]
    assert all(torch.equal(mask, kept[0]) for mask in kept)


@pytest.mark.parametrize("drop_rate", [0, 0.2, 0.9, 0.999])
@pytest.mark.parametrize("factor", [1, 1.0, 3, 12.5])
def test_rescale_number_is_the_factor_at_every_drop_rate(drop_rate: float, factor: float) -> None:
    pruned = Dare(drop_rate, rescale=factor)(torch.full((5000,), 2.0), name="w", seed=0)
    assert set(pruned.tolist()) - {0.0} == {2.0 * factor}


def test_other_names_and_seeds_give_other_masks() -> None:
    masks = {
        tuple((Dare(0.5)(torch.ones(64), name=name, seed=seed) != 0).tolist()) for name in "vw" for seed in range(3)
    }
    assert len(masks) == 6


def test_pruner_is_a_frozen_value() -> None:
    assert Dare(0.5) == Dare(0.5, "inverse_keep")
    assert len({Dare(0.5), Dare(0.5), Dare(0.5, "none"), Dare(0.6)}) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        Dare(0.5).drop_rate = 0.6  # type: ignore[misc]


@pytest.mark.parametrize(
    ("rescale", "method"),
    [("inverse_keep", "DARE"), ("none", "drop only"), (2.0, "drop × 2.0"), (4, "drop × 4")],
)
def test_method_name(rescale: str | float, method: str) -> None:
    assert Dare(0.5, rescale).method == method


@pytest.mark.parametrize("drop_rate", [-0.1, -1e-12, 1.0000001, 90, math.nan, math.inf, -math.inf, "0.5", None, [0.5]])
def test_bad_drop_rate_is_named(drop_rate: object) -> None:
    with pytest.raises(ValueError, match=r"drop_rate must be a number in \[0, 1\]") as raised:
        Dare(drop_rate)  # type: ignore[arg-type]
    assert repr(drop_rate) in str(raised.value)


@pytest.mark.parametrize("drop_rate", [np.float64(0.5), np.float32(0.5), np.int64(1), 1, 0], ids=repr)
def test_numpy_numbers_are_numbers(drop_rate: float) -> None:
    delta = normal(100)
    assert torch.equal(Dare(drop_rate)(delta, name="w", seed=0), Dare(float(drop_rate))(delta, name="w", seed=0))


@pytest.mark.parametrize("rescale", ["inverse", "l3", "", "2.0", "None"])
def test_unknown_rescale_lists_the_known_ones(rescale: str) -> None:
    with pytest.raises(ValueError, match="'inverse_keep', 'none', 'l1', 'l2'") as raised:
        Dare(0.5, rescale)
    assert repr(rescale) in str(raised.value)


@pytest.mark.parametrize("rescale", [None, [2.0], {}], ids=str)
def test_rescale_of_no_known_form_is_a_value_error(rescale: object) -> None:
    with pytest.raises(ValueError, match="rescale"):
        Dare(0.5, rescale)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rescale", "factor"), [(0.5, "2"), (0.1, "10"), (0.25, "4"), (0.999, "1.001")])
def test_factor_below_one_asks_whether_q_was_meant(rescale: float, factor: str) -> None:
    with pytest.raises(ValueError, match=rf"must be at least 1; not {rescale}.*1/q = {factor}(\D|$)"):
        Dare(0.5, rescale)


@pytest.mark.parametrize("rescale", [0, 0.0, -1, -0.5, math.nan, math.inf, -math.inf], ids=str)
def test_factor_that_no_q_explains(rescale: float) -> None:
    with pytest.raises(ValueError, match="must be at least 1") as raised:
        Dare(0.5, rescale)
    assert "1/q" not in str(raised.value)


TENSORS = {
    f"model.layers.{layer}.{part}.weight": normal(6, 9, seed=10 * layer + i)
    for layer in range(3)
    for i, part in enumerate(("q_proj", "k_proj", "up_proj"))
}


@pytest.fixture
def sources(save_checkpoint: Callable[..., Path]) -> dict[str, Path]:
    base = save_checkpoint("base", {name: torch.zeros(6, 9) for name in TENSORS})
    names = list(TENSORS)
    some = {name: TENSORS[name] for name in names[4:]}
    return {
        "base": base,
        "whole": save_checkpoint("whole", TENSORS),
        "sharded": save_checkpoint("sharded", TENSORS, shards={"b.safetensors": names[:5], "a.safetensors": names[5:]}),
        "part": save_checkpoint("part", some),
    }


def test_order_of_reading_and_sharding_change_no_mask(sources: dict[str, Path]) -> None:
    expected = {name: Dare(0.5)(tensor, name=name, seed=7) for name, tensor in TENSORS.items()}
    for kind in ("whole", "sharded", "part"):
        delta = load_delta(base=sources["base"], finetuned=sources[kind]).pruned(Dare(0.5), seed=7)
        forwards = {name: delta[name] for name in delta}
        backwards = {name: delta[name] for name in reversed(list(delta))}
        assert len(forwards) == (5 if kind == "part" else 9)
        for name, tensor in forwards.items():
            assert torch.equal(tensor, expected[name])
            assert torch.equal(backwards[name], expected[name])


def test_pruned_delta_is_lazy_and_leaves_the_first_one_alone(sources: dict[str, Path]) -> None:
    delta = load_delta(base=sources["base"], finetuned=sources["whole"])
    once = delta.pruned(Dare(0.5), seed=7)
    again = once.pruned(Dare(0.9, "none"), seed=7)
    for name, tensor in TENSORS.items():
        assert torch.equal(delta[name], tensor)
        # Masks are nested, so that dropping 0.9 of what 0.5 left is dropping 0.9.
        assert torch.equal(again[name], 2 * Dare(0.9, "none")(tensor, name=name, seed=7))


def test_tensors_of_one_delta_have_masks_of_their_own(sources: dict[str, Path]) -> None:
    pruned = load_delta(base=sources["base"], finetuned=sources["whole"]).pruned(Dare(0.5), seed=7)
    assert len({tuple((tensor != 0).flatten().tolist()) for tensor in pruned.values()}) == len(TENSORS)
