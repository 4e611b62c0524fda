"""Damaged and hostile zip archives of torch."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace

from tests.checkpoints.faults.good import TENSORS, TORCH, Fault, damaged, torch_bytes
from tests.checkpoints.faults.torch_files import (
    DEFLATED,
    PICKLE,
    STORED,
    Record,
    bomb,
    deflated,
    end_of_zip,
    records,
    zip_bytes,
)


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
            "", "../x", "/etc/passwd", name.upper(), "other/" + name.split("/", 1)[1], name + "\0",
            "archive/data.pkl", "archive/constants.pkl", "archive/.storage_alignment", "archive/data/../data/0", "é",
            "x" * 60_000,
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
        for size in (0, len(record.content) - 1, len(record.content) + 1, 2**28, 2**32 - 1):
            yield f"{name} of size {size}", but(replace(record, size=size))
            yield f"{name} of both sizes {size}", but(replace(record, size=size, packed_size=size))
            yield f"{name} of size {size} in the directory", but(replace(record, central_size=size))
        for offset in (0, 50, 2**20, 2**32 - 1):
            yield f"{name} at {offset}", but(replace(record, offset=offset))
        # Zip64 fields for sizes and place.
        for size in (0, len(record.content), 2**40, 2**63, 2**64 - 1):
            extra = struct.pack("<HHQQQ", 1, 24, size, size, 0)
            yield (
                f"{name} of zip64 size {size}",
                but(replace(record, extra=extra, size=2**32 - 1, packed_size=2**32 - 1)),
            )
    for value in (b"big", b"", b"little ", b"Little", b"\xff", b"little" * 100):
        yield (
            f"byteorder {value[:10]!r}",
            zip_bytes([replace(each, content=value) if each.name.endswith("byteorder") else each for each in whole]),
        )
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
    yield (
        "records overlap",
        zip_bytes([replace(each, offset=0) if each.name.endswith("data/1") else each for each in aliased]),
    )


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
    yield (
        "two directories, offset to the first",
        whole_body + padded + _moved(directory, -len(padded)) + end_of_zip(len(whole), size, offset),
    )
    yield (
        "two directories, the bad one last",
        body + bad_body + directory + shifted + end_of_zip(len(whole), len(shifted), len(whole_body)),
    )

    # Two zip64 ends: one right before the locator, one where the locator points.
    def end64(directory_size: int, at: int) -> bytes:
        return struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, len(whole), len(whole), directory_size, at)

    first = len(whole_body) + len(shifted)
    far = end64(len(shifted), len(whole_body))
    near_at = first + len(far)
    near = end64(len(directory), near_at)
    yield (
        "two zip64 ends",
        (
            whole_body
            + shifted
            + far
            + directory
            + near
            + struct.pack("<4sIQI", b"PK\6\7", 0, first, 1)
            + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0)
        ),
    )


def _moved(directory: bytes, by: int) -> bytes:
    """A directory whose records lie elsewhere."""
    moved, at = bytearray(directory), 0
    while at < len(moved):
        name_length, extra, comment = struct.unpack_from("<3H", moved, at + 28)
        (offset,) = struct.unpack_from("<I", moved, at + 42)
        struct.pack_into("<I", moved, at + 42, (offset + by) % 2**32)
        at += 46 + name_length + extra + comment
    return bytes(moved)
