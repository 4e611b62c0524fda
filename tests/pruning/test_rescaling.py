"""Norms in exact arithmetic, and the factors that restore them."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_analysis.pruning.rescaling import match_norm, norm_ratio, power_sum, rescale_name, uniform_factor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LARGEST, SMALLEST = 3.4028234663852886e38, 2.0**-149
FINITE = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-1, 1, width=16),
    st.sampled_from([0.0, -0.0, LARGEST, -LARGEST, SMALLEST, -SMALLEST, 2.0**-126, 2.0**-127, 1.0]),
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slow_sum(values: list[float], power: int) -> Fraction:
    return sum((abs(Fraction(value)) ** power for value in values), Fraction(0))


@settings(deadline=None)
@given(values=st.lists(FINITE, max_size=40), power=st.sampled_from([1, 2]), data=st.data())
def test_power_sum_is_exact_in_any_order(values: list[float], power: int, data: st.DataObject) -> None:
    expected = slow_sum(values, power)
    assert power_sum(torch.tensor(values), power, "w") == expected
    assert power_sum(torch.tensor(data.draw(st.permutations(values))), power, "w") == expected


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5, 7), (2, 3, 4)], ids=str)
def test_power_sum_reads_every_shape_and_dtype(dtype: torch.dtype, shape: tuple[int, ...], power: int) -> None:
    tensor = normal(*shape).to(dtype)
    assert power_sum(tensor, power, "w") == slow_sum(tensor.reshape(-1).float().tolist(), power)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("value", [LARGEST, SMALLEST, 2.0**-126, 1 - 2.0**-24, 0.1])
def test_power_sum_of_many_equal_entries_over_several_blocks(value: float, power: int) -> None:
    count = 2**18 + 3
    tensor = torch.full((count,), value)
    assert power_sum(tensor, power, "w") == count * Fraction(tensor[0].item()) ** power


@pytest.mark.parametrize("power", [1, 2])
def test_power_sum_is_fsum_where_that_is_exact_enough(power: int) -> None:
    tensor = normal(600_000) * 2.0 ** torch.randint(-30, 30, (600_000,), generator=torch.Generator().manual_seed(1))
    # A product of two float32 is exact in float64, so that fsum rounds once.
    assert float(power_sum(tensor, power, "w")) == math.fsum((tensor.double().abs() ** power).tolist())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_power_sum_is_the_same_for_any_number_of_threads(count: int) -> None:
    tensor, before = normal(600_000), torch.get_num_threads()
    expected = slow_sum([], 1) + power_sum(tensor, 2, "w")
    try:
        torch.set_num_threads(count)
        assert power_sum(tensor, 2, "w") == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_entry_without_a_size_names_the_tensor(dtype: torch.dtype, power: int, bad: float) -> None:
    tensor = normal(100).to(dtype)
    tensor[57] = bad
    with pytest.raises(ValueError, match=r"tensor 'model\.w' has NaN or infinite entries"):
        power_sum(tensor, power, "model.w")


@settings(deadline=None)
@given(
    entries=st.lists(st.tuples(st.floats(-100, 100, width=32), st.booleans()), max_size=40),
    power=st.sampled_from([1, 2]),
)
def test_norm_ratio_is_the_quotient_of_the_norms(entries: list[tuple[float, bool]], power: int) -> None:
    before = [value for value, _ in entries]
    after = [value if kept else 0.0 for value, kept in entries]
    ratio = norm_ratio(torch.tensor(before), torch.tensor(after), power, "w")
    if any(after):
        exact = slow_sum(before, power) / slow_sum(after, power)
        assert ratio == pytest.approx(float(exact) ** (1 / power), rel=1e-15)
        assert ratio >= 1
    else:
        assert ratio == 1.0


def test_norm_ratio_names_the_tensor_on_either_side() -> None:
    fine, bad = torch.ones(2), torch.tensor([1.0, math.nan])
    for before, after in ((bad, fine), (fine, bad)):
        with pytest.raises(ValueError, match="'a tensor'"):
            norm_ratio(before, after, 1, "a tensor")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rescale", "power"), [("l1", 1), ("l2", 2)])
def test_match_norm_gives_the_norm_back(dtype: torch.dtype, rescale: str, power: int) -> None:
    tensor = normal(400, 700).to(dtype)
    pruned = torch.where(normal(400, 700, seed=1) < 0, 0.0, tensor)
    matched = match_norm(pruned.clone(), tensor, rescale, "w")
    assert (matched.dtype, matched.shape) == (dtype, tensor.shape)
    assert torch.equal(matched != 0, pruned != 0)
    # Entries are rounded to the dtype; half its spacing is the most that the norm can be off.
    tolerance = {torch.bfloat16: 4e-3, torch.float16: 5e-4}.get(dtype, 2e-7)
    assert float(power_sum(matched, power, "w")) == pytest.approx(float(power_sum(tensor, power, "w")), rel=tolerance)


@pytest.mark.parametrize("rescale", ["inverse_keep", "none", 1.0, 2.5])
def test_match_norm_leaves_other_rescales_alone(rescale: str | float) -> None:
    pruned = torch.tensor([math.nan, 0.0, 1.0])
    assert match_norm(pruned, torch.ones(3), rescale, "w") is pruned


def test_uniform_factors() -> None:
    assert [uniform_factor(rescale, 0.75) for rescale in ("inverse_keep", "none", "l1", "l2", 3)] == [4, 1, 1, 1, 3]
    assert [uniform_factor(rescale, 1) for rescale in ("inverse_keep", "none", "l1", "l2", 3.0)] == [1.0] * 5
    assert [uniform_factor(rescale, 0) for rescale in ("inverse_keep", "none", "l1", "l2", 3.0)] == [1, 1, 1, 1, 3]


@pytest.mark.parametrize(
    ("rescale", "default", "name"),
    [
        ("none", "none", ""),
        ("inverse_keep", "none", " + rescale"),
        ("none", "inverse_keep", " drop only"),
        ("inverse_keep", "inverse_keep", ""),
        ("l1", "none", " + L1"),
        ("l2", "inverse_keep", " + L2"),
        (2.5, "none", " × 2.5"),
    ],
)
def test_rescale_in_a_methods_name(rescale: str | float, default: str, name: str) -> None:
    assert rescale_name(rescale, default) == name
