"""Merge deltas of one base into one delta, tensor by tensor."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path

import torch

from delta_analysis._errors import NotHomologousError
from delta_analysis.alignment import COMPARED, Match, align
from delta_analysis.checkpoint import Checkpoint, Source, open_checkpoint
from delta_analysis.delta import Delta
from delta_analysis.entry import Entry, Stored
from delta_analysis.merge_methods import MergeMethod
from delta_analysis.merge_statistics import gather
from delta_analysis.merge_tensors import Merger, merge_label
from delta_analysis.mergekit_recipe import FILE, mergekit_recipe
from delta_analysis.names import reading_order
from delta_analysis.pruning import Pruner

Batches = Iterable[Mapping[str, torch.Tensor]]
"""Arguments of a model's forward pass, batch after batch."""
Hashes = dict[tuple[Entry, tuple[int, ...]], str]


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

    Each tensor is read of each delta, pruned, trimmed if the method does, and merged; nothing is kept.
    `save_checkpoint(base, merged, …)` writes the merged model tensor by tensor, and beside it a recipe
    for mergekit where that has the method.

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
        the model's forward pass, such as `input_ids` and `attention_mask`. They are read now, once,
        and of the models one at a time is loaded.
    device : where the models run that read the data.

    Returns
    -------
    Delta, whose `finetuned` is a checkpoint of differences that are computed as they are read.

    Raises
    ------
    NotHomologousError
        Before any long work: deltas of another base (unless every weight is equal), or without
        tensors that the others have, or of other shapes.
    ValueError
        Before any long work: no delta; weights that are not finite, or not as many, or with data below 0;
        pruners or data that are not as many; data that the method needs and lacks, or has and does not need.

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
    pruners = _one_each("pruners", prune, len(given))
    numbers = _checked_weights(weights, len(given), method)
    batches = _checked_data(method, data, len(given))
    statistics = [
        gather(method.statistic, delta, each, device=device, seed=seed)  # type: ignore[arg-type]
        for delta, each in zip(given, batches, strict=False)
    ]
    starts = {match.tensor: match.base for match in matches if match.base is not None}
    merger = Merger(lambda name: _read(starts[name]), given, method, pruners, numbers, seed, statistics)
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


def check_mergeable(base: Checkpoint | Source, deltas: Sequence[Delta]) -> tuple[Checkpoint, list[Delta], list[Match]]:
    """The base, the deltas, and what is merged with what of the base; raise unless all deltas are of that base."""
    start = base if isinstance(base, Checkpoint) else open_checkpoint(base)
    given = _checked_deltas(deltas)
    return start, given, _matches(start, given)


def _read(entry: Entry) -> torch.Tensor:
    return entry.read().to(torch.float32)


def _checked_deltas(deltas: Sequence[Delta]) -> list[Delta]:
    if isinstance(deltas, Delta) or not isinstance(deltas, Sequence) or not deltas:
        raise ValueError("deltas must be a list of at least one delta, such as load_delta gives")
    for k, delta in enumerate(deltas):
        if not isinstance(delta, Delta):
            raise ValueError(f"deltas: number {k} is {type(delta).__name__}, not a delta; give load_delta(…)")
        if delta.base is None and not delta.finetuned.is_difference:
            raise ValueError(
                f"deltas: number {k} ({delta.finetuned.source}) is the fine-tuned weights themselves; "
                "load it with the base that it was fine-tuned from"
            )
    return list(deltas)


def _one_each(what: str, given: Pruner | Sequence[Pruner | None] | None, count: int) -> list[Pruner | None]:
    if given is None or callable(given):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"{what}: {len(given)} are given for {count} deltas; give one for all, or one each")
    return list(given)


def _checked_weights(weights: Sequence[float] | None, count: int, method: MergeMethod) -> tuple[float, ...]:
    if weights is None:
        return (1.0,) * count
    if len(weights) != count:
        raise ValueError(f"weights: {len(weights)} are given for {count} deltas; give one for each")
    for k, weight in enumerate(weights):
        if not isinstance(weight, Real) or isinstance(weight, bool) or not math.isfinite(weight):
            raise ValueError(f"weights: number {k} must be a finite number; not {weight!r}")
    if method.statistic and (min(weights) < 0 or not sum(weights)):
        raise ValueError(f"weights: {method.label} needs weights of at least 0, not all of them 0; not {weights!r}")
    return tuple(map(float, weights))


