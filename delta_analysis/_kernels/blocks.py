"""Work on a tensor block by block, in order, on several threads.

What a block yields depends on its entries and its position alone, so neither the number of threads
nor the storage dtype can change a result.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock
from typing import TypeVar

import numpy as np
import torch

Result = TypeVar("Result")
BLOCK = 2**18
"""Entries of a block where work on it takes memory: a megabyte in float32."""
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_building = Lock()


def row_length(tensor: torch.Tensor) -> int:
    """Entries of one row: all that feed one output (first dimension); the whole of a vector."""
    return math.prod(tensor.shape[1:]) if tensor.dim() > 1 else tensor.numel()


def map_blocks(
    tensor: torch.Tensor,
    work: Callable[[torch.Tensor, int], Result],
    *,
    multiple: int = 1,
    block: int = BLOCK,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
) -> list[Result]:
    """`work(values, start)` on each flat block of about `block` entries, in order of position.

    Blocks lie on the CPU, where a tensor of another device is copied first. They are not to be written to.
    Each but the last has a multiple of `multiple` entries, such as a row. A tensor of a dtype that is not
    in `dtypes` comes as float32.
    """
    if not tensor.is_floating_point():
        raise ValueError(f"a tensor of floating dtype is needed; this one is {tensor.dtype}")
    flat = tensor.detach().cpu().reshape(-1)
    convert = flat.dtype not in dtypes
    step = max(min(block, BLOCK) if convert else block, multiple, 1)
    step -= step % max(multiple, 1)

    # Inference mode is a thread's own, and its tensors cannot be written to outside of it.
    inference = torch.is_inference_mode_enabled()

    def run(starts: Sequence[int]) -> list[Result]:
        with torch.inference_mode(inference):
            blocks = ((flat[start : start + step], start) for start in starts)
            return [work(values.to(torch.float32) if convert else values, start) for values, start in blocks]

    starts = range(0, flat.numel(), step)
    threads = min(torch.get_num_threads(), len(starts))
    if threads <= 1:
        return run(starts)
    edges = [len(starts) * i // threads for i in range(threads + 1)]
    parts = [starts[edges[i] : edges[i + 1]] for i in range(threads)]
    return [result for part in thread_pool(threads).map(run, parts) for result in part]


def new_tensor(
    tensor: torch.Tensor,
    work: Callable[[torch.Tensor, int, torch.Tensor], None],
    *,
    multiple: int = 1,
    block: int = BLOCK,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
) -> torch.Tensor:
    """A tensor of the same shape, dtype and device, of which `work(values, start, out)` fills each block."""
    result = uninitialised(tensor.shape, tensor.dtype)
    flat = result.view(-1)

    def fill(values: torch.Tensor, start: int) -> None:
        place = flat[start : start + values.numel()]
        out = place if place.dtype == values.dtype else torch.empty_like(values)
        work(values, start, out)
        if out is not place:
            place.copy_(out)

    map_blocks(tensor, fill, multiple=multiple, block=block, dtypes=dtypes)
    return result.to(tensor.device)


def uninitialised(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A new tensor whose entries may be anything."""
    # numpy asks for huge pages, so that a large tensor costs few page faults.
    numel = math.prod(shape)
    memory = np.empty(max(numel, 1) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(memory).view(dtype)[:numel].view(tuple(shape))


def to_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32: itself if it is that, else a new one."""
    if tensor.dtype == torch.float32:
        return tensor
    return uninitialised(tensor.shape, torch.float32).copy_(tensor)


def thread_pool(threads: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked child has none of its parent's."""
    with _building:
        key = os.getpid(), threads
        if key not in _pools:
            _pools[key] = single_threaded_pool(threads)
        return _pools[key]


def single_threaded_pool(threads: int) -> ThreadPoolExecutor:
    """Threads in each of which torch uses one core."""
    here, started = torch.get_num_threads(), Barrier(threads + 1)
    pool = ThreadPoolExecutor(threads, initializer=_use_one_core)
    try:
        for _ in range(threads):
            pool.submit(started.wait)
        started.wait(timeout=60)
    except BaseException:
        # Else the threads that did start would wait for ever.
        started.abort()
        raise
    # What a thread sets becomes the default of threads to come; so the default is put back.
    torch.set_num_threads(here)
    return pool


def _use_one_core() -> None:
    # Asking first makes torch read the default now, and not over our setting later.
    torch.get_num_threads()
    torch.set_num_threads(1)
