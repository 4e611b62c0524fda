"""A LoRA adapter as a delta: each weight's difference is the product of two small stored factors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from delta_analysis._errors import CheckpointError
from delta_analysis.checkpoints.files import not_floating, read_header
from delta_analysis.checkpoints.folders import read_json
from delta_analysis.checkpoints.names import unwrapped
from delta_analysis.checkpoints.tensors import TensorReference

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
FILES = ("adapter_model.*", "adapters.safetensors", "adapters.npz")
"""Weights of adapters: peft's, and MLX's two."""
FUSE = "fuse it with `mlx_lm.fuse --model BASE --adapter-path ADAPTER --save-path MERGED` and open the folder MERGED"
PREFIX = "base_model.model."
FACTOR = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<kind>[AB](\.default)?\.weight|embedding_[AB](\.default)?)"
)
BASE_LAYER = ".base_layer."
"""What peft puts into the name of a weight that it keeps beside its factors."""
SOME_TOKENS = "trainable_tokens_delta"
"""Rows of an embedding, those of the tokens that were trained."""
VARIANTS = {
    "use_dora": "DoRA, which scales each row of the sum anew",
    "use_qalora": "QALoRA, which pools the inputs",
    "use_bdlora": "BD-LoRA, whose factors are block-diagonal",
    "kasa_config": "KaSA, which truncates the base weight",
    "monteclora_config": "MonteCLoRA, whose factors are sampled",
    "velora_config": "VeLoRA",
    "alora_invocation_tokens": "aLoRA, which is active on some tokens only",
    "arrow_config": "Arrow, which routes between adapters",
    "lora_bias": "LoRA with a bias on lora_B",
    "target_parameters": "LoRA of bare parameters (experts)",
    "megatron_config": "LoRA of Megatron's parallel layers",
    "layer_replication": "LoRA on repeated layers, whose numbers are not the base's",
}
"""Settings that make the delta another than scale · B A, or put it elsewhere."""
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
"""Initialisations that leave the base as it is; the others subtract from it what they put into the factors."""
MOST_REPEATS = 3
"""Repetitions in a pattern; each may try as many places as a name has characters."""
Factors = dict[str, tuple[str, TensorReference]]
"""Kind of factor -> its name in the file, and where it lies."""
WAY_OUT = (
    "merge it into its base with peft's merge_and_unload(), where peft can, save the model with save_pretrained "
    "and open that folder as the fine-tuned model"
)
STORED_WHOLE = (
    "stored whole in the adapter, not as factors (modules_to_save, a bias, an embedding or some of its tokens): "
    "it replaces the base's weight, and only the base could tell the difference"
)


@dataclass(frozen=True)
class LoraProduct:
    """A difference of low rank, scale · B A, computed anew in float32 each time that it is read.

    Attributes
    ----------
    down : A, of shape (r, in), or (r, in, *kernel) for a convolution.
    up : B, of shape (out, r), or (out, r, 1, …) for a convolution.
    scale : what the product is multiplied by.
    transposed : the base stores its weight as (in, out): an embedding, or GPT-2's Conv1D.

    Examples
    --------
    >>> from delta_analysis.checkpoints.tensors import InMemory
    >>> down, up = InMemory(torch.ones(1, 3)), InMemory(torch.tensor([[1.0], [2.0]]))
    >>> LoraProduct(down, up, scale=0.5, transposed=False).read()
    tensor([[0.5000, 0.5000, 0.5000],
            [1.0000, 1.0000, 1.0000]])
    """

    down: TensorReference
    up: TensorReference
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        inside, out = self.down.shape[1:], self.up.shape[0]
        return (*inside, out) if self.transposed else (out, *inside)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(self.down.files + self.up.files))

    def read(self) -> torch.Tensor:
        down, up = (factor.read().to(torch.float32).flatten(1) for factor in (self.down, self.up))
        product = down.T @ up.T if self.transposed else up @ down
        return product.mul_(self.scale).view(self.shape)


@dataclass(frozen=True)
class OnStored:
    """A weight that an adapter stores beside its factors, as of a vocabulary that grew, and their product on it."""

    stored: TensorReference
    product: LoraProduct

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(self.stored.files + self.product.files))

    def read(self) -> torch.Tensor:
        return self.stored.read().to(torch.float32) + self.product.read()


def is_adapter(folder: Path) -> bool:
    """Whether a directory holds a peft adapter of whatever kind, and not only a trace of one."""
    return (folder / CONFIG).is_file() and any(each for name in FILES for each in folder.glob(name))


def way_to_adapter(name: str) -> str:
    """What to do with a factor that is not read as part of an adapter, by the tool that names it so."""
    if name.endswith((".lora_a", ".lora_b")):
        return f"MLX wrote it: {FUSE}"
    if ".lora_down" in name or ".lora_up" in name:
        return "it is one of kohya's scripts (lora_down, lora_up), not of peft: merge it with these and open the result"
    if ".lora_a." in name or ".lora_b." in name:
        return "it is named as torchtune does: save it with torchtune's save_adapter_weights_only in peft's form"
    return "give the folder with its adapter_config.json"


def adapter_differences(folder: Path) -> tuple[dict[str, LoraProduct], dict[str, TensorReference], dict[str, str]]:
    """The differences that a LoRA adapter makes, without its base and not yet computed.

    The scale is alpha / r, or alpha / √r for rsLoRA, where the first of the patterns that matches
    the end of a module's name sets alpha or r for it. Beside the differences: the weights that the
    adapter has whole, by the names of the base; and the name of each stored tensor that is no factor
    -> why it is left out where no base is at hand.
    """
    config = _read_config(folder / CONFIG)
    rank_of = _by_module(folder / CONFIG, config, "r", "rank_pattern")
    alpha_of = _by_module(folder / CONFIG, config, "lora_alpha", "alpha_pattern")
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder}: has {CONFIG} but neither {' nor '.join(WEIGHTS)}; fetch the weights too")
    factors: dict[str, Factors] = {}
    stored_whole: dict[str, TensorReference] = {}
    header = read_header(file)
    for written, stored in unwrapped(header).items():
        reference = header[written]
        if match := FACTOR.fullmatch(stored):
            factors.setdefault(match["module"], {})[match["kind"]] = stored, reference
        elif ".lora_" in stored:
            raise CheckpointError(
                f"{file}: tensor {stored!r} is no factor of plain LoRA; expected {PREFIX}… and lora_A.weight, "
                f"lora_B.weight, lora_embedding_A or lora_embedding_B: {WAY_OUT}"
            )
        else:
            stored_whole[stored.removeprefix(PREFIX)] = reference
    references: dict[str, LoraProduct] = {}
    for module, pair in factors.items():
        rank, alpha = rank_of(module), alpha_of(module)
        down, up = _check_pair(file, pair, rank)
        # Comparing is false for NaN, and right for integers too large for a float.
        if type(alpha) not in (int, float) or not abs(alpha) <= torch.finfo(torch.float32).max:
            raise CheckpointError(f"{folder / CONFIG}: module {module!r} has alpha {alpha!r}; expected a finite number")
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        # Embeddings are always transposed, convolutions never.
        transposed = min(pair).startswith("embedding") or (config["fan_in_fan_out"] and len(down.shape) == 2)
        references[f"{module}.weight"] = LoraProduct(down, up, scale, transposed)
    if not references:
        raise CheckpointError(f"{file}: holds no LoRA factor among {len(stored_whole)} tensors; nothing to compare")
    # An old peft stores the base's own embedding beside its factors, under the name of the weight.
    left_out = {name: reference for name, reference in stored_whole.items() if name not in references}
    whole: dict[str, TensorReference] = {}
    for name, reference in left_out.items():
        target = name.replace(BASE_LAYER, ".")
        product = references.get(target)
        if product is None:
            whole[target] = reference
        elif product.shape == reference.shape:
            whole[target] = OnStored(reference, product)
    whole = {name: reference for name, reference in whole.items() if not name.endswith(SOME_TOKENS)}
    return references, whole, dict.fromkeys(left_out, STORED_WHOLE)


def _read_config(file: Path) -> dict[str, Any]:
    config = read_json(file)
    if "fine_tune_type" in config:
        raise CheckpointError(f"{file}: an adapter of MLX ({config['fine_tune_type']}), not of peft: {FUSE}")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: an adapter of peft_type {config.get('peft_type')!r}, not LORA: {WAY_OUT}")
    for key, variant in VARIANTS.items():
        if config.get(key):
            raise CheckpointError(f"{file}: {key} is set: {variant}; expected plain LoRA: {WAY_OUT}")
    if (start := config.get("init_lora_weights")) not in PLAIN_STARTS:
        raise CheckpointError(
            f"{file}: init_lora_weights is {start!r}, which also changes the base weights, so that scale · B A is not "
            f"the difference from the base: save it with path_initial_model_for_weight_conversion, or {WAY_OUT}"
        )
    for key in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(config.setdefault(key, False), bool):
            raise CheckpointError(f"{file}: {key} is {config[key]!r}; expected true or false")
    return config


def _by_module(file: Path, config: dict[str, Any], key: str, patterns_key: str) -> Callable[[str], Any]:
    """What the first pattern that matches a module's name, or its end from a dot on, sets; else the general setting."""
    patterns = config.get(patterns_key) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{file}: {patterns_key} is {patterns!r}; expected an object from module to number")
    if slow := next((pattern for pattern in patterns if _may_never_end(pattern)), None):
        raise CheckpointError(
            f"{file}: {patterns_key} has the pattern {slow[:80]!r}, which repeats a group or more than {MOST_REPEATS} "
            "other things, so that matching it may never end; name the modules instead"
        )
    try:
        compiled = [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items()]
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{file}: {patterns_key} holds no regular expression ({error}); correct it") from error
    return lambda module: next((value for pattern, value in compiled if pattern.match(module)), config.get(key))


