"""Damaged and hostile files of torch: zip archives, and pickles in them, in torch's old form and bare."""

from __future__ import annotations

import collections
import io
import itertools
import pickle
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from tests.faults.good import (
    EMBEDDING, FEW, NORM, NUMBERS, TENSORS, TORCH, WIDE, Fault, damaged, flipped, torch_bytes,
)  # fmt: skip

WITNESS = "witness"
"""Hostile code would make a file of this name in the working directory."""
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
        directory += struct.pack(
            "<4s6H3I5H2I", b"PK\1\2", 20, *common, central_size, len(central), 0, 0, 0, 0, 0, start
        ) + central  # fmt: skip
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
    pickle_: bytes, *, magic: bytes = MAGIC, protocol: bytes = PROTOCOL, system: bytes = SYSTEM, keys: bytes | None = None,
    sizes: list[int] | None = None,
) -> bytes:  # fmt: skip
    """A file as torch wrote it before version 1.6."""
    sizes = [tensor.numel() for tensor in TENSORS.values()] if sizes is None else sizes
    keys = pickle.dumps([str(i) for i in range(len(DATA))], 2) if keys is None else keys
    data = b"".join(struct.pack("<Q", size % 2**64) + each
                    for size, each in zip(sizes, DATA, strict=True))  # fmt: skip
    return magic + protocol + system + pickle_ + keys + data


PICKLE = pickled(described())
LEGACY_PICKLE = pickled(described(), legacy=True)


def zip_faults() -> Iterator[Fault]:
    for label, content in _zips():
        yield f"zip: {label}", {TORCH: content}


