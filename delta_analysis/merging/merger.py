"""Merge deltas of one base into one delta, tensor by tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch

from delta_analysis._errors import checked_number
from delta_analysis._kernels import to_float32
from delta_analysis.checkpoints import Checkpoint, Source, TensorReference
from delta_analysis.deltas import COMPARED, Delta, Match
from delta_analysis.merging.compatibility import check_deltas, check_mergeable
from delta_analysis.merging.mergekit import FILE, mergekit_recipe
from delta_analysis.merging.methods import MergeMethod, Parts
from delta_analysis.merging.statistics import check_inputs, gather
from delta_analysis.pruning import Prune, Pruner, bind

Inputs = Iterable[Mapping[str, torch.Tensor]]
"""Arguments of a model's forward pass, batch after batch."""


@dataclass(frozen=True, eq=False)
class Computed:
    """A tensor of a merge, made anew each time that it is read."""

    name: str
    shape: tuple[int, ...]
    files: tuple[Path, ...] = field(repr=False)
    make: Callable[[str], torch.Tensor] = field(repr=False)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def read(self) -> torch.Tensor:
        return self.make(self.name)


def merge(
    base: Checkpoint | Source,
    deltas: Sequence[Delta],
    method: MergeMethod,
    prune: Pruner | Sequence[Pruner | None] | None = None,
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    data: Sequence[Inputs] | None = None,
    device: str = "cpu",
) -> Delta:
    """The deltas of one base merged into one, a delta again: lazy, to be evaluated, analysed or saved.

    `save_checkpoint(base, merged, …)` writes the merged model tensor by tensor, nothing is kept, and beside it
    a recipe for mergekit where that has the method.

    Parameters
    ----------
    base : what all deltas are differences from.
    deltas : as from `load_delta`, pruned or not. A tensor that an adapter leaves alone is zero in its
        delta; of other fine-tunes all must have the same tensors.
    method : `Average`, `TaskArithmetic`, `Ties`, `Della`, `Fisher`, `RegMean` or `Widen`.
    prune : applied to each delta before, such as `Dare(0.9)`; or one for each delta, None for none. The
        first delta is pruned under `seed`, each other one under a seed made of `seed` and its position
        (`source_seed`), so that masks are independent.
    weights : finite numbers, one a delta; 1 each by default.
    seed : determines, with a delta's position and a tensor's name, all random numbers.
    data : for `Fisher` and `RegMean`, for each delta batches of what its model is for: arguments of
        the model's forward pass, such as `input_ids` and `attention_mask`. They are read now, once.
    device : where the models run that read the data.

    Returns
    -------
    Delta, whose `finetuned` is a checkpoint of differences that are computed as they are read.

    Raises
    ------
    NotHomologousError
        Deltas of another base (by its weights), without tensors that the others have, or of other shapes.
    ValueError
        No delta; weights that are not finite, or that the method cannot use; weights, pruners or data that
        are not as many; data that the method needs and lacks, or has and does not need. All this at once.

    Warns
    -----
    UserWarning
        Tensors, tokens or settings of a fine-tune that differ from the base's, and are not in the merge.

    Examples
    --------
    >>> import delta_analysis as da
    >>> deltas = [da.load_delta(base="zoo:tiny/base", finetuned=f"zoo:tiny/{name}") for name in ("instruct", "math")]
    >>> merged = merge("zoo:tiny/base", deltas, da.merging.TaskArithmetic(0.5))
    >>> name = "model.norm.weight"
    >>> torch.equal(merged[name], (deltas[0][name] + deltas[1][name]) / 2)
    True
    """
    # What costs nothing to check comes before weights are read.
    count, seed = len(check_deltas(deltas)), int(checked_number("seed", seed, 0, whole=True))
    pruners, shares = _one_each(prune, count), _checked_weights(weights, count)
    _check_method(method, shares)
    batches = _checked_data(method, data, count)
    start, given, matches = check_mergeable(base, deltas)
    statistics = [
        gather(method.statistic, delta, each, device=device, seed=seed)  # type: ignore[arg-type]
        for delta, each in zip(given, batches, strict=False)
    ]
    starts = {match.tensor: match.base for match in matches if match.base is not None}
    merger = Merger(lambda name: _read(starts[name]), given, method, pruners, shares, seed, statistics)
    return _merged(start, matches, merger)


