"""Damaged safetensors files, shards, indices and configurations."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save

from tests.checkpoints.faults.good import (
    CONFIG,
    EMBEDDING,
    FEW,
    INDEX,
    NORM,
    NUMBERS,
    SINGLE,
    TENSORS,
    TORCH_INDEX,
    WIDE,
    WRONG,
    Content,
    Fault,
    damaged,
    flipped,
    shards,
    torch_bytes,
)

DTYPES = "F64 F32 F16 BF16 F8_E4M3 F8_E5M2 F8_E8M0 F6_E2M3 F4 I64 U64 I32 U32 I16 U16 I8 U8 BOOL C64 f32".split()
NAMES = (
    "", ".", "..", "../../etc/passwd", "/etc/passwd", "a\nb", "a\0b", "\r", "é", "\U0001f600", "x" * 100_000,
    "..weight", "layers." + "9" * 25 + ".weight", "layers." + "9" * 5000 + ".weight", "layers.٣.weight",
    "layers.-1.weight", "%s{0}{name!r}", "__metadata__", "lm_head.weight", "cls.predictions.decoder.weight",
    "model." * 1000 + "weight", "attn.bias", "rotary_emb.inv_freq", f"base_model.model.{EMBEDDING}", "weight",
    ".weight", "\\", "a b", "\u202e", "a.lora_A.weight",
)  # fmt: skip
WHOLE = save(TENSORS)
LENGTH = int.from_bytes(WHOLE[:8], "little")
HEADER, DATA = WHOLE[8 : 8 + LENGTH], WHOLE[8 + LENGTH :]
MANY = b"[" * 100_000


def around(header: bytes | dict[str, Any], data: bytes = DATA) -> bytes:
    """A safetensors file."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def safetensors_faults() -> Iterator[Fault]:
    for label, content in _safetensors():
        yield f"safetensors: {label}", {SINGLE: content}


def _safetensors() -> Iterator[tuple[str, Content]]:
    yield from flipped(WHOLE, 8 + LENGTH, 1, stop=8 + LENGTH)
    yield from damaged(WHOLE, 30, 2)
    for label, data in flipped(DATA, len(DATA), 3):
        yield f"data {label}", around(HEADER, data)
    for length in (*NUMBERS[1:-3], LENGTH - 1, LENGTH + 1, LENGTH + 8, len(WHOLE), len(WHOLE) - 8, 2**64 - 1, 10**8):
        yield f"header length {length}", length.to_bytes(8, "little") + WHOLE[8:]
    header = json.loads(HEADER)
    for name in (NORM,):
        for key, old in header[name].items():
            at_places = [old] if isinstance(old, str) else [old, *({"in": i} for i in range(len(old)))]
            for place in at_places:
                for value in WRONG:
                    new = value
                    if isinstance(place, dict):
                        new = [value if i == place["in"] else each for i, each in enumerate(old)]
                    about = {**header[name], key: new}
                    yield f"{name}: {key} is {str(new)[:60]}", around({**header, name: about})
            yield f"{name}: no {key}", around({**header, name: {k: v for k, v in header[name].items() if k != key}})
        for value in WRONG:
            yield f"{name} is {str(value)[:60]}", around({**header, name: value})
            yield f"{name} has {str(value)[:60]} more", around({**header, name: {**header[name], "more": value}})
        first, last = header[name]["data_offsets"]
        for offsets in ((last, first), (first, last, last), (first,), (first + 1, last + 1), (first - 1, last - 1)):
            about = {**header[name], "data_offsets": offsets}
            yield f"{name}: offsets {offsets}", around({**header, name: about})
    for value in WRONG:
        yield f"metadata is {str(value)[:60]}", around({**header, "__metadata__": value})
        yield f"header is {str(value)[:60]}", around(json.dumps(value).encode())
    for name, dtype in ((name, dtype) for name in (EMBEDDING, WIDE, NORM) for dtype in DTYPES):
        yield f"{name}: dtype {dtype}", around({**header, name: {**header[name], "dtype": dtype}})
    for dtype in DTYPES:
        yield f"as bytes: dtype {dtype}", around({"a.weight": about_bytes(dtype, [48])}, bytes(range(48)))
        yield f"as bits: dtype {dtype}", around({NORM: about_bytes(dtype, [3], 6)}, bytes(range(6)))
        yield f"nothing: dtype {dtype}", around({NORM: about_bytes(dtype, [0], 0)}, b"")
    for name in NAMES:
        renamed = {name if each == NORM else each: about for each, about in header.items()}
        yield f"tensor named {name[:60]!r}", around(renamed)
        yield f"only {name[:60]!r}", around({name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8))
        yield f"large {name[:60]!r}", save({**TENSORS, name: TENSORS[EMBEDDING].clone()})
    for shape in (
        [2**63, 0], [0, 2**63], [2**62, 4, 0], [0, 2**62, 4], [0] * 100, [1] * 60, [1] * 70, [2**64 - 1, 0],
        [0] * 5000, [2**31, 2**31, 0], [1] * 2000,
    ):  # fmt: skip
        size = 0 if 0 in shape else 4
        for name in (NORM, "new.weight"):
            about = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
            yield f"{name}: shape {str(shape)[:60]}", around({name: about}, bytes(size))
            rest = {EMBEDDING: {"dtype": "F32", "shape": [3, 2], "data_offsets": [size, size + 24]}}
            yield f"{name}: shape {str(shape)[:60]} and another", around({name: about, **rest}, bytes(size + 24))
    yield from _raw_headers(header)