def _zips() -> Iterator[tuple[str, bytes]]:
    yield from damaged(torch_bytes(TENSORS), 30, 7)
    for label, content in damaged(zip_bytes(records(PICKLE)), 20, 8):
        yield f"made here, {label}", content
    for label, content in damaged(PICKLE, 20, 9):
        yield f"pickle in it, {label}", zip_bytes(records(content))
    whole = records(PICKLE)
    for i, record in enumerate(whole):
        def but(changed: Record, i: int = i) -> bytes:
            return zip_bytes([*whole[:i], changed, *whole[i + 1 :]])

        name = record.name
        for other in (
            "", "../x", "/etc/passwd", name.upper(), "other/" + name.split("/", 1)[1], name + "\0", "archive/data.pkl",
            "archive/constants.pkl", "archive/.storage_alignment", "archive/data/../data/0", "é", "x" * 60_000,
        ):  # fmt: skip
            yield f"{name} renamed {other[:40]!r}", but(replace(record, name=other))
        yield f"{name} named otherwise in the directory", but(replace(record, central_name="archive/x"))
        yield f"{name} deflated", but(deflated(name, record.content))
        yield f"{name} said to be deflated", but(replace(record, method=DEFLATED))
        yield f"{name} of an unknown method", but(replace(record, method=99))
        yield f"{name} a bomb", but(bomb(name))
        yield f"{name} a bomb, small in the directory", but(replace(bomb(name), central_size=6))
        yield f"{name} a bomb that says it is stored", but(replace(bomb(name), method=STORED))
        yield f"{name} encrypted", but(replace(record, flags=0x801))
        yield f"{name} strongly encrypted", but(replace(record, flags=0x841))
        yield f"{name} with data after it", but(replace(record, flags=0x808, size=0))
        yield f"{name} of a wrong checksum", but(replace(record, crc=1))
        yield f"{name} empty", but(replace(record, content=b""))
        yield f"{name} longer", but(replace(record, content=record.content + bytes(4)))
        yield f"{name} shorter", but(replace(record, content=record.content[:-1]))
        yield f"{name} of zeros", but(replace(record, content=bytes(len(record.content))))
        yield f"{name} twice", zip_bytes([*whole, record])
        yield f"{name} twice, other", zip_bytes([*whole, replace(record, content=bytes(len(record.content)))])
        yield f"{name} absent", zip_bytes([*whole[:i], *whole[i + 1 :]])
        for size in (0, len(record.content) - 1, len(record.content) + 1, 2**16, 2**28, 2**31, 2**32 - 1):
            yield f"{name} of size {size}", but(replace(record, size=size))
            yield f"{name} of both sizes {size}", but(replace(record, size=size, packed_size=size))
            yield f"{name} of size {size} in the directory", but(replace(record, central_size=size))
        for offset in (0, 1, 50, 2**20, 2**31, 2**32 - 1):
            yield f"{name} at {offset}", but(replace(record, offset=offset))
        # Zip64 fields for sizes and place.
        for size in (0, len(record.content), 2**40, 2**63, 2**64 - 1):
            extra = struct.pack("<HHQQQ", 1, 24, size, size, 0)
            yield f"{name} of zip64 size {size}", but(replace(record, extra=extra, size=2**32 - 1, packed_size=2**32 - 1))
    for value in (b"big", b"", b"little ", b"Little", b"\xff", b"little" * 100):
        yield f"byteorder {value[:10]!r}", zip_bytes([replace(each, content=value) if each.name.endswith("byteorder") else each
                                                   for each in whole])  # fmt: skip
    for value in ("0", "1", "63", "64", "-64", "10" * 20, "x"):
        extra_records = [Record("archive/.format_version", b"1"), Record("archive/.storage_alignment", value.encode())]
        yield f"alignment {value[:10]}", zip_bytes([*whole[:1], *extra_records, *whole[1:]])
    for shift in (-100, -1, 1, 100, 2**31):
        yield f"directory {shift} off", zip_bytes(whole, shift=shift)
    for end in (b"", b"PK\5\6", end_of_zip(0, 0, 0), end_of_zip(9, 2**32 - 1, 0), end_of_zip(2**16 - 1, 10, 2**32 - 1)):
        yield f"another end {end[:10]!r}", zip_bytes(whole) + end
    yield "comment", zip_bytes(whole, comment=b"c" * 1000)
    yield "bytes before", zip_bytes(whole, before=b"PK\3\4" + bytes(96), shift=-100)
    yield "bytes before, counted", zip_bytes(whole, before=b"PK\3\4" + bytes(96))
    yield "no records", zip_bytes([])
    yield "many records", zip_bytes([*whole, *(Record(f"archive/data/{i}", b"") for i in range(9, 3000))])
    yield from two_directories(whole)
    yield "ends alone", b"PK\3\4" + end_of_zip(0, 0, 4)
    yield "two archives", zip_bytes(whole) + zip_bytes(whole)
    aliased = [replace(each, content=b"") if each.name.endswith("data/1") else each for each in whole]
    yield "records overlap", zip_bytes([replace(each, offset=0) if each.name.endswith("data/1") else each for each in aliased])


def two_directories(whole: list[Record]) -> Iterator[tuple[str, bytes]]:
    """Archives in which readers that trust different fields find different directories."""
    bad = zip_bytes([bomb("archive/data.pkl"), *whole[1:]])
    bad_body, bad_directory = bad[: bad.index(b"PK\1\2")], bad[bad.index(b"PK\1\2") : -22]
    honest = zip_bytes(whole)
    start = honest.index(b"PK\1\2")
    body, directory = honest[:start], honest[start:-22]
    # One that counts from the beginning finds the first, one that counts back from the end the second.
    whole_body = body + bad_body
    shifted = _moved(bad_directory, len(body))
    offset = len(whole_body)
    size = len(directory)
    padded = shifted + bytes(max(size - len(shifted), 0))
    yield "two directories, offset to the first", whole_body + padded + _moved(directory, -len(padded)) + end_of_zip(
        len(whole), size, offset
    )
    yield "two directories, the bad one last", body + bad_body + directory + shifted + end_of_zip(
        len(whole), len(shifted), len(whole_body)
    )
    # Two zip64 ends: one right before the locator, one where the locator points.
    def end64(directory_size: int, at: int) -> bytes:
        return struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, len(whole), len(whole), directory_size, at)

    first = len(whole_body) + len(shifted)
    far = end64(len(shifted), len(whole_body))
    near_at = first + len(far)
    near = end64(len(directory), near_at)
    yield "two zip64 ends", (
        whole_body + shifted + far + directory + near + struct.pack("<4sIQI", b"PK\6\7", 0, first, 1)
        + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0)
    )  # fmt: skip


