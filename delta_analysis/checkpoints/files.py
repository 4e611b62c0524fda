"""Headers of weight files: which tensors a file holds and where, without reading any of them."""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
from io import SEEK_END, BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from delta_analysis._errors import CheckpointError
from delta_analysis.checkpoints.pickles import Storage, View, read_pickle
from delta_analysis.checkpoints.tensors import InFile, TensorReference

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
ZIP, LITTLE = b"PK\x03\x04", b"little"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
MOST_PICKLED = 2**22
"""Bytes that are believed to be an honest pickle of names and shapes; a tensor takes some 200."""
NESTED = ("state_dict", "model_state_dict", "model", "module")
"""Where training frameworks keep the weights, beside what else they need to go on."""
Place = tuple[int, int]
"""Where a storage begins in its file, and its bytes."""
Contents = tuple[dict[str, View], dict[str, Place]]
"""The tensors by name, and the places of storages by key."""


def read_header(file: Path) -> dict[str, TensorReference]:
    """The tensors of a `.safetensors` or `.bin` file by name, not yet read.

    Nothing in a pickle is executed: it is read as data, whether it lies in a zip archive or in the
    form that torch had before version 1.6.
    """
    references = _torch_header(file) if file.suffix == ".bin" else _safetensors_header(file)
    for name, reference in references.items():
        # A tensor without entries may claim any lengths, and torch multiplies those that are not 0.
        if len(reference.shape) > MOST_DIMENSIONS or math.prod(length or 1 for length in reference.shape) >= 2**63:
            raise CheckpointError(
                f"{file}: tensor {name!r} has {len(reference.shape)} dimensions of up to "
                f"{max(reference.shape)} entries; expected at most {MOST_DIMENSIONS}, and fewer than 2^63 entries: "
                "fetch it again"
            )
    return references


def _safetensors_header(file: Path) -> dict[str, TensorReference]:
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
    references: dict[str, TensorReference] = {}
    for name, about in header.items():
        dtype = SAFETENSORS_DTYPES.get(about["dtype"])
        if dtype is None:
            raise not_floating(file, name, about["dtype"])
        references[name] = InFile(file, name, 8 + length + about["data_offsets"][0], tuple(about["shape"]), dtype)
    return references


def _torch_header(file: Path) -> dict[str, TensorReference]:
    try:
        with file.open("rb") as opened:
            is_zip = opened.read(len(ZIP)) == ZIP
            opened.seek(0)
            views, places = _zip_contents(opened) if is_zip else _legacy_contents(opened)
        return {name: _place(file, name, view, places) for name, view in views.items()}
    # What a damaged or hostile file makes the parsers raise cannot be listed.
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{file}: not a readable checkpoint of tensors ({type(error).__name__}: {reason}); code in it is never "
            "run: fetch it again from a source that you trust, in safetensors if there is one, or, of a training "
            "run's own file, save its 'state_dict' by itself and open that"
        ) from error


def _zip_contents(opened: BinaryIO) -> Contents:
    """The contents of an archive as torch writes it, with nothing compressed."""
    with zipfile.ZipFile(opened) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        if len(infos) < len(archive.infolist()):
            raise ValueError("it has two records of one name")
        if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in infos.values()):
            raise ValueError("it has compressed or encrypted records, which torch never writes")
        if any(info.compress_size != info.file_size for info in infos.values()):
            raise ValueError("it has a record of two sizes")
        roots = [name.removesuffix("data.pkl") for name in infos if re.fullmatch("[^/]+/data.pkl", name)]
        if len(roots) != 1:
            raise ValueError(f"it has {len(roots)} pickles of tensors, and torch writes one")
        root = roots[0]
        if infos[f"{root}data.pkl"].file_size > MOST_PICKLED:
            raise ValueError(f"its pickle is larger than {MOST_PICKLED} bytes")
        order = infos.get(f"{root}byteorder")
        if order and (order.file_size != len(LITTLE) or archive.read(order) != LITTLE):
            raise ValueError("its entries are not little-endian")
        views = _views(read_pickle(BytesIO(archive.read(f"{root}data.pkl"))))
    places = {}
    for name, info in infos.items():
        # The local header, unlike the central one, says where the record itself begins.
        opened.seek(info.header_offset)
        signature, name_length, extra_length = struct.unpack("<4s22x2H", opened.read(30))
        if signature != ZIP:
            raise ValueError(f"its directory has {name!r} at a place where no record begins")
        start = info.header_offset + 30 + name_length + extra_length
        if name.startswith(f"{root}data/"):
            places[name.removeprefix(f"{root}data/")] = start, info.file_size
    return views, places


