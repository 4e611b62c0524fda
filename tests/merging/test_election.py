"""The election of signs against a plain loop over entries, and the limits of slack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from delta_analysis.merging import election
from delta_analysis.merging.election import FUSIONS, Slack, elected

# Few values, so that entries tie and sums cancel; those beyond every number too.
EXACT = st.sampled_from([-3.0, -1.0, -0.5, -0.0, 0.0, 0.0, 0.5, 1.0, 2.0])
ENTRY = EXACT | st.sampled_from([math.nan, math.inf, -math.inf]) | st.floats(width=32, allow_nan=False)
WEIGHT = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 1.0]) | st.floats(-1e3, 1e3)
LIMIT = st.sampled_from([0.0, 0.5, 1.0, 3.0, math.inf])


@st.composite
def votes(draw: st.DrawFn, entry: st.SearchStrategy[float] = ENTRY, low: int = 1) -> list[list[float]]:
    """One list of entries a delta."""
    count, numel = draw(st.integers(low, 4)), draw(st.integers(1, 8))
    return draw(st.lists(st.lists(entry, min_size=numel, max_size=numel), min_size=count, max_size=count))


def tensors(deltas: Sequence[Sequence[float]]) -> list[torch.Tensor]:
    return [torch.tensor(delta, dtype=torch.float32) for delta in deltas]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def entry_of(
    entries: Sequence[float],
    weights: Sequence[float],
    scaling: float,
    slack: Slack | None,
    elect: bool,
    fuse: str,
) -> float:
    """The definition, for one entry of each delta."""
    cast = [weight * entry for weight, entry in zip(weights, entries, strict=True)]
    total = 0.0
    for vote in cast:
        total += vote
    if math.isnan(total):
        return math.nan
    positive = total >= 0
    if slack is not None:
        own = cast[slack.protected]
        others = total - own
        opposed = (own > 0 and others < 0) or (own < 0 and others > 0)
        if opposed and abs(others) <= (1 + slack.relative) * abs(own) + slack.absolute:
            positive = own > 0
    counted = [
        (vote, abs(weight))
        for vote, weight in zip(cast, weights, strict=True)
        if (not elect and vote != 0) or (elect and vote != 0 and (vote > 0) == positive)
    ]
    fused, whole = 0.0, 0.0
    for vote, size in counted:
        fused, whole = fused + vote, whole + size
    return scaling * (fused / whole if fuse == "mean" and counted else fused)


@given(
    deltas=votes(),
    weights=st.lists(WEIGHT, min_size=4, max_size=4),
    scaling=st.sampled_from([1.0, 0.5, -2.0, 0.0]),
    slack=st.none() | st.builds(Slack, st.integers(0, 3), LIMIT, LIMIT),
    elect=st.booleans(),
    fuse=st.sampled_from(FUSIONS),
)
def test_every_entry_is_that_of_the_definition(
    deltas: list[list[float]],
    weights: list[float],
    scaling: float,
    slack: Slack | None,
    elect: bool,
    fuse: str,
) -> None:
    shares = weights[: len(deltas)]
    if slack is not None and slack.protected >= len(deltas):
        slack = None
    given = tensors(deltas)
    before = [delta.clone() for delta in given]
    found = elected(given, shares, scaling=scaling, slack=slack, elect=elect, fuse=fuse)
    assert found.dtype == torch.float32
    rows = [
        entry_of([float(delta[i]) for delta in given], shares, scaling, slack, elect, fuse)
        for i in range(len(deltas[0]))
    ]
    with np.errstate(over="ignore"):
        expected = np.array(rows).astype(np.float32)
    np.testing.assert_array_equal(found.numpy(), expected)
    # What is merged is left as it was.
    for delta, own in zip(given, before, strict=True):
        np.testing.assert_array_equal(delta.numpy(), own.numpy())


def test_an_election_by_hand() -> None:
    deltas = tensors(
        [[4.0, -1.0, 1.0, 0.0, 0.0, 2.0], [-1.0, -3.0, -1.0, 0.0, 5.0, 0.0], [-2, 8.0, 0.0, 0.0, 1.0, 4.0]]
    )
    # The negative ones of the first three are outvoted, the third in a tie. A zero is no vote and no part of a mean.
    assert elected(deltas, [1, 1, 1]).tolist() == [4, 8, 1, 0, 3, 3]
    assert elected(deltas, [1, 1, 1], fuse="sum").tolist() == [4, 8, 1, 0, 6, 6]
    # Weights vote too, and weigh the mean of those that agree.
    assert elected(deltas, [1, 1, 3]).tolist() == [-7 / 4, 8, 1, 0, 2, 3.5]
    assert elected(deltas, [1, 1, 3], elect=False).tolist() == pytest.approx([-3 / 5, 4, 0, 0, 2, 3.5])


@given(
    deltas=votes(st.sampled_from([-2.0, -0.5, 0.25, 1.0]) | EXACT),
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=4, max_size=4),
    protected=st.integers(0, 3),
    fuse=st.sampled_from(FUSIONS),
)
def test_slack_of_nothing_is_the_plain_election_but_where_all_cancels(
    deltas: list[list[float]], weights: list[float], protected: int, fuse: str
) -> None:
    given, shares = tensors(deltas), weights[: len(deltas)]
    plain = elected(given, shares, fuse=fuse)
    slack = elected(given, shares, slack=Slack(min(protected, len(deltas) - 1)), fuse=fuse)
    total = sum(weight * delta for weight, delta in zip(shares, given, strict=True))
    assert torch.equal(slack[total != 0], plain[total != 0])
    own = given[min(protected, len(deltas) - 1)]
    won = slack[(total == 0) & (own != 0)].sign()
    assert torch.equal(won, own[(total == 0) & (own != 0)].sign())


@given(
    deltas=votes(EXACT, low=2),
    weights=st.lists(st.sampled_from([0.5, 1.0, 100.0]), min_size=4, max_size=4),
    protected=st.integers(0, 3),
    limit=st.sampled_from([{"relative": math.inf}, {"absolute": math.inf}]),
)
def test_with_infinite_slack_the_protected_never_loses(
    deltas: list[list[float]], weights: list[float], protected: int, limit: dict[str, float]
) -> None:
    given, k = tensors(deltas), min(protected, len(deltas) - 1)
    found = elected(given, weights[: len(deltas)], slack=Slack(k, **limit), fuse="sum")
    changed = given[k] != 0
    assert torch.equal(found[changed].sign(), given[k][changed].sign())
    assert bool((found[changed].abs() >= (weights[k] * given[k][changed]).abs()).all())
    # Where it has nothing to say, it is the plain election.
    plain = elected(given, weights[: len(deltas)], fuse="sum")
    assert torch.equal(found[~changed], plain[~changed])


@pytest.mark.parametrize("numel", [0, 1, 2**15 - 1, 2**15, 2**15 + 1, 3 * 2**15 + 7])
def test_blocks_leave_no_trace(numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = [normal(numel, seed=k) for k in range(3)]
    weights = (1.0, 0.5, 2.0)
    stacked = torch.stack([weight * delta.double() for weight, delta in zip(weights, deltas, strict=True)])
    agree = stacked.sign() == torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    shares = torch.tensor(weights, dtype=torch.float64)[:, None]
    expected = ((stacked * agree).sum(0) / (shares * agree).sum(0)).float()
    found = elected(deltas, weights)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for block in (64, 2**20):
        monkeypatch.setattr(election, "_BLOCK", block)
        assert torch.equal(elected(deltas, weights), found)


def test_deltas_may_lie_in_memory_in_any_order() -> None:
    one, two = normal(40, 30), normal(30, 40, seed=1)
    assert torch.equal(elected([one, two.T], [1, 2]), elected([one, two.T.contiguous()], [1, 2]))
    assert torch.equal(elected([two.T, one], [2, 1]), elected([two.T.contiguous(), one], [2, 1]))


def test_slack_has_to_protect_a_delta_that_is_there() -> None:
    with pytest.raises(ValueError, match=r"slack protects delta 2 \(from 0\), and there are 2"):
        elected([normal(3), normal(3)], [1, 1], slack=Slack(2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"protected": -1}, "protected must be a whole number of at least 0; not -1"),
        ({"protected": 0.0}, "protected must be"),
        ({"protected": True}, "protected must be"),
        ({"relative": -0.1}, "relative must be a number of at least 0; not -0.1"),
        ({"relative": math.nan}, "relative must be"),
        ({"absolute": "1"}, "absolute must be a number of at least 0; not '1'"),
        ({"absolute": True}, "absolute must be"),
    ],
)
def test_slack_out_of_range_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Slack(**{"protected": 0, **wrong})


def test_slack_says_what_it_is() -> None:
    labels = [Slack(0).label, Slack(1, 2).label, Slack(1, 0.5, 1e-3).label, Slack(0, absolute=math.inf).label]
    assert labels == ["slack 0", "slack 2 relative", "slack 0.5 relative + 0.001 absolute", "slack inf absolute"]
    assert Slack(1, 2) == Slack(1, 2.0)
    assert isinstance(Slack(1, 2).relative, float)