def _moved(directory: bytes, by: int) -> bytes:
    """A directory whose records lie elsewhere."""
    moved, at = bytearray(directory), 0
    while at < len(moved):
        name_length, extra, comment = struct.unpack_from("<3H", moved, at + 28)
        (offset,) = struct.unpack_from("<I", moved, at + 42)
        struct.pack_into("<I", moved, at + 42, (offset + by) % 2**32)
        at += 46 + name_length + extra + comment
    return bytes(moved)


def pickle_faults() -> Iterator[Fault]:
    """What a pickle says about its tensors is wrong; in a zip and in the old form."""
    for label, value in _values():
        try:
            content, legacy = pickled(value), pickled(value, legacy=True)
        except (pickle.PicklingError, TypeError, RecursionError):
            continue
        yield f"pickle in zip: {label}", {TORCH: zip_bytes(records(content))}
        yield f"pickle in old form: {label}", {TORCH: legacy_bytes(legacy)}
    for label, content in _raw_pickles():
        yield f"raw pickle in zip: {label}", {TORCH: zip_bytes(records(content))}
        yield f"raw pickle in old form: {label}", {TORCH: legacy_bytes(content)}
        yield f"raw pickle: {label}", {TORCH: content}
    for label, tensors in _kinds_of_tensors():
        yield f"saved by torch: {label}", {TORCH: torch_bytes(tensors)}
        yield f"saved by torch, old form: {label}", {TORCH: torch_bytes(tensors, legacy=True)}


