"""Load the model and the tokenizer of a checkpoint, to evaluate it; never remote code, never random weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from delta_analysis._errors import CheckpointError
from delta_analysis.checkpoints import (
    Checkpoint,
    Converted,
    TensorReference,
    has_tokenizer,
    input_embedding,
    model_map,
    output_head,
    settings_of,
    text_settings,
    tokenizer_folder,
)
from delta_analysis.deltas import Delta, edited_checkpoint, judged_class


def load_model(checkpoint: Checkpoint, device: str = "cpu", dtype: str = "float32") -> PreTrainedModel:
    """The model of a checkpoint directory, of the class that its configuration names; never runs remote code.

    Its weights are those that `open_checkpoint` reads. `dtype` is `float32`, or `auto` for the one
    that most of the weights are stored in.

    Raises
    ------
    CheckpointError
        An architecture that transformers does not know, weights that do not fit the configuration,
        or fewer than the architecture has.
    """
    if checkpoint.path is None or checkpoint.is_delta:
        raise CheckpointError(f"{checkpoint.source}: is no model on disk; evaluation needs a checkpoint directory")
    return _model(checkpoint, checkpoint.references, device, dtype)


class _Readable(Protocol):
    """What a weight is read from, when transformers asks for it."""

    def read(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class _OnDemand:
    """A weight as transformers takes it from an open file: it is read when it is indexed."""

    weight: _Readable

    def __getitem__(self, _: object) -> torch.Tensor:
        return self.weight.read()


@dataclass(frozen=True)
class _Edited:
    """A weight of the model that a delta makes, with the rows that the delta does not cover as they were."""

    delta: Delta
    name: str
    before: TensorReference | None

    def read(self) -> torch.Tensor:
        weight = self.delta.weight(self.name)
        if self.before is None or self.before.shape == tuple(weight.shape):
            return weight
        return torch.cat([weight, self.before.read()[len(weight) :].to(weight)])


def _model(checkpoint: Checkpoint, weights: Mapping[str, _Readable], device: str, dtype: str) -> PreTrainedModel:
    """A model of these weights, with the configuration of the checkpoint."""
    found, where = judged_class(checkpoint), checkpoint.path or checkpoint.source
    make: Any = found
    wanted = model_map(checkpoint.config, checkpoint.shapes, found)
    for placement in wanted.placements:
        for parameter, shape in placement.shapes.items():
            if shape != wanted.shapes[parameter]:
                raise CheckpointError(
                    f"{where}: tensor {placement.stored[0]!r} has shape {shape}, and by config.json {parameter!r} of a "
                    f"{found.__name__} has {wanted.shapes[parameter]}; correct the size in config.json"
                )
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, report = make.from_pretrained(
            None,
            config=settings_of(checkpoint.config, found),
            state_dict={name: _OnDemand(weight) for name, weight in weights.items()},
            dtype=_dtype(checkpoint) if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise CheckpointError(
            f"{where}: cannot be loaded as a {found.__name__} ({_first_line(str(error))}); "
            "evaluation needs a directory with config.json and weights of one architecture"
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise CheckpointError(
            f"{where}: lacks {len(missing)} weights of its architecture, first {missing[0]!r}; "
            "they would be random, fetch the whole checkpoint"
        )
    # Where the weights come from, for whoever saves an adapter of the model.
    model.name_or_path = model.config.name_or_path = str(where)
    if model.can_generate():
        # Greedy means greedy: a checkpoint's penalties and sampling settings would change the answers.
        model.generation_config = GenerationConfig(eos_token_id=_end_tokens(checkpoint))
    return model.to(torch.device(device)).eval()


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The one that most of the weights are stored in."""
    count: Counter[torch.dtype] = Counter()
    for reference in checkpoint.references.values():
        count[reference.dtype] += math.prod(reference.shape)
    return count.most_common(1)[0][0]