def about_bytes(dtype: str, shape: list[int], size: int = 48) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}


def _raw_headers(header: dict[str, Any]) -> Iterator[tuple[str, Content]]:
    one = b'{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
    other = b'{"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}'
    far = b'{"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}'
    for label, raw, size in (
        ("twice the same name", b'{"a": %b, "a": %b}' % (one, other), 8),
        ("twice the same name, other way", b'{"a": %b, "a": %b}' % (other, one), 8),
        ("twice the same name, other place", b'{"a": %b, "a": %b}' % (one, far), 16),
        ("twice the same name, one escaped", rb'{"a": %b, "\u0061": %b}' % (one, other), 8),
        ("twice a dtype", one.join((b'{"a": ', b"}")).replace(b'"F32"', b'"F32", "dtype": "F16"'), 8),
        ("twice a shape", one.join((b'{"a": ', b"}")).replace(b"[2]", b'[2], "shape": [1, 2]'), 8),
        ("overlap", b'{"a": %b, "b": %b}' % (one, other), 8),
        ("overlap in part", b'{"a": %b, "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}' % one, 12),
        ("gap", b'{"b": %b}' % far, 16),
        ("NaN", b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', 8),
        ("Infinity", b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, Infinity]}}', 8),
        ("exponent", b'{"a": {"dtype": "F32", "shape": [2e0], "data_offsets": [0, 8]}}', 8),
        ("minus zero", b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-0, 8]}}', 8),
        ("leading zero", b'{"a": {"dtype": "F32", "shape": [02], "data_offsets": [0, 8]}}', 8),
        ("many digits", b'{"a": {"dtype": "F32", "shape": [%b], "data_offsets": [0, 8]}}' % (b"9" * 10_000), 8),
        ("lone surrogate", rb'{"\ud800": %b}' % one, 8),
        ("surrogates", rb'{"\ud83d\ude00": %b}' % one, 8),
        ("not UTF-8", b'{"\xff\xfe": %b}' % one, 8),
        ("Latin-1", '{"é": '.encode("latin-1") + one + b"}", 8),
        ("raw newline in a name", b'{"a\n": %b}' % one, 8),
        ("BOM", b'\xef\xbb\xbf{"a": %b}' % one, 8),
        ("UTF-16", json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode("utf-16"), 8),
        ("deep list", MANY, 8),
        ("deep object", b'{"a":' * 100_000, 8),
        ("deep list in a shape", b'{"a": {"dtype": "F32", "shape": %b' % MANY, 8),
        ("closed deep list", b'{"a": %b%b}' % (MANY, b"]" * 100_000), 8),
        ("deep metadata", b'{"__metadata__": {"a": %b}, "a": %b}' % (MANY, one), 8),
        ("blanks", b'{"a": %b}' % one + b" " * 100_000, 8),
        ("blanks before", b" " * 8 + b'{"a": %b}' % one, 8),
        ("more after it", b'{"a": %b}}' % one, 8),
        ("two objects", b'{"a": %b}{"b": %b}' % (one, other), 8),
        ("comment", b'{"a": %b /* all */}' % one, 8),
        ("single quotes", b"{'a': %b}" % one, 8),
        ("comma", b'{"a": %b,}' % one, 8),
        ("zero byte", b'{"a": %b}\0' % one, 8),
        ("no object", b"", 8),
        ("many tensors", json.dumps({f"{i}.weight": about_bytes("F32", [0], 0) for i in range(300)}).encode(), 0),
    ):
        yield label, around(raw, bytes(range(size)))
    for order in ("reversed", "sorted"):
        items = sorted(header.items()) if order == "sorted" else list(reversed(header.items()))
        yield f"header {order}", around(dict(items))


