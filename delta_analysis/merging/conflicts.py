"""Interference: where deltas of one base pull the same entries in different directions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
import torch

from delta_analysis._errors import NotHomologousError, checked_number, one_of
from delta_analysis._kernels import compiled, map_blocks
from delta_analysis.checkpoints import parse_name, reading_order
from delta_analysis.deltas import GROUPS, LABELS, Grouping
from delta_analysis.pruning import find_threshold

Tensors = Mapping[str, torch.Tensor]


def interference(deltas: Mapping[str, Tensors], *, by: Grouping = "tensor", largest: float = 0.01) -> pd.DataFrame:
    """How much each two deltas are in each other's way, by tensor or by group of tensors.

    Of one tensor after the other the deltas' entries are held, never two models. Tensors that only one
    of a pair has are left out.

    Parameters
    ----------
    deltas : label -> delta, as from `load_delta`, pruned or not, or a merge; two at least.
    by : the groups of `value_ranges`: `tensor`, `place`, `layer`, `module`, `kind` or `model`.
    largest : share of each tensor's entries, those of largest |δ|, whose overlap is measured; in (0, 1].

    Returns
    -------
    DataFrame, one row a pair and group, with columns `one, other`, the labels; `tensor, layer, module,
    kind, shape` (missing where a group spans many; layer -1 is outside the stack); `tensors`, how many; `numel`;
    `both`, the share of entries that are not zero in both; `conflicts`, the share of all entries that
    are not zero in both and differ in sign; `conflicts_of_both`, of those not zero in both;
    `cosine`; `inner`, Σ δ δ'; `norm_ratio`, that of `other` over that of `one`; `overlap`, of the
    largest entries of one how many are among the other's; `overlap_by_chance`, the same if their
    places were independent; `mass_outvoted`, the share of all magnitude that conflicts cancel in the sum,
    `2 Σ min(|δ|, |δ'|) / Σ (|δ| + |δ'|)`, the first sum over conflicts. Shares of nothing are NaN.

    Among the largest of n entries are `round(largest · n)`, and those that equal the last of them, but no zeros;
    where the two deltas have not as many, the overlap is of their mean number. A group's shares are
    of sums over its tensors.

    Raises
    ------
    ValueError
        Fewer than two deltas; `by` or `largest` out of range; a NaN or infinite entry.
    NotHomologousError
        A pair without a common tensor, or a common tensor of two shapes.

    Examples
    --------
    >>> one, other = torch.tensor([1.0, -2.0, 3.0, 0.0]), torch.tensor([1.0, 2.0, 0.0, 1.0])
    >>> table = interference({"one": {"w": one}, "other": {"w": other}}, largest=0.25)
    >>> table[["both", "conflicts", "inner", "mass_outvoted"]].values.tolist()
    [[0.5, 0.25, -3.0, 0.4]]
    """
    check_grouping(by)
    checked_number("largest", largest, 0, 1, low_open=True)
    if len(deltas) < 2:
        raise ValueError(f"deltas: at least two are needed to compare, label -> delta; {len(deltas)} given")
    rows: dict[tuple[str, str], list[dict[str, object]]] = {pair: [] for pair in combinations(deltas, 2)}
    for one, other in rows:
        common_names({one: deltas[one], other: deltas[other]})
    for name in sorted({name for delta in deltas.values() for name in delta}, key=reading_order):
        having = {label: delta for label, delta in deltas.items() if name in delta}
        if len(having) < 2:
            continue
        tensors = read_together(having, name)
        energies = {label: energy(tensor, name, label) for label, tensor in tensors.items()}
        cuts = {label: _least_of_largest(tensor, name, largest) for label, tensor in tensors.items()}
        for one, other in combinations(tensors, 2):
            sums = _compare(tensors[one], tensors[other], cuts[one], cuts[other])
            squares = {"square_one": energies[one], "square_other": energies[other]}
            rows[one, other].append({"one": one, "other": other, **labels(name, tensors[one]), **squares, **sums})
    table = group_sums([row for pair in rows.values() for row in pair], by, apart=("one", "other"))
    return _shares(table)


def _shares(sums: pd.DataFrame) -> pd.DataFrame:
    """The columns of `interference` out of sums."""
    top = sums["top_one"] + sums["top_other"]
    shares = {
        "both": sums["both"] / sums["numel"],
        "conflicts": sums["conflicts"] / sums["numel"],
        "conflicts_of_both": sums["conflicts"] / sums["both"],
        "cosine": sums["inner"] / np.sqrt(sums["square_one"] * sums["square_other"]),
        "inner": sums["inner"],
        "norm_ratio": np.sqrt(sums["square_other"] / sums["square_one"]),
        "overlap": 2 * sums["top_both"] / top,
        "overlap_by_chance": 2 * sums["top_chance"] / top,
        "mass_outvoted": sums["cancelled"] / sums["mass"],
    }
    return sums[["one", "other", *LABELS, "tensors", "numel"]].assign(**shares)


COUNTS = ("both", "conflicts", "top_one", "top_other", "top_both")
SUMS = ("inner", "mass", "cancelled")


def _compare(one: torch.Tensor, other: torch.Tensor, cut_one: float, cut_other: float) -> dict[str, float]:
    beside = other.reshape(-1)

    def work(values: torch.Tensor, start: int) -> tuple[np.ndarray, np.ndarray]:
        counts, sums = np.zeros(len(COUNTS), dtype=np.int64), np.zeros(len(SUMS))
        _compare_block(values.numpy(), beside[start : start + len(values)].numpy(), cut_one, cut_other, counts, sums)
        return counts, sums

    parts = map_blocks(one, work)
    found = {column: sum(counts[i].item() for counts, _ in parts) for i, column in enumerate(COUNTS)}
    found |= {column: math.fsum(sums[i] for _, sums in parts) for i, column in enumerate(SUMS)}
    return {**found, "top_chance": found["top_one"] * found["top_other"] / max(one.numel(), 1)}


@compiled
def _compare_block(one, other, cut_one, cut_other, counts, sums):  # type: ignore[no-untyped-def]
    both = conflicts = top_one = top_other = top_both = 0
    inner = mass = cancelled = 0.0
    for i in range(one.size):
        a, b = np.float64(one[i]), np.float64(other[i])
        size_a, size_b, product = abs(a), abs(b), a * b
        both += product != 0
        conflicts += product < 0
        top_one += size_a >= cut_one
        top_other += size_b >= cut_other
        top_both += (size_a >= cut_one) & (size_b >= cut_other)
        inner += product
        mass += size_a + size_b
        cancelled += 2 * min(size_a, size_b) * (product < 0)
    counts[:] = both, conflicts, top_one, top_other, top_both
    sums[:] = inner, mass, cancelled


def _least_of_largest(tensor: torch.Tensor, name: str, largest: float) -> float:
    """The magnitude at which the `largest` share of a tensor's entries begins; above 0."""
    n = max(tensor.numel(), 1)
    bits = find_threshold(lambda: [(name, tensor)], 1 - round(largest * n) / n, seed=0).magnitude
    return float(np.uint32(max(bits, 1)).view(np.float32))


