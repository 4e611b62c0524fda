"""Merges beside those of peft, on the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import merge_utils as peft

from delta_analysis.merging.election import elected
from delta_analysis.merging.merger import Merger
from delta_analysis.merging.methods import MergeMethod
from delta_analysis.merging.task_arithmetic import TaskArithmetic
from delta_analysis.merging.ties import Ties
from delta_analysis.pruning import Magnitude, Pruner

SHAPES = [(1,), (3, 4, 5), (300, 301)]
WEIGHTS = [(1.0,), (1.0, 1.0), (0.3, -2.0, 0.7)]


def normal(count: int, shape: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def ours(
    tensors: Sequence[torch.Tensor], weights: Sequence[float], method: MergeMethod, pruner: Pruner | None = None
) -> torch.Tensor:
    deltas = [{"w": tensor} for tensor in tensors]
    return Merger({}.__getitem__, deltas, method, [pruner] * len(deltas), tuple(weights), seed=0)("w")


def rates(numel: int, share: float) -> tuple[float, float]:
    """A drop rate and peft's density that drop the same number of entries: there `int(density * n)` are kept."""
    dropped = max(round(share * numel), 1)
    return dropped / numel, (numel - dropped + 0.5) / numel


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_task_arithmetic(shape: tuple[int, ...], weights: tuple[float, ...]) -> None:
    tensors = normal(len(weights), shape)
    expected = peft.task_arithmetic(tensors, torch.tensor(weights))
    torch.testing.assert_close(ours(tensors, weights, TaskArithmetic()), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("share", [0.1, 0.9, 1.0])
@pytest.mark.parametrize("weights", WEIGHTS[1:])
@pytest.mark.parametrize("shape", SHAPES)
def test_task_arithmetic_after_magnitude(shape: tuple[int, ...], weights: tuple[float, ...], share: float) -> None:
    tensors = normal(len(weights), shape)
    drop_rate, density = rates(tensors[0].numel(), share)
    expected = peft.magnitude_prune(tensors, torch.tensor(weights), density)
    found = ours(tensors, weights, TaskArithmetic(), Magnitude(drop_rate))
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("share", [0.1, 0.9])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_ties_with_equal_weights(shape: tuple[int, ...], count: int, share: float) -> None:
    """Their weight multiplies the mean, where ours cancels; so it is our scaling."""
    tensors = normal(count, shape)
    drop_rate, density = rates(tensors[0].numel(), share)
    for weight in (1.0, 0.4):
        expected = peft.ties(tensors, torch.full((count,), weight), density, "total")
        found = ours(tensors, [weight] * count, Ties(drop_rate, scaling=weight))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


entries = st.lists(st.lists(st.integers(-4, 4), min_size=6, max_size=6), min_size=1, max_size=5)


@given(entries)
def test_elections_that_end_in_a_draw(rows: list[list[int]]) -> None:
    """Small integers: many zeros, and sums that are exactly zero."""
    tensors = torch.tensor(rows, dtype=torch.float32)
    mask = peft.calculate_majority_sign_mask(tensors, "total")
    expected: dict[str, Callable[[], torch.Tensor]] = {
        "mean": lambda: peft.disjoint_merge(tensors, mask),
        "sum": lambda: (tensors * mask).sum(dim=0),
    }
    for fuse, merged in expected.items():
        torch.testing.assert_close(elected(list(tensors), [1.0] * len(rows), fuse=fuse), merged())
