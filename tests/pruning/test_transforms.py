"""Deltas changed by hand: closed forms of each change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from delta_analysis.pruning.transforms import Change, Clipped, Permuted, Scaled, SignsRedrawn, Topless, largest

CHANGES: tuple[Change, ...] = (Scaled(2.0), Clipped(0.2), Topless(0.2), Permuted(), SignsRedrawn())
# Few values, so that many are equal in size; multiples of powers of two are exact in every dtype.
VALUES = st.lists(st.integers(-6, 6).map(lambda value: value / 4), max_size=40)
SHARES = st.sampled_from([0.0, 0.01, 0.1, 0.25, 0.5, 0.9, 1.0])


def exact(values: Sequence[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def changed(change: Change, values: Sequence[float], name: str = "w", seed: int = 0) -> np.ndarray:
    return change(torch.tensor(values, dtype=torch.float32), name=name, seed=seed).numpy()


@given(values=VALUES, factor=st.sampled_from([0.25, 1.0, 3.0, 1e-3]))
def test_scaled_multiplies(values: list[float], factor: float) -> None:
    np.testing.assert_array_equal(changed(Scaled(factor), values), exact(values) * np.float32(factor))


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
def test_a_factor_is_finite_and_above_zero(factor: float) -> None:
    with pytest.raises(ValueError, match="factor must be a finite number above 0"):
        Scaled(factor)


@pytest.mark.parametrize("kind", [Clipped, Topless])
@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_one(kind: type[Clipped] | type[Topless], share: float) -> None:
    with pytest.raises(ValueError, match=r"share must be a number in \[0, 1\]"):
        kind(share)


@given(values=VALUES, share=SHARES)
def test_clipped_at_the_largest_of_the_others(values: list[float], share: float) -> None:
    sizes = sorted(map(abs, values))
    cut = round(share * len(values))
    limit = sizes[-cut - 1] if cut < len(values) else 0.0
    found = changed(Clipped(share), values)
    np.testing.assert_array_equal(found, np.clip(exact(values), -limit, limit))
    # No more entries than asked for have changed, and none but the largest.
    assert (found != exact(values)).sum() <= cut


@given(values=VALUES, share=SHARES)
def test_topless_has_the_largest_and_their_equals_set_to_zero(values: list[float], share: float) -> None:
    given_values = exact(values)
    cut = round(share * len(values))
    found = changed(Topless(share), values)
    if cut:
        least = sorted(map(abs, values))[-cut]
        np.testing.assert_array_equal(found, np.where(np.abs(given_values) >= least, 0, given_values))
    else:
        np.testing.assert_array_equal(found, given_values)
    assert (found[largest(torch.tensor(values), share).numpy()] == 0).all()


def test_largest_without_ties() -> None:
    tensor = torch.tensor([[1.0, -5.0], [4.0, 0.5]])
    assert largest(tensor, 0.5).tolist() == [[False, True], [True, False]]
    assert largest(tensor, 0.0).sum() == 0
    assert largest(tensor, 1.0).all()
    # Fewer than half an entry is none.
    assert largest(tensor, 0.12).sum() == 0
    assert largest(tensor, 0.13).sum() == 1


def test_ties_at_the_cut() -> None:
    tensor = torch.tensor([3.0, -3.0, 3.0, 1.0])
    assert largest(tensor, 0.25).tolist() == [True, True, True, False]
    assert changed(Topless(0.25), [3, -3, 3, 1]).tolist() == [0, 0, 0, 1]
    # The next one is as large, so nothing stands out.
    assert changed(Clipped(0.25), [3, -3, 3, 1]).tolist() == [3, -3, 3, 1]
    assert changed(Clipped(0.75), [3, -3, 3, 1]).tolist() == [1, -1, 1, 1]


def test_a_tensor_of_equal_sizes_has_no_outliers() -> None:
    assert changed(Clipped(0.1), [0.5] * 10 + [-0.5] * 10).tolist() == [0.5] * 10 + [-0.5] * 10


@pytest.mark.parametrize("values", [[2.0, -1.0, 7.0], [5.0], [0.0, 0.0]])
def test_the_ends_of_a_share(values: list[float]) -> None:
    for kind in (Clipped, Topless):
        assert changed(kind(0.0), values).tolist() == values
        assert changed(kind(1.0), values).tolist() == [0.0] * len(values)


@given(share=SHARES, values=VALUES)
def test_clipped_and_topless_share_what_they_leave(share: float, values: list[float]) -> None:
    """What neither changes is equal; where nothing is tied, topless zeroes what clipped cuts."""
    tensor = exact(sorted(set(map(abs, values)) - {0.0}))
    clipped, topless = changed(Clipped(share), tensor.tolist()), changed(Topless(share), tensor.tolist())
    np.testing.assert_array_equal(clipped != tensor, topless == 0)
    np.testing.assert_array_equal(clipped[topless != 0], tensor[topless != 0])


@given(values=VALUES, seed=st.integers(0, 2**40), name=st.text(max_size=5))
def test_permuted_keeps_the_multiset(values: list[float], seed: int, name: str) -> None:
    assert sorted(changed(Permuted(), values, name, seed).tolist()) == sorted(values)


@given(values=VALUES, seed=st.integers(0, 2**40), name=st.text(max_size=5))
def test_redrawn_signs_keep_sizes_in_their_places(values: list[float], seed: int, name: str) -> None:
    np.testing.assert_array_equal(np.abs(changed(SignsRedrawn(), values, name, seed)), np.abs(exact(values)))


@pytest.mark.parametrize("change", [Permuted(), SignsRedrawn()], ids=lambda change: change.label)
def test_what_is_drawn_depends_on_seed_and_name_only(change: Change) -> None:
    tensors = {name: torch.arange(1.0, 201.0) for name in ("a", "b")}
    keys = [(name, seed) for name in tensors for seed in (0, 1, 2)]
    found = {key: change(tensors[key[0]], name=key[0], seed=key[1]) for key in keys}
    for name, seed in reversed(keys):
        again = change(tensors[name].to(torch.float64), name=name, seed=seed)
        assert torch.equal(again, found[name, seed].double())
    # Of equal tensors every name and every seed makes another one.
    assert len({tuple(each.tolist()) for each in found.values()}) == len(keys)
    # So they do of another tensor of the same shape, in the same way.
    other = torch.randn(200, generator=torch.Generator().manual_seed(5)).abs()
    if isinstance(change, Permuted):
        expected = other[found["a", 1].long() - 1]
    else:
        expected = other * found["a", 1].sign()
    assert torch.equal(change(other, name="a", seed=1), expected)


def test_orders_and_signs_are_uniform() -> None:
    """Over many seeds each entry comes to each place equally often, and bears each sign."""
    count, n = 4000, 5
    tensor = torch.arange(1.0, n + 1)
    orders = np.array([changed(Permuted(), tensor.tolist(), seed=seed) for seed in range(count)])
    signs = np.array([changed(SignsRedrawn(), tensor.tolist(), seed=seed) for seed in range(count)]) > 0
    shares = np.array([(orders == value).mean(axis=0) for value in tensor.numpy()])
    np.testing.assert_allclose(shares, 1 / n, atol=4.5 * np.sqrt(0.16 / count))
    np.testing.assert_allclose(signs.mean(axis=0), 0.5, atol=4.5 * 0.5 / np.sqrt(count))
    # Neighbours differ as often as not.
    np.testing.assert_allclose((signs[:, 1:] == signs[:, :-1]).mean(axis=0), 0.5, atol=4.5 * 0.5 / np.sqrt(count))


def test_labels_tell_changes_apart() -> None:
    labels = [change.label for change in (*CHANGES, Scaled(0.05), Scaled(0.0512), Clipped(0.001), Topless(0.01))]
    assert len(set(labels)) == len(labels)
    assert Scaled(0.05).label == "size × 0.05"
    assert Clipped(0.001).label == "largest 0.1% clipped"
    assert Topless(0.01).label == "largest 1% spared"
