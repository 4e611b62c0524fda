"""One tensor of a merge: each delta pruned and trimmed, then merged; the deltas may lie on disk or in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from delta_analysis.merge_methods import MergeMethod, Parts, ReadsBase
from delta_analysis.pruning import Prune, Pruner, prepared

Tensors = Mapping[str, torch.Tensor]
TRIMMING = 2**16
"""Stands for a position after all deltas: what a method trims after a pruner is drawn under another seed."""


@dataclass(frozen=True, eq=False)
class Pruned(Mapping[str, torch.Tensor]):
    """Tensors, each pruned when it is read; a pruner that compares all of them reads them before the first."""

    tensors: Tensors = field(repr=False)
    pruner: Pruner
    seed: int

    @cached_property
    def _prune(self) -> Prune:
        return prepared(self.pruner, self.tensors, self.seed)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._prune(self.tensors[name], name=name, seed=self.seed)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors


@dataclass(frozen=True, eq=False)
class Merger:
    """Makes the tensors of a merge, any one at any time.

    Attributes
    ----------
    base : reads a tensor of the base, float32, for a method that has to see it.
    deltas : one mapping for each; a tensor that one does not have is zero in it.
    method : what they are merged by.
    pruners : one a delta, None for none; each draws from a seed of its own (`source_seed`).
    weights : one a delta.
    seed : determines, with a delta's position and a tensor's name, all random numbers.
    statistics : of each delta, what its data says about tensors; empty if the method needs none.
    """

    base: Callable[[str], torch.Tensor]
    deltas: Sequence[Tensors]
    method: MergeMethod
    pruners: Sequence[Pruner | None]
    weights: tuple[float, ...]
    seed: int
    statistics: Sequence[Tensors] = ()

    @cached_property
    def _ready(self) -> list[Tensors]:
        """The deltas as they are merged."""
        ready: list[Tensors] = []
        for k, (tensors, pruner) in enumerate(zip(self.deltas, self.pruners, strict=True)):
            seed, trim = source_seed(self.seed, k), self.method.trim
            if pruner is not None:
                tensors = Pruned(tensors, pruner, seed)
                # Else the trimming would look at the very numbers that the pruner has looked at.
                seed = source_seed(seed, TRIMMING)
            ready.append(tensors if trim is None else Pruned(tensors, trim, seed))
        return ready

    def __call__(self, name: str) -> torch.Tensor:
        """The merged delta's tensor of this name, float32."""
        found = [each[name] if name in each else None for each in self._ready]
        shape = next(each.shape for each in found if each is not None)
        deltas = tuple(torch.zeros(shape) if each is None else each for each in found)
        base = self.base(name) if isinstance(self.method, ReadsBase) else None
        known = [each[name] for each in self.statistics if name in each]
        statistics = tuple(known) if self.statistics and len(known) == len(self.deltas) else None
        return self.method(Parts(name, deltas, self.weights, base, statistics))


def source_seed(seed: int, position: int) -> int:
    """The seed under which the delta at a position of a merge is pruned: the merge's own for the first.

    Examples
    --------
    >>> source_seed(7, 0)
    7
    >>> source_seed(7, 1) == source_seed(7, 1) != source_seed(8, 1)
    True
    """
    if not position:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=6).digest(), "little")


def merge_label(method: MergeMethod, pruners: Sequence[Pruner | None]) -> str:
    """What tables and figures call a merge: its pruner and its method."""
    names = dict.fromkeys("whole" if each is None else each.method for each in pruners)
    before = "" if list(names) == ["whole"] else f"{', '.join(names)} + "
    return f"{before}{method.label}"
