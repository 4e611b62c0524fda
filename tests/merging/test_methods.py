"""Average, task arithmetic, TIES and DELLA: closed forms, each other, and the pruners that they trim by."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from delta_analysis.merging.average import Average
from delta_analysis.merging.della import Della
from delta_analysis.merging.election import Slack
from delta_analysis.merging.methods import MergeMethod, Parts
from delta_analysis.merging.task_arithmetic import TaskArithmetic
from delta_analysis.merging.ties import Ties
from delta_analysis.pruning import Magnitude, MagPrune, Pruner

SHAPE = (12, 7)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


DELTAS = tuple(normal(*SHAPE, seed=seed) for seed in (1, 2, 3))


def parts(deltas: Sequence[torch.Tensor] = DELTAS, weights: Sequence[float] | None = None) -> Parts:
    return Parts("w", tuple(deltas), tuple(weights or [1.0] * len(deltas)), normal(*deltas[0].shape, seed=9))


def trimmed(pruner: Pruner | None, seed: int = 0) -> Parts:
    """As a merge hands them to its method."""
    if pruner is None:
        return parts()
    return parts([pruner(delta, name="w", seed=seed + k) for k, delta in enumerate(DELTAS)])


ARRAYS = npst.arrays(np.float32, (3, 5), elements=st.floats(-100, 100, width=32))


@settings(deadline=None)
@given(
    ARRAYS,
    st.lists(st.floats(0.01, 10) | st.floats(-10, -0.01), min_size=3, max_size=3),
    st.sampled_from([1.0, -0.3, 2]),
)
def test_sum_and_mean_are_those_of_the_definition(values: np.ndarray, weights: list[float], scaling: float) -> None:
    given = [torch.from_numpy(row) for row in values]
    whole = np.array(weights)[:, None] * values.astype(np.float64)
    size = np.abs(whole).sum(0).max()
    total = TaskArithmetic(scaling)(parts(given, weights))
    assert total.dtype == torch.float32
    np.testing.assert_allclose(total, scaling * whole.sum(0), atol=1e-6 * size * abs(scaling), rtol=0)
    if abs(sum(weights)) > 0.1:
        mean = Average(scaling)(parts(given, weights))
        assert mean.dtype == torch.float32
        limit = 1e-6 * size * abs(scaling / sum(weights))
        np.testing.assert_allclose(mean, scaling * whole.sum(0) / sum(weights), atol=limit, rtol=0)


@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.0, 0.0)])
def test_weights_that_sum_to_nothing_have_no_mean(weights: tuple[float, float]) -> None:
    for merge in (lambda: Average()(parts(DELTAS[:2], weights)), lambda: Average().check(weights)):
        with pytest.raises(ValueError, match="weights .* sum to 0, so that there is no mean"):
            merge()
    # Their sum is the difference of the two, and is what it is for.
    expected = DELTAS[0] * weights[0] + DELTAS[1] * weights[1]
    torch.testing.assert_close(TaskArithmetic()(parts(DELTAS[:2], weights)), expected)


@pytest.mark.parametrize("scope", ["tensor", "row", "model"])
def test_ties_trims_as_magnitude_does(scope: Any) -> None:
    assert Ties(0.7, scope).trim == Magnitude(0.7, scope, "none")
    assert Ties(0.0, scope).trim is None


@pytest.mark.parametrize("fuse", ["mean", "sum"])
def test_slack_of_ties_is_that_of_the_election(fuse: Any) -> None:
    plain = Ties(0.0, fuse=fuse)
    guarded = dataclasses.replace(plain, slack=Slack(1, relative=math.inf))
    merged = guarded(parts(DELTAS[:2]))
    assert torch.equal(merged.sign(), DELTAS[1].sign())
    differ = merged != plain(parts(DELTAS[:2]))
    assert torch.equal(differ, (DELTAS[0] * DELTAS[1] < 0) & (DELTAS[0].abs() > DELTAS[1].abs()))
    assert torch.equal(merged[differ], DELTAS[1][differ])
    late = Ties(0.0, slack=Slack(3))
    for merge in (lambda: late(parts()), lambda: late.check((1.0, 1.0, 1.0))):
        with pytest.raises(ValueError, match=r"slack protects delta 3 \(from 0\), and there are 3"):
            merge()
    late.check((1.0, 1.0, 1.0, 1.0))


def test_della_drops_as_magprune_does() -> None:
    assert Della(0.6, 0.2, "tensor").trim == MagPrune(0.6, 0.2, "tensor", "inverse_keep")
    assert Della(0.6).trim == MagPrune(0.6, "widest", "row", "inverse_keep")
    assert Della(0.0).trim is None


def test_the_ablations_of_della_do_something() -> None:
    """Each one alone makes another merge under the same random numbers."""
    merges = {
        "DELLA": Della(0.5),
        "by tensor": Della(0.5, within="tensor"),
        "no election": Della(0.5, elect=False),
        "narrow": Della(0.5, window=0.1),
    }
    found = {name: method(trimmed(method.trim)) for name, method in merges.items()}
    names = list(found)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not torch.equal(found[one], found[other]), (one, other)


def test_without_an_election_all_that_is_not_zero_counts() -> None:
    one, two = torch.tensor([3.0, 0.0, -1.0, 0.0]), torch.tensor([-1.0, 4.0, -3.0, 0.0])
    assert Della(0.0, elect=False)(parts([one, two])).tolist() == [1, 4, -2, 0]
    assert Della(0.0)(parts([one, two])).tolist() == [3, 4, -2, 0]


def test_methods_that_differ_have_labels_that_differ() -> None:
    methods: list[MergeMethod] = [
        Average(),
        TaskArithmetic(),
        Ties(),
        Ties(within="model"),
        Ties(within="row"),
        Ties(fuse="sum"),
        Ties(slack=Slack(0)),
        Ties(slack=Slack(0, 1.0)),
        Ties(slack=Slack(0, 1.0), fuse="sum"),
        Della(),
        Della(within="tensor"),
        Della(elect=False),
        Della(window=0.2),
        Della(window=0.2, elect=False),
    ]
    labels = [method.label for method in methods]
    assert len(set(labels)) == len(labels)
    assert labels[:4] == ["average", "task arithmetic", "TIES", "TIES by model"]
    # Rates and scalings have columns of their own.
    assert Ties(0.5, scaling=2).label == Ties().label
    assert all(method.statistic == "" and hash(method) == hash(dataclasses.replace(method)) for method in methods)  # type: ignore[type-var]
    assert [method.trim for method in methods[:2]] == [None, None]
