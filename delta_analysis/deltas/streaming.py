"""One pass over a delta: pieces of both files are read side by side, tallied, and forgotten."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import reduce
from typing import TextIO

import pandas as pd
import torch
from tqdm import tqdm

from delta_analysis._kernels import thread_pool
from delta_analysis.checkpoints import InFile, TensorReference, parse_name
from delta_analysis.deltas.alignment import Match
from delta_analysis.deltas.delta import Delta
from delta_analysis.deltas.tally import DIGITS, GRID, PIECE, Piece, Tally, tally_blocks, tally_tensor

TASK = 8 * GRID
"""Entries that one worker reads and tallies at a time."""
AHEAD = 64
"""Tasks that are handed out before the first of them is asked for its result."""


@dataclass(frozen=True, eq=False)
class Tallies:
    """What one pass over a delta found; every table of value ranges is made of it.

    Attributes
    ----------
    source : of the fine-tuned side.
    tensors : one row a tensor, with `tensor, layer, module, kind, shape` and its statistics.
    cells : (layer, module, kind) -> the tally of the tensors there, such as the experts of a layer.
    """

    source: str
    tensors: pd.DataFrame = field(repr=False)
    cells: dict[tuple[int, str, str], Tally] = field(repr=False)


def tally_delta(delta: Delta, *, executor: Executor | None = None, progress: TextIO | None = None) -> Tallies:
    """Read a delta once, and count and add up what `value_ranges` and `magnitude_histogram` need.

    The base and the fine-tune are read in pieces of 2^18 entries; neither a model nor a tensor is
    ever in memory, but for a tensor that has to be computed (of an adapter, or pruned). Sums are
    formed in float64 on a fixed grid of 2^20 entries of a tensor, so that the result is the same to
    the last bit for any executor and number of workers.

    Parameters
    ----------
    delta : as from `load_delta`.
    executor : where pieces are read and tallied; its workers need the same files under the same
        paths. The default is as many threads as torch uses. A tensor that has to be computed, or
        that is in memory, is tallied here. Do not call this from a task of the same executor: the
        two would wait for each other.
    progress : where to show tensors, bytes and the time left, such as `sys.stderr`; None shows them on
        a terminal only.

    Raises
    ------
    CheckpointError
        A file that cannot be read to its end.

    Warns
    -----
    UserWarning
        NaN or infinite entries, with the tensor and their number; weights stored in steps that are
        larger than the typical delta.

    Examples
    --------
    >>> from delta_analysis import load_delta
    >>> tallies = tally_delta(load_delta(base="zoo:small/base", finetuned="zoo:small/instruct"))
    >>> tallies.tensors["numel"].sum().item()
    865536
    """
    # What was computed, or is stored as a difference, was not rounded to the steps of the weights.
    rounded = not delta.edits and not delta.finetuned.is_delta
    rows: list[dict[str, object]] = []
    cells: dict[tuple[int, str, str], Tally] = {}
    total = sum(_nbytes(match) for match in delta.compared.values())
    hidden = None if progress is None else False
    with tqdm(total=total, unit="B", unit_scale=True, file=progress, disable=hidden, leave=False) as bar:
        for match, result in _in_order(delta, executor or thread_pool(torch.get_num_threads()), bar):
            layer, module, kind = cell = parse_name(match.tensor, len(match.shape))
            labels = {"tensor": match.tensor, "layer": layer, "module": module, "kind": kind, "shape": str(match.shape)}
            rows.append({**labels, **result.row(), **({} if rounded else {"storage_step": math.nan})})
            cells[cell] = cells[cell] + result if cell in cells else result
            bar.set_postfix_str(f"{len(rows)} of {len(delta)} tensors", refresh=False)
    found = Tallies(delta.finetuned.source, pd.DataFrame(rows), cells)
    _warn(found)
    return found


def _in_order(delta: Delta, executor: Executor, bar: tqdm) -> Iterator[tuple[Match, Tally]]:
    """The tally of each tensor, in order, with a bounded number of tasks under way."""
    waiting: deque[tuple[Match, list[Future[Tally]]]] = deque()
    try:
        for match in delta.compared.values():
            futures = (
                []
                if delta.edits
                else _submit(match, executor, subtract=not delta.finetuned.is_difference(match.tensor))
            )
            waiting.append((match, futures))
            while waiting and (not waiting[-1][1] or sum(len(tasks) for _, tasks in waiting) > AHEAD):
                yield _finish(delta, *waiting[0], bar)
                waiting.popleft()
        while waiting:
            yield _finish(delta, *waiting[0], bar)
            waiting.popleft()
    finally:
        for _, futures in waiting:
            for future in futures:
                future.cancel()


def _submit(match: Match, executor: Executor, *, subtract: bool) -> list[Future[Tally]]:
    """Tasks that tally a tensor out of its files; none if it has to be computed as a whole."""
    finetuned, base = match.finetuned, match.base
    if not isinstance(finetuned, InFile) or not (base is None or isinstance(base, InFile)):
        return []
    if finetuned.strides or (base and base.strides):
        return []
    starts = range(0, max(finetuned.numel, 1), TASK)
    return [executor.submit(tally_stored, finetuned, base, start, subtract) for start in starts]


def _finish(delta: Delta, match: Match, futures: list[Future[Tally]], bar: tqdm) -> tuple[Match, Tally]:
    if not futures:
        tensor, base = delta.read(match.tensor)
        bar.update(_nbytes(match))
        return match, tally_tensor(tensor, base, digits=_digits(match.finetuned, match.base))
    results = []
    for future in futures:
        results.append(future.result())
        bar.update(_nbytes(match) // len(futures))
    return match, reduce(Tally.__add__, results)


def tally_stored(finetuned: InFile, base: InFile | None, start: int, subtract: bool) -> Tally:  # noqa: FBT001
    """Tally the `TASK` entries from `start` on, read from the files piece by piece into the same memory."""
    stop = min(start + TASK, finetuned.numel)
    with finetuned.open() as file, (base or finetuned).open() as base_file:
        ours = torch.empty(min(PIECE, stop - start), dtype=finetuned.dtype)
        theirs = torch.empty_like(ours, dtype=base.dtype) if base else None

        def pieces(first: int, last: int) -> Iterator[Piece]:
            for at in range(first, last, PIECE):
                size = min(PIECE, last - at)
                finetuned.read_into(file, ours[:size], at)
                if base is not None and theirs is not None:
                    base.read_into(base_file, theirs[:size], at)
                yield ours[:size], theirs[:size] if theirs is not None else None

        grid = range(start, stop, GRID)
        digits = _digits(finetuned, base)
        return tally_blocks((pieces(at, min(at + GRID, stop)) for at in grid), subtract=subtract, digits=digits)


def _digits(*sides: TensorReference | None) -> int:
    return min(DIGITS[side.dtype] for side in sides if side is not None)


def _nbytes(match: Match) -> int:
    sides = [side for side in (match.finetuned, match.base) if side is not None]
    return sum(torch.Size(side.shape).numel() * side.dtype.itemsize for side in sides)


def _warn(found: Tallies) -> None:
    tensors = found.tensors
    bad = tensors[tensors["nonfinite"] > 0]
    if len(bad):
        few = "; ".join(f"{row.tensor!r} has {row.nonfinite} of {row.numel}" for row in bad.head(3).itertuples())
        warnings.warn(
            f"{found.source}: {len(bad)} of {len(tensors)} tensors have NaN or infinite entries on either side: {few}; "
            "they are counted in column nonfinite and left out of every statistic",
            stacklevel=3,
        )
    # A tensor that training left alone lost nothing.
    coarse = tensors[(tensors["storage_step"] > tensors["abs_p50"]) & (tensors["zero_share"] < 1)]
    if len(coarse):
        row = coarse.iloc[0]
        warnings.warn(
            f"{found.source}: {len(coarse)} of {len(tensors)} tensors are stored in steps larger than their median "
            f"|δ|, such as {row['tensor']!r} (step {row['storage_step']:.2g}, median {row['abs_p50']:.2g}); many of "
            "their deltas are lost to rounding, compare checkpoints in float32 if there are any",
            stacklevel=3,
        )
