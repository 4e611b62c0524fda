"""Open a checkpoint: read headers, check them, and hand out one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from delta_analysis._errors import CheckpointError
from delta_analysis.names import reading_order
from delta_analysis.paths import zoo_model

INDEX = "model.safetensors.index.json"
FLOAT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BUFFER_DTYPES = {"I64", "BOOL"}
FLOAT_BUFFERS = ("rotary_emb.inv_freq", "attn.masked_bias")


class Entry(NamedTuple):
    """Where a tensor lies and what its header says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, torch.Tensor]):
    """A lazy, read-only mapping from tensor name to tensor, in the stored dtype.

    Reading an item opens its file, reads that tensor alone and closes the file again, so the
    memory in use is one tensor. Iteration is by layer, then by name.

    Attributes
    ----------
    source : what was asked for: a path, or `zoo:small/base`.
    path : the directory or file that it is.
    entries : name -> file, shape and storage dtype, for every weight.
    skipped : name -> why a stored tensor is no weight of its own (an integer buffer, or an output
        head tied to the embeddings and equal to them).
    """

    source: str
    path: Path
    entries: dict[str, Entry] = field(repr=False)
    skipped: dict[str, str] = field(repr=False)

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self.entries[name]
        try:
            with safe_open(entry.file, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{entry.file}: tensor {name!r} cannot be read: {error}; "
                "the file has changed since it was opened, fetch it again"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's `config.json`, or an empty dict for a bare file."""
        return _read_config(self.path)

    def files(self) -> list[Path]:
        """The weight files, sorted."""
        return sorted({entry.file for entry in self.entries.values()})


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a checkpoint without loading any weight.

    Parameters
    ----------
    source : a directory with `model.safetensors` or with shards and their index, a single
        `.safetensors` file, or an embedded model such as `zoo:small/base`.

    Raises
    ------
    CheckpointError
        No weights, a damaged or missing file, a tensor that the index names and its shard lacks,
        or weights that are not floating point.

    Examples
    --------
    >>> base = open_checkpoint("zoo:small/base")
    >>> base["model.norm.weight"].shape
    torch.Size([128])
    """
    path = zoo_model(str(source)) if str(source).startswith("zoo:") else Path(source).expanduser()
    if not path.exists():
        raise CheckpointError(
            f"{source}: no such file or directory; expected a checkpoint directory, a .safetensors file, "
            "or an embedded model such as zoo:small/base"
        )
    found: dict[str, Entry] = {}
    for file, names in _weight_files(path).items():
        header = _read_header(file)
        missing = sorted(names - header.keys()) if names is not None else []
        if missing:
            raise CheckpointError(
                f"{file}: tensor {missing[0]!r} is named in {INDEX} but is not in the shard "
                f"({len(missing)} such); the shard and the index come from different saves, fetch both again"
            )
        for name in header:
            if name in found:
                raise CheckpointError(
                    f"{file}: tensor {name!r} also stands in {found[name].file.name}; "
                    f"remove one of the two files, or add {INDEX}"
                )
        found.update(header)
    skipped = {name: reason for name, entry in found.items() if (reason := _not_a_weight(name, entry))}
    entries = {name: found[name] for name in sorted(found, key=reading_order) if name not in skipped}
    if not entries:
        raise CheckpointError(f"{path}: holds no weights ({len(skipped)} buffers); nothing to compare")
    return _without_tied_head(Checkpoint(str(source), path, entries, skipped))


def _weight_files(path: Path) -> dict[Path, set[str] | None]:
    """The files to read, each with the names that the index promises in it (None: no index)."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path}: expected a .safetensors file; convert it with save_pretrained first")
        return {path: None}
    index = path / INDEX
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: has no 'weight_map'; fetch the index again")
        shards: dict[Path, set[str] | None] = {}
        for shard in weight_map.values():
            if not isinstance(shard, str) or shard in ("", ".."):
                raise CheckpointError(f"{index}: shard {shard!r} is not the name of a file; fetch the index again")
            if Path(shard).name != shard:
                raise CheckpointError(
                    f"{index}: shard {shard!r} lies outside the checkpoint's directory; fetch the index again"
                )
        for shard in sorted(set(weight_map.values())):
            file = path / shard
            if not file.exists():
                raise CheckpointError(f"{file}: named in {INDEX} but absent; fetch the missing shard")
            shards[file] = {name for name, where in weight_map.items() if where == shard}
        return shards
    single = path / "model.safetensors"
    files = [single] if single.exists() else sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{path}: no .safetensors weights here; expected model.safetensors, or shards with {INDEX}"
        )
    return dict.fromkeys(files)


def _read_header(file: Path) -> dict[str, Entry]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            return {name: Entry(file, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise CheckpointError(
            f"{file}: not a readable safetensors file ({error}); it has {size} bytes and may be truncated: "
            "fetch it again"
        ) from error


def _not_a_weight(name: str, entry: Entry) -> str | None:
    """Why the tensor is a buffer, None if it is a weight; integer weights are an error."""
    if name.endswith(FLOAT_BUFFERS) or (name.endswith("attn.bias") and len(entry.shape) == 4):
        return "buffer that the model computes, not a weight"
    if entry.dtype in FLOAT_DTYPES:
        return None
    if entry.dtype in BUFFER_DTYPES and not name.endswith("weight"):
        return f"{entry.dtype} buffer, not a weight"
    raise CheckpointError(
        f"{entry.file}: tensor {name!r} has dtype {entry.dtype}; expected floating point "
        f"({', '.join(FLOAT_DTYPES)}): dequantise the model to bfloat16 or float32 first"
    )


def _without_tied_head(checkpoint: Checkpoint) -> Checkpoint:
    """Set aside an output head that is stored beside the embeddings and equal to them."""
    head = "lm_head.weight"
    embeddings = [name for name in checkpoint if name.endswith(("embed_tokens.weight", "wte.weight"))]
    if not (checkpoint.config.get("tie_word_embeddings") and head in checkpoint and embeddings):
        return checkpoint
    # transformers keeps a stored head that differs from the embeddings, whatever the configuration says.
    if not torch.equal(checkpoint[head], checkpoint[embeddings[0]]):
        return checkpoint
    entries = {name: entry for name, entry in checkpoint.entries.items() if name != head}
    return replace(
        checkpoint, entries=entries, skipped={**checkpoint.skipped, head: f"tied to {embeddings[0]}, counted there"}
    )


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    return _read_json(file) if path.is_dir() and file.exists() else {}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content