def _checked_data(method: MergeMethod, data: Sequence[Batches] | None, count: int) -> Sequence[Batches]:
    if not method.statistic:
        if data is not None:
            raise ValueError(f"data: {method.label} needs none; leave it out")
        return ()
    if data is None:
        raise ValueError(f"data: {method.label} needs some of each model; give for each delta an iterable of batches")
    if len(data) != count:
        raise ValueError(f"data: {len(data)} iterables are given for {count} deltas; give one for each")
    return data


def _matches(base: Checkpoint, deltas: Sequence[Delta]) -> list[Match]:
    """What is merged with what of the base, after all deltas were found to fit."""
    each = [
        {match.tensor: match for match in align(base, delta.finetuned, "common") if match.status == COMPARED}
        if delta.base is None
        else delta.compared
        for delta in deltas
    ]
    whole = [k for k, delta in enumerate(deltas) if not delta.finetuned.is_difference] or range(len(deltas))
    names = dict.fromkeys(name for k in whole for name in each[k])
    for k, delta in enumerate(deltas):
        lacking = [name for name in names if name not in each[k]]
        if lacking and not delta.finetuned.is_difference:
            raise NotHomologousError(
                f"{delta.finetuned.source}: {len(lacking)} of {len(names)} tensors of the other deltas are not in its "
                f"delta, such as {lacking[0]!r}; all have to be fine-tunes of one model: see its coverage()"
            )
        unknown = [name for name in each[k] if name not in names]
        if unknown:
            raise NotHomologousError(
                f"{delta.finetuned.source}: changes {unknown[0]!r}, which the other deltas do not have"
            )
    found = [_fitting(name, deltas, each) for name in names]
    _check_bases(base, deltas, each, found)
    taken = {match.base_name for match in found}
    beyond = [m for m in align(base, deltas[0].finetuned, "common") if m.status == "only in base"]
    found += [match for match in beyond if match.base_name not in taken]
    return sorted(found, key=lambda match: reading_order(match.tensor))


def _fitting(name: str, deltas: Sequence[Delta], each: Sequence[Mapping[str, Match]]) -> Match:
    """The match of a tensor, which all deltas have in one shape."""
    having = {k: matches[name] for k, matches in enumerate(each) if name in matches}
    first, *others = having
    for k in others:
        if having[k].shape != having[first].shape:
            raise NotHomologousError(
                f"tensor {name!r}: {having[first].shape} in {deltas[first].finetuned.source} and {having[k].shape} in "
                f"{deltas[k].finetuned.source}; all deltas have to be of one shape, also of one vocabulary"
            )
    return having[first]


def _check_bases(
    base: Checkpoint, deltas: Sequence[Delta], each: Sequence[Mapping[str, Match]], found: Sequence[Match]
) -> None:
    """Raise unless every delta's base has the weights of `base`; files that are the same are not read."""
    hashes: Hashes = {}
    for match in found:
        own = base.entries.get(match.base_name)
        for delta, matches in zip(deltas, each, strict=True):
            theirs = matches[match.tensor].base if match.tensor in matches and delta.base is not None else None
            if theirs is None or own is theirs:
                continue
            name = f"tensor {match.tensor!r}"
            if own is None:
                raise NotHomologousError(f"{base.source}: has no {name}, which {delta.finetuned.source} has a delta of")
            # The same place in the same file is not read again.
            if isinstance(own, Stored) and replace(own, shape=theirs.shape) == theirs:
                continue
            if _hash(own, theirs.shape, hashes) != _hash(theirs, theirs.shape, hashes):
                assert delta.base is not None
                raise NotHomologousError(
                    f"{delta.finetuned.source}: is a delta from another base: {name} of {delta.base.source} is not "
                    f"that of {base.source}; load all deltas with the base that they are merged on"
                )


def _hash(entry: Entry, shape: tuple[int, ...], known: Hashes) -> str:
    """A hash of the float32 values; of more rows than are compared, where a vocabulary was cut, of the first ones."""
    if (entry, shape) not in known:
        values = _read(entry)[: shape[0]] if shape and entry.shape else _read(entry)
        hashed = hashlib.blake2b(str(tuple(values.shape)).encode(), digest_size=16)
        hashed.update(values.contiguous().view(-1).numpy().data)
        known[entry, shape] = hashed.hexdigest()
    return known[entry, shape]