def shard_faults() -> Iterator[Fault]:
    for suffix, scale in ((".safetensors", 6), (".bin", 6)):
        whole = shards(suffix)
        one, two, index = whole
        for shard in (one, two):
            content = whole[shard]
            assert isinstance(content, bytes)
            for label, changed in damaged(content, scale, len(shard)):
                yield f"shard {shard}: {label}", {**whole, shard: changed}
            for label, made in _places(content):
                yield f"shard {shard}: {label}", {**whole, shard: made}
            yield f"shard {shard}: removed", {name: each for name, each in whole.items() if name != shard}
            yield f"shard {shard}: alone", {shard: content}
        yield f"shards {suffix}: swapped", {**whole, one: whole[two], two: whole[one]}
        yield f"shards {suffix}: the same twice", {**whole, two: whole[one]}
        yield f"shards {suffix}: the same twice, no index", {one: whole[one], two: whole[one]}
        yield f"shards {suffix}: no index", {one: whole[one], two: whole[two]}
        yield f"shards {suffix}: index alone", {index: whole[index]}
        other = save(TENSORS) if suffix == ".bin" else torch_bytes(TENSORS)
        yield f"shards {suffix}: of the other form", {**whole, one: other}


def _places(content: bytes) -> Iterator[tuple[str, Content]]:
    """Things that stand where a file should."""
    yield "directory", Path.mkdir
    yield "pipe", os.mkfifo
    yield "link to itself", lambda file: file.symlink_to(file)
    yield "link to nothing", lambda file: file.symlink_to(file.parent / "nothing")
    yield "link to its directory", lambda file: file.symlink_to(file.parent)
    yield "link to an endless file", lambda file: file.symlink_to("/dev/zero")
    yield "link to an empty device", lambda file: file.symlink_to("/dev/null")
    yield "empty", b""
    yield "sparse", lambda file: _sparse(file, b"")
    yield "sparse after it", lambda file: _sparse(file, content)

    def linked(file: Path) -> None:
        kept = file.parent / "kept"
        kept.write_bytes(content)
        file.symlink_to(kept)

    yield "link to the content", linked


def _sparse(file: Path, content: bytes) -> None:
    """Half a gigabyte that takes no room on the disk."""
    file.write_bytes(content)
    os.truncate(file, 2**29)


def index_faults() -> Iterator[Fault]:
    for suffix in (".safetensors", ".bin"):
        whole = shards(suffix)
        one, two, index = whole
        text = whole[index]
        assert isinstance(text, bytes)
        for label, content in _index(json.loads(text), text, one, two, suffix):
            yield f"index of {suffix}: {label}", {**whole, index: content}
        for label, made in _places(text):
            yield f"index of {suffix}: {label}", {**whole, index: made}


