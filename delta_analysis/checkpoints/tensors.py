"""Where a weight comes from: a place in a file, or memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch

from delta_analysis._errors import CheckpointError
from delta_analysis._kernels import uninitialised


class TensorReference(Protocol):
    """A tensor that has not been read: its shape, its storage dtype, and how to get it."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def files(self) -> tuple[Path, ...]:
        """The files that it is read from."""
        ...

    def read(self) -> torch.Tensor:
        """The whole tensor, in its storage dtype, not to be written to."""
        ...


@dataclass(frozen=True)
class InFile:
    """A tensor that lies in a file in one run of little-endian entries, row by row.

    Attributes
    ----------
    file : the file, which is opened anew for each reading.
    name : the tensor's name in the file, for errors.
    offset : of its first byte from the beginning of the file.
    strides : in entries, of a tensor that does not lie row by row; None otherwise.
    """

    file: Path
    name: str = field(repr=False)
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file,)

    def read(self) -> torch.Tensor:
        if self.strides is None:
            return self.piece(0, self.numel).view(self.shape)
        # A view that covers each entry once has as many entries in the file as in the tensor.
        return self.piece(0, self.numel).as_strided(self.shape, self.strides).contiguous()

    def piece(self, start: int, stop: int) -> torch.Tensor:
        """The entries from `start` to `stop` as they lie in the file, flat."""
        out = uninitialised((stop - start,), self.dtype)
        with self.open() as file:
            self.read_into(file, out, start)
        return out

    def open(self) -> FileIO:
        """The file, unbuffered, for `read_into`."""
        try:
            return self.file.open("rb", buffering=0)
        except OSError as error:
            raise self._changed(error.strerror or str(error)) from error

    def read_into(self, file: FileIO, out: torch.Tensor, start: int) -> None:
        """Fill a flat tensor with the entries from `start` on."""
        memory = out.view(torch.uint8).numpy().data
        try:
            file.seek(self.offset + start * self.dtype.itemsize)
            done = 0
            # A read may return less than was asked for; nothing at all is the end of the file.
            while done < len(memory) and (count := file.readinto(memory[done:])):
                done += count
        except OSError as error:
            raise self._changed(error.strerror or str(error)) from error
        if done < len(memory):
            raise self._changed(f"it ends {len(memory) - done} bytes too early")

    def _changed(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file}: tensor {self.name!r} cannot be read: {problem}; "
            "the file has changed since it was opened, or the disk fails: fetch it again"
        )


@dataclass(frozen=True, eq=False)
class InMemory:
    """A tensor in memory, such as a parameter of a module."""

    tensor: torch.Tensor = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def files(self) -> tuple[Path, ...]:
        return ()

    def read(self) -> torch.Tensor:
        # A copy, so that nobody writes into a model by way of its delta.
        return self.tensor.to("cpu", copy=True)
