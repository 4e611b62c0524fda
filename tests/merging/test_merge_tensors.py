"""One tensor of a merge: every delta pruned under a seed of its own and trimmed, whatever is read first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from delta_analysis.merging.average import Average
from delta_analysis.merging.della import Della
from delta_analysis.merging.merger import TRIMMING, Merger, Tensors, merge_label, source_seed
from delta_analysis.merging.methods import MergeMethod, Parts
from delta_analysis.merging.task_arithmetic import TaskArithmetic
from delta_analysis.merging.ties import Ties
from delta_analysis.pruning import Dare, Magnitude, MagPrune, Pruner, bind

SHAPES = {"v": (7,), "w": (6, 5), "x": (4, 3, 2)}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tensors(seed: int) -> dict[str, torch.Tensor]:
    return {name: normal(*shape, seed=seed + i) for i, (name, shape) in enumerate(SHAPES.items())}


BASE, DELTAS = tensors(0), [tensors(10), tensors(20), tensors(30)]


@dataclass(frozen=True)
class Shown(MergeMethod):
    """A method that keeps what it was handed."""

    trim: Pruner | None = None
    scaling: float = 1.0
    seen: list[Parts] = field(default_factory=list, compare=False)
    label = "shown"

    def __call__(self, parts: Parts) -> torch.Tensor:
        self.seen.append(parts)
        return parts.deltas[0]


@dataclass(frozen=True)
class ShownBase(Shown):
    """One that has to see the base too."""

    reads_base = True


class Counted(Mapping[str, torch.Tensor]):
    """Tensors that count how often they are read."""

    def __init__(self, inner: Tensors) -> None:
        self.inner = inner
        self.reads: list[str] = []

    def __getitem__(self, name: str) -> torch.Tensor:
        self.reads.append(name)
        return self.inner[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.inner)

    def __len__(self) -> int:
        return len(self.inner)

    def __contains__(self, name: object) -> bool:
        return name in self.inner


def merger(
    method: MergeMethod, pruner: Pruner | None = None, deltas: list[Any] | None = None, seed: int = 5, **change: Any
) -> Merger:
    deltas = DELTAS if deltas is None else deltas
    given = {"pruners": [pruner] * len(deltas), "weights": (1.0,) * len(deltas), "seed": seed, **change}
    return Merger(BASE.__getitem__, deltas, method, **given)


def handed(method: Shown, make: Merger, name: str = "w") -> Parts:
    make(name)
    return method.seen[-1]


def test_a_method_gets_all_that_a_tensor_is_made_of() -> None:
    shown = Shown()
    parts = handed(shown, merger(shown, weights=(1.0, -2.0, 0.5)))
    assert (parts.name, parts.weights, parts.statistics) == ("w", (1.0, -2.0, 0.5), None)
    for delta, given in zip(parts.deltas, DELTAS, strict=True):
        assert torch.equal(delta, given["w"])


def test_the_base_is_read_for_a_method_that_has_to_see_it_alone() -> None:
    read = []

    def base(name: str) -> torch.Tensor:
        read.append(name)
        return BASE[name]

    given = {"deltas": DELTAS, "pruners": [None] * 3, "weights": (1.0,) * 3, "seed": 0}
    for method in (Shown(), TaskArithmetic(), Ties(), Della()):
        Merger(base, method=method, **given)("w")  # type: ignore[arg-type]
    assert read == []
    shown = ShownBase()
    found = handed(shown, Merger(base, method=shown, **given)).base  # type: ignore[arg-type]
    assert found is not None and torch.equal(found, BASE["w"])
    assert read == ["w"]


@pytest.mark.parametrize(
    "pruner", [Dare(0.5), MagPrune(0.5), Magnitude(0.5), Magnitude(0.5, "model"), Magnitude(0.5, "row")], ids=repr
)
def test_each_delta_is_pruned_under_its_own_seed(pruner: Pruner) -> None:
    shown = Shown()
    make = merger(shown, pruner)
    for name in SHAPES:
        for k, (delta, given) in enumerate(zip(handed(shown, make, name).deltas, DELTAS, strict=True)):
            seed = source_seed(5, k)
            assert torch.equal(delta, bind(pruner, given, seed)(given[name], name=name, seed=seed))


def test_what_the_method_trims_comes_after_the_pruner_and_has_numbers_of_its_own() -> None:
    shown = Shown(trim=MagPrune(0.5))
    parts = handed(shown, merger(shown, Dare(0.5)))
    for k, (delta, given) in enumerate(zip(parts.deltas, DELTAS, strict=True)):
        seed = source_seed(5, k)
        dropped = Dare(0.5)(given["w"], name="w", seed=seed)
        assert torch.equal(delta, MagPrune(0.5)(dropped, name="w", seed=source_seed(seed, TRIMMING)))
    # A trim alone is the same as that pruner before a method without.
    assert torch.equal(merger(Ties(0.7))("w"), merger(Ties(0.0), Magnitude(0.7))("w"))
    assert torch.equal(merger(Della(0.7))("w"), merger(Della(0.0), MagPrune(0.7))("w"))


def test_each_delta_may_have_a_pruner_of_its_own() -> None:
    shown = Shown()
    parts = handed(shown, merger(shown, pruners=[Dare(0.5), None, Magnitude(0.5)]))
    assert torch.equal(parts.deltas[0], Dare(0.5)(DELTAS[0]["w"], name="w", seed=5))
    assert torch.equal(parts.deltas[1], DELTAS[1]["w"])
    assert torch.equal(parts.deltas[2], Magnitude(0.5)(DELTAS[2]["w"], name="w", seed=0))


def test_a_model_wide_trim_is_of_each_delta_as_a_whole() -> None:
    make = merger(Ties(0.6, "model"))
    cut = [Magnitude(0.6, "model").over(delta, 0) for delta in DELTAS]
    for name in SHAPES:
        trimmed = [each(delta[name], name=name, seed=0) for each, delta in zip(cut, DELTAS, strict=True)]
        assert torch.equal(make(name), Ties(0.0)(Parts(name, tuple(trimmed), (1.0,) * 3, BASE[name])))
    left = [sum(int((each[name] != 0).sum()) for name in SHAPES) for each in make._ready]
    numel = sum(tensor.numel() for tensor in BASE.values())
    assert left == [numel - round(0.6 * numel)] * 3
    assert not all(torch.equal(make(name), merger(Ties(0.6))(name)) for name in SHAPES)


def test_a_tensor_reads_itself_alone_and_once() -> None:
    counted = [Counted(delta) for delta in DELTAS]
    merger(Ties(0.5), Dare(0.5), counted)("w")
    assert [each.reads for each in counted] == [["w"]] * 3
    # A cut over all tensors is sought once, before the first one.
    make = merger(Ties(0.5, "model"), None, counted)
    make("w")
    whole = [len(each.reads) for each in counted]
    make("v")
    assert [len(each.reads) for each in counted] == [count + 1 for count in whole]


def test_a_delta_without_a_tensor_leaves_it_alone() -> None:
    lacking = {"w": DELTAS[1]["w"]}
    make = merger(TaskArithmetic(), None, [DELTAS[0], lacking])
    assert torch.equal(make("v"), DELTAS[0]["v"])
    assert torch.equal(make("w"), DELTAS[0]["w"] + DELTAS[1]["w"])
    shown = Shown(trim=Magnitude(0.5, "model"))
    parts = handed(shown, merger(shown, Dare(0.5), [DELTAS[0], lacking]), "x")
    assert torch.equal(parts.deltas[1], torch.zeros(SHAPES["x"]))


def test_statistics_are_those_of_every_delta_or_of_none() -> None:
    shown = Shown()
    known: list[Tensors] = [{"w": normal(6, 5, seed=k), "v": normal(7, seed=k)} for k in (1, 2, 3)]
    found = handed(shown, merger(shown, statistics=known)).statistics
    assert found is not None
    assert all(torch.equal(one, each["w"]) for one, each in zip(found, known, strict=True))
    assert handed(shown, merger(shown, statistics=[*known[:2], {}])).statistics is None
    assert handed(shown, merger(shown, statistics=known), "x").statistics is None


def test_seeds_of_sources_differ_and_the_first_is_the_merges_own() -> None:
    found = [source_seed(seed, k) for seed in range(50) for k in range(20)]
    assert len(set(found)) == len(found)
    assert [source_seed(seed, 0) for seed in (0, 1, 10**12)] == [0, 1, 10**12]
    assert all(0 <= seed < 2**48 for seed in found)


def test_a_merge_is_called_by_its_pruners_and_its_method() -> None:
    assert merge_label(TaskArithmetic(), [None, None]) == "task arithmetic"
    assert merge_label(Ties(), [Dare(0.5)] * 3) == "DARE + TIES"
    assert merge_label(Average(), [Dare(0.5), None, Magnitude(0.5), None]) == "DARE, whole, MP + average"
