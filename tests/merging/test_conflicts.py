"""Interference of deltas: every column against plain numpy, and limits where it is known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_analysis._errors import NotHomologousError
from delta_analysis.deltas.delta import load_delta
from delta_analysis.deltas.ranges import GROUPS, LABELS, Grouping, value_ranges
from delta_analysis.merging.conflicts import interference

NAMES = ["model.norm.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
COLUMNS = [
    *("one", "other", "tensor", "layer", "module", "kind", "shape", "tensors", "numel", "both", "conflicts"),
    *("conflicts_of_both", "cosine", "inner", "norm_ratio", "overlap", "overlap_by_chance", "mass_outvoted"),
]
MEASURES = COLUMNS[COLUMNS.index("both") :]
# Few sizes, so that many are equal, and zeros.
ENTRIES = st.integers(-4, 4).map(lambda value: value / 2)


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def by_hand(one: np.ndarray, other: np.ndarray, largest: float) -> dict[str, float]:
    """Of one tensor, or of several of which each makes up a row."""
    one, other = (np.atleast_2d(each).astype(np.float64) for each in (one, other))
    both = (one != 0) & (other != 0)
    conflicts = both & (np.sign(one) != np.sign(other))
    count = round(largest * one.shape[1])
    tops = []
    for values in (one, other):
        sizes = np.abs(values)
        last = np.sort(sizes, axis=1)[:, -count][:, None] if count else np.inf
        tops.append((sizes >= last) & (sizes > 0))
    picked = (tops[0].sum() + tops[1].sum()) / 2
    chance = (tops[0].sum(axis=1) * tops[1].sum(axis=1)).sum() / one.shape[1]
    mass = (np.abs(one) + np.abs(other)).sum()
    norms = np.sqrt((one**2).sum()), np.sqrt((other**2).sum())
    return {
        "both": both.mean(),
        "conflicts": conflicts.mean(),
        "conflicts_of_both": ratio(conflicts.sum(), both.sum()),
        "cosine": ratio((one * other).sum(), norms[0] * norms[1]),
        "inner": (one * other).sum(),
        "norm_ratio": norms[1] / norms[0] if norms[0] else math.inf if norms[1] else math.nan,
        "overlap": ratio((tops[0] & tops[1]).sum(), picked),
        "overlap_by_chance": ratio(chance, picked),
        # What cancels is what the sum lacks.
        "mass_outvoted": ratio(mass - np.abs(one + other).sum(), mass),
    }


def measured(table: pd.DataFrame) -> list[dict[str, float]]:
    return table[MEASURES].to_dict("records")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def several(seed: int) -> dict[str, torch.Tensor]:
    return {name: normal(*([8] if i == 0 else [6, 8]), seed=seed + i) for i, name in enumerate(NAMES)}


@settings(deadline=None)
@given(
    pairs=st.lists(st.tuples(ENTRIES, ENTRIES), min_size=1, max_size=30),
    largest=st.sampled_from([0.01, 0.1, 0.5, 0.9, 1.0]),
)
def test_every_column_against_numpy(pairs: list[tuple[float, float]], largest: float) -> None:
    one, other = torch.tensor(pairs).unbind(dim=1)
    (found,) = measured(interference({"a": {"w": one}, "b": {"w": other}}, largest=largest))
    assert found == pytest.approx(by_hand(one.numpy(), other.numpy(), largest), abs=1e-12, nan_ok=True)


def test_large_tensors_are_compared_in_blocks() -> None:
    one, other = normal(700, 1001), normal(700, 1001, seed=1) * (normal(700, 1001, seed=2) > 0)
    (found,) = measured(interference({"a": {"w": one}, "b": {"w": other}}))
    assert found == pytest.approx(by_hand(one.flatten().numpy(), other.flatten().numpy(), 0.01), rel=1e-9)
    assert found["overlap_by_chance"] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("by", GROUPS)
def test_groups_are_those_of_value_ranges(by: Grouping) -> None:
    delta = load_delta(base="zoo:tiny/base", finetuned="zoo:tiny/instruct")
    other = load_delta(base="zoo:tiny/base", finetuned="zoo:tiny/math")
    found = interference({"instruct": delta, "math": other}, by=by)
    expected = value_ranges(delta, by=by)
    assert found.columns.tolist() == COLUMNS
    shared = [*LABELS, "tensors", "numel"]
    pd.testing.assert_frame_equal(
        found[shared].sort_values(shared, ignore_index=True), expected[shared].sort_values(shared, ignore_index=True)
    )


def test_a_group_is_its_tensors_together() -> None:
    one, other = several(0), several(10)
    found = interference({"a": one, "b": other}, by="module", largest=0.2).set_index("module")
    rows, other_rows = (np.stack([each[name].flatten().numpy() for name in NAMES[1:]]) for each in (one, other))
    assert found.loc["mlp.up_proj", MEASURES].to_dict() == pytest.approx(by_hand(rows, other_rows, 0.2))


def test_each_pair_is_compared_as_if_alone() -> None:
    deltas = {"a": several(0), "b": several(10), "c": several(20)}
    found = interference(deltas, by="model")
    assert list(zip(found["one"], found["other"], strict=True)) == [("a", "b"), ("a", "c"), ("b", "c")]
    for (one, other), rows in found.groupby(["one", "other"]):
        alone = interference({one: deltas[one], other: deltas[other]}, by="model")
        pd.testing.assert_frame_equal(rows.reset_index(drop=True), alone)


@pytest.mark.parametrize(
    "entries", [normal(1000), normal(1000).sign(), normal(1000).round()], ids=["", "signs", "ties"]
)
def test_a_delta_beside_itself_and_its_negative(entries: torch.Tensor) -> None:
    found = interference({"a": {"w": entries}, "b": {"w": 3 * entries}, "c": {"w": -entries}})
    same, negative, _ = measured(found)
    expected = {"conflicts": 0.0, "cosine": 1.0, "norm_ratio": 3.0, "overlap": 1.0, "mass_outvoted": 0.0}
    assert {column: same[column] for column in expected} == pytest.approx(expected)
    expected = {"conflicts_of_both": 1.0, "cosine": -1.0, "norm_ratio": 1.0, "overlap": 1.0, "mass_outvoted": 1.0}
    assert {column: negative[column] for column in expected} == pytest.approx(expected)


def test_zeros_are_never_among_the_largest() -> None:
    one, other = torch.zeros(100), torch.zeros(100)
    one[:3], other[2:5] = 1.0, 1.0
    # Ten of each are sought, and three are there.
    (found,) = measured(interference({"a": {"w": one}, "b": {"w": other}}, largest=0.1))
    assert found["overlap"] == pytest.approx(1 / 3)
    assert found["overlap_by_chance"] == pytest.approx(0.03)


def test_tensors_that_one_side_lacks_are_left_out() -> None:
    one, other, third = several(0), several(10), several(20)
    del one[NAMES[0]], other[NAMES[1]]
    found = interference({"a": one, "b": other, "c": third})
    assert found.groupby(["one", "other"])["tensor"].agg(list).to_dict() == {
        ("a", "b"): [NAMES[2]],
        ("a", "c"): NAMES[1:],
        ("b", "c"): [NAMES[0], NAMES[2]],
    }


class Recorded(Mapping[str, torch.Tensor]):
    """Tensors that are made when they are read; the order of reading is kept."""

    def __init__(self, label: str, reads: list[tuple[str, str]]) -> None:
        self.label, self.reads = label, reads

    def __getitem__(self, name: str) -> torch.Tensor:
        self.reads.append((name, self.label))
        return normal(4, 4)

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)

    def __contains__(self, name: object) -> bool:
        return name in NAMES


def test_each_tensor_is_read_once_and_with_its_counterparts() -> None:
    reads: list[tuple[str, str]] = []
    interference({label: Recorded(label, reads) for label in "abc"})
    assert reads == [(name, label) for name in NAMES for label in "abc"]


def test_other_dtypes_and_layouts() -> None:
    one, other = normal(6, 8).bfloat16(), normal(8, 6, seed=1).double().T
    found = interference({"a": {"w": one}, "b": {"w": other}})
    expected = interference({"a": {"w": one.float()}, "b": {"w": other.float().contiguous()}})
    pd.testing.assert_frame_equal(found, expected)


def test_a_tensor_without_entries() -> None:
    (found,) = measured(interference({"a": {"w": torch.zeros(0, 3)}, "b": {"w": torch.zeros(0, 3)}}))
    assert found.pop("inner") == 0
    assert all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_entries_that_are_not_finite_are_told(value: float) -> None:
    deltas = {"a": several(0), "b": several(10)}
    deltas["b"][NAMES[1]][2, 3] = value
    with pytest.raises(ValueError, match=rf"tensor '{NAMES[1]}': has NaN or infinite entries in 'b'"):
        interference(deltas)


def test_deltas_that_cannot_be_compared_are_told() -> None:
    with pytest.raises(NotHomologousError, match="deltas 'a' and 'c' have no tensor in common"):
        interference({"a": {"v": normal(3)}, "b": {"v": normal(3), "w": normal(3)}, "c": {"w": normal(3)}})
    with pytest.raises(NotHomologousError, match=r"tensor 'w': has shapes \(3,\) in 'a', \(4,\) in 'b'"):
        interference({"a": {"w": normal(3)}, "b": {"w": normal(4)}})
    with pytest.raises(ValueError, match="at least two are needed"):
        interference({"a": {"w": normal(3)}})
    deltas = {"a": several(0), "b": several(10)}
    with pytest.raises(ValueError, match="by must be one of 'tensor', .*; not 'block'"):
        interference(deltas, by="block")  # type: ignore[arg-type]
    for share in (0.0, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"largest must be a number in \(0, 1\]"):
            interference(deltas, largest=share)
