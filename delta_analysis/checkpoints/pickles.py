"""The pickle in a torch file, read as data: which names it holds and where each tensor lies.

A pickle is a program. This reads the few instructions that torch writes for named tensors and calls
nothing, so that there is nothing for a hostile one to run, to exhaust or to crash; torch's own
`weights_only` reader calls functions, and can be made to fill the memory or to end the process.
"""

from __future__ import annotations

import math
import pickletools
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch

STORAGES = {
    f"torch {kind}Storage": dtype
    for kind, dtype in {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool, "QInt8": torch.qint8, "QUInt8": torch.quint8, "QInt32": torch.qint32,
    }.items()
} | {"torch.storage UntypedStorage": torch.uint8}  # fmt: skip
DTYPES = {
    str(dtype).replace(".", " "): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and str(dtype).startswith(("torch.float8", "torch.uint"))
}
"""Those that have no storage of their own and stand beside an untyped one."""
REBUILD = {f"torch._utils _rebuild_{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3", "qtensor")}
PARAMETERS = {f"torch._utils _rebuild_parameter{rest}" for rest in ("", "_with_state")}
CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINSTRING"}
IGNORED = {"PROTO", "FRAME"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class Function:
    """What a pickle calls by name, and is not looked up."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A run of entries: the key of the record that holds them, and how many there are."""

    dtype: torch.dtype
    key: str
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class View:
    """A tensor: which entries of a storage it has, with its strides in entries."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether the entries lie row by row; a stride over one entry, or in a tensor without any, is never taken."""
        steps = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        taken = [(stride, step) for n, stride, step in zip(self.shape, self.strides, steps, strict=True) if n != 1]
        return 0 in self.shape or all(stride == step for stride, step in taken)


def read_pickle(stream: BytesIO) -> Any:
    """The next object in a stream of pickles, with a `View` for each tensor; an instruction not torch's is an error."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def popped(start: int) -> list[Any]:
        items = stack[start:]
        del stack[start:]
        return items

    argument: Any
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in LITERALS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(Function(argument))
        elif name == "STACK_GLOBAL":
            module, function = (_kind(each, str) for each in popped(len(stack) - 2))
            stack.append(Function(f"{module} {function}"))
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(popped(marks.pop())))
        elif name in TUPLES:
            stack.append(tuple(popped(len(stack) - TUPLES[name])))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name in ("APPEND", "APPENDS"):
            items = popped(marks.pop() if name == "APPENDS" else len(stack) - 1)
            _kind(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = popped(marks.pop() if name == "SETITEMS" else len(stack) - 2)
            # Hashing a key of any other kind can be made to end the process. Optimizers number their states.
            keys = [key if type(key) is int else _kind(key, str) for key in items[::2]]
            _kind(stack[-1], dict).update(zip(keys, items[1::2], strict=True))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_rebuilt(_kind(stack.pop(), Function).name, _kind(arguments, tuple)))
        elif name == "BUILD":
            # The state of an OrderedDict has the versions of modules; that of a tensor would change its place.
            stack.pop()
            _kind(stack[-1], dict)
        elif name == "STOP":
            return stack.pop()
        elif name not in IGNORED:
            raise ValueError(f"its pickle has the instruction {name}, which torch does not write for tensors")
    raise ValueError("its pickle has no end")


def _kind(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"its pickle has a {type(value).__name__} where torch writes a {kind.__name__}")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("its pickle has a number that is out of range")
    return value


def _storage(identity: Any) -> Storage:
    what, kind, key, _, numel, *view = _kind(identity, tuple)
    if what != "storage" or view not in ([], [None]):
        raise ValueError("its pickle refers to something else than a storage")
    name = _kind(kind, Function).name
    if name not in STORAGES:
        raise ValueError(f"its pickle has a storage of the unknown kind {name.replace(' ', '.')}")
    return Storage(STORAGES[name], _kind(key, str), _count(numel))


def _rebuilt(name: str, arguments: tuple[Any, ...]) -> Any:
    if name == "collections OrderedDict" and not arguments:
        return {}
    if name in PARAMETERS:
        return _kind(arguments[0], View)
    if name not in REBUILD:
        raise ValueError(f"its pickle calls {name.replace(' ', '.')}, which makes no plain tensor")
    storage, offset, shape, strides, *rest = arguments
    dtype = _kind(storage, Storage).dtype
    if name.endswith("v3"):
        kind = _kind(rest.pop(2), Function).name
        if kind not in DTYPES:
            raise ValueError(f"its pickle has a tensor of the unknown dtype {kind.replace(' ', '.')}")
        dtype = DTYPES[kind]
    if name.endswith(("v2", "v3")) and any(rest[2:]):
        raise ValueError("its pickle has a view that negates or conjugates what is stored")
    lengths, steps = (tuple(_count(each) for each in _kind(given, tuple)) for given in (shape, strides))
    if len(lengths) != len(steps):
        raise ValueError("its pickle has a tensor with more or fewer strides than dimensions")
    return View(storage, dtype, _count(offset), lengths, steps)
