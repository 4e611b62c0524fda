"""The weight files of a checkpoint's directory, and its JSON files."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from delta_analysis._errors import CheckpointError
from delta_analysis.checkpoints.files import read_header
from delta_analysis.checkpoints.tensors import TensorReference

LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json", "*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model*.bin"),
)
"""Single file, index, and shards without an index."""
PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{1,9})-of-(?P<of>\d{1,9})\.(safetensors|bin)")
LONGEST_NAME = 255
"""Bytes of a shard's name; file systems take no more."""
LONGEST_PATH = 1000
LFS = b"version https://git-lfs"
MOST_JSON = 2**25
"""Bytes that are believed to be an honest index or configuration; the index of 10^5 tensors has some 2^23."""


def read_folder(path: Path) -> dict[str, TensorReference]:
    """The tensors of a checkpoint's directory, or of a single weight file, by name."""
    if not path.is_dir():
        return read_header(_regular(path))
    found: dict[str, TensorReference] = {}
    files = _weight_files(path)
    owner = {name: file for file, (promised, _) in files.items() for name in promised}
    for file, (promised, index) in files.items():
        header = read_header(_regular(file))
        missing = sorted(promised - header.keys())
        if missing:
            raise CheckpointError(
                f"{file}: tensor {missing[0]!r} is named in {index} but is not in the shard "
                f"({len(missing)} such); the shard and the index come from different saves, fetch both again"
            )
        # A tensor in two shards is that of the shard that the index names.
        header = {name: reference for name, reference in header.items() if owner.get(name, file) == file}
        twice = sorted(found.keys() & header.keys())
        if twice:
            raise CheckpointError(
                f"{file}: tensor {twice[0]!r} also stands in {found[twice[0]].files[0].name}; "
                "remove one of the two files, or add an index"
            )
        found.update(header)
    return found


def _regular(file: Path) -> Path:
    """A file that can be read twice from any place, unlike a pipe, which would wait for ever."""
    if file.is_file() and file.suffix in (".safetensors", ".bin"):
        with file.open("rb") as opened:
            if opened.read(len(LFS)) == LFS:
                raise CheckpointError(
                    f"{file}: a pointer of Git LFS, not the weights: run `git lfs pull` in its folder"
                )
        return file
    raise CheckpointError(f"{file}: expected a .safetensors or .bin file; convert it with save_pretrained first")


def _weight_files(path: Path) -> dict[Path, tuple[set[str], str]]:
    """The files to read, each with the names that an index promises in it and the index's own name."""
    # As transformers does: a single file goes before shards that an earlier save left behind.
    for single, index, _ in LAYOUTS:
        if (path / single).exists():
            return {path / single: (set(), "")}
        if (path / index).exists():
            promised = read_index(path / index)
            _check_complete(path / index, promised)
            if absent := [shard for shard in promised if not (path / shard).exists()]:
                raise CheckpointError(f"{path / absent[0]}: named in {index} but absent; fetch the missing shard")
            return {path / shard: (names, index) for shard, names in promised.items()}
    for _, _, pattern in LAYOUTS:
        files = sorted(path.glob(pattern))
        if files:
            _check_complete(path, [file.name for file in files])
            return {file: (set(), "") for file in files}
    held = Counter(file.suffix or file.name for file in path.iterdir()).most_common(8)
    raise CheckpointError(
        f"{path}: no weights here; expected model.safetensors or pytorch_model.bin, or shards of either with their "
        f"index ({LAYOUTS[0][1]} or {LAYOUTS[1][1]}), got {', '.join(f'{n} {kind}' for kind, n in held) or 'nothing'}"
    )


def _check_complete(where: Path, names: Iterable[str]) -> None:
    """Raise if these are named as parts of a whole, `-00001-of-00003`, and one is not among them."""
    parts: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if match := PART.fullmatch(name):
            parts.setdefault((match["stem"], match["of"]), set()).add(int(match["number"]))
    for (stem, of), held in parts.items():
        # Some count from 0. A number may be absurd, so nothing as long is made of it.
        first = min(held)
        if first > 1 or len(held) < int(of):
            lost = next(number for number in range(min(first, 1), len(held) + 2) if number not in held)
            raise CheckpointError(
                f"{where}: holds {len(held)} of {int(of)} shards named {stem}-…-of-{of}, and lacks number {lost}; "
                "a part is not the model: fetch the missing shards, or remove those that an earlier save left behind"
            )


def read_index(index: Path) -> dict[str, set[str]]:
    """The shards that an index names, each with the tensors that are to be in it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no 'weight_map'; fetch the index again")
    promised: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if (
            not isinstance(shard, str)
            or shard in ("", "..")
            or "\0" in shard
            or max(len(part.encode(errors="surrogatepass")) for part in shard.split("/")) > LONGEST_NAME
            or len(shard) > LONGEST_PATH
        ):
            raise CheckpointError(f"{index}: shard {shard!r} is not the name of a file; fetch the index again")
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise CheckpointError(
                f"{index}: shard {shard!r} lies outside the checkpoint's directory; fetch the index again"
            )
        promised.setdefault(shard, set()).add(name)
    return {shard: promised[shard] for shard in sorted(promised)}


def read_config(path: Path) -> dict[str, Any]:
    """The `config.json` of a directory; empty if there is none."""
    file = path / "config.json"
    return read_json(file) if path.is_dir() and file.exists() else {}


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    # A pipe would wait for ever, and a device may have no end.
    if not file.is_file() or file.stat().st_size > MOST_JSON:
        raise CheckpointError(f"{file}: expected a file of JSON of at most {MOST_JSON} bytes; fetch it again")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(content).__name__}; fetch it again")
    return content
