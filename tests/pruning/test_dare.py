"""DARE: which entries are dropped, what the rest becomes, and what it does to a delta on average."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.merge_utils import prune

from delta_analysis._kernels.philox import random_bits
from delta_analysis.deltas.delta import load_delta
from delta_analysis.pruning import Dare, Magnitude, MagPrune
from tests.pruning.reference import DTYPES, RATE, SIGMAS, normal, slow_kept


@given(drop_rate=RATE, seed=st.integers(0, 2**40), name=st.text("abw.1", max_size=6))
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


@given(rate=st.floats(0.001, 0.999), factor=st.floats(1, 100), seed=st.integers(0, 1000))
def test_rescale_variants_share_one_mask(rate: float, factor: float, seed: int) -> None:
    delta = torch.ones(200)
    dropped = Dare(rate, "none")(delta, name="w", seed=seed)
    for rescale, expected in (("inverse_keep", 1 / (1 - rate)), (factor, factor)):
        scaled = Dare(rate, rescale)(delta, name="w", seed=seed)
        torch.testing.assert_close(scaled, dropped * expected)


def test_single_entry_falls_under_some_seeds_and_not_under_others() -> None:
    kept = [bool(Dare(0.5)(torch.tensor(1.0), name="w", seed=seed)) for seed in range(40)]
    assert kept == [slow_kept(1, 0.5, name="w", seed=seed)[0] for seed in range(40)]
    assert 0 < sum(kept) < 40


@pytest.mark.parametrize("rescale", ["inverse_keep", "none", 1.0, 2.5], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_survivors_are_the_float32_product_rounded_once(dtype: torch.dtype, rescale: str | float) -> None:
    delta = normal(1000).to(dtype)
    pruned = Dare(0.7, rescale)(delta, name="w", seed=0)
    factor = {"inverse_keep": 1 / (1 - 0.7), "none": 1.0}.get(str(rescale)) or float(rescale)
    expected = torch.from_numpy(delta.float().numpy() * np.float32(factor)).to(dtype)
    kept = torch.tensor(slow_kept(1000, 0.7, name="w", seed=0))
    assert torch.equal(pruned[kept], expected[kept])
    assert not pruned[~kept].any()


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


@pytest.mark.parametrize("density", [0.5, 0.3, 0.1])
def test_survivors_have_pefts_values(density: float) -> None:
    tensor = normal(10_000)
    torch.manual_seed(0)
    theirs = prune(tensor, density, method="random", rescale=True)
    ours = Dare(1 - density)(tensor, name="w", seed=0)
    both = (theirs != 0) & (ours != 0)
    assert both.sum() > 10_000 * density**2 / 2
    torch.testing.assert_close(ours[both], theirs[both], rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", [Dare, Magnitude, MagPrune])
@pytest.mark.parametrize(("rescale", "power"), [("l1", 1), ("l2", 2)])
@pytest.mark.parametrize("drop_rate", [0.0, 0.3, 0.9, 0.999])
def test_norms_are_restored(make: type, rescale: str, power: int, drop_rate: float) -> None:
    delta = normal(300, 400)
    pruned = make(drop_rate, rescale=rescale)(delta, name="w", seed=0)
    before, after = (float((each.double().abs() ** power).sum()) for each in (delta, pruned))
    assert after == pytest.approx(before, rel=2e-7 * power)
    # The factor is one for all survivors, and the mask that of the variant without it.
    plain = make(drop_rate, rescale="none")(delta, name="w", seed=0)
    assert torch.equal(plain != 0, pruned != 0)
    theirs = (delta.double().abs() ** power).sum() / (plain.double().abs() ** power).sum()
    torch.testing.assert_close(pruned.double(), plain.double() * theirs ** (1 / power), rtol=2e-7, atol=0)


@pytest.mark.parametrize("rescale", ["l1", "l2"])
def test_a_norm_out_of_reach_is_an_error(rescale: str) -> None:
    delta = torch.tensor([1e38, 1e38, 1e-45, 1e-45])
    tiny = next(
        seed
        for seed in range(999)
        if (survivors := Dare(0.5, "none")(delta, name="w", seed=seed))[2:].any() and not survivors[:2].any()
    )
    with pytest.raises(ValueError, match="'w'.*beyond float32"):
        Dare(0.5, rescale)(delta, name="w", seed=tiny)


@pytest.mark.parametrize("make", [Dare, Magnitude, MagPrune])
@pytest.mark.parametrize("rescale", ["l1", "l2"])
def test_nothing_left_has_no_norm_to_match(make: type, rescale: str) -> None:
    for tensor in (torch.zeros(3, 4), torch.empty(0), torch.ones(3, 4)):
        assert not make(1.0, rescale=rescale)(tensor, name="w", seed=0).any()
