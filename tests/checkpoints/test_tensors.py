"""Entries of a file and of memory, read whole and in pieces."""

from __future__ import annotations

import pickle
from io import FileIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_analysis._errors import CheckpointError
from delta_analysis.checkpoints.tensors import InFile, InMemory

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)
VALUES = np.arange(24, dtype="<f4")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """24 float32 numbers after five other bytes."""
    file = tmp_path / "weights"
    file.write_bytes(b"12345" + VALUES.tobytes() + b"end")
    return file


@pytest.mark.parametrize("shape", [(24,), (4, 6), (2, 3, 4), (24, 1)])
def test_entries_lie_row_by_row_from_the_offset_on(file: Path, shape: tuple[int, ...]) -> None:
    entry = InFile(file, "a", 5, shape, torch.float32)
    assert entry.read().tolist() == VALUES.reshape(shape).tolist()
    assert (entry.numel, entry.files) == (24, (file,))


@pytest.mark.parametrize(("shape", "expected"), [((), VALUES[2]), ((0, 3), np.empty((0, 3)))])
def test_scalars_and_empty_tensors(file: Path, shape: tuple[int, ...], expected: np.ndarray) -> None:
    read = InFile(file, "a", 13, shape, torch.float32).read()
    np.testing.assert_array_equal(read.numpy(), expected)
    assert read.shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_bit_by_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.tensor([[0.0, 1.0, -2.5], [1e4, -0.0, 3.0]]).to(dtype)
    file = tmp_path / "weights"
    file.write_bytes(b"\0" + values.view(torch.uint8).numpy().tobytes())
    read = InFile(file, "a", 1, (2, 3), dtype).read()
    assert read.dtype == dtype
    assert torch.equal(read.view(torch.uint8), values.view(torch.uint8))


@settings(deadline=None)
@given(order=st.permutations(range(3)), start=st.integers(0, 10))
def test_strides_are_those_of_any_permutation(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], start: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "permuted"
    values = np.arange(start, start + 24, dtype="<f4").reshape(2, 3, 4)
    file.write_bytes(bytes(start) + values.tobytes())
    expected = values.transpose(order)
    strides = tuple(stride // 4 for stride in expected.strides)
    read = InFile(file, "a", start, expected.shape, torch.float32, strides).read()
    assert read.is_contiguous()
    np.testing.assert_array_equal(read.numpy(), expected)


@settings(deadline=None)
@given(first=st.integers(0, 24), second=st.integers(0, 24), dtype=st.sampled_from(["<f2", "<f4", "<f8"]))
def test_a_piece_is_a_slice(tmp_path_factory: pytest.TempPathFactory, first: int, second: int, dtype: str) -> None:
    file = tmp_path_factory.getbasetemp() / "sliced"
    values = torch.from_numpy(VALUES.astype(dtype))
    file.write_bytes(b"12345" + values.numpy().tobytes())
    start, stop = sorted((first, second))
    piece = InFile(file, "a", 5, (4, 6), values.dtype).piece(start, stop)
    assert piece.dtype == values.dtype
    assert piece.tolist() == VALUES[start:stop].tolist()


def test_reads_that_return_less_than_was_asked_for_are_continued(file: Path) -> None:
    class Slow(FileIO):
        def readinto(self, memory: memoryview) -> int:
            return super().readinto(memory[:7])

    out = torch.empty(20)
    with Slow(file) as opened:
        InFile(file, "a", 5, (24,), torch.float32).read_into(opened, out, 3)
    assert out.tolist() == VALUES[3:23].tolist()


@pytest.mark.parametrize("left", [0, 5, 5 + 95])
def test_the_end_of_the_file_is_an_error_that_counts_the_bytes(file: Path, left: int) -> None:
    entry = InFile(file, "a.weight", 5, (4, 6), torch.float32)
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(CheckpointError) as caught:
        entry.read()
    assert str(caught.value) == (
        f"{file}: tensor 'a.weight' cannot be read: it ends {min(101 - left, 96)} bytes too early; "
        "the file has changed since it was opened, or the disk fails: fetch it again"
    )


def test_a_file_that_is_gone_is_an_error(file: Path) -> None:
    entry = InFile(file, "a.weight", 5, (4, 6), torch.float32)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"tensor 'a\.weight' cannot be read: No such file or directory; "):
        entry.read()


def test_a_failing_disk_is_an_error(file: Path) -> None:
    class Failing(FileIO):
        def readinto(self, memory: memoryview) -> int:
            raise OSError(5, "Input/output error")

    entry = InFile(file, "a.weight", 5, (2,), torch.float32)
    with (
        Failing(file) as opened,
        pytest.raises(CheckpointError, match=r"tensor 'a\.weight' cannot be read: Input/output error; "),
    ):
        entry.read_into(opened, torch.empty(2), 0)


def test_a_stored_entry_travels_to_other_processes(file: Path) -> None:
    entry = InFile(file, "a.weight", 5, (4, 6), torch.float32)
    again = pickle.loads(pickle.dumps(entry))
    assert again == entry
    assert torch.equal(again.read(), entry.read())


def test_what_is_held_is_handed_out_as_a_copy() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    entry = InMemory(tensor)
    assert (entry.shape, entry.dtype, entry.files) == ((2, 3), torch.float32, ())
    read = entry.read()
    assert read.device.type == "cpu"
    assert torch.equal(read, tensor)
    read.zero_()
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
