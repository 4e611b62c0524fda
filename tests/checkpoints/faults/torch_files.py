"""Files of torch, written so that any field of an archive or a pickle can be set apart from the truth."""

from __future__ import annotations

import collections
import io
import pickle
import struct
import zlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from tests.checkpoints.faults.good import TENSORS

STORED, DEFLATED = 0, 8
MEGABYTE = bytes(2**20)
BOMB = 1024
"""Megabytes."""


@dataclass(frozen=True)
class Record:
    """A record of a zip archive; whatever its headers say of it can be set apart from what it is."""

    name: str
    content: bytes
    method: int = STORED
    flags: int = 0x800
    size: int | None = None
    packed_size: int | None = None
    crc: int | None = None
    extra: bytes = b""
    offset: int | None = None
    central_name: str | None = None
    central_size: int | None = None


def zip_bytes(records: list[Record], *, comment: bytes = b"", before: bytes = b"", shift: int = 0) -> bytes:
    """An archive; `shift` is added to what its end says about where the directory begins."""
    body, directory = before, b""
    for record in records:
        crc = zlib.crc32(record.content) if record.crc is None else record.crc
        packed = len(record.content) if record.packed_size is None else record.packed_size
        size = packed if record.size is None else record.size
        name = record.name.encode(errors="surrogateescape")
        common = (20, record.flags, record.method, 0, 0, crc, packed)
        start = len(body) if record.offset is None else record.offset
        body += struct.pack("<4s5H3I2H", b"PK\3\4", *common, size, len(name), len(record.extra)) + name + record.extra
        body += record.content
        central = name if record.central_name is None else record.central_name.encode()
        central_size = size if record.central_size is None else record.central_size
        directory += (
            struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, *common, central_size, len(central), 0, 0, 0, 0, 0, start)
            + central
        )
    return body + directory + end_of_zip(len(records), len(directory), len(body) + shift, comment)


def end_of_zip(count: int, size: int, offset: int, comment: bytes = b"") -> bytes:
    return struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, size, offset, len(comment)) + comment


def deflated(name: str, content: bytes, **changes: Any) -> Record:
    packer = zlib.compressobj(wbits=-15)
    packed = packer.compress(content) + packer.flush()
    return Record(name, packed, DEFLATED, size=len(content), crc=zlib.crc32(content), **changes)


@cache
def bomb(name: str) -> Record:
    """A gigabyte of zeros in a megabyte."""
    packer = zlib.compressobj(9, wbits=-15)
    packer.compress(MEGABYTE), packer.flush(zlib.Z_FULL_FLUSH)
    # After a full flush nothing before it is referred to, so each repetition is the same bytes.
    piece = packer.compress(MEGABYTE) + packer.flush(zlib.Z_FULL_FLUSH)
    return Record(name, piece * BOMB + b"\x03\x00", DEFLATED, size=BOMB * 2**20, crc=_crc_of_bomb())


@cache
def _crc_of_bomb() -> int:
    crc = 0
    for _ in range(BOMB):
        crc = zlib.crc32(MEGABYTE, crc)
    return crc


@dataclass(frozen=True)
class Storage:
    """What stands for a storage in a pickle."""

    kind: Any
    key: Any
    numel: Any
    location: Any = "cpu"


@dataclass(frozen=True)
class Call:
    """Unpickles as the value of a call."""

    function: Any
    arguments: tuple[Any, ...]

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


KINDS = {torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage, torch.bfloat16: torch.BFloat16Storage}


def rebuilt(storage: Storage, offset: Any, shape: Any, strides: Any) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, (storage, offset, shape, strides, False, collections.OrderedDict()))


def described(tensors: dict[str, torch.Tensor] = TENSORS) -> dict[str, Call]:
    """What a pickle of tensors calls to rebuild them, each with a storage of its own."""
    return {
        name: rebuilt(Storage(KINDS[each.dtype], str(i), each.numel()), 0, tuple(each.shape), each.stride())
        for i, (name, each) in enumerate(tensors.items())
    }


def pickled(value: object, *, legacy: bool = False, protocol: int = 2) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, each: object) -> Any:
            if not isinstance(each, Storage):
                return None
            return ("storage", each.kind, each.key, each.location, each.numel, *((None,) if legacy else ()))

    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump(value)
    return buffer.getvalue()


def raw(tensor: torch.Tensor) -> bytes:
    """Its bytes, row by row; an empty view may have strides that torch does not take for bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


DATA = [raw(tensor) for tensor in TENSORS.values()]


def records(pickle_: bytes, data: list[bytes] = DATA) -> list[Record]:
    """Those that torch writes."""
    return [
        Record("archive/data.pkl", pickle_),
        Record("archive/byteorder", b"little"),
        *(Record(f"archive/data/{i}", each) for i, each in enumerate(data)),
        Record("archive/version", b"3\n"),
    ]


MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
PROTOCOL = pickle.dumps(1001, 2)
SYSTEM = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}, 2)


def legacy_bytes(
    pickle_: bytes,
    *,
    magic: bytes = MAGIC,
    protocol: bytes = PROTOCOL,
    system: bytes = SYSTEM,
    keys: bytes | None = None,
    sizes: list[int] | None = None,
) -> bytes:
    """A file as torch wrote it before version 1.6."""
    sizes = [tensor.numel() for tensor in TENSORS.values()] if sizes is None else sizes
    keys = pickle.dumps([str(i) for i in range(len(DATA))], 2) if keys is None else keys
    data = b"".join(struct.pack("<Q", size % 2**64) + each for size, each in zip(sizes, DATA, strict=True))
    return magic + protocol + system + pickle_ + keys + data


PICKLE = pickled(described())
LEGACY_PICKLE = pickled(described(), legacy=True)
