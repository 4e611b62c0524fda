"""How much memory an operator takes beside its input: a high-water mark, and no timing."""

from __future__ import annotations

import gc
import resource
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import ForkServerContext

import numpy as np
import pytest
import torch

from delta_analysis.pruning import Dare, Magnitude, MagPrune, Pruner
from delta_analysis.pruning import by_row as rows

ENTRIES = 2**24
SLACK = 8 * 2**20
PRUNERS = [Dare(0.9), Dare(0.9, "l1"), Magnitude(0.9), MagPrune(0.9), MagPrune(0.9, within="tensor")]


def peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def extra(pruner: Pruner) -> int:
    """Bytes that a call takes at its peak, its result included; only in a process that has done nothing else."""
    torch.set_num_threads(2)
    tensor = torch.from_numpy(np.random.default_rng(0).standard_normal((2048, ENTRIES // 2048), dtype=np.float32))
    # What is compiled or imported at the first call is none of the operator's.
    long, rows.LONG_ROW = rows.LONG_ROW, 2**16
    pruner(tensor[:64].clone(), name="w", seed=0)
    rows.LONG_ROW = long
    gc.collect()
    before = peak()
    pruned = pruner(tensor, name="w", seed=0)
    assert pruned.numel() == ENTRIES
    return peak() - before


@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
def test_an_operator_takes_its_result_and_little_more(pruner: Pruner, processes: ForkServerContext) -> None:
    with ProcessPoolExecutor(1, processes) as pool:
        taken = pool.submit(extra, pruner).result()
    output = 4 * ENTRIES
    assert taken > 0.9 * output
    assert taken <= output + 0.1 * 2 * output + SLACK
