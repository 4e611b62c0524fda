"""Open a checkpoint: read headers, check them, and hand out one tensor at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from delta_analysis._errors import CheckpointError
from delta_analysis.checkpoints.configs import text_settings
from delta_analysis.checkpoints.files import not_floating
from delta_analysis.checkpoints.folders import read_config, read_folder
from delta_analysis.checkpoints.hub import fetch_tokenizer, fetch_weights, parse_hub_id
from delta_analysis.checkpoints.lora import BASE_LAYER, LoraProduct, adapter_differences, is_adapter, way_to_adapter
from delta_analysis.checkpoints.names import input_embedding, output_head, reading_order, unwrapped
from delta_analysis.checkpoints.paths import zoo_model
from delta_analysis.checkpoints.published import PREFIX as PAIR
from delta_analysis.checkpoints.tensors import InFile, InMemory, TensorReference

Source = str | Path | torch.nn.Module
FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BUFFER_DTYPES = (torch.int64, torch.bool)
MASKS = (torch.bool, torch.uint8)
BUFFERS = ("inv_freq", "masked_bias")
INTEGER_BUFFERS = ("position_ids", "token_type_ids", "relative_position_index")
CAUSAL_MASKS = ("attn.bias", "attention.bias", "mask")
LEFT_OVER = ("quantization_config", "compression_config")
"""Settings of quantised weights, which are never read: beside weights in full precision they say what is not so."""
GATHER = (
    "DeepSpeed's ZeRO-3 saved it before the weights were gathered; gather them with the zero_to_fp32.py that lies in "
    "the run's checkpoint, or save again with stage3_gather_16bit_weights_on_model_save"
)
COMPARED_AT_ONCE = 2**20


@dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, torch.Tensor]):
    """A lazy, read-only mapping from tensor name to tensor, in the stored dtype.

    Reading an item opens its file, reads that tensor alone and closes the file again, so the
    memory in use is one tensor. Iteration is by layer, then by name.

    Attributes
    ----------
    source : what was asked for: a path, a hub id, `zoo:small/base`, or the class of a module.
    path : the directory or file that it is, None for a module.
    references : name -> where the weight comes from: its shape, dtype and place.
    skipped : name -> why a stored tensor is no weight of its own (an integer buffer, a second name
        of the same memory, an output head tied to the embeddings and equal to them, a whole weight
        inside an adapter).
    config : the model's `config.json`, empty for a bare file.
    is_delta : whether the tensors are differences from a base, as an adapter's are, and not weights.
    whole : name -> weight that an adapter has beside its differences; part of its delta once a base is at hand.
    beside : name -> text of files that belong beside it when a model is saved from it.
    """

    source: str
    path: Path | None
    references: dict[str, TensorReference] = field(repr=False)
    skipped: dict[str, str] = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    is_delta: bool = False
    whole: Mapping[str, TensorReference] = field(default_factory=dict, repr=False)
    beside: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.references[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.references)

    def __len__(self) -> int:
        return len(self.references)

    def __contains__(self, name: object) -> bool:
        return name in self.references

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: reference.shape for name, reference in self.references.items()}

    def files(self) -> list[Path]:
        """The weight files, sorted."""
        return sorted({file for reference in self.references.values() for file in reference.files})

    def is_difference(self, name: str) -> bool:
        """Whether the tensor is a difference from a base, and not a weight."""
        return self.is_delta and self.references.get(name) is not self.whole.get(name)

    def with_whole(self) -> Checkpoint:
        """The adapter with its whole weights among its tensors, for a base to be subtracted from them."""
        references = {**self.references, **self.whole}
        ordered = {name: references[name] for name in sorted(references, key=reading_order)}
        skipped = {
            name: reason for name, reason in self.skipped.items() if name.replace(BASE_LAYER, ".") not in self.whole
        }
        return replace(self, references=ordered, skipped=skipped)

    @property
    def ties_head(self) -> bool:
        """Whether the configuration makes the output head the embeddings; so does one that is silent."""
        text = text_settings(self.config)
        return bool(text.get("tie_word_embeddings", bool(text)))


def open_checkpoint(source: Source) -> Checkpoint:
    """Open a checkpoint without loading any weight.

    Parameters
    ----------
    source : one of

        - a directory with `model.safetensors` or `pytorch_model.bin`, or with shards and their index;
        - a single `.safetensors` or `.bin` file;
        - a hub id `org/name`, optionally `org/name@revision`; only weights, index and configuration
          are fetched, once;
        - a directory or hub id of a LoRA adapter, whose tensors are the differences `scale · B A`;
        - an embedded model such as `zoo:small/base`;
        - a `torch.nn.Module`, whose parameters are read where they are.

    Raises
    ------
    CheckpointError
        No weights, a damaged or missing file, a tensor that the index names and its shard lacks,
        weights that are not floating point or not gathered, a hub repository that is gated, missing or out of
        reach, an adapter of another kind than plain LoRA. No code from a checkpoint is ever run.

    Warns
    -----
    UserWarning
        Settings of quantisation beside weights in full precision; they are left out of `config`.

    Examples
    --------
    >>> base = open_checkpoint("zoo:small/base")
    >>> base["model.norm.weight"].shape
    torch.Size([128])
    """
    if isinstance(source, torch.nn.Module):
        config = getattr(source, "config", None)
        if any(tensor.is_meta for tensor in source.parameters()):
            raise CheckpointError(f"{type(source).__name__}: has parameters without data; load its weights first")
        parameters = {name: InMemory(tensor.detach()) for name, tensor in source.named_parameters()}
        settings = config.to_dict() if config is not None and hasattr(config, "model_type") else {}
        return _checkpoint(type(source).__name__, None, parameters, {}, settings)
    path = find_checkpoint(source)
    if is_adapter(path):
        references, whole, skipped = adapter_differences(path)
        return replace(_checkpoint(str(source), path, references, skipped, {}), is_delta=True, whole=whole)
    return _checkpoint(str(source), path, read_folder(path), {}, read_config(path))


def find_checkpoint(source: str | Path) -> Path:
    """The directory or file that a source names, fetched if it is on the hub."""
    text = str(source)
    if not text:
        raise CheckpointError("the source is empty; expected a path, a hub id or an embedded model")
    if text.startswith("zoo:"):
        return zoo_model(text)
    if text.startswith(PAIR):
        raise CheckpointError(f"{text}: names two checkpoints; give it as base and as finetuned of load_delta")
    path = Path(source).expanduser()
    if path.exists():
        return path
    hub = parse_hub_id(text)
    if hub is None:
        raise CheckpointError(
            f"{source}: no such file or directory; expected a checkpoint directory, a .safetensors or .bin file, "
            "a hub id such as org/name or org/name@revision, or an embedded model such as zoo:small/base"
        )
    try:
        return fetch_weights(hub)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: no such file or directory here; as a hub id, {error}") from error


def tokenizer_folder(checkpoint: Checkpoint) -> Path | None:
    """The directory of a checkpoint with its tokenizer, fetched if it is on the hub; None for a module or a file."""
    hub = None if Path(checkpoint.source).expanduser().exists() else parse_hub_id(checkpoint.source)
    if hub is not None and checkpoint.path is not None:
        # The folder of a snapshot is named after its commit.
        return fetch_tokenizer(hub._replace(revision=checkpoint.path.name))
    return checkpoint.path if checkpoint.path is not None and checkpoint.path.is_dir() else None


def _checkpoint(
    source: str,
    path: Path | None,
    found: Mapping[str, TensorReference],
    skipped: dict[str, str],
    config: dict[str, Any],
) -> Checkpoint:
    for name, reference in found.items():
        if ".lora_" in name and not isinstance(reference, LoraProduct):
            raise CheckpointError(f"{path or source}: {name!r} is a factor of an adapter; {way_to_adapter(name)}")
    hollow = [name for name, reference in found.items() if reference.shape == (0,)]
    if hollow:
        raise CheckpointError(
            f"{path or source}: {len(hollow)} of {len(found)} tensors have no entries, such as {hollow[0]!r}: {GATHER}"
        )
    short = unwrapped(found)
    found = {short[name]: reference for name, reference in found.items()}
    buffers = {name: reason for name, reference in found.items() if (reason := _not_a_weight(source, name, reference))}
    repeated = {name: f"tied to {first}, counted there" for name, first in _repeated(found).items()}
    apart = {**repeated, **buffers}
    references = {name: found[name] for name in sorted(found, key=reading_order) if name not in apart}
    if not references:
        raise CheckpointError(f"{path or source}: holds no weights ({len(buffers)} buffers); nothing to compare")
    if left := [key for key in LEFT_OVER if config.get(key)]:
        warnings.warn(
            f"{path or source}: its configuration has a {left[0]}, though its weights are in full precision; "
            "the setting is left over from training and is not used",
            stacklevel=3,
        )
    config = {key: value for key, value in config.items() if key not in LEFT_OVER}
    return _without_tied_head(Checkpoint(source, path, references, {**skipped, **apart}, config))


def _repeated(found: Mapping[str, TensorReference]) -> dict[str, str]:
    """Name -> the first name of the same memory: a `.bin` file has tied weights under each of their names."""
    first: dict[object, str] = {}
    names = {name: first.setdefault(_place(reference) or name, name) for name, reference in found.items()}
    return {name: earlier for name, earlier in names.items() if name != earlier}


def _place(reference: TensorReference) -> object:
    """Where the entries lie; None where there are none, or where they have to be computed."""
    if isinstance(reference, InFile):
        return replace(reference, name="") if reference.numel else None
    if isinstance(reference, InMemory) and reference.tensor.data_ptr():
        return reference.tensor.data_ptr(), reference.shape, reference.tensor.stride(), reference.dtype
    return None


def _not_a_weight(source: str, name: str, reference: TensorReference) -> str | None:
    """Why the tensor is a buffer, None if it is a weight; integer weights are an error."""
    is_mask = reference.dtype in MASKS or name.endswith(CAUSAL_MASKS)
    square = len(reference.shape) == 4 and reference.shape[:2] == (1, 1) and reference.shape[2] == reference.shape[3]
    if name.endswith(BUFFERS) or (is_mask and square):
        return "buffer that the model computes, not a weight"
    if reference.dtype in FLOAT_DTYPES:
        return None
    dtype = str(reference.dtype).removeprefix("torch.")
    if name.endswith(INTEGER_BUFFERS) or (reference.dtype in BUFFER_DTYPES and not name.endswith("weight")):
        return f"{dtype} buffer, not a weight"
    raise not_floating(reference.files[0] if reference.files else Path(source), name, dtype)


def _without_tied_head(checkpoint: Checkpoint) -> Checkpoint:
    """Set aside an output head that is stored beside the embeddings and equal to them."""
    head, embedding = output_head(checkpoint), input_embedding(checkpoint)
    if not (head and embedding and checkpoint.ties_head):
        return checkpoint
    # transformers keeps a stored head that differs from the embeddings, whatever the configuration says.
    if not _equal(checkpoint.references[head], checkpoint.references[embedding]):
        return checkpoint
    references = {name: reference for name, reference in checkpoint.references.items() if name != head}
    return replace(
        checkpoint, references=references, skipped={**checkpoint.skipped, head: f"tied to {embedding}, counted there"}
    )


def _equal(one: TensorReference, other: TensorReference) -> bool:
    """Whether two tensors are equal, read piece by piece and no further than the first difference."""
    if one.shape != other.shape:
        return False
    if not (isinstance(one, InFile) and isinstance(other, InFile) and one.strides is other.strides is None):
        return torch.equal(one.read(), other.read())
    stops = range(COMPARED_AT_ONCE, one.numel + COMPARED_AT_ONCE, COMPARED_AT_ONCE)
    pieces = ((stop - COMPARED_AT_ONCE, min(stop, one.numel)) for stop in stops)
    return all(torch.equal(one.piece(*piece), other.piece(*piece)) for piece in pieces)
