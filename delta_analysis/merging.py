"""Merge deltas of one base into one delta, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from numbers import Real
from operator import index
from pathlib import Path

import torch

from delta_analysis.alignment import COMPARED, Match
from delta_analysis.checkpoint import Checkpoint, Source
from delta_analysis.delta import Delta
from delta_analysis.entry import Entry
from delta_analysis.memory import to_float32
from delta_analysis.merge_methods import MergeMethod
from delta_analysis.merge_statistics import check_batch, gather
from delta_analysis.merge_tensors import Merger, merge_label
from delta_analysis.mergeable import check_mergeable
from delta_analysis.mergekit_recipe import FILE, mergekit_recipe
from delta_analysis.pruning import Pruner

Batches = Iterable[Mapping[str, torch.Tensor]]
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
    data: Sequence[Batches] | None = None,
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
    >>> merged = merge("zoo:tiny/base", deltas, da.TaskArithmetic(0.5))
    >>> name = "model.norm.weight"
    >>> torch.equal(merged[name], (deltas[0][name] + deltas[1][name]) / 2)
    True
    """
    start, given, matches = check_mergeable(base, deltas)
    pruners, number = _one_each(prune, len(given)), _checked_seed(seed)
    shares = _checked_weights(weights, len(given))
    _check_method(method, shares)
    batches = _checked_data(method, data, len(given))
    statistics = [
        gather(method.statistic, delta, each, device=device, seed=number)  # type: ignore[arg-type]
        for delta, each in zip(given, batches, strict=False)
    ]
    starts = {match.tensor: match.base for match in matches if match.base is not None}
    merger = Merger(lambda name: _read(starts[name]), given, method, pruners, shares, number, statistics)
    return _merged(start, matches, merger)


def _merged(base: Checkpoint, matches: Sequence[Match], merger: Merger) -> Delta:
    """The delta whose fine-tuned side is what the merger makes."""
    deltas = [delta for delta in merger.deltas if isinstance(delta, Delta)]
    sources = [delta.finetuned.source for delta in deltas]
    files = tuple({file for delta in deltas for file in delta.finetuned.files()})
    names = [match.tensor for match in matches if match.status == COMPARED]
    shapes = {match.tensor: match.shape for match in matches}
    entries: dict[str, Entry] = {name: Computed(name, shapes[name], files, merger) for name in names}
    recipe = mergekit_recipe(base.source, deltas, merger.method, merger.pruners, merger.weights)
    label = f"{merge_label(merger.method, merger.pruners)} of {', '.join(sources)}"
    beside = {FILE: recipe} if recipe else {}
    merged = Checkpoint(label, None, entries, {}, {}, is_difference=True, beside=beside)
    return Delta(base, merged, tuple(replace(m, finetuned=entries.get(m.tensor, m.finetuned)) for m in matches))


def _check_method(method: MergeMethod, weights: Sequence[float]) -> None:
    if isinstance(method, type) or not callable(getattr(method, "check", None)):
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
    for k, weight in enumerate(weights):
        if not isinstance(weight, Real) or isinstance(weight, bool) or not math.isfinite(weight):
            raise ValueError(f"weights: number {k} must be a finite number; not {weight!r}")
    return tuple(map(float, weights))


def _checked_seed(seed: int) -> int:
    try:
        number = index(seed)
    except TypeError:
        number = -1
    if number < 0 or isinstance(seed, bool):
        raise ValueError(f"seed must be a whole number of at least 0; not {seed!r}")
    return number


def _checked_data(method: MergeMethod, data: Sequence[Batches] | None, count: int) -> list[Batches]:
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


def _looked_at(batches: Batches, position: int) -> Batches:
    if not isinstance(batches, Iterable):
        raise ValueError(f"data: number {position} must be an iterable of batches; not {batches!r}")
    rest: Iterator[Mapping[str, torch.Tensor]] = iter(batches)
    first = next(rest, None)
    if first is None:
        raise ValueError(f"data: number {position} holds no batch (a generator can be read only once)")
    check_batch(first, 0)
    return chain([first], rest)


def _read(entry: Entry) -> torch.Tensor:
    return to_float32(entry.read())
