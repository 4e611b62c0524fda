"""WIDEN against plain loops over columns, and at the limits where its scores are known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_analysis.merging.methods import MergeMethod, Parts
from delta_analysis.merging.widen import Widen

Matrix = list[list[float]]
EMBEDDING = "model.embed_tokens.weight"
# Few values, so that columns tie, and columns of zeros are frequent.
ENTRIES = st.sampled_from([-2.0, -0.5, 0.0, 0.0, 0.25, 1.0, 3.0])


def widen(
    method: MergeMethod,
    base: Matrix | torch.Tensor,
    deltas: Sequence[Matrix | torch.Tensor],
    weights: Sequence[float] | None = None,
    name: str = "w",
) -> torch.Tensor:
    tensors = tuple(torch.as_tensor(delta) for delta in deltas)
    return method(Parts(name, tensors, tuple(weights or [1.0] * len(tensors)), torch.as_tensor(base)))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mean_rank(values: list[float], j: int) -> float:
    less = sum(value < values[j] - 1e-12 for value in values)
    equal = sum(abs(value - values[j]) <= 1e-12 for value in values)
    return less + (equal - 1) / 2


def slow(base: Matrix, deltas: Sequence[Matrix], weights: Sequence[float], t: float, calibration: float) -> Matrix:
    """The definition, column by column."""
    height, n = len(base), len(base[0])
    significances: list[list[list[float]]] = [[], []]
    for delta in deltas:
        magnitudes, directions = [], []
        for j in range(n):
            old, new = [row[j] for row in base], [row[j] + change[j] for row, change in zip(base, delta, strict=True)]
            a, b = math.hypot(*old), math.hypot(*new)
            inner = sum(x * y for x, y in zip(old, new, strict=True))
            magnitudes.append(abs(b - a))
            directions.append(1 - inner / (a * b) if a and b else 0.0 if a == b else 1.0)
        for found, values in zip(significances, (magnitudes, directions), strict=True):
            found.append([mean_rank(values, j) / n for j in range(n)])
    merged = [[0.0] * n for _ in range(height)]
    for found in significances:
        for k, delta in enumerate(deltas):
            for j in range(n):
                score = math.exp(found[k][j]) / sum(math.exp(each[j]) for each in found)
                if found[k][j] > t * sum(found[k]) / n + 1e-12:
                    score = calibration
                for i in range(height):
                    merged[i][j] += score / 2 * weights[k] * delta[i][j]
    return merged


def test_a_score_for_each_column_worked_out_by_hand() -> None:
    base = [[3.0, 0.0, 1.0], [4.0, 2.0, 0.0]]
    # Magnitudes 5, 2, 1 become 5, 4, 2: changes 0, 2, 1. Directions: turned (cos 24/25), kept, kept.
    one = [[1.0, 0.0, 1.0], [-1.0, 2.0, 0.0]]
    # They become 10, 2, 1: changes 5, 0, 0. Directions: kept, turned by 90°, by 180°.
    two = [[3.0, 2.0, -2.0], [4.0, -2.0, 0.0]]

    # Significances times three. Of one: magnitude 0, 2, 1; direction 2, ½, ½. Of two: 2, ½, ½; and 0, 1, 2.
    def softmax(own: float, other: float) -> float:
        return 1 / (1 + math.exp((other - own) / 3))

    pure = [
        (softmax(0, 2) + softmax(2, 0)) / 2,
        (softmax(2, 0.5) + softmax(0.5, 1)) / 2,
        (softmax(1, 0.5) + softmax(0.5, 2)) / 2,
    ]
    rows = list(zip(one, two, strict=True))
    expected = [[a * s + b * (1 - s) for a, b, s in zip(*row, pure, strict=True)] for row in rows]
    torch.testing.assert_close(widen(Widen(threshold=math.inf), base, [one, two]), torch.tensor(expected))
    # Above the mean, 1: of one column 1 by magnitude, column 0 by direction; of two column 0, and column 2.
    first = [(softmax(0, 2) + 1) / 2, (1 + softmax(0.5, 1)) / 2, (softmax(1, 0.5) + softmax(0.5, 2)) / 2]
    second = [(1 + softmax(0, 2)) / 2, (softmax(0.5, 2) + softmax(1, 0.5)) / 2, (softmax(0.5, 1) + 1) / 2]
    expected = [[a * s + b * t for a, b, s, t in zip(*row, first, second, strict=True)] for row in rows]
    torch.testing.assert_close(widen(Widen(), base, [one, two]), torch.tensor(expected))


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 3),
    kinds=st.lists(st.sampled_from(["own", "own", "first", "still", "new", "lost"]), min_size=1, max_size=6),
    threshold=st.sampled_from([0.0, 0.7, 1.0, 1.5, math.inf]),
    calibration=st.sampled_from([-0.5, 0.0, 1.0, 2.0]),
)
def test_equals_the_definition(seed: int, count: int, kinds: list[str], threshold: float, calibration: float) -> None:
    base, *deltas = normal(count + 1, 3, len(kinds), seed=seed)
    for j, kind in enumerate(kinds):
        # Columns that tie: equal ones, those that a delta leaves alone, and those that are zero on one side or both.
        base[:, j] = {"first": base[:, 0], "new": torch.zeros(3)}.get(kind, base[:, j])
        for k, delta in enumerate(deltas):
            made = {"first": delta[:, 0], "lost": -base[:, j]}.get(kind, delta[:, j])
            delta[:, j] = torch.zeros(3) if kind in ("still", "new") and k == 0 else made
    weights = [0.5, -1.0, 2.0][:count]
    expected = slow(base.tolist(), [delta.tolist() for delta in deltas], weights, threshold, calibration)
    method = Widen(scaling=0.5, threshold=threshold, calibration=calibration)
    torch.testing.assert_close(widen(method, base, deltas, weights), torch.tensor(expected) / 2)


@given(
    sizes=st.lists(st.tuples(ENTRIES, ENTRIES), min_size=1, max_size=6), threshold=st.sampled_from([0.0, 1.0, math.inf])
)
def test_entries_of_vectors_are_scored_by_their_size(sizes: list[tuple[float, float]], threshold: float) -> None:
    means = [sum(abs(pair[k]) for pair in sizes) / len(sizes) for k in (0, 1)]
    expected = []
    for pair in sizes:
        total = sum(math.exp(abs(value)) for value in pair)
        scores = [
            1.5 if mean and abs(value) > threshold * mean else math.exp(abs(value)) / total
            for value, mean in zip(pair, means, strict=True)
        ]
        expected.append(sum(score * value for score, value in zip(scores, pair, strict=True)))
    deltas = [[pair[k] for pair in sizes] for k in (0, 1)]
    found = widen(
        Widen(threshold=threshold, calibration=1.5), torch.ones(len(sizes)), [torch.tensor(d) for d in deltas]
    )
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("shape", [(5, 7), (7,), (3, 4, 2)], ids=str)
@pytest.mark.parametrize("name", ["w", EMBEDDING])
def test_of_equal_deltas_a_softmax_gives_the_delta(shape: tuple[int, ...], name: str) -> None:
    delta = normal(*shape)
    for count in (1, 2, 3):
        found = widen(Widen(threshold=math.inf), normal(*shape, seed=1), [delta] * count, name=name)
        torch.testing.assert_close(found, delta)


def test_an_embedding_is_a_weight_turned_round() -> None:
    base, deltas = normal(30, 8), [normal(30, 8, seed=k) for k in (1, 2)]
    found = widen(Widen(), base, deltas, name=EMBEDDING)
    torch.testing.assert_close(found, widen(Widen(), base.T, [delta.T for delta in deltas]).T)
    assert not torch.allclose(found, widen(Widen(), base, deltas))


def test_dimensions_after_the_second_belong_to_the_input() -> None:
    base, deltas = normal(6, 4, 3), [normal(6, 4, 3, seed=k) for k in (1, 2)]
    flat = widen(Widen(), base.flatten(1), [delta.flatten(1) for delta in deltas])
    torch.testing.assert_close(widen(Widen(), base, deltas), flat.view(6, 4, 3), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["w", EMBEDDING])
def test_small_deltas_are_told_apart_in_weights_of_several_blocks(name: str) -> None:
    # A millionth of the base: of float32 columns all cosines would be 1.
    base = normal(7000, 40)
    deltas = [normal(7000, 40, seed=k) * torch.linspace(1e-6, 4e-6, 40) for k in (1, 2)]
    ranks = []
    for start, delta in ((base.double(), delta.double()) for delta in deltas):
        along = start * ((start * delta).sum(0) / start.square().sum(0))
        turned = (delta - along).norm(dim=0) / start.norm(dim=0)
        moved = ((start + delta).norm(dim=0) - start.norm(dim=0)).abs()
        ranks.append(torch.stack([each.argsort().argsort() for each in (moved, turned)]) / 40)
    scores = torch.stack(ranks).softmax(dim=0).mean(dim=1)
    expected = scores[0] * deltas[0] + scores[1] * deltas[1]
    turn = torch.t if name == EMBEDDING else torch.clone
    found = widen(Widen(threshold=math.inf), turn(base), [turn(delta) for delta in deltas], name=name)
    torch.testing.assert_close(turn(found), expected)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("name", ["w", EMBEDDING])
def test_shapes_without_much_in_them(shape: tuple[int, ...], name: str) -> None:
    found = widen(Widen(), torch.ones(shape), [torch.ones(shape)] * 2, name=name)
    assert (found.shape, found.dtype) == (shape, torch.float32)
    # Nothing is above a mean of equals.
    torch.testing.assert_close(found, torch.ones(shape))


def test_a_matrix_with_nan_becomes_nan() -> None:
    delta = normal(3, 4)
    delta[1, 2] = math.nan
    assert widen(Widen(), normal(3, 4, seed=1), [delta, normal(3, 4, seed=2)]).isnan().all()
