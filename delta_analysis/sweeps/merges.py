"""A merge as an edit of a pair: in place of the fine-tune's delta comes its merge with others, in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from delta_analysis.checkpoints import content_hash
from delta_analysis.deltas import Delta, load_delta
from delta_analysis.evaluation import finetuned_model, token_batches
from delta_analysis.merging import MergeMethod, Merger, Statistic, Statistics, gather, merge_label
from delta_analysis.pruning import Prune, Pruner, Rescale
from delta_analysis.sweeps.pairs import LOADING, Pair, drop_oldest


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
        Weights that are not as many as the sources, or that the method cannot use. In a sweep: a pair that is not
        the first source; a delta of the sources that changes a tensor which the pair's own does not have.
    """

    sources: tuple[MergeSource, ...]
    by: MergeMethod
    prune: Pruner | None = None
    weights: tuple[float, ...] = ()
    within: str = field(default="model", init=False)

    def __post_init__(self) -> None:
        if self.weights and len(self.weights) != len(self.sources):
            raise ValueError(
                f"weights: {len(self.weights)} are given for {len(self.sources)} deltas; give one for each"
            )
        self.by.check(self.weights or (1.0,) * len(self.sources))

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
        first, *others = map(_opened, self.sources)
        own, deltas = first.select(), [tensors]
        for other in others:
            names = other.select()
            if beyond := [name for name in names if name not in own]:
                raise ValueError(
                    f"{other.finetuned.source}: changes {beyond[0]!r}, which {first.finetuned.source} leaves alone; "
                    "take a pair that changes all tensors for the first"
                )
            # Of an edit's scope, as the pair's own.
            deltas.append(_Part(other, [name for name in tensors if name in names]))
        needed, count = self.by.statistic, len(deltas)
        statistics = _statistics(needed, self.sources, seed) if needed else []

        def base(name: str) -> torch.Tensor:
            start = first.read(name)[1]
            assert start is not None
            return start

        merger = Merger(base, deltas, self.by, [self.prune] * count, self.weights or (1.0,) * count, seed, statistics)
        return lambda tensor, *, name, seed: merger(name)


def merge_source(pair: Pair, texts: Sequence[str] = ()) -> MergeSource:
    """A pair's delta as a part of a merge."""
    if pair.base is None:
        raise ValueError(f"a merge adds deltas to a base, and pair {pair.name!r} has none; give Pair its base")
    return MergeSource(pair.base, pair.finetuned, (content_hash(pair.base), content_hash(pair.finetuned)), tuple(texts))


@dataclass(frozen=True, eq=False)
class _Part(Mapping[str, torch.Tensor]):
    """Some tensors of a delta, read when they are asked for."""

    delta: Delta
    names: Sequence[str]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.delta[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names


@lru_cache(maxsize=64)
def _opened(source: MergeSource) -> Delta:
    """The delta, of which nothing is read; opened once, since that may ask the hub."""
    return load_delta(base=source.base, finetuned=source.finetuned)


_gathered: dict[tuple[Statistic, MergeSource, int], Statistics] = {}


def _statistics(statistic: Statistic, sources: Sequence[MergeSource], seed: int) -> list[Statistics]:
    """What the data of each says, gathered once; earlier ones go where memory is short."""
    keys = [(statistic, source, seed if statistic == "fisher" else 0) for source in sources]
    with LOADING:
        if not all(key in _gathered for key in keys):
            drop_oldest(_gathered)
        for key in keys:
            if key not in _gathered:
                _gathered[key] = _gather(*key)
        return [_gathered[key] for key in keys]


def _gather(statistic: Statistic, source: MergeSource, seed: int) -> Statistics:
    delta = _opened(source)
    model, tokenizer = finetuned_model(delta)
    batches = token_batches(source.texts, model, tokenizer)
    inputs = [{"input_ids": batch.ids, "attention_mask": batch.mask} for batch in batches]
    return gather(statistic, delta, inputs, seed=seed)  # type: ignore[arg-type]


def release_statistics() -> None:
    """Let go of statistics that are too large to be held for later."""
    with LOADING:
        drop_oldest(_gathered)
