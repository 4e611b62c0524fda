"""Work on blocks: order, sizes, dtypes, threads, errors and forked processes."""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_analysis._kernels.blocks import (
    BLOCK,
    map_blocks,
    new_tensor,
    row_length,
    single_threaded_pool,
    to_float32,
    uninitialised,
)
from delta_analysis._kernels.floats import NATIVE
from delta_analysis.pruning import Dare, Magnitude, MagPrune

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4), (2, 3, 1, 4), (0,), (3, 0, 2)]

Threads = Callable[[int], None]


@pytest.fixture
def threads() -> Iterator[Threads]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def span(values: torch.Tensor, start: int) -> tuple[int, int]:
    return start, values.numel()


@pytest.mark.parametrize("count", [1, 2, 3])
@settings(deadline=None)
@given(numel=st.integers(0, 300), block=st.integers(1, 90), multiple=st.integers(0, 120))
def test_blocks_follow_each_other_and_hold_whole_multiples(count: int, numel: int, block: int, multiple: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        spans = map_blocks(torch.zeros(numel), span, block=block, multiple=multiple)
    finally:
        torch.set_num_threads(before)
    ends = [0, *(start + size for start, size in spans)]
    assert [start for start, _ in spans] == ends[:-1]
    assert ends[-1] == numel
    assert all(size % max(multiple, 1) == 0 for _, size in spans[:-1])
    assert all(0 < size <= max(block, multiple) for _, size in spans)
    assert len({size for _, size in spans[:-1]}) <= 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_and_entries_are_the_same_for_any_number_of_threads(threads: Threads, count: int) -> None:
    threads(count)
    tensor = normal(70, 31)
    found = map_blocks(tensor, lambda values, start: (start, values.clone()), block=100)
    assert [start for start, _ in found] == list(range(0, 2170, 100))
    assert torch.equal(torch.cat([values for _, values in found]), tensor.reshape(-1))
    doubled = new_tensor(tensor, lambda values, _, out: torch.mul(values, 2, out=out), block=100)
    assert torch.equal(doubled, 2 * tensor)


def test_several_threads_work_at_a_time(threads: Threads) -> None:
    threads(3)
    # All three have to be inside at once for the barrier to open.
    barrier = threading.Barrier(3, timeout=60)
    found = map_blocks(torch.zeros(3), lambda values, _: barrier.wait(), block=1)
    assert sorted(found) == [0, 1, 2]
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtypes", [(torch.float32,), NATIVE], ids=["float32", "native"])
def test_work_gets_the_dtypes_that_it_reads(dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> None:
    tensor = normal(1000).to(dtype)
    found = map_blocks(tensor, lambda values, _: values, block=64, dtypes=dtypes)
    assert {values.dtype for values in found} == {dtype if dtype in dtypes else torch.float32}
    assert torch.equal(torch.cat(found).float(), tensor.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtypes", [(torch.float32,), NATIVE], ids=["float32", "native"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_new_tensor_has_the_shape_and_dtype_of_the_old_one(
    dtype: torch.dtype, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
) -> None:
    tensor = normal(*shape).to(dtype)
    result = new_tensor(tensor, lambda values, _, out: torch.neg(values, out=out), dtypes=dtypes)
    assert (result.shape, result.dtype, result.device) == (tensor.shape, dtype, tensor.device)
    assert result.is_contiguous()
    assert torch.equal(result, -tensor.float().to(dtype))
    assert map_blocks(tensor, span) == ([(0, tensor.numel())] if tensor.numel() else [])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_tensors_are_read_row_by_row(dtype: torch.dtype) -> None:
    tensor = normal(40, 30).to(dtype)
    for strided in (tensor.T, tensor[::2, 1::3], tensor.expand(2, 40, 30), tensor.flip(0)[3:]):
        copied = new_tensor(strided, lambda values, _, out: out.copy_(values), block=50)
        assert torch.equal(copied, strided)
        assert copied.is_contiguous()


def test_tensor_that_wants_a_gradient_is_read_without_one() -> None:
    tensor = normal(10).requires_grad_()
    result = new_tensor(tensor, lambda values, _, out: torch.mul(values, 2, out=out))
    assert not result.requires_grad
    assert torch.equal(result, 2 * tensor.detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_converted_block_takes_no_more_memory_than_a_float32_one(dtype: torch.dtype) -> None:
    spans = map_blocks(torch.empty(BLOCK + 5, dtype=dtype), span, block=4 * BLOCK)
    assert [size for _, size in spans] == ([BLOCK + 5] if dtype == torch.float32 else [BLOCK, 5])


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("failing", [0, 37, 99])
def test_an_error_in_any_thread_is_raised(threads: Threads, count: int, failing: int) -> None:
    threads(count)

    def work(values: torch.Tensor, start: int) -> None:
        if start == failing:
            raise ValueError(f"block {start}")

    with pytest.raises(ValueError, match=f"block {failing}"):
        map_blocks(torch.zeros(100), work, block=1)
    assert map_blocks(torch.zeros(3), span, block=1) == [(0, 1), (1, 1), (2, 1)]


@pytest.mark.parametrize(
    ("shape", "row"),
    [((), 1), ((5,), 5), ((3, 4), 4), ((3, 4, 2), 8), ((0, 4), 4), ((3, 0), 0), ((0,), 0), ((7, 1), 1)],
)
def test_a_row_is_all_that_feeds_one_output(shape: tuple[int, ...], row: int) -> None:
    assert row_length(torch.empty(shape)) == row
    assert shape[:1] == () or len(shape) == 1 or row * shape[0] == math.prod(shape)


def prune_in_a_forked_child_too() -> None:
    torch.set_num_threads(2)
    tensor = torch.from_numpy(np.arange(2.0**20, dtype=np.float32)).view(2**6, 2**14)
    pruners = [Dare(0.5), Dare(0.5, "l1"), Magnitude(0.5), Magnitude(0.5, "row"), MagPrune(0.5)]
    before = [pruner(tensor, name="w", seed=0) for pruner in pruners]
    child = os.fork()
    if child == 0:
        after = [pruner(tensor, name="w", seed=0) for pruner in pruners]
        # Compared by numpy: torch itself cannot compute on several threads after a fork.
        same = all((new.numpy() == old.numpy()).all() for new, old in zip(after, before, strict=True))
        os._exit(0 if same else 1)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def test_a_forked_child_has_threads_of_its_own(processes: ForkServerContext) -> None:
    process = processes.Process(target=prune_in_a_forked_child_too, daemon=True)
    process.start()
    process.join(120)
    assert process.exitcode == 0


def test_threads_of_ours_leave_the_default_of_others_alone() -> None:
    """What a thread sets becomes the default of threads to come, unless it is put back."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        pool = single_threaded_pool(3)
        inside = [pool.submit(torch.get_num_threads).result() for _ in range(6)]
        seen: list[int] = []
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert inside == [1] * 6
        assert seen == [3]
        assert torch.get_num_threads() == 3
        pool.shutdown()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("inference", [False, True])
def test_blocks_are_worked_on_in_the_callers_mode(threads: Threads, *, inference: bool) -> None:
    threads(2)
    with torch.inference_mode(inference):
        pruned = Dare(0.5)(normal(2 * BLOCK + 7), name="w", seed=0)
        # Written in place by the pool's threads, as a chain of prunings is.
        modes = map_blocks(pruned, lambda values, _: (values.mul_(1.0), torch.is_inference_mode_enabled())[1])
    assert modes == [inference] * len(modes)
    assert len(modes) > 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2**21,)], ids=str)
def test_uninitialised_memory_is_a_plain_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = uninitialised(shape, dtype)
    assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % dtype.itemsize == 0
    tensor.view(-1).view(torch.uint8).fill_(0)
    assert not tensor.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float32_has_the_values_of_a_cast(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0.1, -0.0, 1e38], [float("nan"), float("inf"), 3e-5]], dtype=torch.float64).to(dtype)
    found = to_float32(tensor)
    torch.testing.assert_close(found, tensor.to(torch.float32), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(found), torch.signbit(tensor.to(torch.float32)))
    assert (found is tensor) is (dtype == torch.float32)