def _end_tokens(checkpoint: Checkpoint) -> int | list[int] | None:
    """The tokens that end an answer: what the generation settings say, else the configuration."""
    if checkpoint.path is not None and (checkpoint.path / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(checkpoint.path).eos_token_id
    stated = text_settings(checkpoint.config).get("eos_token_id")
    return stated if isinstance(stated, int | list) else None


def check_device(device: str) -> None:
    """Raise unless it is `cpu` or a CUDA device that is there."""
    present = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if device not in (present + ["cuda"] * torch.cuda.is_available()):
        raise ValueError(f"device must be one of {', '.join(present)}; not {device!r}")


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint directory.

    Raises
    ------
    CheckpointError
        A directory without a tokenizer that transformers can load.
    """
    folder = tokenizer_folder(checkpoint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: has no tokenizer that can be loaded ({_first_line(str(error))}); "
            "copy tokenizer.json and tokenizer_config.json beside the weights"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0]


def finetuned_model(
    delta: Delta, device: str = "cpu", dtype: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The fine-tuned model of a delta, with its edits; and the tokenizer."""
    whole = edited_checkpoint(delta)
    # An adapter's own goes before that of its base: it may have tokens or a chat template more.
    sides = [delta.finetuned, whole] if delta.finetuned.is_delta else [whole]
    owner = next((side for side in sides if _has_tokenizer(side)), None)
    tokenizer: Any = _NoTokenizer(whole.source) if owner is None else load_tokenizer(owner)
    weights = _edited_weights(delta, whole) if delta.finetuned.is_delta or delta.edits else whole.references
    model = _model(whole, weights, device, dtype)
    if not isinstance(tokenizer, _NoTokenizer) and getattr(model.config, "pad_token_id", None) is None:
        # A classifier finds the end of a padded text by it.
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


@dataclass(frozen=True)
class _NoTokenizer:
    """Stands for the tokenizer of a model without one, of images for example: an evaluation that asks it is told."""

    source: str

    def __getattr__(self, name: str) -> object:
        raise CheckpointError(
            f"{self.source}: has no tokenizer, and the evaluation needs one; "
            "copy tokenizer.json and tokenizer_config.json beside the weights"
        )

    def __call__(self, *_: object, **__: object) -> object:
        return self.__getattr__("__call__")


def _has_tokenizer(checkpoint: Checkpoint) -> bool:
    folder = tokenizer_folder(checkpoint)
    return folder is not None and has_tokenizer(folder)


def _edited_weights(delta: Delta, whole: Checkpoint) -> dict[str, _Readable]:
    """The weights of the edited model by their stored names, read when they are asked for."""
    weights: dict[str, _Readable] = dict(whole.references)
    for name in delta.select():
        match = delta.compared[name]
        side, known_as = (match.base, match.base_name) if delta.finetuned.is_delta else (match.finetuned, name)
        replaced = side.placement.stored if isinstance(side, Converted) else (known_as,)
        # A head that is compared with the embeddings to which the base ties it becomes one of its own.
        if not (output_head([name]) and input_embedding(replaced)):
            for stored in replaced:
                weights.pop(stored, None)
        weights[name] = _Edited(delta, name, whole.references.get(known_as))
    return weights


def write_weights(model: PreTrainedModel, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Replace parameters; of a weight with fewer rows than its parameter, a shorter vocabulary, the first ones.

    Raises
    ------
    ValueError
        A name that the model lacks, a shape that differs, or a weight that is NaN or infinite.
    """
    parameters = parameters_of(model)
    with torch.no_grad():
        for name, weight in weights:
            whole = _with_other_rows(parameters.get(name), weight)
            _matching(parameters, name, whole).copy_(whole)


def _with_other_rows(whole: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    """The weight of all tokens, where the delta has only those that both vocabularies share."""
    rows = weight.shape[0] if weight.dim() else 0
    if whole is None or weight.shape == whole.shape or weight.shape[1:] != whole.shape[1:] or rows > len(whole):
        return weight
    return torch.cat([weight, whole[rows:].detach().to(weight)])


def parameters_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Name -> weight or saved buffer; tied ones appear under each of their names and share one storage."""
    return dict(model.state_dict(keep_vars=True))


def _matching(parameters: Mapping[str, torch.Tensor], name: str, weight: torch.Tensor) -> torch.Tensor:
    """The parameter of that name, if the weight fits it and is finite."""
    if name not in parameters:
        raise ValueError(f"tensor {name!r} has no place in the model; its parameters begin with {list(parameters)[:3]}")
    parameter = parameters[name]
    if parameter.shape != weight.shape:
        raise ValueError(f"tensor {name!r} has shape {tuple(weight.shape)}, the model's {tuple(parameter.shape)}")
    if bad := int((~torch.isfinite(weight)).sum()):
        raise ValueError(
            f"tensor {name!r} has {bad} NaN or infinite entries of {weight.numel()}; a model with them cannot be judged"
        )
    return parameter
