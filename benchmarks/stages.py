"""Where the time goes: the stages of three operators alone, on one thread, into memory that is ready."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

import delta_analysis as da
from benchmarks.ours import DROP_RATE, OPERATORS, make_tensor
from benchmarks.timing import medians
from delta_analysis._kernels import drop_below, drop_randomly, philox, rank_sums
from delta_analysis._kernels.blocks import BLOCK
from delta_analysis.pruning.by_row import ROWS_BLOCK

KEY = philox.stream_key(0, "w")
Stages = dict[tuple[str, str], Callable[[], object]]
"""Work by operator and stage."""


def stage_times(shape: tuple[int, int], dtype: torch.dtype, budget: float) -> dict[tuple[str, str], float]:
    """Nanoseconds an entry of each stage."""
    torch.set_num_threads(1)
    tensor = make_tensor(shape, dtype)
    out = torch.zeros_like(tensor)
    works = {**memory_stages(tensor, out), **dare(tensor, out), **magnitude(tensor, out), **magprune(tensor, out)}
    return {stage: taken / tensor.numel() * 1e9 for stage, taken in medians(works, budget).items()}


def memory_stages(tensor: torch.Tensor, out: torch.Tensor) -> Stages:
    """What the machine takes for a result, whatever is put into it."""
    return {
        ("memory", "copy into a ready buffer"): lambda: out.copy_(tensor),
        ("memory", "new result from numpy, touched"): lambda: np.empty(tensor.nbytes, dtype=np.uint8).fill(0),
        ("memory", "new result from torch, touched"): lambda: torch.empty_like(tensor).fill_(0),
    }


def dare(tensor: torch.Tensor, out: torch.Tensor) -> Stages:
    values, numbers = tensor.view(-1), np.empty(BLOCK, dtype=np.uint32)

    def draw() -> None:
        for start in range(0, values.numel(), BLOCK):
            philox.fill(KEY, start, numbers[: values.numel() - start])

    return {
        ("Dare(0.9)", "random numbers alone"): draw,
        ("Dare(0.9)", "draw and drop"): lambda: drop_randomly(values, DROP_RATE, None, KEY, 0, out.view(-1)),
        ("Dare(0.9)", "the whole call"): lambda: OPERATORS["Dare(0.9)"](tensor),
    }


def magnitude(tensor: torch.Tensor, out: torch.Tensor) -> Stages:
    pruner, values = da.Magnitude(DROP_RATE), tensor.view(-1)
    place = pruner.threshold({"w": tensor}, 0).of("w")
    return {
        ("Magnitude(0.9)", "find the threshold"): lambda: pruner.threshold({"w": tensor}, 0),
        ("Magnitude(0.9)", "drop below it"): lambda: drop_below(values, place, 1.0, KEY, 0, out.view(-1)),
        ("Magnitude(0.9)", "the whole call"): lambda: OPERATORS["Magnitude(0.9)"](tensor),
    }


def magprune(tensor: torch.Tensor, out: torch.Tensor) -> Stages:
    """Stages on one block of rows after another, each of which stays in the processor's cache."""
    pruner, row = da.MagPrune(DROP_RATE), tensor.shape[1]
    blocks = list(row_blocks(tensor, out))
    sums = rank_sums(blocks[0][0])
    rates = pruner.probabilities(row, sums.clone())

    def rank() -> None:
        for block, _, _ in blocks:
            rank_sums(block)

    def probabilities() -> None:
        for block, _, _ in blocks:
            pruner.probabilities(row, sums[: len(block)])

    def drop() -> None:
        for block, start, target in blocks:
            drop_randomly(block, rates[: len(block)], None, KEY, start, target)

    return {
        ("MagPrune(0.9)", "rank in each row"): rank,
        ("MagPrune(0.9)", "probabilities"): probabilities,
        ("MagPrune(0.9)", "draw and drop"): drop,
        ("MagPrune(0.9)", "the whole call"): lambda: OPERATORS["MagPrune(0.9)"](tensor),
    }


def row_blocks(tensor: torch.Tensor, out: torch.Tensor) -> Iterator[tuple[torch.Tensor, int, torch.Tensor]]:
    """Blocks of whole rows in float32, as the operator forms them: entries, position, place of the result."""
    step = max(ROWS_BLOCK // tensor.shape[1], 1)
    ready = torch.zeros(step, tensor.shape[1])
    for first in range(0, len(tensor), step):
        block = tensor[first : first + step].to(torch.float32)
        target = out[first : first + step] if out.dtype == torch.float32 else ready[: len(block)]
        yield block, first * tensor.shape[1], target