def _legacy_contents(opened: BinaryIO) -> Contents:
    """The contents of a file as torch wrote it before version 1.6: five pickles, then storages with their lengths."""
    head = BytesIO(opened.read(MOST_PICKLED))
    if read_pickle(head) != LEGACY_MAGIC:
        raise ValueError("it begins neither as a zip archive nor as a file of torch before 1.6")
    _version, _system, tensors, keys = (read_pickle(head) for _ in range(4))
    views = _views(tensors)
    storages = {view.storage.key: view.storage for view in views.values()}
    places, at = {}, head.tell()
    if set(keys) - storages.keys():
        raise ValueError("it holds other tensors beside the weights, in the form of torch before 1.6")
    for key in keys:
        opened.seek(at)
        (numel,) = struct.unpack("<q", opened.read(8))
        if numel != storages[key].numel:
            raise ValueError(f"storage {key!r} has {numel} entries, and its pickle says {storages[key].numel}")
        places[key] = at + 8, storages[key].nbytes
        at += 8 + storages[key].nbytes
    if at > opened.seek(0, SEEK_END):
        raise ValueError("it ends too early")
    return views, places


def _views(tensors: object) -> dict[str, View]:
    """These are named tensors, and no storage is read as two types; of a training run its weights alone."""
    if isinstance(tensors, dict):
        nested = (tensors.get(key) for key in NESTED)
        tensors = next((each for each in nested if isinstance(each, dict) and each), tensors)
    if not isinstance(tensors, dict):
        raise TypeError(f"it holds a {type(tensors).__name__}, not a dict from name to tensor")
    storages: dict[str, Storage] = {}
    for name, view in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"it has the number {name} where the name of a tensor was expected")
        if not isinstance(view, View):
            raise TypeError(f"{name!r} is a {type(view).__name__}, where a name and a tensor were expected")
        if storages.setdefault(view.storage.key, view.storage) != view.storage:
            raise ValueError(f"tensor {name!r} reads the storage of another as {view.storage.dtype}")
    return tensors


def _place(file: Path, name: str, view: View, places: dict[str, Place]) -> InFile:
    start, size = places[view.storage.key]
    numel, lengths = math.prod(view.shape), view.shape
    reach = view.offset + (
        1 + sum((n - 1) * step for n, step in zip(lengths, view.strides, strict=True)) if numel else 0
    )
    if size != view.storage.nbytes or reach * view.dtype.itemsize > size:
        raise ValueError(f"tensor {name!r} does not fit into its record")
    offset = start + view.offset * view.dtype.itemsize
    if view.is_contiguous:
        return InFile(file, name, offset, view.shape, view.dtype)
    if reach - view.offset != numel:
        raise ValueError(f"tensor {name!r} is a view that skips or repeats entries")
    return InFile(file, name, offset, view.shape, view.dtype, view.strides)


def not_floating(file: Path, name: str, dtype: str) -> CheckpointError:
    """The refusal of a tensor whose entries are not floating point numbers of 16 bits or more."""
    lower = dtype.lower()
    kind = "fp8" if lower.startswith(("f8", "float8")) else "int8" if lower in ("i8", "int8", "qint8") else "packed"
    return CheckpointError(
        f"{file}: tensor {name!r} is stored as {dtype}: {kind} codes, which mean nothing without their scales; "
        "expected float64, float32, float16 or bfloat16: take the model's unquantised checkpoint, or load it with "
        "transformers, call model.dequantize() and model.save_pretrained(…), and open that folder"
    )
