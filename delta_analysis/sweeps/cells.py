"""Cells of a sweep on disk: one parquet file each, named by its content, written whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from delta_analysis.checkpoints import writable_folder, written_whole

STORE = "DELTA_ANALYSIS_CELLS"
"""The environment variable that names a folder for the cells of all sweeps, wherever else they write."""


ROOMS = ("_kernels", "checkpoints", "deltas", "evaluation", "merging", "pruning", "sweeps")
"""The rooms whose code what a cell holds is computed by."""


Row = dict[str, Any]
"""One metric of a cell, in the columns of `SCHEMA`."""

SCHEMA = pa.schema(
    [
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("outcomes", pa.list_(pa.float64())),
        ("achieved_drop_rate", pa.float64()),
        ("seconds", pa.float64()),
        ("device", pa.string()),
        ("versions", pa.string()),
        ("base_hash", pa.string()),
        ("finetuned_hash", pa.string()),
        ("error", pa.string()),
        ("cell", pa.string()),
    ]
)


def content(value: object) -> object:
    """What a pruner or an evaluation consists of, as JSON: its class and its fields, whatever their depth.

    Fields that change speed alone are left out.

    Raises
    ------
    TypeError
        A part that is no frozen dataclass of plain values, so that equal content could not be told.

    Examples
    --------
    >>> from delta_analysis.pruning import Dare
    >>> content(Dare(0.9))
    {'class': 'Dare', 'drop_rate': 0.9, 'rescale': 'inverse_keep'}
    """
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, tuple):
        return [content(each) for each in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and isinstance(value, Hashable):
        kind = type(value)
        counted = [each.name for each in dataclasses.fields(value) if not each.metadata.get("speed")]
        fields = {name: content(getattr(value, name)) for name in counted}
        return {"class": kind.__qualname__, **fields}
    raise TypeError(
        f"{value!r} cannot be part of a cell's key; "
        "make pruners and evaluations frozen dataclasses of numbers, texts and tuples of these"
    )


def digest(description: object) -> str:
    """A hash of what `content` gives, the same in every process."""
    return hashlib.blake2b(json.dumps(description, sort_keys=True).encode(), digest_size=16).hexdigest()


@cache
def code_digest() -> str:
    """A hash of the sources that compute cells: code that was changed returns no number of before."""
    package = Path(__file__).parents[1]
    hashed = hashlib.blake2b(digest_size=16)
    for file in sorted(file for room in ROOMS for file in (package / room).rglob("*.py")):
        source = file.read_bytes()
        hashed.update(f"{file.relative_to(package).as_posix()} {len(source)}\n".encode() + source)
    return hashed.hexdigest()


@dataclass(frozen=True)
class CellStore:
    """A folder of cells. Any number of sweeps may read and write it at the same time."""

    folder: Path

    @classmethod
    def of(cls, out_dir: str | Path) -> CellStore:
        """The folder that `DELTA_ANALYSIS_CELLS` names, or else `cells` in `out_dir`."""
        # Absolute, since a worker may have another working directory.
        named = os.environ.get(STORE)
        return cls(writable_folder(Path(named or Path(out_dir) / "cells").expanduser().absolute()))

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.parquet"

    def read(self, key: str) -> list[Row] | None:
        """The rows of a finished cell; None if it is missing, damaged, or ended in an error, and has to run."""
        try:
            # In one go: the file may be replaced while it is read.
            table = pq.read_table(pa.BufferReader(self.path(key).read_bytes()))
            rows: list[Row] = table.to_pylist()
            # Parquet itself overlooks many a changed byte, and a file under another name is another cell.
            whole = table.schema.metadata[b"digest"] == digest([key, rows]).encode()
        except (OSError, ValueError, TypeError, KeyError, pa.ArrowException):
            return None
        return rows if whole and rows and not any(row["error"] for row in rows) else None

    def write(self, key: str, rows: list[Row]) -> None:
        """Write a cell; an error takes the place of no finished one."""
        if any(row.get("error") for row in rows) and self.read(key):
            return
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        with written_whole(self.path(key)) as partial:
            pq.write_table(table.replace_schema_metadata({"digest": digest([key, table.to_pylist()])}), partial)
