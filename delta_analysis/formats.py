"""Headers of weight files: which tensors a file holds and where, without reading any of them."""

from __future__ import annotations

import json
import math
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from delta_analysis._errors import CheckpointError
from delta_analysis.entry import Entry, Held, Stored

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MOST_DIMENSIONS = 64
"""Of a tensor that torch computes with."""
ZIP = b"PK\x03\x04"
MOST_PICKLED = 2**25
"""Bytes that are believed to be an honest pickle of names and shapes; a tensor takes some 200."""


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of a `.safetensors` or `.bin` file by name, not yet read.

    Nothing in a pickle is executed: torch reads it with `weights_only`. A `.bin` file in the form
    that torch had before version 1.6 cannot be read in parts; its tensors are held in memory.

    Raises
    ------
    CheckpointError
        A file that is damaged, or a pickle of anything but tensors.
    """
    entries = _torch_header(file) if file.suffix == ".bin" else _safetensors_header(file)
    for name, entry in entries.items():
        # A tensor without entries may claim any lengths, and torch multiplies those that are not 0.
        if len(entry.shape) > MOST_DIMENSIONS or math.prod(length or 1 for length in entry.shape) >= 2**63:
            raise CheckpointError(
                f"{file}: tensor {name!r} has {len(entry.shape)} dimensions of up to {max(entry.shape)} entries; "
                f"expected at most {MOST_DIMENSIONS}, and fewer than 2^63 entries: fetch it again"
            )
    return entries


def _safetensors_header(file: Path) -> dict[str, Entry]:
    try:
        # This checks the header: its lengths, offsets and shapes, and that the file is whole.
        with safe_open(file, framework="pt"), file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header: dict[str, Any] = json.loads(opened.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: not a readable safetensors file ({error}); it has {file.stat().st_size} bytes and may be "
            "truncated: fetch it again"
        ) from error
    header.pop("__metadata__", None)
    entries: dict[str, Entry] = {}
    for name, about in header.items():
        dtype = SAFETENSORS_DTYPES.get(about["dtype"])
        if dtype is None:
            raise not_floating(file, name, about["dtype"])
        entries[name] = Stored(file, name, 8 + length + about["data_offsets"][0], tuple(about["shape"]), dtype)
    return entries


def _torch_header(file: Path) -> dict[str, Entry]:
    try:
        with file.open("rb") as opened:
            is_zip = opened.read(len(ZIP)) == ZIP
        records = _zip_records(file) if is_zip else None
        tensors = torch.load(file, map_location="meta", weights_only=True)
        _check_tensors(tensors)
        if records is None:
            return _hold(file, tensors)
        return {name: _place(file, name, tensor, records) for name, tensor in tensors.items()}
    except CheckpointError:
        raise
    # What a damaged or hostile file makes the parsers raise cannot be listed.
    except Exception as error:
        # Of torch's own text only the cause: the rest recommends to switch this protection off.
        lines = (line.strip() for line in str(error).splitlines() if "weights_only" not in line)
        reason = next(filter(None, lines), "unknown cause")
        raise CheckpointError(
            f"{file}: not a readable checkpoint of tensors ({type(error).__name__}: {reason}); code in it is never "
            "run: fetch it again from a source that you trust, in safetensors if there is one"
        ) from error


def _zip_records(file: Path) -> dict[int, int]:
    """Offset of each record of a zip file -> its size; they must be as torch writes them, uncompressed."""
    with zipfile.ZipFile(file) as archive, file.open("rb") as opened:
        infos = archive.infolist()
        size = file.stat().st_size
        if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in infos):
            raise ValueError("it has compressed or encrypted records, which torch never writes")
        if sum(info.file_size for info in infos) > size:
            raise ValueError("its records are larger than the file")
        if any(info.file_size > MOST_PICKLED for info in infos if info.filename.endswith(".pkl")):
            raise ValueError(f"its pickle is larger than {MOST_PICKLED} bytes")
        if any(archive.read(info) != b"little" for info in infos if info.filename.rpartition("/")[2] == "byteorder"):
            raise ValueError("its entries are not little-endian")
        records = {}
        for info in infos:
            # The local header, unlike the central one, says where the record itself begins.
            opened.seek(info.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", opened.read(4))
            records[info.header_offset + 30 + name_length + extra_length] = info.file_size
    return records


def _check_tensors(tensors: object) -> None:
    """These are named tensors of the plain kind."""
    if not isinstance(tensors, dict):
        raise TypeError(f"it holds a {type(tensors).__name__}, not a dict from name to tensor")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name!r} is a {type(tensor).__name__}, where a name and a tensor were expected")
        if tensor.is_neg():
            raise TypeError(f"{name!r} is a view of the opposite sign, where the numbers themselves were expected")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name!r} is sparse, where a dense tensor was expected")


def _hold(file: Path, expected: dict[str, torch.Tensor]) -> dict[str, Entry]:
    storages = [tensor.untyped_storage() for tensor in expected.values()]
    if sum({storage._cdata: storage.nbytes() for storage in storages}.values()) > file.stat().st_size:
        raise ValueError("its tensors are larger than the file")
    if any(tensor.nbytes > tensor.untyped_storage().nbytes() for tensor in expected.values()):
        raise ValueError("it has a view that repeats entries")
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ValueError("it has a tensor without entries, saved from the meta device")
    return {name: Held(tensor.detach()) for name, tensor in tensors.items()}


def _place(file: Path, name: str, tensor: torch.Tensor, records: dict[int, int]) -> Stored:
    storage, dtype, shape = tensor.untyped_storage(), tensor.dtype, tuple(tensor.shape)
    record: Any = storage._checkpoint_offset
    first, strides = int(tensor.storage_offset()) * dtype.itemsize, tensor.stride()
    reach = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if records.get(record) != storage.nbytes() or first + reach * dtype.itemsize > storage.nbytes():
        raise ValueError(f"tensor {name!r} does not fit into its record")
    if tensor.is_contiguous():
        return Stored(file, name, record + first, shape, dtype)
    if reach != tensor.numel():
        raise ValueError(f"tensor {name!r} is a view that skips or repeats entries")
    return Stored(file, name, record + first, shape, dtype, strides)


def not_floating(file: Path, name: str, dtype: str) -> CheckpointError:
    """The refusal of a tensor whose entries are not floating point numbers of 16 bits or more."""
    lower = dtype.lower()
    kind = "fp8" if lower.startswith(("f8", "float8")) else "int8" if lower in ("i8", "int8", "qint8") else "packed"
    return CheckpointError(
        f"{file}: tensor {name!r} is stored as {dtype}: {kind} codes, which mean nothing without their scales; "
        "expected float64, float32, float16 or bfloat16: take the model's unquantised checkpoint, or load it with "
        "transformers, call model.dequantize() and model.save_pretrained(…), and open that folder"
    )
