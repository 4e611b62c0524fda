"""Save a base plus a delta as a checkpoint that transformers loads, tensor by tensor."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pandas as pd
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from tqdm import tqdm

from delta_analysis._errors import NotHomologousError, one_of
from delta_analysis.checkpoint import Checkpoint, tokenizer_folder
from delta_analysis.delta import Delta
from delta_analysis.names import bare_name

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The dtypes that weights are saved in, and what safetensors calls them."""
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)
"""What is copied beside weights and configuration."""


class Part(NamedTuple):
    """A tensor to be saved: where it begins, what is added to it, and how it is stored."""

    base_name: str
    delta_name: str | None
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


def save_checkpoint(
    base: Checkpoint,
    delta: Delta,
    out_dir: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
) -> pd.DataFrame:
    """Save `base + delta` as sharded safetensors with index, configuration and tokenizer.

    Each tensor is `float32(base) + delta`, rounded once to the dtype it is stored in. Two tensors
    are in memory at a time. A tensor of the base that the delta does not have, or a row of a grown
    vocabulary, is saved as it is in the base. Configuration and tokenizer are the fine-tune's where
    it has the same tensors as the result, else the base's.

    Parameters
    ----------
    base : as from `open_checkpoint`.
    delta : as from `load_delta`, pruned or not.
    out_dir : a folder that does not exist yet, or is empty; it appears under this name when it is complete.
    dtype : `float32`, `float16`, `bfloat16`, or None for that of each tensor in the base.
    max_shard_size : the most bytes of a file, as a number or as text such as `"5GB"`.

    Returns
    -------
    DataFrame, one row a tensor: `tensor, file, dtype, numel`; `changed`, how many entries of the
    delta are not zero; `lost`, how many of these left the stored weight as it would be without
    them, because the storage's step is too large; `lost_share`, lost over changed (0 if none is).

    Raises
    ------
    FileExistsError
        `out_dir` holds something already; nothing is ever overwritten.
    NotHomologousError
        A tensor of the delta that the base does not have, or has in another shape.
    ValueError
        An unknown dtype, or a weight beyond the range of the one asked for.

    Examples
    --------
    >>> import tempfile
    >>> import delta_analysis as da
    >>> base, out = da.open_checkpoint("zoo:small/base"), tempfile.mkdtemp()
    >>> delta = da.load_delta(base="zoo:small/base", finetuned="zoo:small/instruct")
    >>> saved = save_checkpoint(base, delta.pruned(da.Dare(0.9), seed=0), out, dtype="bfloat16")
    >>> bool(saved["lost_share"].max() < 0.2)
    True
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(one_of("dtype", dtype, DTYPES))
    out = Path(out_dir).expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: exists already; choose another out_dir, or remove it")
    parts = _plan(base, delta, dtype)
    companion = _companion(base, delta, parts)
    tokenizer = tokenizer_folder(companion)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        table = _write_shards(base, delta, parts, partial, max_shard_size)
        _write_config(companion, partial, dtype, own_head=any(name not in base for name in parts))
        for pattern in COMPANIONS if tokenizer else ():
            for file in sorted(tokenizer.glob(pattern)) if tokenizer else ():
                # A repository may have a whole folder of this name.
                if file.is_file():
                    shutil.copy(file, partial / file.name)
        partial.replace(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return table


def _plan(base: Checkpoint, delta: Delta, dtype: str | None) -> dict[str, Part]:
    """Every tensor of the result by the name that it is saved under."""
    short = {bare_name(name): name for name in base}
    added: dict[str, str] = {}
    own: list[tuple[str, str]] = []
    for name, match in delta.compared.items():
        target = match.base_name or (name if name in base else short.get(bare_name(name), name))
        needed = () if match.finetuned is None else match.finetuned.shape
        there = base.entries[target].shape if target in base else None
        if there is None or there[1:] != needed[1:] or there[:1] < needed[:1]:
            raise NotHomologousError(
                f"{base.source}: tensor {target!r} has shape {there}, where the delta changes one of {needed}; "
                "save with the base that the delta was taken from"
            )
        if bare_name(name) == bare_name(target):
            added[target] = name
        else:
            own.append((name, target))
    stored = {name: dtype or _storable(base, name) for name in base}
    parts = {name: Part(name, added.get(name), base.entries[name].shape, stored[name]) for name in base}
    # A head of its own, where the base ties its head to the embeddings.
    parts.update({name: Part(target, name, base.entries[target].shape, stored[target]) for name, target in own})
    return parts


def _storable(base: Checkpoint, name: str) -> str:
    stored = str(base.entries[name].dtype).removeprefix("torch.")
    return stored if stored in DTYPES else "float32"


def _companion(base: Checkpoint, delta: Delta, parts: dict[str, Part]) -> Checkpoint:
    """The side whose configuration and tokenizer fit the result."""
    tuned = delta.finetuned
    shapes = {name: entry.shape for name, entry in tuned.entries.items()}
    same = shapes == {name: part.shape for name, part in parts.items()}
    return tuned if same and tuned.config and not tuned.is_difference else base


def _write_shards(
    base: Checkpoint, delta: Delta, parts: dict[str, Part], folder: Path, max_shard_size: int | str
) -> pd.DataFrame:
    split = split_state_dict_into_shards_factory(
        parts,
        get_storage_size=lambda part: part.nbytes,
        get_storage_id=lambda part: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    rows: list[dict[str, object]] = []
    with tqdm(total=len(parts), unit="tensor", disable=None, leave=False) as bar:
        for file, names in split.filename_to_tensors.items():

            def tensors(file: str = file, names: Iterable[str] = names) -> Iterator[torch.Tensor]:
                for name in names:
                    tensor, row = _sum(base, delta, parts[name])
                    rows.append({"tensor": name, "file": file, **row})
                    bar.update()
                    yield tensor

            _write_file(folder / file, {name: parts[name] for name in names}, tensors())
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return pd.DataFrame(rows)


def _sum(base: Checkpoint, delta: Delta, part: Part) -> tuple[torch.Tensor, dict[str, object]]:
    """The tensor to be stored, and what its rounding did to the delta."""
    dtype = getattr(torch, part.dtype)
    weight = base[part.base_name].to(torch.float32)
    changed = lost = 0
    stored = weight.to(dtype)
    if part.delta_name is not None:
        change = delta[part.delta_name]
        head = weight[: len(change)] if change.dim() else weight
        rounded = (head + change).to(dtype)
        before = stored[: len(change)] if change.dim() else stored
        changed = int(torch.count_nonzero(change))
        lost = int(((change != 0) & (rounded == before)).sum())
        stored = torch.cat([rounded, stored[len(change) :]]) if change.dim() and len(change) < len(stored) else rounded
        beyond = int((torch.isinf(rounded) & torch.isfinite(head + change)).sum())
    else:
        beyond = int((torch.isinf(stored) & torch.isfinite(weight)).sum())
    if beyond:
        raise ValueError(
            f"tensor {part.base_name!r} has {beyond} entries beyond the range of {part.dtype}; "
            "save in bfloat16 or float32"
        )
    counts = {"changed": changed, "lost": lost, "lost_share": lost / changed if changed else 0.0}
    return stored, {"dtype": part.dtype, "numel": stored.numel(), **counts}


def _write_file(path: Path, parts: dict[str, Part], tensors: Iterator[torch.Tensor]) -> None:
    """A safetensors file, written from its header on, one tensor at a time."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, part in parts.items():
        begin, end = end, end + part.nbytes
        header[name] = {"dtype": DTYPES[part.dtype], "shape": list(part.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write_config(side: Checkpoint, folder: Path, dtype: str | None, *, own_head: bool) -> None:
    if not side.config:
        return
    config = dict(side.config)
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    if own_head:
        config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=1, default=str) + "\n", encoding="utf-8")
