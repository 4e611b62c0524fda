"""Peak memory of one call, each in a process of its own; Linux only.

The share is (input + what the call adds to its process at the peak) / (input + output).
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks.ours import OPERATORS, make_tensor
from benchmarks.peers import PEERS
from benchmarks.process import highest, resident
from benchmarks.timing import THREADS, warm_up

Shares = dict[tuple[str, torch.dtype], float]


def memory_shares(names: Iterable[str], dtypes: Sequence[torch.dtype], shape: tuple[int, int]) -> Shares:
    """The share for each name and dtype; empty where it cannot be measured."""
    if sys.platform != "linux":
        return {}
    # The processes start as copies of one that has imported everything and called nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context, max_tasks_per_child=1) as pool:
        tasks = {(name, dtype): pool.submit(memory_share, name, dtype, shape) for name in names for dtype in dtypes}
        return {task: future.result() for task, future in tasks.items()}


def memory_share(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> float:
    """The share in this process, in which nothing may have held more memory before than the call will."""
    torch.set_num_threads(THREADS)
    prune = {**OPERATORS, **PEERS}[name]
    warm_up({name: prune}, dtype)
    tensor = make_tensor(shape, dtype)
    # What the warm-up freed goes back to the system, lest the call takes it for nothing.
    ctypes.CDLL(None).malloc_trim(0)
    before = resident()
    result = prune(tensor)
    added = highest() - before
    return (tensor.nbytes + added) / (tensor.nbytes + result.nbytes)