def common_names(deltas: Mapping[str, Tensors]) -> list[str]:
    """The tensors that all of labelled deltas have, in order; raise unless there is one."""
    first, *others = deltas.values()
    names = [name for name in first if all(name in delta for delta in others)]
    if not names:
        raise NotHomologousError(
            f"deltas {' and '.join(map(repr, deltas))} have no tensor in common; they have to be of one base"
        )
    return sorted(names, key=reading_order)


def read_together(deltas: Mapping[str, Tensors], name: str) -> dict[str, torch.Tensor]:
    """One tensor of each of labelled deltas, float32 on the CPU; raise unless they have one shape."""
    tensors = {label: delta[name].detach().to("cpu", torch.float32) for label, delta in deltas.items()}
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{tuple(tensor.shape)} in {label!r}" for label, tensor in tensors.items())
        raise NotHomologousError(f"tensor {name!r}: has shapes {shapes}; the deltas have to be of one base")
    return tensors


def energy(tensor: torch.Tensor, name: str, label: str) -> float:
    """Σ δ² in float64; raise if an entry is not finite."""
    total = sum(map_blocks(tensor, lambda values, _: float(values.to(torch.float64).square().sum())))
    if not math.isfinite(total):
        raise ValueError(f"tensor {name!r}: has NaN or infinite entries in {label!r}, and finite ones are needed")
    return float(total)


def labels(name: str, tensor: torch.Tensor) -> dict[str, object]:
    """The labels of a row for one tensor, and its number of entries."""
    named = zip(LABELS, (name, *parse_name(name, tensor.dim()), str(tuple(tensor.shape))), strict=True)
    return {**dict(named), "numel": tensor.numel()}


def check_grouping(by: str) -> None:
    """Raise unless tensors can be grouped so."""
    if by not in GROUPS:
        raise ValueError(one_of("by", by, GROUPS))


def group_sums(rows: Sequence[Mapping[str, object]], by: Grouping, apart: Sequence[str] = ()) -> pd.DataFrame:
    """Sums over groups of tensors, those of different `apart` apart; labels that a group does not share are missing."""
    table = pd.DataFrame(rows).assign(tensors=1)
    names = [*apart, *LABELS]
    added = table.columns.difference(names)
    keys = [*apart, *{"place": ["layer", "module"], "model": []}.get(by, [by])]
    grouped = []
    for _, group in table.groupby(keys or np.zeros(len(table)), sort=False):
        shared = {label: group[label].iloc[0] if len(set(group[label])) == 1 else None for label in names}
        grouped.append({**shared, **{column: group[column].sum() for column in added}})
    return pd.DataFrame(grouped).astype({"layer": "Int64"})
