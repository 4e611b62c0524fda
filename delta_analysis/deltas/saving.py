"""Save a base plus a delta as a checkpoint that transformers loads, tensor by tensor."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from tqdm import tqdm

from delta_analysis._errors import CheckpointError, NotHomologousError, one_of
from delta_analysis._kernels import map_blocks, uninitialised
from delta_analysis.checkpoints import (
    TOKENIZER,
    Checkpoint,
    Converted,
    TensorReference,
    bare_name,
    has_tokenizer,
    input_embedding,
    model_class,
    model_map,
    output_head,
    tokenizer_folder,
    written_whole,
)
from delta_analysis.deltas.delta import Delta
from delta_analysis.deltas.placements import edited_checkpoint

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The dtypes that weights are saved in, and what safetensors calls them."""


class Part(NamedTuple):
    """A tensor to be saved: the model's own, what replaces it or its first rows, and how it is stored.

    `finetuned` tells whether the model's own is the fine-tune's, whose entries stay as they are where the delta's do.
    """

    own: TensorReference
    start: TensorReference | None
    delta_name: str
    dtype: str
    finetuned: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.own.shape) * getattr(torch, self.dtype).itemsize


def save_checkpoint(
    base: Checkpoint,
    delta: Delta,
    out_dir: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
) -> pd.DataFrame:
    """Save `base + delta` as sharded safetensors with index, configuration and tokenizer.

    Each tensor is `float32(base) + delta`, rounded once to the dtype it is stored in. What the delta
    does not cover (a head, the rows of a grown vocabulary) or leaves as it was is the fine-tune's own. Of an
    adapter or a published delta it is the base that is saved, with the delta added. A few tensors are in memory.

    Parameters
    ----------
    base : as from `open_checkpoint`.
    delta : as from `load_delta`, pruned or not.
    out_dir : a folder that does not exist yet, or is empty; it appears under this name when it is complete,
        and until then is `.NAME.….partial` beside it.
    dtype : `float32`, `float16`, `bfloat16`, or None for that of each tensor now (float64 becomes float32).
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
        An unknown dtype, a weight beyond the range of the one asked for, or a delta that is the
        fine-tuned weights themselves.

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
    out = Path(out_dir).expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: exists already; choose another out_dir, or remove it")
    model = edited_checkpoint(delta, base)
    # A bare file of weights has neither configuration nor tokenizer.
    described = model if model.config else base
    parts = _plan(base, delta, model, dtype)
    ties_head = _ties_head(parts, described)
    with written_whole(out) as folder:
        folder.mkdir()
        table = _write_shards(delta, parts, folder, max_shard_size)
        _write_config(described, folder, parts, ties_head=ties_head)
        for file in _tokenizer(delta.finetuned, model, base):
            shutil.copy(file, folder / file.name)
        # They describe the delta as it was made, before any edit.
        for name, text in {} if delta.edits else delta.finetuned.beside.items():
            (folder / name).write_text(text, encoding="utf-8")
    return table


def _tokenizer(*sides: Checkpoint) -> list[Path]:
    """The files of the first side that has a tokenizer; none if no side has."""
    for side in sides:
        try:
            folder = tokenizer_folder(side)
        except CheckpointError:
            # A repository without a tokenizer: the other side's, or none, is what there is to save.
            continue
        # An adapter may have a part of it, such as a chat template.
        if folder is not None and (has_tokenizer(folder) or not side.is_delta):
            # A repository may have a whole folder of such a name.
            files = [file for file in sorted(folder.iterdir()) if TOKENIZER.fullmatch(file.name) and file.is_file()]
            # Old ones are a vocabulary alone; how to generate is no tokenizer.
            if any(file.name != "generation_config.json" for file in files):
                return files
    return []


def _plan(base: Checkpoint, delta: Delta, model: Checkpoint, dtype: str | None) -> dict[str, Part]:
    """Every tensor of the model by its name, with what the delta makes of it."""
    if base.is_delta:
        raise NotHomologousError(f"{base.source}: is an adapter, not a base; give the model that it was trained on")
    if delta.base is None and model is delta.finetuned:
        raise ValueError(
            f"{model.source}: the delta is the fine-tuned weights themselves; load it with its base to save their sum"
        )
    apart = delta.finetuned.is_delta
    short = {bare_name(name): name for name in base}
    own = dict(model.references)
    changes: dict[str, tuple[TensorReference | None, str]] = {}
    for name, match in delta.compared.items():
        side = match.base if apart else match.finetuned
        if isinstance(side, Converted):
            # What the files have in parts is saved as the model has it, which loads as well.
            own = {each: reference for each, reference in own.items() if each not in side.placement.stored}
            own[name] = side
        if isinstance(match.base, Converted):
            changes[name] = match.base, name
            continue
        target = match.base_name or name
        target = target if target in base else short.get(bare_name(target), target)
        start = base.references.get(target)
        # The rows that both sides have may be fewer than those of the base.
        taken_from = match.shape if delta.base is None else delta.base.references[match.base_name].shape
        if start is None or start.shape != taken_from:
            raise NotHomologousError(
                f"{base.source}: tensor {target!r} has shape {start and start.shape}, where the delta's base has "
                f"{taken_from}; save with the base that the delta was taken from"
            )
        place = target if apart else name
        if apart and output_head([name]) and input_embedding([target]):
            # A head that the base ties to its embeddings becomes a matrix of its own.
            place, own[name] = name, start
        changes[place] = start, name
    parts = {}
    for name, reference in own.items():
        start, delta_name = changes.get(name, (None, ""))
        parts[name] = Part(reference, start, delta_name, dtype or _storable(reference), not apart)
    return parts


def _ties_head(parts: dict[str, Part], model: Checkpoint) -> bool:
    """Whether transformers would make the output head the embeddings, as the configuration stands."""
    shapes = {name: part.own.shape for name, part in parts.items()}
    found = model_class(model.config, shapes)
    return model.ties_head if found is None else bool(model_map(model.config, shapes, found).tied)


def _storable(reference: TensorReference) -> str:
    stored = str(reference.dtype).removeprefix("torch.")
    return stored if stored in DTYPES else "float32"


def _write_shards(delta: Delta, parts: dict[str, Part], folder: Path, max_shard_size: int | str) -> pd.DataFrame:
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

            def make(name: str, file: str = file) -> torch.Tensor:
                tensor, row = _sum(name, delta, parts[name])
                rows.append({"tensor": name, "file": file, **row})
                bar.update()
                return tensor

            _write_file(folder / file, {name: parts[name] for name in names}, make)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return pd.DataFrame(rows)


def _sum(name: str, delta: Delta, part: Part) -> tuple[torch.Tensor, dict[str, object]]:
    """The tensor to be stored, and what its rounding did to the delta."""
    dtype = getattr(torch, part.dtype)
    if part.start is None:
        stored, counts = _rounded(part.own.read(), None, dtype)
    else:
        change = delta[part.delta_name]
        rows = slice(len(change)) if change.dim() else ...
        own = part.own.read()[rows] if part.finetuned else None
        stored, counts = _rounded(part.start.read()[rows], change, dtype, own)
        if stored.shape != part.own.shape:
            beyond_base, more = _rounded(part.own.read()[len(change) :], None, dtype)
            stored, counts = torch.cat([stored, beyond_base]), counts + more
    changed, lost, beyond = counts.tolist()
    if beyond:
        raise ValueError(
            f"tensor {name!r} has {beyond} entries beyond the range of {part.dtype}; save in bfloat16 or float32"
        )
    shares = {"changed": changed, "lost": lost, "lost_share": lost / changed if changed else 0.0}
    return stored, {"dtype": part.dtype, "numel": stored.numel(), **shares}


def _rounded(
    start: torch.Tensor, change: torch.Tensor | None, dtype: torch.dtype, own: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`float32(start) + change` in the dtype; how many entries change, are lost, and left the dtype's range."""
    stored = uninitialised(start.shape, dtype)
    out, changes = stored.view(-1), None if change is None else change.reshape(-1)
    tuned = None if own is None else own.reshape(-1)

    def add(before: torch.Tensor, at: int) -> list[int]:
        place = slice(at, at + before.numel())
        after = before if changes is None else before + changes[place]
        if tuned is not None and changes is not None:
            whole = tuned[place].to(torch.float32)
            after = torch.where(changes[place] == whole - before, whole, after)
        out[place] = after
        # The extremes, which are NaN where an entry is, take less than a look at each entry.
        finite = all(map(math.isfinite, torch.stack(torch.aminmax(out[place])).tolist()))
        beyond = 0 if finite else int((torch.isinf(out[place]) & torch.isfinite(after)).sum())
        if changes is None:
            return [0, 0, beyond]
        changed = changes[place] != 0
        lost = changed & (out[place] == before.to(dtype))
        return [int(np.count_nonzero(each)) for each in (changed, lost)] + [beyond]

    return stored, torch.tensor([[0, 0, 0], *map_blocks(start, add)]).sum(0)


def _write_file(path: Path, parts: dict[str, Part], make: Callable[[str], torch.Tensor]) -> None:
    """A safetensors file, written from its header on, one tensor at a time."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, part in parts.items():
        begin, end = end, end + part.nbytes
        header[name] = {"dtype": DTYPES[part.dtype], "shape": list(part.own.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in parts:
            # No name for the tensor, which would hold it while the next one is made.
            file.write(make(name).contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _write_config(model: Checkpoint, folder: Path, parts: dict[str, Part], *, ties_head: bool) -> None:
    if not model.config:
        return
    sizes: Counter[str] = Counter()
    for part in parts.values():
        sizes[part.dtype] += part.nbytes
    # transformers loads weights in the dtype that the configuration names, whatever they are stored in.
    names = [name for name in ("torch_dtype", "dtype") if name in model.config] or ["dtype"]
    stated: dict[str, object] = dict.fromkeys(names, sizes.most_common(1)[0][0])
    if ties_head and output_head(parts) is not None and input_embedding(parts) is not None:
        stated["tie_word_embeddings"] = False
    config = {**model.config, **stated}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {**config["text_config"], **stated}
    (folder / "config.json").write_text(json.dumps(config, indent=1, default=str) + "\n", encoding="utf-8")