def _values() -> Iterator[tuple[str, object]]:
    good = described()
    wide = Storage(torch.BFloat16Storage, "1", 8)
    for value in FEW:
        shown = str(value)[:40]
        yield f"numel {shown}", {**good, WIDE: rebuilt(replace(wide, numel=value), 0, (2, 4), (4, 1))}
        yield f"key {shown}", {**good, WIDE: rebuilt(replace(wide, key=value), 0, (2, 4), (4, 1))}
        yield f"location {shown}", {**good, WIDE: rebuilt(replace(wide, location=value), 0, (2, 4), (4, 1))}
        yield f"kind {shown}", {**good, WIDE: rebuilt(replace(wide, kind=value), 0, (2, 4), (4, 1))}
        yield f"offset {shown}", {**good, WIDE: rebuilt(wide, value, (2, 4), (4, 1))}
        yield f"shape {shown}", {**good, WIDE: rebuilt(wide, 0, value, (4, 1))}
        yield f"length {shown}", {**good, WIDE: rebuilt(wide, 0, (2, value), (4, 1))}
        yield f"strides {shown}", {**good, WIDE: rebuilt(wide, 0, (2, 4), value)}
        yield f"stride {shown}", {**good, WIDE: rebuilt(wide, 0, (2, 4), (value, 1))}
        yield f"repeated {shown} times", {**good, WIDE: rebuilt(wide, 0, (2, value), (4, 0))}
        yield f"one number {shown} times", {**good, WIDE: rebuilt(wide, 0, (value,), (0,))}
        yield f"{shown} instead of a tensor", {**good, WIDE: value}
        yield f"{shown} instead of all", value
        if not isinstance(value, list | dict):
            yield f"{shown} as a name", {**good, value: good[WIDE]}
    for location in ("cuda", "cuda:0", "meta", "mps", "cpu:99", "../x", "hpu", "x" * 10_000):
        yield f"location {location[:40]}", {**good, WIDE: rebuilt(replace(wide, location=location), 0, (2, 4), (4, 1))}
    for kind in ("Double Int Long Short Char Byte Bool ComplexFloat ComplexDouble QInt8 QUInt8 QInt32 QUInt4x2 Untyped "
                 "Half Float").split():  # fmt: skip
        storage_kind = getattr(torch, f"{kind}Storage")
        for numel in (1, 2, 4, 8, 16, 10**15):
            storage = Storage(storage_kind, "1", numel)
            yield f"{kind} of {numel}", {**good, WIDE: rebuilt(storage, 0, (numel,), (1,))}
    for key in ("0", "2", "3", "9", "../data.pkl", "../byteorder", "/etc/passwd", "0\0", "x" * 1000):
        yield f"record {key[:20]!r}", {**good, WIDE: rebuilt(replace(wide, key=key), 0, (2, 4), (4, 1))}
    for shape, strides, offset in (
        ((2, 4), (1, 2), 0), ((4, 2), (1, 4), 0), ((2, 2), (4, 1), 0), ((2, 4), (3, 1), 0), ((2, 4), (0, 1), 0), ((8,), (1,), 1),
        ((7,), (1,), 1), ((4,), (2,), 0), ((2, 4), (-4, 1), 4), ((8,), (-1,), 7), ((0,), (1,), 0), ((0,), (1,), 2**40), ((0, 2**62), (1, 1), 0),
        ((2**20, 2**20), (0, 0), 0), ((1,) * 60, (1,) * 60, 0), ((1,) * 70, (1,) * 70, 0), ((1,) * 5000, (0,) * 5000, 0),
        ((2, 2, 2), (2, 1, 4), 0), ((2, 2, 2), (1, 4, 2), 0), ((1, 8), (2**62, 1), 0), ((8, 1), (1, 2**40), 0), ((2, 4), (4,), 0),
        ((2,), (4, 1), 0), ((), (), 0), ((), (), 7), ((), (), 8), ((3, 3), (2, 1), 0), ((2, 3), (1, 1), 0), ((2, 1, 4), (4, 99, 1), 0),
        ((2**31, 2**31, 2**31), (0, 0, 0), 0), ((4, 0), (2**61, 1), 0), ((2, 3), (2, 2), 0), ((2, 2), (2, 2), 0), ((3, 2), (1, 2), 1),
    ):  # fmt: skip
        label = f"shape {str(shape)[:40]} strides {str(strides)[:40]} offset {offset}"
        yield label, {**good, WIDE: rebuilt(wide, offset, shape, strides)}
        yield f"{label}, alone", {"new.weight": rebuilt(wide, offset, shape, strides)}
    yield "one storage as two types", {**good, EMBEDDING: good[EMBEDDING], NORM: rebuilt(Storage(torch.HalfStorage, "0", 12), 0, (3,), (1,))}
    yield "two names of one tensor", {**good, "again.weight": good[WIDE]}
    yield "half of a storage each", {**good, "half.weight": rebuilt(wide, 4, (2, 2), (2, 1))}
    yield "nested", {"state_dict": good}
    yield "nested, with a number", {"model": good, "epoch": 1}
    yield "a list", list(good.values())
    yield "OrderedDict", collections.OrderedDict(good)
    yield "Counter", collections.Counter({"a": 1})
    yield "call of a call", {**good, WIDE: Call(torch._utils._rebuild_parameter, (good[WIDE], False, collections.OrderedDict()))}
    yield "parameter of nothing", {**good, WIDE: Call(torch._utils._rebuild_parameter, (None, False, collections.OrderedDict()))}
    rebuild = torch._utils
    layout = Call(torch.serialization._get_layout, ("torch.sparse_coo",))
    big = (10**6, 10**6)
    ones = good["s"]
    for label, call in (
        ("bytes", Call(bytearray, (2**31,))),
        ("many bytes", Call(bytearray, (2**40,))),
        ("tensor", Call(torch.Tensor, (2**28,))),
        ("many tensors", Call(torch.Tensor, (2**40,))),
        ("float tensor", Call(torch.FloatTensor, (2**28,))),
        ("storage", Call(torch.UntypedStorage, (2**31,))),
        ("size", Call(torch.Size, ((2**40, 2**40),))),
        ("device", Call(torch.device, ("cuda",))),
        ("set", Call(set, ([1, 2],))),
        ("complex", Call(complex, (1, 2))),
        ("code", Call(torch._utils._rebuild_tensor_v2, ())),
        ("meta", Call(rebuild._rebuild_meta_tensor_no_storage, (torch.float32, (2, 4), (4, 1), False))),
        ("large meta", Call(rebuild._rebuild_meta_tensor_no_storage, (torch.float32, (2**40,), (1,), False))),
        ("sparse", Call(rebuild._rebuild_sparse_tensor, (layout, (good[EMBEDDING], ones, big, True)))),
        ("quantised", Call(rebuild._rebuild_qtensor, (Storage(torch.QInt8Storage, "1", 16), 0, (16,), (1,),
                                                      (torch.per_tensor_affine, 0.1, 0), False, collections.OrderedDict()))),
        ("nested tensor", Call(rebuild._rebuild_nested_tensor, (good[WIDE], ones, ones, ones))),
        ("wrapper", Call(rebuild._rebuild_wrapper_subclass, (torch.Tensor, torch.float32, (2, 4), (4, 1), 0, torch.strided,
                                                             torch.device("cpu"), False))),
        ("typed", Call(torch._tensor._rebuild_from_type_v2, (rebuild._rebuild_tensor_v2, torch.Tensor,
                                                             good[WIDE].arguments, {"a": 1}))),
        ("parameter type", Call(torch._tensor._rebuild_from_type_v2, (rebuild._rebuild_tensor_v2, torch.nn.Parameter,
                                                             good[WIDE].arguments, {"data": 1}))),
        ("from numpy", Call(rebuild._rebuild_device_tensor_from_numpy, (b"", torch.float32, "cpu", False))),
        ("view of a view", Call(rebuild._rebuild_tensor_v3, (wide, 0, (2, 4), (4, 1), False, collections.OrderedDict(), torch.float32))),
    ):  # fmt: skip
        yield f"call of {label}", {**good, WIDE: call}
        yield f"call of {label}, alone", call


