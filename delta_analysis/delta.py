"""The delta between a base and its fine-tune: a lazy mapping of float32 tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch

from delta_analysis._errors import NotHomologousError
from delta_analysis.checkpoint import FLOAT_DTYPES, Checkpoint, open_checkpoint
from delta_analysis.names import reading_order
from delta_analysis.pruning import Prune, Pruner, prepared

COMPARED = "compared"


@dataclass(frozen=True, eq=False)
class Delta(Mapping[str, torch.Tensor]):
    """Fine-tuned minus base, one float32 tensor at a time.

    `delta[name] = float32(finetuned[name]) - float32(base[name])`, then whatever pruning
    `pruned` asked for. Nothing is kept in memory: an item is computed each time it is read.

    Attributes
    ----------
    base : the checkpoint subtracted, or None for the fine-tuned weights themselves.
    finetuned : the checkpoint it is subtracted from.
    names : the tensors compared, by layer, then by name.
    edits : the pruners applied, each with its seed, in order.
    """

    base: Checkpoint | None
    finetuned: Checkpoint
    names: tuple[str, ...] = field(repr=False)
    edits: tuple[tuple[Pruner, int], ...] = ()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.read(name)[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def read(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The delta's tensor and the base's, both float32, each side read once; the base may be zeros."""
        if name not in self.names:
            raise KeyError(name)
        finetuned = self.finetuned[name].to(torch.float32)
        base = torch.zeros_like(finetuned) if self.base is None else self.base[name].to(torch.float32)
        tensor = finetuned - base
        for prune, seed in self._prunes:
            tensor = prune(tensor, name=name, seed=seed)
        return tensor, base

    @cached_property
    def _prunes(self) -> tuple[tuple[Prune, int], ...]:
        """The pruners made ready; one that compares all tensors reads them, as the edits before it leave them."""
        if not self.edits:
            return ()
        *earlier, (pruner, seed) = self.edits
        before = replace(self, edits=tuple(earlier))
        return (*before._prunes, (prepared(pruner, before, seed), seed))

    def pruned(self, pruner: Pruner, *, seed: int) -> Delta:
        """The same delta with `pruner` applied to each tensor as it is read.

        Nothing is read now. A pruner that compares the entries of all tensors, such as
        `Magnitude(0.9, scope="model")`, reads the delta three times before the first item.

        Parameters
        ----------
        pruner : such as `Dare(0.9)`.
        seed : with the tensor's name it determines the random numbers, whatever the order of
            reading.
        """
        return replace(self, edits=(*self.edits, (pruner, seed)))

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
        `finetuned_dtype`, empty where a side lacks it as a weight; `numel`, of the fine-tuned side
        where it has one.
        """
        return _coverage(self.base, self.finetuned)


def load_delta(*, base: str | Path | None, finetuned: str | Path) -> Delta:
    """The delta between two checkpoints, without loading either.

    Parameters
    ----------
    base, finetuned : sources as `open_checkpoint` takes them; with `base=None` the delta is the
        fine-tuned model itself, as a difference from zero.

    Raises
    ------
    CheckpointError
        A source that cannot be read.
    NotHomologousError
        No tensor in common, or no common tensor of equal shape: the two are not a base and its
        fine-tune. A partial mismatch is no error; `Delta.coverage` tells it.

    Examples
    --------
    >>> delta = load_delta(base="zoo:small/base", finetuned="zoo:small/instruct")
    >>> delta["model.norm.weight"].dtype
    torch.float32
    """
    tuned = open_checkpoint(finetuned)
    if base is None:
        return Delta(None, tuned, tuple(tuned))
    start = open_checkpoint(base)
    common = [name for name in tuned if name in start]
    names = tuple(name for name in common if start.entries[name].shape == tuned.entries[name].shape)
    if not common:
        raise NotHomologousError(
            f"{base} and {finetuned} have no tensor in common: the first begins with {_first(start)}, "
            f"the second with {_first(tuned)}; a delta needs the base that was fine-tuned"
        )
    if not names:
        differing = [f"{name} {start.entries[name].shape} against {tuned.entries[name].shape}" for name in common[:3]]
        raise NotHomologousError(
            f"{base} and {finetuned} share {len(common)} names but no shape: {'; '.join(differing)}; "
            "a delta needs the base that was fine-tuned, of the same size"
        )
    return Delta(start, tuned, names)


def _first(checkpoint: Checkpoint) -> str:
    return ", ".join(list(checkpoint)[:3])


def _coverage(base: Checkpoint | None, finetuned: Checkpoint) -> pd.DataFrame:
    sides = {"base": base, "finetuned": finetuned}
    names = dict.fromkeys(
        name for side in sides.values() if side is not None for name in (*side.entries, *side.skipped)
    )
    rows = []
    for name in sorted(names, key=reading_order):
        entries = {key: side.entries.get(name) if side is not None else None for key, side in sides.items()}
        status, reason = _status(name, base, finetuned)
        row: dict[str, object] = {"tensor": name, "status": status, "reason": reason}
        for key, entry in entries.items():
            row[f"{key}_shape"] = str(entry.shape) if entry else ""
            row[f"{key}_dtype"] = FLOAT_DTYPES[entry.dtype] if entry else ""
        here = entries["finetuned"] or entries["base"]
        row["numel"] = math.prod(here.shape) if here else 0
        rows.append(row)
    return pd.DataFrame(rows)


def _status(name: str, base: Checkpoint | None, finetuned: Checkpoint) -> tuple[str, str]:
    sides = [side for side in (base, finetuned) if side is not None]
    if not any(name in side for side in sides):
        return "skipped", next(side.skipped[name] for side in sides if name in side.skipped)
    if base is None:
        return COMPARED, "difference from zero"
    if name not in finetuned:
        return "only in base", "the fine-tuned checkpoint has no tensor of this name"
    if name not in base:
        return "only in finetuned", "the base has no tensor of this name"
    ours, theirs = base.entries[name].shape, finetuned.entries[name].shape
    return (COMPARED, "") if ours == theirs else ("shape differs", f"{ours} against {theirs}")


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