def _merged(base: Checkpoint, matches: Sequence[Match], merger: Merger) -> Delta:
    """The delta whose fine-tuned side is what the merger makes."""
    deltas = [delta for delta in merger.deltas if isinstance(delta, Delta)]
    sources = [delta.finetuned.source for delta in deltas]
    files = tuple({file for delta in deltas for file in delta.finetuned.files()})
    names = [match.tensor for match in matches if match.status == COMPARED]
    shapes = {match.tensor: match.shape for match in matches}
    references: dict[str, TensorReference] = {name: Computed(name, shapes[name], files, merger) for name in names}
    recipe = mergekit_recipe(base.source, deltas, merger.method, merger.pruners, merger.weights)
    label = f"{merge_label(merger.method, merger.pruners)} of {', '.join(sources)}"
    beside = {FILE: recipe} if recipe else {}
    merged = Checkpoint(label, None, references, {}, {}, is_delta=True, beside=beside)
    return Delta(base, merged, tuple(replace(m, finetuned=references.get(m.tensor, m.finetuned)) for m in matches))


def _check_method(method: MergeMethod, weights: Sequence[float]) -> None:
    if not isinstance(method, MergeMethod):
        raise ValueError(f"method must be a merge method such as Ties(0.8), a value and not a class; not {method!r}")
    method.check(tuple(weights))


def _one_each(given: Pruner | Sequence[Pruner | None] | None, count: int) -> list[Pruner | None]:
    pruners = list(given) if isinstance(given, list | tuple) else [given] * count
    if len(pruners) != count:
        raise ValueError(f"prune: {len(pruners)} pruners are given for {count} deltas; give one for all, or one each")
    for pruner in pruners:
        if pruner is not None and (isinstance(pruner, type) or not hasattr(pruner, "drop_rate")):
            raise ValueError(
                f"prune must be a pruner such as Dare(0.9), a list with one for each, or None; not {pruner!r}"
            )
    return pruners  # type: ignore[return-value]


def _checked_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    if weights is None:
        return (1.0,) * count
    if not isinstance(weights, Sequence) or len(weights) != count:
        raise ValueError(f"weights must be {count} numbers, one for each delta; not {weights!r}")
    return tuple(checked_number(f"weights[{k}]", weight) for k, weight in enumerate(weights))


def _checked_data(method: MergeMethod, data: Sequence[Inputs] | None, count: int) -> list[Inputs]:
    """The batches of each delta, the first of each looked at before any model is loaded."""
    if not method.statistic:
        if data is not None:
            raise ValueError(f"data: {method.label} needs none; leave it out")
        return []
    if data is None:
        raise ValueError(f"data: {method.label} needs some of each model; give for each delta an iterable of batches")
    if not isinstance(data, Sequence) or len(data) != count:
        given = len(data) if isinstance(data, Sequence) else data
        raise ValueError(f"data: must be {count} iterables of batches, one for each delta; not {given!r}")
    return [_looked_at(batches, k) for k, batches in enumerate(data)]


def _looked_at(batches: Inputs, position: int) -> Inputs:
    if not isinstance(batches, Iterable):
        raise ValueError(f"data: number {position} must be an iterable of batches; not {batches!r}")
    rest: Iterator[Mapping[str, torch.Tensor]] = iter(batches)
    first = next(rest, None)
    if first is None:
        raise ValueError(f"data: number {position} holds no batch (a generator can be read only once)")
    check_inputs(first, 0)
    return chain([first], rest)


def _read(reference: TensorReference) -> torch.Tensor:
    return to_float32(reference.read())


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
        return bind(self.pruner, self.tensors, self.seed)

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
        base = self.base(name) if self.method.reads_base else None
        known = [each[name] for each in self.statistics if name in each]
        statistics = tuple(known) if self.statistics and len(known) == len(self.deltas) else None
        return self.method(Parts(name, deltas, self.weights, base, statistics))


def source_seed(seed: int, position: int) -> int:
    """The seed under which the delta at a position of a merge is pruned: the merge's own for the first."""
    if not position:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=6).digest(), "little")


def merge_label(method: MergeMethod, pruners: Sequence[Pruner | None]) -> str:
    """What tables and figures call a merge: its pruner and its method."""
    names = dict.fromkeys("whole" if each is None else each.method for each in pruners)
    before = "" if list(names) == ["whole"] else f"{', '.join(names)} + "
    return f"{before}{method.label}"