def _raw_pickles() -> Iterator[tuple[str, bytes]]:
    """Opcodes that a pickler would not write."""
    dict_, end = b"\x80\x02}", b"."
    key = b"X\x01\0\0\0a"
    for length in (2**31, 2**32 - 1):
        yield f"a string of {length} bytes", dict_ + b"X" + struct.pack("<I", length) + b"a" + end
        yield f"bytes, {length} of them", b"\x80\x03B" + struct.pack("<I", length) + b"a" + end
        yield f"a memo's place {length - 1}", dict_ + b"r" + struct.pack("<I", length - 1) + end
        yield f"an integer of {length} bytes", b"\x80\x02\x8b" + struct.pack("<I", length) + b"a" + end
    for length in (2**31, 2**40, 2**63, 2**64 - 1):
        yield f"a long string of {length} bytes", b"\x80\x04\x8d" + struct.pack("<Q", length) + b"a" + end
        yield f"long bytes, {length} of them", b"\x80\x04\x8e" + struct.pack("<Q", length) + b"a" + end
        yield f"a byte array of {length}", b"\x80\x05\x96" + struct.pack("<Q", length) + b"a" + end
        yield f"a frame of {length}", b"\x80\x04\x95" + struct.pack("<Q", length) + b"}" + end
    # Hashing these in C takes a stack without end.
    yield "tuples in a key, very deep", dict_ + b")" + b"\x85" * 200_000 + b"Ns" + end
    for depth in (100, 2_000, 20_000):
        yield f"{depth} lists in lists", b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + end
        yield f"{depth} tuples in tuples", b"\x80\x02)" + b"\x85" * depth + end
        yield f"{depth} tuples in a key", dict_ + b")" + b"\x85" * depth + b"Ns" + end
        yield f"{depth} marks", b"\x80\x02" + b"(" * depth + end
        yield f"{depth} tuples as a tensor", dict_ + key + b")" + b"\x85" * depth + b"s" + end
        yield f"{depth} dicts in dicts", b"\x80\x02" + (b"}" + key) * depth + b"}" + b"s" * depth + end
    yield "a list that holds itself", b"\x80\x02]q\0h\0a" + end
    yield "a dict that holds itself", b"\x80\x02}q\0" + key + b"h\0s" + end
    yield "doubled tuples", b"\x80\x02)" + b"q\0h\0\x86" * 100 + end
    yield "doubled tuples in a key", dict_ + b")" + b"q\0h\0\x86" * 60 + b"Ns" + end
    yield "doubled lists", b"\x80\x02]" + b"q\0]h\0ah\0a" * 100 + end
    yield "doubled tuples as a tensor", dict_ + key + b")" + b"q\0h\0\x86" * 60 + b"s" + end
    yield "many dicts", b"\x80\x02" + b"}" * 2**18 + end
    yield "many sets", b"\x80\x04" + b"\x8f" * 2**18 + end
    yield "many places in the memo", b"\x80\x02}" + b"".join(b"r" + struct.pack("<I", i) for i in range(2**15)) + end
    yield "no stop", dict_
    yield "stop alone", end
    yield "nothing", b""
    yield "unknown opcode", b"\x80\x02\xff."
    yield "pop of nothing", b"\x80\x020."
    for protocol in range(10):
        yield f"protocol {protocol}", b"\x80" + bytes([protocol]) + b"}" + end
    yield "persistent number", b"\x80\x02K\x07Q" + end
    yield "persistent text", b"P0\n" + end
    yield "persistent module", b"\x80\x02(X\x06\0\0\0moduleX\x01\0\0\0aX\x01\0\0\0bX\x01\0\0\0ctQ" + end
    yield "extension", b"\x80\x02\x82\x01" + end


