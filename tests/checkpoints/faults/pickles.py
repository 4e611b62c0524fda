"""Damaged and hostile pickles: in a zip archive, in the form that torch had before, and bare."""

from __future__ import annotations

import collections
import io
import itertools
import pickle
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from tests.checkpoints.faults.good import (
    EMBEDDING,
    FEW,
    NORM,
    NUMBERS,
    TENSORS,
    TORCH,
    WIDE,
    Fault,
    damaged,
    torch_bytes,
)
from tests.checkpoints.faults.torch_files import (
    LEGACY_PICKLE,
    PICKLE,
    Call,
    Record,
    Storage,
    described,
    legacy_bytes,
    pickled,
    rebuilt,
    records,
    zip_bytes,
)

WITNESS = "witness"
"""Hostile code would make a file of this name in the working directory."""


def pickle_faults() -> Iterator[Fault]:
    """What a pickle says about its tensors is wrong; in a zip and in the old form."""
    for number, (label, value) in enumerate(_values()):
        yield f"pickle in zip: {label}", {TORCH: zip_bytes(records(pickled(value)))}
        if number % 3 == 0:
            yield f"pickle in old form: {label}", {TORCH: legacy_bytes(pickled(value, legacy=True))}
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
    for kind in (
        "Double Int Long Short Char Byte Bool ComplexFloat ComplexDouble QInt8 QUInt8 QInt32 QUInt4x2 Untyped "
        "Half Float"
    ).split():
        storage_kind = getattr(torch, f"{kind}Storage")
        for numel in (1, 2, 4, 8, 16, 10**15):
            storage = Storage(storage_kind, "1", numel)
            yield f"{kind} of {numel}", {**good, WIDE: rebuilt(storage, 0, (numel,), (1,))}
    for key in ("0", "2", "3", "9", "../data.pkl", "../byteorder", "/etc/passwd", "0\0", "x" * 1000):
        yield f"record {key[:20]!r}", {**good, WIDE: rebuilt(replace(wide, key=key), 0, (2, 4), (4, 1))}
    for shape, strides, offset in (
        ((2, 4), (1, 2), 0), ((4, 2), (1, 4), 0), ((2, 2), (4, 1), 0), ((2, 4), (3, 1), 0), ((2, 4), (0, 1), 0),
        ((8,), (1,), 1), ((7,), (1,), 1), ((4,), (2,), 0), ((2, 4), (-4, 1), 4), ((8,), (-1,), 7), ((0,), (1,), 0),
        ((0,), (1,), 2**40), ((0, 2**62), (1, 1), 0), ((2**20, 2**20), (0, 0), 0), ((1,) * 60, (1,) * 60, 0),
        ((1,) * 70, (1,) * 70, 0), ((1,) * 5000, (0,) * 5000, 0), ((2, 2, 2), (2, 1, 4), 0),
        ((2, 2, 2), (1, 4, 2), 0), ((1, 8), (2**62, 1), 0), ((8, 1), (1, 2**40), 0), ((2, 4), (4,), 0),
        ((2,), (4, 1), 0), ((), (), 0), ((), (), 7), ((), (), 8), ((3, 3), (2, 1), 0), ((2, 3), (1, 1), 0),
        ((2, 1, 4), (4, 99, 1), 0), ((2**31, 2**31, 2**31), (0, 0, 0), 0), ((4, 0), (2**61, 1), 0),
        ((2, 3), (2, 2), 0), ((2, 2), (2, 2), 0), ((3, 2), (1, 2), 1),
    ):  # fmt: skip
        label = f"shape {str(shape)[:40]} strides {str(strides)[:40]} offset {offset}"
        yield label, {**good, WIDE: rebuilt(wide, offset, shape, strides)}
        yield f"{label}, alone", {"new.weight": rebuilt(wide, offset, shape, strides)}
    yield (
        "one storage as two types",
        {**good, EMBEDDING: good[EMBEDDING], NORM: rebuilt(Storage(torch.HalfStorage, "0", 12), 0, (3,), (1,))},
    )
    yield "two names of one tensor", {**good, "again.weight": good[WIDE]}
    yield "half of a storage each", {**good, "half.weight": rebuilt(wide, 4, (2, 2), (2, 1))}
    yield "nested", {"state_dict": good}
    yield "nested, with a number", {"model": good, "epoch": 1}
    yield "a list", list(good.values())
    yield "OrderedDict", collections.OrderedDict(good)
    yield "Counter", collections.Counter({"a": 1})
    yield (
        "call of a call",
        {**good, WIDE: Call(torch._utils._rebuild_parameter, (good[WIDE], False, collections.OrderedDict()))},
    )
    yield (
        "parameter of nothing",
        {**good, WIDE: Call(torch._utils._rebuild_parameter, (None, False, collections.OrderedDict()))},
    )
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
        (
            "quantised",
            Call(
                rebuild._rebuild_qtensor,
                (
                    Storage(torch.QInt8Storage, "1", 16),
                    0,
                    (16,),
                    (1,),
                    (torch.per_tensor_affine, 0.1, 0),
                    False,
                    collections.OrderedDict(),
                ),
            ),
        ),
        ("nested tensor", Call(rebuild._rebuild_nested_tensor, (good[WIDE], ones, ones, ones))),
        (
            "wrapper",
            Call(
                rebuild._rebuild_wrapper_subclass,
                (torch.Tensor, torch.float32, (2, 4), (4, 1), 0, torch.strided, torch.device("cpu"), False),
            ),
        ),
        (
            "typed",
            Call(
                torch._tensor._rebuild_from_type_v2,
                (rebuild._rebuild_tensor_v2, torch.Tensor, good[WIDE].arguments, {"a": 1}),
            ),
        ),
        (
            "parameter type",
            Call(
                torch._tensor._rebuild_from_type_v2,
                (rebuild._rebuild_tensor_v2, torch.nn.Parameter, good[WIDE].arguments, {"data": 1}),
            ),
        ),
        ("from numpy", Call(rebuild._rebuild_device_tensor_from_numpy, (b"", torch.float32, "cpu", False))),
        (
            "view of a view",
            Call(
                rebuild._rebuild_tensor_v3, (wide, 0, (2, 4), (4, 1), False, collections.OrderedDict(), torch.float32)
            ),
        ),
    ):
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
    yield (
        "channels last",
        {**TENSORS, WIDE: torch.arange(16.0).reshape(1, 2, 2, 4).to(memory_format=torch.channels_last)},
    )
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
    for view in (
        (),
        ("v", 0, 8),
        ("v", 4, 4),
        ("v", 0, 2**40),
        ("v", -1, 8),
        ("v", 2**62, 8),
        (None, None, None),
        ("0", 0, 8),
    ):
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
    ("delta_analysis.checkpoints.paths", "find_root", ()),
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
            yield (
                f"in another record {label}",
                {TORCH: zip_bytes([*records(PICKLE), Record("archive/constants.pkl", evil)])},
            )
            yield (
                f"as the key of a storage {label}",
                {TORCH: zip_bytes(records(PICKLE.replace(b"X\x01\0\0\x001", evil[2:-1])))},
            )
            parts: dict[str, Callable[[], bytes]] = {
                "magic": lambda evil=evil: legacy_bytes(LEGACY_PICKLE, magic=evil),
                "protocol": lambda evil=evil: legacy_bytes(LEGACY_PICKLE, protocol=evil),
                "system": lambda evil=evil: legacy_bytes(LEGACY_PICKLE, system=evil),
                "tensors": lambda in_dict=in_dict: legacy_bytes(in_dict),
                "keys": lambda evil=evil: legacy_bytes(LEGACY_PICKLE, keys=evil),
            }
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
