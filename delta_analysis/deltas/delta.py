"""The delta between a base and its fine-tune: a lazy mapping of float32 tensors."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import pandas as pd
import torch

from delta_analysis._errors import NotHomologousError
from delta_analysis._kernels import map_blocks, to_float32, uninitialised
from delta_analysis.checkpoints import (
    PREFIX,
    STORED_WHOLE,
    Checkpoint,
    InFile,
    Source,
    TensorReference,
    config_differences,
    open_checkpoint,
    pair_sources,
)
from delta_analysis.deltas.alignment import COMPARED, Match, Vocabulary, align, coverage_table
from delta_analysis.deltas.selection import CLASSIFIER, HEADS, in_scope
from delta_analysis.pruning import Prune, Pruner, bind

SAMPLED_TENSORS, SAMPLED_ENTRIES = 5, 2**16
PUBLISHED_DELTA = 0.1
"""Weights below this share of the base's size are taken for a delta: fine-tunes keep the size."""


@dataclass(frozen=True, eq=False)
class Delta(Mapping[str, torch.Tensor]):
    """Fine-tuned minus base, one float32 tensor at a time.

    `delta[name] = float32(finetuned[name]) - float32(base[name])`, then whatever pruning
    `pruned` asked for. Nothing is kept in memory: an item is computed each time it is read.

    Attributes
    ----------
    base : the checkpoint subtracted, or None for the fine-tuned weights themselves.
    finetuned : the checkpoint it is subtracted from, or one of differences, such as an adapter.
    matches : what is compared with what, and what is not.
    edits : the pruners applied, each with its seed, in order.
    """

    base: Checkpoint | None
    finetuned: Checkpoint
    matches: tuple[Match, ...] = field(repr=False)
    edits: tuple[tuple[Pruner | Prune, int], ...] = ()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._read(name)[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.compared)

    def __len__(self) -> int:
        return len(self.compared)

    def __contains__(self, name: object) -> bool:
        return name in self.compared

    @cached_property
    def compared(self) -> dict[str, Match]:
        """Name -> what is compared under it, by layer, then by name."""
        return {match.tensor: match for match in self.matches if match.status == COMPARED}

    def read(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The delta's tensor and the base's, both float32, each side read once; None without a base."""
        tensor, base = self._read(name)
        return tensor, None if base is None else to_float32(base)

    def weight(self, name: str) -> torch.Tensor:
        """The edited model's weight in float32: base + delta, and the fine-tune's own where an entry is as it was.

        Of a matrix over vocabularies of different sizes these are the rows that both have.
        """
        own, base = self._sides(name)
        whole = self._difference(name, own, base)
        start = torch.zeros_like(whole) if base is None else to_float32(base)
        return edited_weight(start, self._edited(name, whole), whole, None if self._is_difference(name) else own)

    def _read(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The delta's tensor, and the base's as it is stored."""
        own, base = self._sides(name)
        return self._edited(name, self._difference(name, own, base)), base

    def _sides(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Fine-tuned and base as they are stored."""
        match = self.compared[name]
        assert match.finetuned is not None
        return match.finetuned.read(), None if match.base is None else match.base.read()

    def _difference(self, name: str, own: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
        return to_float32(own) if base is None or self._is_difference(name) else _difference(own, base)

    def _is_difference(self, name: str) -> bool:
        return self.finetuned.is_difference(name)

    def _edited(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        for prune, seed in self._prunes:
            tensor = prune(tensor, name=name, seed=seed)
        return tensor

    @cached_property
    def _prunes(self) -> tuple[tuple[Prune, int], ...]:
        """The pruners made ready; one that compares all tensors reads them, as the edits before it leave them."""
        if not self.edits:
            return ()
        *earlier, (pruner, seed) = self.edits
        before = replace(self, edits=tuple(earlier))
        return (*before._prunes, (bind(pruner, before, seed), seed))

    def pruned(self, pruner: Pruner | Prune, *, seed: int) -> Delta:
        """The same delta with `pruner` applied to each tensor as it is read.

        Nothing is read now. A pruner that compares the entries of all tensors, such as
        `Magnitude(0.9, within="model")`, reads the delta three times before the first item.

        Parameters
        ----------
        pruner : such as `Dare(0.9)`, or anything that is called as one.
        seed : with the tensor's name it determines the random numbers, whatever the order of
            reading.
        """
        return replace(self, edits=(*self.edits, (pruner, seed)))

    def select(self, scope: str = "all") -> Delta:
        """The part of the delta that an edit of a scope reaches; of a classifier never its head.

        Pruners that were given before act on this part alone, as if it had been selected first.

        Parameters
        ----------
        scope : `all` (as DARE's scripts for language models do); `linear`, the matrices inside the
            layers, without the output head; `attention` and `mlp`, the matrices and biases of a layer's
            attention and those beside it; `embeddings`; `norms`; a glob pattern such as
            `*.layers.0.*`; or several of these with commas between.

        Raises
        ------
        ValueError
            A part of the scope that selects nothing.

        Examples
        --------
        >>> delta = load_delta(base="zoo:tiny/base", finetuned="zoo:tiny/math")
        >>> list(delta.select("embeddings"))
        ['model.embed_tokens.weight']
        """
        architecture = next(iter(self.finetuned.config.get("architectures") or []), "")
        heads = HEADS if architecture.endswith(CLASSIFIER) else ()
        shapes = {name: match.shape for name, match in self.compared.items() if not (heads and name.startswith(heads))}
        chosen = set(in_scope(scope, {name: len(shape) for name, shape in shapes.items()}))
        return replace(self, matches=tuple(self.compared[name] for name in self if name in chosen))

    def summary(self) -> pd.DataFrame:
        """What the pruning did, one row a tensor.

        Columns: `tensor`; `numel`; `zero_before`, the share of entries that were zero before;
        `achieved_drop_rate`, the share of the other entries that are zero now (0 if there are none).
        """
        unpruned = replace(self, edits=())
        return pd.DataFrame([drop_summary(name, unpruned[name], self[name]) for name in self])

    def coverage(self) -> pd.DataFrame:
        """What is compared and what is not, one row a tensor name on either side.

        Columns: `tensor`; `status`, which is `compared`, `only in base`, `only in finetuned`,
        `shape differs` or `skipped`; `reason`; `base_shape`, `finetuned_shape`, `base_dtype`,
        `finetuned_dtype`, empty where a side lacks it as a weight; `numel`, of the larger side;
        `numel_compared`, how many of these are compared.
        """
        return coverage_table(list(self.matches), self.base, self.finetuned)

    def config_differences(self) -> pd.DataFrame:
        """Settings that change what weights mean and differ: columns `setting, base, finetuned`."""
        return config_differences({} if self.base is None else self.base.config, self.finetuned.config)


def load_delta(
    *,
    base: Source | None,
    finetuned: Source,
    vocab: Vocabulary = "common",
    finetuned_is_delta: bool = False,
) -> Delta:
    """The delta between two checkpoints, without loading either.

    Parameters
    ----------
    base, finetuned : sources as `open_checkpoint` takes them, or `pair:NAME` for both (see
        `known_pairs`). With `base=None`, also beside `pair:NAME`, the delta is the fine-tuned
        model itself, as a difference from zero. Of a LoRA adapter the delta is formed from its
        factors; its base may be None.
    vocab : where one side has more tokens than the other, `common` compares the rows that both
        have, and `Delta.coverage` counts the rest; `error` refuses.
    finetuned_is_delta : the fine-tuned source holds differences already, as some models are
        published; nothing is subtracted.

    Raises
    ------
    CheckpointError
        A source that cannot be read.
    NotHomologousError
        No tensor in common, or no common tensor of equal shape: the two are not a base and its
        fine-tune; or vocabularies that differ under `vocab="error"`. A partial mismatch is no
        error; `Delta.coverage` tells it.

    Warns
    -----
    UserWarning
        An adapter with whole weights beside its factors, and no base to subtract from them; or
        fine-tuned weights so small beside the base's that they must be a published delta.

    Examples
    --------
    >>> delta = load_delta(base="zoo:small/base", finetuned="zoo:small/instruct")
    >>> delta["model.norm.weight"].dtype
    torch.float32
    """
    if isinstance(finetuned, str) and finetuned.startswith(PREFIX):
        # Each side of `pair:NAME` is its own; a base of None or another base is left as it is.
        pair_base, tuned_source = pair_sources(finetuned)
        base, finetuned = (pair_base if base == finetuned else base), tuned_source
    elif isinstance(base, str) and base.startswith(PREFIX):
        base, _ = pair_sources(base)
    tuned = open_checkpoint(finetuned)
    if finetuned_is_delta:
        tuned = replace(tuned, is_delta=True)
    start = None if base is None else open_checkpoint(base)
    if start is not None and start.is_delta:
        raise NotHomologousError(
            f"{start.source}: is an adapter, not a base; give the model that it was trained on as base, "
            "and the adapter as finetuned"
        )
    if start is not None:
        tuned = tuned.with_whole()
    delta = Delta(start, tuned, tuple(align(start, tuned, vocab)))
    if not len(delta):
        raise _not_homologous(delta)
    if not tuned.is_delta:
        _warn_of_published_delta(delta)
    elif not finetuned_is_delta:
        _check_adapter(delta)
    return delta


def _not_homologous(delta: Delta) -> NotHomologousError:
    base, finetuned = delta.base, delta.finetuned
    assert base is not None
    differing = [match for match in delta.matches if match.status == "shape differs"]
    if not differing:
        return NotHomologousError(
            f"{base.source} and {finetuned.source} have no tensor in common: the first begins with {_names(base)}, "
            f"the second with {_names(finetuned)}; a delta needs the base that was fine-tuned"
        )
    examples = "; ".join(f"{match.tensor} {match.reason}" for match in differing[:3])
    return NotHomologousError(
        f"{base.source} and {finetuned.source} share {len(differing)} names but no shape: {examples}; "
        "a delta needs the base that was fine-tuned, of the same size"
    )


def _check_adapter(delta: Delta) -> None:
    """Raise if a part of it does not fit into the base, and warn if one is left out: the edit is another without it."""
    unfit = [match for match in delta.matches if match.status == "shape differs"]
    if unfit and delta.base is not None:
        raise NotHomologousError(
            f"{delta.finetuned.source}: {unfit[0].tensor!r} has another shape than {delta.base.source} has, "
            f"{unfit[0].reason}; give the base that it was trained on. If its vocabulary was resized, call "
            "model.resize_token_embeddings(…) on the base, save it with save_pretrained and give that folder as base"
        )
    tuned = delta.finetuned
    for name, match in delta.compared.items():
        own = tuned.references[name]
        if own.shape != match.shape and not tuned.is_difference(name):
            warnings.warn(
                f"{tuned.source}: {name!r} has rows for {own.shape[0]} tokens, and {match.shape[0]} of them are in the "
                "base too; these are in the delta, the others are judged and saved as the adapter has them",
                stacklevel=3,
            )
    whole = [name for name, reason in tuned.skipped.items() if reason == STORED_WHOLE]
    if whole:
        warnings.warn(
            f"{tuned.source}: {len(whole)} of its tensors are not in the delta, such as {whole[0]!r} "
            f"({STORED_WHOLE}); coverage() lists them",
            stacklevel=3,
        )


def _names(checkpoint: Checkpoint) -> str:
    return ", ".join(list(checkpoint)[:3])


def _warn_of_published_delta(delta: Delta) -> None:
    """Warn if a few weight matrices of the fine-tuned side are far smaller than the base's."""
    matrices = [match for match in delta.compared.values() if match.base is not None and len(match.base.shape) > 1]
    few = matrices[:: max(len(matrices) // SAMPLED_TENSORS, 1)][:SAMPLED_TENSORS]
    sizes = [(_size(match.finetuned), _size(match.base)) for match in few]
    ratios = [tuned / base for tuned, base in sizes if base]
    if ratios and statistics.median(ratios) < PUBLISHED_DELTA:
        warnings.warn(
            f"{delta.finetuned.source}: its weights are {statistics.median(ratios):.2g} times the size of the base's; "
            "if it is a published delta and not a model, give finetuned_is_delta=True",
            stacklevel=3,
        )


def _size(reference: TensorReference | None) -> float:
    """Root mean square of the first entries."""
    if isinstance(reference, InFile):
        values = reference.piece(0, min(reference.numel, SAMPLED_ENTRIES))
    else:
        values = reference.read().reshape(-1)[:SAMPLED_ENTRIES] if reference is not None else torch.zeros(1)
    return float(values.to(torch.float64).square().mean().sqrt().nan_to_num(nan=0.0))


def _difference(finetuned: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """`float32(finetuned) - float32(base)`, neither of them as a whole in float32."""
    result = uninitialised(base.shape, torch.float32)
    flat, out = finetuned.reshape(-1), result.view(-1)

    def subtract(values: torch.Tensor, start: int) -> None:
        place = slice(start, start + values.numel())
        torch.sub(flat[place].to(torch.float32), values, out=out[place])

    map_blocks(base, subtract)
    return result


def edited_weight(
    start: torch.Tensor, kept: torch.Tensor, whole: torch.Tensor, own: torch.Tensor | None
) -> torch.Tensor:
    """`start + kept`, and the fine-tune's own entry where the delta's is kept as it is, which rounding would miss."""
    if own is None:
        return start + kept
    return torch.where(kept == whole, own.to(torch.float32), start + kept)


def drop_summary(name: str, before: torch.Tensor, after: torch.Tensor) -> dict[str, object]:
    """One row of `Delta.summary`."""
    nonzero = int(torch.count_nonzero(before))
    left = int(torch.count_nonzero(after[before != 0]))
    numel = before.numel()
    return {
        "tensor": name,
        "numel": numel,
        "zero_before": 1 - nonzero / numel if numel else 0.0,
        "achieved_drop_rate": 1 - left / nonzero if nonzero else 0.0,
    }
