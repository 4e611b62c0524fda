"""Whole checkpoints of every form, and the ways to damage any bytes."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

Content = bytes | Callable[[Path], None]
"""What a file holds, or what makes it, such as a link."""
Fault = tuple[str, dict[str, Content]]
"""A label, and the files of a directory."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
CONFIG = "config.json"
EMBEDDING, WIDE, NORM = "model.embed_tokens.weight", "model.layers.0.up.weight", "model.layers.0.norm.weight"
HALVES = ([EMBEDDING, NORM], [WIDE, "s"])
NUMBERS = (-1, 0, 1, 2**20, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, 2**70, 10**400)
WRONG: tuple[Any, ...] = (
    *NUMBERS, -(2**63), 0.5, 1.0, 1e308, True, None, "", "0", "F32", "\0", [], {}, [[]], [None], ["0"], [0.0],
    {"a": 1},
)  # fmt: skip
"""Values for any place in a header or an index."""
FEW: tuple[Any, ...] = (-1, 0, 2**31, 2**40, 2**63, 10**400, 0.5, True, None, "", "0", [], {})
"""And for any place in a configuration or a pickle, which have more."""

BASE = {EMBEDDING: torch.full((3, 2), 0.5), WIDE: torch.full((2, 4), -0.25), NORM: torch.ones(3), "s": torch.ones(())}
_noise = torch.Generator().manual_seed(0)
TENSORS = {
    EMBEDDING: torch.randn(3, 2, generator=_noise),
    WIDE: torch.randn(2, 4, generator=_noise).to(torch.bfloat16),
    NORM: torch.randn(3, generator=_noise).to(torch.float16),
    "s": torch.tensor(7.0),
}


def good() -> Iterator[Fault]:
    """Checkpoints that have to be read."""
    yield "safetensors", {SINGLE: save(TENSORS), CONFIG: b'{"model_type": "llama", "vocab_size": 3}'}
    yield "safetensors in shards", shards()
    yield "torch", {TORCH: torch_bytes(TENSORS)}
    yield "torch in shards", shards(".bin")
    yield "torch, transposed", {TORCH: torch_bytes({**TENSORS, WIDE: TENSORS[WIDE].reshape(4, 2).T})}
    yield "torch, parameters", {TORCH: torch_bytes({k: torch.nn.Parameter(v) for k, v in TENSORS.items()})}
    yield "legacy torch", {TORCH: torch_bytes(TENSORS, legacy=True)}


def torch_bytes(tensors: dict[str, Any], *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def shards(suffix: str = ".safetensors") -> dict[str, Content]:
    """Two shards and their index."""
    stem, index = ("model", INDEX) if suffix == ".safetensors" else ("pytorch_model", TORCH_INDEX)
    files: dict[str, Content] = {}
    weight_map = {}
    for number, names in enumerate(HALVES, 1):
        tensors = {name: TENSORS[name] for name in names}
        file = f"{stem}-0000{number}-of-00002{suffix}"
        files[file] = save(tensors) if suffix == ".safetensors" else torch_bytes(tensors)
        weight_map.update(dict.fromkeys(names, file))
    files[index] = json.dumps({"metadata": {"total_size": 54}, "weight_map": weight_map}).encode()
    return files


def flipped(whole: bytes, count: int, seed: int, stop: int | None = None) -> Iterator[tuple[str, bytes]]:
    """One byte changed, at `count` places spread over the first `stop` bytes."""
    random_ = random.Random(seed)
    stop = len(whole) if stop is None else stop
    for i in range(count):
        at = i * stop // count
        changed = bytearray(whole)
        changed[at] ^= random_.choice((1, 2, 4, 8, 16, 32, 64, 128, random_.randrange(1, 256)))
        yield f"{len(whole)} bytes, byte {at} becomes {changed[at]} ({i})", bytes(changed)


def spliced(whole: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """A run of bytes removed, repeated, overwritten or put in somewhere."""
    random_ = random.Random(seed)
    for i in range(count):
        start, at = sorted(random_.sample(range(len(whole)), 2))
        stop = min(start + random_.choice((1, 2, 4, 8, 64)), len(whole))
        run = random_.choice((whole[start:stop], bytes(8), b"\xff" * 8, random_.randbytes(random_.randrange(1, 9))))
        change = ("removed", "repeated", "overwritten", "put in")[i % 4]
        yield (
            f"{len(whole)} bytes, splice {i}, bytes {start} to {stop} {change}",
            {
                "removed": whole[:start] + whole[stop:],
                "repeated": whole[:stop] + whole[start:],
                "overwritten": whole[:at] + run + whole[at + len(run) :],
                "put in": whole[:at] + run + whole[at:],
            }[change],
        )


def cut(whole: bytes, count: int) -> Iterator[tuple[str, bytes]]:
    """The file ends early, at `count` places, or late."""
    for size in sorted(
        {i * len(whole) // count for i in range(count)} | {1, 4, 7, 8, 9, len(whole) - 2, len(whole) - 1}
    ):
        yield f"cut to {size} bytes", whole[:size]
    for more in (b"\0", b"\n", b"}", bytes(8), bytes(4096), whole):
        yield f"{len(more)} bytes more", whole + more


def damaged(whole: bytes, scale: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """All of these, some six times `scale`."""
    yield from flipped(whole, 4 * scale, seed)
    yield from spliced(whole, scale, seed + 1)
    yield from cut(whole, scale)