def _may_never_end(pattern: str) -> bool:
    """Whether the time of matching may grow without bound: what is repeated is a group, or too much is repeated."""
    plain = re.sub(r"\\.|\[\^?\]?[^\]]*\]|\(\?", "x", pattern)
    return bool(re.search(r"\)[*+{]", plain)) or len(re.findall(r"[*+{?]", plain)) > MOST_REPEATS


def _check_pair(file: Path, pair: Factors, rank: object) -> tuple[TensorReference, TensorReference]:
    """A and B, which belong together, multiply and have this rank."""
    kinds = sorted(pair)
    name, down = pair[kinds[0]]
    if len(kinds) != 2 or kinds[0].replace("A", "B") != kinds[1]:
        raise CheckpointError(f"{file}: tensor {name!r} is not one of a pair, A and B; save the adapter again")
    up = pair[kinds[1]][1]
    for stored, reference in pair.values():
        if not reference.dtype.is_floating_point or reference.dtype.itemsize == 1:
            raise not_floating(file, stored, str(reference.dtype).removeprefix("torch."))
    if len(down.shape) < 2 or up.shape[1:] != (down.shape[0],) + (1,) * (len(down.shape) - 2):
        raise CheckpointError(
            f"{file}: tensor {name!r} has shape {down.shape} and its partner {up.shape}; expected (r, in, …) and "
            "(out, r, …), from no grouped convolution and with all shards gathered: save the adapter again"
        )
    if not down.shape[0] or down.shape[0] != rank:
        raise CheckpointError(
            f"{file}: tensor {name!r} has rank {down.shape[0]}, and {CONFIG} says {rank!r}; "
            "expected the same whole number above 0: the two come from different saves, fetch both again"
        )
    return down, up
