"""A merge as an edit of a pair: in place of the fine-tune's delta comes its merge with others, in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from threading import Lock

import torch

from delta_analysis.checkpoints import content_hash
from delta_analysis.deltas import editable_shapes, load_delta
from delta_analysis.evaluation import finetuned_model, token_batches
from delta_analysis.merging import MergeMethod, Merger, Statistic, Tensors, gather, merge_label
from delta_analysis.pruning import Prune, Pruner, Rescale
from delta_analysis.sweeps.pairs import Pair


@dataclass(frozen=True)
class MergeSource:
    """A delta that takes part in a merge.

    Attributes
    ----------
    base, finetuned : sources as `load_delta` takes them.
    hashes : of both, which tell equal content apart from equal names.
    texts : what the model is for, for methods that need data.
    """

    base: str = field(metadata={"speed": True}, repr=False)
    finetuned: str = field(metadata={"speed": True})
    hashes: tuple[str, str] = field(repr=False)
    texts: tuple[str, ...] = field(repr=False)

    def without_texts(self) -> MergeSource:
        """The same delta for methods that need no data."""
        return replace(self, texts=())


@dataclass(frozen=True)
class Merging:
    """Called as a pruner of a pair's delta in a sweep, it gives the delta's merge with others.

    Its drop rate is that of the pruner, or else that of the method's own trimming; its rescale is the
    method's scaling.

    Attributes
    ----------
    sources : all deltas that are merged; the first is the pair's own.
    by : the merge method.
    prune : applied to each delta before, or None.
    weights : one a delta; empty for 1 each.

    Raises
    ------
    ValueError
        Weights that are not as many as the sources. In a sweep: a pair that is not the first source; a delta of
        the sources that changes a tensor which the pair's own does not have.
    """

    sources: tuple[MergeSource, ...]
    by: MergeMethod
    prune: Pruner | None = None
    weights: tuple[float, ...] = ()
    scope: str = field(default="model", init=False)

    def __post_init__(self) -> None:
        if self.weights and len(self.weights) != len(self.sources):
            raise ValueError(
                f"weights: {len(self.weights)} are given for {len(self.sources)} deltas; give one for each"
            )

    @property
    def drop_rate(self) -> float:
        pruner = self.prune or self.by.trim
        return 0.0 if pruner is None else pruner.drop_rate

    @property
    def rescale(self) -> Rescale:
        return self.by.scaling

    @property
    def method(self) -> str:
        """What tables and figures call it."""
        return merge_label(self.by, [self.prune])

    @property
    def random(self) -> bool:
        """Whether seeds make a difference."""
        # The labels that Fisher information rests on are drawn.
        drawn = self.by.statistic == "fisher"
        return drawn or any(each is not None and each.random for each in (self.prune, self.by.trim))

    def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
        raise ValueError(f"a merge reads all deltas, and {name!r} is a tensor of one; use it in a sweep")

    def over(self, tensors: Mapping[str, torch.Tensor], seed: int) -> Prune:
        """The merge of the pair's delta with the others."""
        first, *others = (source.without_texts() for source in self.sources)
        own, deltas = _names(first), [tensors]
        sample = min(tensors, key=lambda name: (tensors[name].dim() < 2, tensors[name].numel()))
        if sample not in own or not torch.equal(_tensor(first, sample), tensors[sample].cpu()):
            raise ValueError(
                f"a merge of {first.finetuned} is an edit of its own pair, and this is another: {sample!r} differs"
            )
        for source in others:
            other = _tensors(source)
            if beyond := [name for name in other if name not in own]:
                raise ValueError(
                    f"{source.finetuned}: changes {beyond[0]!r}, which {first.finetuned} leaves alone; "
                    "take a pair that changes all tensors for the first"
                )
            # Of an edit's scope, as the pair's own.
            deltas.append({name: other[name] for name in tensors if name in other})
        needed, count = self.by.statistic, len(deltas)
        statistics = [_statistics(needed, each, seed) for each in self.sources] if needed else []

        def base(name: str) -> torch.Tensor:
            return _base(first)[name]

        merger = Merger(base, deltas, self.by, [self.prune] * count, self.weights or (1.0,) * count, seed, statistics)
        return lambda tensor, *, name, seed: merger(name)


def merge_source(pair: Pair, texts: Sequence[str] = ()) -> MergeSource:
    """A pair's delta as a part of a merge."""
    if pair.base is None:
        raise ValueError(f"a merge adds deltas to a base, and pair {pair.name!r} has none; give Pair its base")
    return MergeSource(pair.base, pair.finetuned, (content_hash(pair.base), content_hash(pair.finetuned)), tuple(texts))


_gathering = Lock()


@lru_cache(maxsize=4)
def _tensors(source: MergeSource) -> dict[str, torch.Tensor]:
    """The delta, in memory."""
    delta = load_delta(base=source.base, finetuned=source.finetuned)
    return {name: delta[name] for name in editable_shapes(delta)}


@lru_cache(maxsize=64)
def _tensor(source: MergeSource, name: str) -> torch.Tensor:
    """A single tensor of the delta."""
    return load_delta(base=source.base, finetuned=source.finetuned)[name]


@lru_cache(maxsize=1)
def _base(source: MergeSource) -> dict[str, torch.Tensor]:
    """The base, in memory."""
    delta = load_delta(base=source.base, finetuned=source.finetuned)
    read = {name: delta.read(name)[1] for name in editable_shapes(delta)}
    return {name: base for name, base in read.items() if base is not None}


@lru_cache(maxsize=64)
def _names(source: MergeSource) -> frozenset[str]:
    """The tensors that the delta changes."""
    return frozenset(editable_shapes(load_delta(base=source.base, finetuned=source.finetuned)))


def _statistics(statistic: Statistic, source: MergeSource, seed: int) -> Tensors:
    # One thread at a time, so that two do not gather the same.
    with _gathering:
        return _gathered(statistic, source, seed if statistic == "fisher" else 0)


@lru_cache(maxsize=16)
def _gathered(statistic: Statistic, source: MergeSource, seed: int) -> Tensors:
    delta = load_delta(base=source.base, finetuned=source.finetuned)
    model, tokenizer = finetuned_model(delta)
    batches = token_batches(source.texts, model, tokenizer)
    return gather(
        statistic,  # type: ignore[arg-type]
        delta,
        [{"input_ids": batch.ids, "attention_mask": batch.mask} for batch in batches],
        seed=seed,
    )
