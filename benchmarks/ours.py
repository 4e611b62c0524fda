"""The package's side: what is timed, under the names that the tables use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import delta_analysis as da
from delta_analysis.deltas.tally import tally_tensor
from delta_analysis.pruning import Pruner

Work = Callable[[torch.Tensor], object]
Prune = Callable[[torch.Tensor], torch.Tensor]

DROP_RATE = 0.9
PRUNERS: dict[str, Pruner] = {
    "Dare(0.9)": da.Dare(DROP_RATE),
    'Dare(0.9, rescale="l1")': da.Dare(DROP_RATE, rescale="l1"),
    "Magnitude(0.9)": da.Magnitude(DROP_RATE),
    'Magnitude(0.9, within="row")': da.Magnitude(DROP_RATE, within="row"),
    "MagPrune(0.9)": da.MagPrune(DROP_RATE),
    'MagPrune(0.9, within="tensor")': da.MagPrune(DROP_RATE, within="tensor"),
}
OPERATORS: dict[str, Prune] = {name: partial(pruner, name="w", seed=0) for name, pruner in PRUNERS.items()}
STATISTICS: dict[str, Work] = {"value_ranges, one tensor": tally_tensor}
CLONE = "torch.clone"
YARDSTICKS: dict[str, Work] = {CLONE: torch.clone}
READY_COPY = "copy into a ready buffer"


def make_tensor(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Normal entries of the size of a delta's, made in parts so that little more than the result is ever held."""
    tensor = torch.empty(shape, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for part in tensor.view(-1).split(2**20):
        part.copy_(torch.randn(part.numel(), generator=generator) * 1e-3)
    return tensor