def _kinds_of_tensors() -> Iterator[tuple[str, dict[str, Any]]]:
    plain = TENSORS[WIDE].float()
    yield "sparse", {**TENSORS, WIDE: plain.to_sparse()}
    yield "parameter", {**TENSORS, WIDE: torch.nn.Parameter(plain)}
    yield "meta", {**TENSORS, WIDE: plain.to("meta")}
    yield "complex", {**TENSORS, WIDE: plain.to(torch.complex64)}
    yield "conjugate", {**TENSORS, WIDE: plain.to(torch.complex64).conj()}
    yield "negated", {**TENSORS, WIDE: torch._neg_view(plain)}
    yield "expanded", {**TENSORS, WIDE: torch.ones(1).expand(2, 4)}
    yield "expanded far", {**TENSORS, WIDE: torch.ones(1).expand(2**20, 2**20)}
    yield "slice", {**TENSORS, WIDE: torch.arange(16.0).reshape(4, 4)[:2]}
    yield "columns", {**TENSORS, WIDE: torch.arange(16.0).reshape(2, 8)[:, :4]}
    yield "transposed", {**TENSORS, WIDE: torch.arange(8.0).reshape(4, 2).T}
    yield "float8", {**TENSORS, WIDE: plain.to(torch.float8_e4m3fn)}
    yield "int8", {**TENSORS, WIDE: plain.to(torch.int8)}
    yield "mask", {**TENSORS, "mask": torch.ones(2, 4, dtype=torch.bool)}
    yield "empty", {**TENSORS, WIDE: torch.zeros(0, 4)}
    yield "channels last", {**TENSORS, WIDE: torch.arange(16.0).reshape(1, 2, 2, 4).to(memory_format=torch.channels_last)}
    yield "nothing", {}
    yield "number", {**TENSORS, "step": 3}
    yield "storage", {**TENSORS, WIDE: torch.ones(3).untyped_storage()}
    yield "attribute", {**TENSORS, WIDE: _with_attribute(plain)}
    yield "not numbers", {**TENSORS, WIDE: torch.tensor([1.0, float("nan"), float("inf"), 0, 0, 0, 0, 0]).reshape(2, 4)}


