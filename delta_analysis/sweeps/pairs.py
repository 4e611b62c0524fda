"""A pair in memory, whose fine-tuned model is edited and restored: loaded once, shared by threads."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from delta_analysis.checkpoints import PREFIX, Placement, open_checkpoint, pair_sources
from delta_analysis.deltas import edited_weight, in_scope, load_delta, placements
from delta_analysis.evaluation import (
    Evaluation,
    finetuned_model,
    parameters_of,
    write_weights,
)
from delta_analysis.pruning import Change, Pruner, bind

HELD_BYTES = 2**30
"""Pairs that together are no larger stay in memory for the next sweep."""


@dataclass(frozen=True)
class Pair:
    """A base and a fine-tune.

    Attributes
    ----------
    name : how tables and figures call the pair, `base → fine-tune`.
    base, finetuned : sources as `load_delta` takes them; without a base (None) it is the fine-tuned
        weights themselves that are dropped. `pair:NAME` stands for its side of a known pair.
    """

    name: str
    base: str | None
    finetuned: str

    def __post_init__(self) -> None:
        if self.base and self.base.startswith(PREFIX):
            object.__setattr__(self, "base", pair_sources(self.base)[0])
        if self.finetuned.startswith(PREFIX):
            object.__setattr__(self, "finetuned", pair_sources(self.finetuned)[1])


@dataclass(frozen=True)
class Edit:
    """A pruner, the tensors that it is applied to, and what is made of them before.

    Attributes
    ----------
    pruner : such as `Dare(0.9)`.
    scope : which tensors; `all` by default, else as `Delta.select` takes it: `linear`, `attention`,
        `mlp`, `embeddings`, `norms`, glob patterns, several with commas between.
    change : such as `Scaled(2.0)`, made of the delta's tensors before they are pruned, under seed 0.
    """

    pruner: Pruner
    scope: str = "all"
    change: Change | None = None

    @property
    def method(self) -> str:
        """What tables and figures call it."""
        return self.pruner.method if self.change is None else f"{self.change.label}, {self.pruner.method}"


class Edited(NamedTuple):
    """A model with pruned weights, and the share of the entries in scope, not zero before, that were dropped."""

    model: PreTrainedModel
    achieved_drop_rate: float


@dataclass(frozen=True, eq=False)
class EditablePair:
    """A pair in memory: the untouched fine-tuned model, the base weights and the delta, each loaded once.

    Threads may share it: each edits a copy of the model of its own. `nonzero` counts entries of the delta.
    """

    pair: Pair
    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    placements: tuple[Placement, ...] = field(repr=False)
    base: dict[str, torch.Tensor] = field(repr=False)
    delta: dict[str, torch.Tensor] = field(repr=False)
    nonzero: dict[str, int] = field(repr=False)
    _copies: list[PreTrainedModel] = field(default_factory=list, repr=False)
    _prepared: dict[Evaluation, Evaluation] = field(default_factory=dict, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    @classmethod
    def load(cls, pair: Pair, device: str = "cpu") -> EditablePair:
        lazy = load_delta(base=pair.base, finetuned=pair.finetuned)
        placed = placements(lazy)
        model, tokenizer = finetuned_model(lazy, device)
        known = {name for placement in placed for name in placement.stored}
        tensors = {name: lazy.read(name) for name in lazy.select() if name in known}
        delta = {name: tensor for name, (tensor, _) in tensors.items()}
        base = {name: torch.zeros_like(delta[name]) if start is None else start for name, (_, start) in tensors.items()}
        nonzero = {name: int(torch.count_nonzero(tensor)) for name, tensor in delta.items()}
        return cls(pair, model, tokenizer, placed, base, delta, nonzero)

    @property
    def nbytes(self) -> int:
        """Memory of the weights, with one copy that is edited."""
        held = [*self.base.values(), *self.delta.values()]
        return sum(tensor.nbytes for tensor in held) + 2 * sum(each.nbytes for each in self.model.parameters())

    @contextmanager
    def edited(self, edit: Edit | None, seed: int) -> Iterator[Edited]:
        """A model that is base + pruned delta in the edit's scope and fine-tuned elsewhere, while it lasts.

        Without an edit it is the fine-tuned one. Afterwards the model is as before, bit for bit.
        """
        shapes = {name: tensor.dim() for name, tensor in self.delta.items()}
        scoped = {} if edit is None else {name: self.delta[name] for name in in_scope(edit.scope, shapes)}
        with self._lock:
            model = self._copies.pop() if self._copies else copy.deepcopy(self.model)
        before = sum(self.nonzero[name] for name in scoped)
        if edit is not None and edit.change is not None:
            scoped = {name: edit.change(tensor, name=name, seed=0) for name, tensor in scoped.items()}
            before = sum(int(torch.count_nonzero(tensor)) for tensor in scoped.values())
        left = 0

        untouched = parameters_of(self.model)

        def weights(pruner: Pruner) -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal left
            prune = bind(pruner, scoped, seed)
            for placement in self.placements:
                # Tensors that are fused in the model are written together, those out of scope as they are.
                if scoped.keys().isdisjoint(placement.stored):
                    continue
                kept = {name: self.delta[name] for name in placement.stored}
                for name in scoped.keys() & kept:
                    kept[name] = prune(scoped[name], name=name, seed=seed)
                    left += int(torch.count_nonzero(kept[name]))
                pruned, whole, base = (placement.to_model(each) for each in (kept, self.delta, self.base))
                for parameter, tensor in pruned.items():
                    own = untouched[parameter][: len(tensor)] if tensor.dim() else untouched[parameter]
                    yield parameter, edited_weight(base[parameter], tensor, whole[parameter], own.to(tensor.device))

        try:
            if edit is not None:
                write_weights(model, weights(edit.pruner))
            yield Edited(model, 1 - left / before if before and edit is not None else 0.0)
        finally:
            with torch.no_grad():
                for name, parameter in parameters_of(model).items():
                    parameter.copy_(untouched[name])
            self._copies.append(model)

    def prepared(self, evaluation: Evaluation) -> Evaluation:
        """The evaluation with tokens, batches and the untouched model's outputs at hand, made once."""
        with self._lock:
            if evaluation not in self._prepared:
                self._prepared[evaluation] = evaluation.prepared(self.model, self.tokenizer)
            return self._prepared[evaluation]


def edited_source(pair: Pair) -> str:
    """Where the model that is edited comes from: an adapter or a published delta has none, so its base is."""
    apart = pair.base is not None and open_checkpoint(pair.finetuned).is_delta
    return str(pair.base) if apart else pair.finetuned


_held: dict[tuple[object, ...], EditablePair] = {}


LOADING = Lock()
"""One thread at a time, so that none loads what another does, and since transformers builds models under a global
device context."""


def held_pair(pair: Pair, content: Sequence[object], device: str) -> EditablePair:
    """The pair in this process's memory, loaded if it is not; earlier ones go where memory is short.

    `content` tells whether the files are the ones that were loaded.
    """
    key = (pair.base, pair.finetuned, *content, device)
    with LOADING:
        if key not in _held:
            # Before loading, so that two large pairs are never held together.
            drop_oldest(_held)
            _held[key] = EditablePair.load(pair, device)
        return _held[key]


def release_pairs() -> None:
    """Let go of pairs that are too large to be held for later."""
    with LOADING:
        drop_oldest(_held)


def drop_oldest(held: dict[Any, Any]) -> None:
    """Drop the oldest until those that are left are within `HELD_BYTES`."""
    while held and sum(each.nbytes for each in held.values()) > HELD_BYTES:
        del held[next(iter(held))]