def _index(good: dict[str, Any], text: bytes, one: str, two: str, suffix: str) -> Iterator[tuple[str, Content]]:
    yield from damaged(text, 8, 5)
    weight_map = good["weight_map"]
    for value in FEW:
        yield f"is {str(value)[:60]}", json.dumps(value).encode()
        yield f"weight_map is {str(value)[:60]}", json.dumps({"weight_map": value}).encode()
        yield f"shard is {str(value)[:60]}", json.dumps({"weight_map": {**weight_map, NORM: value}}).encode()
        yield f"metadata is {str(value)[:60]}", json.dumps({**good, "metadata": value}).encode()
    for shard in (
        ".", "..", "../" + one, "/etc/passwd", "/dev/zero", "./" + one, one + "/", one + "\0", "~/" + one,
        "x" * 5000, one.upper(), one + " ", "sub/" + one, "..\\" + one, "é.bin", "\ud800.bin", "config.json",
        f"*{suffix}", "nothing" + suffix, f"../{'../' * 20}etc/passwd", "file:///etc/passwd",
        "https://example.org/a" + suffix, "%2e%2e/" + one, index_of(suffix),
    ):  # fmt: skip
        yield f"shard {shard[:60]!r}", json.dumps({"weight_map": {**weight_map, NORM: shard}}).encode()
        yield f"all in {shard[:60]!r}", json.dumps({"weight_map": dict.fromkeys(weight_map, shard)}).encode()
    for name in NAMES[::3]:
        yield f"promises {name[:60]!r}", json.dumps({"weight_map": {**weight_map, name: one}}).encode()
    for name in weight_map:
        other = one if weight_map[name] == two else two
        yield f"{name} in the other", json.dumps({"weight_map": {**weight_map, name: other}}).encode()
        yield f"no {name}", json.dumps({"weight_map": {k: v for k, v in weight_map.items() if k != name}}).encode()
    yield "weight_map twice", b'{"weight_map": {}, %b' % text[1:]
    yield "deep", b'{"weight_map": %b' % MANY
    yield "deep, closed", b'{"metadata": %b%b, %b' % (MANY, b"]" * len(MANY), text[1:])
    yield "deep, in reach", b'{"metadata": %b%b, %b' % (b"[" * 900, b"]" * 900, text[1:])
    yield "UTF-16", text.decode().encode("utf-16")
    yield "BOM", b"\xef\xbb\xbf" + text
    yield "NaN", b'{"metadata": NaN, %b' % text[1:]
    yield "many digits", b'{"metadata": %b, %b' % (b"9" * 10_000, text[1:])


def index_of(suffix: str) -> str:
    return INDEX if suffix == ".safetensors" else TORCH_INDEX


def config_faults() -> Iterator[Fault]:
    text = b'{"model_type": "llama", "vocab_size": 3, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}'
    for label, content in _config(text):
        yield f"config: {label}", {SINGLE: WHOLE, CONFIG: content}
    for label, made in _places(text):
        yield f"config: {label}", {SINGLE: WHOLE, CONFIG: made}


def _config(text: bytes) -> Iterator[tuple[str, Content]]:
    yield from damaged(text, 12, 6)
    good = json.loads(text)
    keys = (
        "model_type",
        "vocab_size",
        "text_config",
        "tie_word_embeddings",
        "rope_scaling",
        "rope_parameters",
        "head_dim",
    )
    for key in (
        *keys, "rope_theta", "hidden_act", "num_attention_heads", "architectures", "auto_map", "dtype", "num_labels",
        "id2label", "num_hidden_layers", "transformers_version", "sliding_window", "to_dict",
    ):  # fmt: skip
        for value in (*FEW, {"rope_theta": []}, {"model_type": []}):
            yield f"{key} is {str(value)[:60]}", json.dumps({**good, key: value}).encode()
    for key in keys:
        yield f"{key} is deep", b'{"%b": %b1%b}' % (key.encode(), b'{"rope_type":' * 800, b"}" * 800)
        yield f"{key} is a deep list", b'{"%b": %b%b}' % (key.encode(), b"[" * 900, b"]" * 900)
        yield f"{key} is NaN", b'{"%b": NaN}' % key.encode()
    for kind in ("gpt2", "bert", "qwen2", "mixtral", "auto", "encoder-decoder", "../x", "gemma3"):
        yield f"model type {kind}", json.dumps({**good, "model_type": kind}).encode()
        yield f"model type {kind}, long", json.dumps({"model_type": kind, "num_hidden_layers": 10**8}).encode()
    yield "many labels", json.dumps({**good, "num_labels": 2**20}).encode()
    yield "deep", MANY
    yield "many digits", b'{"vocab_size": %b}' % (b"9" * 10_000)