def _with_attribute(tensor: torch.Tensor) -> torch.Tensor:
    marked = tensor.clone()
    marked.mark = "x"  # type: ignore[attr-defined]
    return marked


def legacy_faults() -> Iterator[Fault]:
    whole = legacy_bytes(LEGACY_PICKLE)
    for label, content in itertools.chain(damaged(whole, 25, 10), _legacy()):
        yield f"old form: {label}", {TORCH: content}


def _legacy() -> Iterator[tuple[str, bytes]]:
    for value in (*NUMBERS[:10], -(2**63)):
        yield f"first of {value}", legacy_bytes(LEGACY_PICKLE, sizes=[value, 8, 3, 1])
        yield f"last of {value}", legacy_bytes(LEGACY_PICKLE, sizes=[6, 8, 3, value])
    for value in (*FEW, ["0"], ["0"] * 4, ["3", "2", "1", "0"], ["0", "1", "2", "3", "9"], ["../x"]):
        other = pickle.dumps(value, 2)
        yield f"keys {str(value)[:40]}", legacy_bytes(LEGACY_PICKLE, keys=other)
        yield f"protocol {str(value)[:40]}", legacy_bytes(LEGACY_PICKLE, protocol=other)
        yield f"system {str(value)[:40]}", legacy_bytes(LEGACY_PICKLE, system=other)
    good = described()
    for view in ((), ("v", 0, 8), ("v", 4, 4), ("v", 0, 2**40), ("v", -1, 8), ("v", 2**62, 8), (None, None, None), ("0", 0, 8)):
        persistent = ("storage", torch.BFloat16Storage, "1", "cpu", 8, view)
        yield f"view {view}", legacy_bytes(_persistent({**good, WIDE: None}, persistent))


def _persistent(value: dict[str, Any], identity: tuple[Any, ...]) -> bytes:
    """A pickle whose second tensor's storage has any persistent id."""
    mark = Storage(torch.BFloat16Storage, "1", 8)

    class Pickler(pickle.Pickler):
        def persistent_id(self, each: object) -> Any:
            if each is mark:
                return identity
            return ("storage", each.kind, each.key, "cpu", each.numel, None) if isinstance(each, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({**value, WIDE: rebuilt(mark, 0, (2, 4), (4, 1))})
    return buffer.getvalue()


MAKE = f"open({WITNESS!r}, 'w').close()"
CALLS: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("os", "system", (f"touch {WITNESS}",)),
    ("posix", "system", (f"touch {WITNESS}",)),
    ("os", "mkdir", (WITNESS,)),
    ("os", "popen", (f"touch {WITNESS}",)),
    ("subprocess", "Popen", (["touch", WITNESS],)),
    ("subprocess", "check_output", (["touch", WITNESS],)),
    ("builtins", "exec", (MAKE,)),
    ("builtins", "eval", (MAKE,)),
    ("__builtin__", "eval", (MAKE,)),
    ("builtins", "open", (WITNESS, "w")),
    ("io", "open", (WITNESS, "w")),
    ("builtins", "__import__", ("antigravity",)),
    ("importlib", "import_module", ("antigravity",)),
    ("runpy", "_run_code", (MAKE, {})),
    ("code", "interact", ()),
    ("timeit", "timeit", (MAKE,)),
    ("pty", "spawn", (["touch", WITNESS],)),
    ("shutil", "copyfile", ("/etc/hostname", WITNESS)),
    ("pathlib", "Path.touch", (WITNESS,)),
    ("torch", "load", (WITNESS,)),
    ("torch", "save", (1, WITNESS)),
    ("torch.serialization", "load", (WITNESS,)),
    ("torch.storage", "_load_from_bytes", (pickle.dumps(1),)),
    ("torch.hub", "load", ("a/b", "c")),
    ("torch.jit", "load", (WITNESS,)),
    ("torch._utils", "_rebuild_tensor_v2.__globals__", ()),
    ("torch", "UntypedStorage.from_file", (WITNESS, True, 64)),
    ("torch.storage", "UntypedStorage.from_file", (WITNESS, True, 64)),
    ("torch._dynamo", "reset", ()),
    ("numpy", "save", (WITNESS, 1)),
    ("numpy", "load", (WITNESS,)),
    ("pickle", "loads", (b"cos\nsystem\n(S'touch witness'\ntR.",)),
    ("functools", "partial", ("x",)),
    ("operator", "attrgetter", ("x",)),
    ("builtins", "getattr", ("x", "y")),
    ("socket", "create_connection", (("127.0.0.1", 9),)),
    ("urllib.request", "urlopen", ("http://127.0.0.1:9/",)),
    ("ctypes", "CDLL", ("libc.so.6",)),
    ("delta_analysis.paths", "find_root", ()),
)


