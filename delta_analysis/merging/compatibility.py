"""Whether deltas can be merged: all of one base, with the same tensors in the same shapes."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from delta_analysis._errors import NotHomologousError
from delta_analysis._kernels import to_float32
from delta_analysis.checkpoints import (
    Checkpoint,
    InFile,
    Source,
    TensorReference,
    open_checkpoint,
    output_head,
    reading_order,
)
from delta_analysis.deltas import Delta, Match, align

Hashes = dict[tuple[TensorReference, tuple[int, ...]], str]


def check_mergeable(base: Checkpoint | Source, deltas: Sequence[Delta]) -> tuple[Checkpoint, list[Delta], list[Match]]:
    """The base, the deltas, and what is merged with what of the base; raise unless all deltas are of that base.

    Weights of bases are compared by hash, unless they lie in the same place; nothing else is read.

    Raises
    ------
    NotHomologousError
        Deltas of another base, without tensors that the others have, or of other shapes.
    ValueError
        No delta, or what is none.

    Warns
    -----
    UserWarning
        Tensors or tokens of a fine-tune that the base lacks: they are in no delta, and the merge has the
        base's own; settings that differ from the base's, which the merge has.
    """
    start = base if isinstance(base, Checkpoint) else open_checkpoint(base)
    given = [_based(delta, start) for delta in check_deltas(deltas)]
    matches = _matches(start, given)
    for delta in given:
        _warn_of_losses(delta)
    return start, given, matches


def _based(delta: Delta, base: Checkpoint) -> Delta:
    """The delta with its base, which that of an adapter may lack."""
    if delta.base is None:
        delta = replace(delta, base=base, matches=tuple(align(base, delta.finetuned, "common")))
    strange = [m for m in delta.matches if m.status in ("only in finetuned", "shape differs")]
    if delta.finetuned.is_delta and strange:
        problem = strange[0].reason if strange[0].status == "shape differs" else "which the base does not have"
        raise NotHomologousError(
            f"{delta.finetuned.source}: changes {strange[0].tensor!r}, {problem}; it is not of the base {base.source}"
        )
    return delta


def _warn_of_losses(delta: Delta) -> None:
    """Warn of what a fine-tune has beyond its base, and of settings that it has changed."""
    if delta.finetuned.is_delta or delta.base is None:
        return
    shapes = delta.finetuned.shapes
    beyond = [name for name, shape in shapes.items() if name not in delta or delta.compared[name].shape != shape]
    if beyond:
        warnings.warn(
            f"{delta.finetuned.source}: {len(beyond)} of its tensors, or rows of them, are not in {delta.base.source}, "
            f"such as {beyond[0]!r}; a merge has those of the base alone",
            stacklevel=4,
        )
    settings = delta.config_differences()
    if len(settings):
        row = settings.iloc[0]
        warnings.warn(
            f"{delta.finetuned.source}: {len(settings)} of its settings are not those of {delta.base.source}, such as "
            f"{row['setting']!r} ({row['base']} against {row['finetuned']}); a merge has those of the base",
            stacklevel=4,
        )


def _read(reference: TensorReference) -> torch.Tensor:
    return to_float32(reference.read())


def check_deltas(deltas: Sequence[Delta]) -> list[Delta]:
    """The deltas; raise unless they are some, each with its base or an adapter."""
    if isinstance(deltas, Delta) or not isinstance(deltas, Sequence) or not deltas:
        raise ValueError("deltas must be a list of at least one delta, such as load_delta gives")
    for k, delta in enumerate(deltas):
        if not isinstance(delta, Delta):
            raise ValueError(f"deltas: number {k} is {type(delta).__name__}, not a delta; give load_delta(…)")
        if delta.base is None and not delta.finetuned.is_delta:
            raise ValueError(
                f"deltas: number {k} ({delta.finetuned.source}) is the fine-tuned weights themselves; "
                "load it with the base that it was fine-tuned from"
            )
    return list(deltas)


def _matches(base: Checkpoint, deltas: Sequence[Delta]) -> list[Match]:
    """What is merged with what of the base, after all deltas were found to fit."""
    each = [delta.compared for delta in deltas]
    heads = {name for matches in each for name in matches if output_head([name])}
    for delta, matches in zip(deltas, each, strict=True):
        if heads - matches.keys() and delta.finetuned.ties_head and output_head(matches) is None:
            raise NotHomologousError(
                f"{delta.finetuned.source}: ties its output head to its embeddings, and another delta has a head of "
                f"its own, {min(heads)!r}; untie it first (load it with transformers, give lm_head.weight a copy "
                "of the embeddings, set tie_word_embeddings to false, save_pretrained), then merge"
            )
    whole = [k for k, delta in enumerate(deltas) if not delta.finetuned.is_delta] or range(len(deltas))
    names = dict.fromkeys(name for k in whole for name in each[k])
    for k, delta in enumerate(deltas):
        lacking = [name for name in names if name not in each[k]]
        if lacking and not delta.finetuned.is_delta:
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
        own = base.references.get(match.base_name)
        for delta, matches in zip(deltas, each, strict=True):
            theirs = matches[match.tensor].base if match.tensor in matches else None
            if theirs is None or own is theirs:
                continue
            name = f"tensor {match.tensor!r}"
            if own is None:
                raise NotHomologousError(f"{base.source}: has no {name}, which {delta.finetuned.source} has a delta of")
            # The same place in the same file is not read again.
            if isinstance(own, InFile) and replace(own, shape=theirs.shape) == theirs:
                continue
            if _hash(own, theirs.shape, hashes) != _hash(theirs, theirs.shape, hashes):
                assert delta.base is not None
                raise NotHomologousError(
                    f"{delta.finetuned.source}: is a delta from another base: {name} of {delta.base.source} is not "
                    f"that of {base.source}; load all deltas with the base that they are merged on"
                )


def _hash(reference: TensorReference, shape: tuple[int, ...], known: Hashes) -> str:
    """A hash of the float32 values; of more rows than are compared, where a vocabulary was cut, of the first ones."""
    if (reference, shape) not in known:
        values = _read(reference)[: shape[0]] if shape and reference.shape else _read(reference)
        hashed = hashlib.blake2b(str(tuple(values.shape)).encode(), digest_size=16)
        hashed.update(values.contiguous().view(-1).numpy().data)
        known[reference, shape] = hashed.hexdigest()
    return known[reference, shape]