def hostile_pickles() -> Iterator[Fault]:
    """Pickles that call what they must not, bare, in a zip, and in each part of the old form."""
    for (module, name, arguments), protocol in itertools.product(CALLS, (0, 2, 4)):
        evil = hostile(module, name, arguments, protocol)
        label = f"{module}.{name} by protocol {protocol}"
        in_dict = hostile(module, name, arguments, protocol, inside=True)
        yield f"bare {label}", {TORCH: evil}
        yield f"in a zip {label}", {TORCH: zip_bytes(records(in_dict))}
        if protocol == 2 and name in ("system", "eval", "_load_from_bytes"):
            yield f"alone in a zip {label}", {TORCH: zip_bytes(records(evil))}
            yield f"in another record {label}", {TORCH: zip_bytes([*records(PICKLE), Record("archive/constants.pkl", evil)])}
            yield f"as the key of a storage {label}", {TORCH: zip_bytes(records(PICKLE.replace(b"X\x01\0\0\x001", evil[2:-1])))}
            parts: dict[str, Callable[[], bytes]] = {
                "magic": lambda evil=evil: legacy_bytes(LEGACY_PICKLE, magic=evil),
                "protocol": lambda evil=evil: legacy_bytes(LEGACY_PICKLE, protocol=evil),
                "system": lambda evil=evil: legacy_bytes(LEGACY_PICKLE, system=evil),
                "tensors": lambda in_dict=in_dict: legacy_bytes(in_dict),
                "keys": lambda evil=evil: legacy_bytes(LEGACY_PICKLE, keys=evil),
            }  # type: ignore[misc]
            for part, make in parts.items():
                yield f"as {part} of the old form {label}", {TORCH: make()}


def hostile(module: str, name: str, arguments: tuple[Any, ...], protocol: int, *, inside: bool = False) -> bytes:
    """A pickle that calls a function, alone or as a tensor in a dict."""
    start = b"" if protocol < 2 else b"\x80" + bytes([protocol])
    given = pickle.dumps(arguments, protocol)
    given = given[:-1] if protocol < 2 else given[(2 if protocol < 4 else 11) : -1]
    if protocol < 4:
        function = f"c{module}\n{name}\n".encode()
    else:
        function = b"".join(b"\x8c" + bytes([len(each)]) + each.encode() for each in (module, name)) + b"\x93"
    call = function + given + b"R"
    return start + (b"}" + b"X\x08\0\0\0a.weight" + call + b"s" if inside else call) + b"."
