"""Load the model and the tokenizer of a checkpoint, to evaluate it; never remote code, never random weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from delta_analysis._errors import CheckpointError
from delta_analysis.checkpoints import Checkpoint, output_head, tokenizer_folder
from delta_analysis.deltas import CLASSIFIER, Delta


def load_model(checkpoint: Checkpoint, device: str = "cpu", dtype: str = "float32") -> PreTrainedModel:
    """The model of a checkpoint directory, for evaluation; never runs remote code.

    A model with a classification head if its configuration names such an architecture, a causal
    language model otherwise. `dtype` is `float32`, or `auto` for the checkpoint's own.

    Raises
    ------
    CheckpointError
        A directory that transformers cannot load, or that lacks weights of its own architecture.
    """
    if checkpoint.path is None or checkpoint.is_delta:
        raise CheckpointError(f"{checkpoint.source}: is no model on disk; evaluation needs a checkpoint directory")
    architecture = next(iter(checkpoint.config.get("architectures") or []), "")
    auto = AutoModelForSequenceClassification if architecture.endswith(CLASSIFIER) else AutoModelForCausalLM
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = auto.from_pretrained(
            checkpoint.path,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: cannot be loaded as a language model ({_first_line(str(error))}); "
            "evaluation needs a directory with config.json and weights of one architecture"
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise CheckpointError(
            f"{checkpoint.path}: lacks {len(missing)} weights of its architecture, first {missing[0]!r}; "
            "they would be random, fetch the whole checkpoint"
        )
    if getattr(model, "generation_config", None) is not None:
        # Greedy means greedy: a checkpoint's penalties and sampling settings would change the answers.
        model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model.to(torch.device(device)).eval()


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
    """The fine-tuned model of a delta, with its edits, and the tokenizer; that of an adapter is made of its base."""
    apart = delta.base if delta.finetuned.is_delta else None
    whole = apart or delta.finetuned
    model = load_model(whole, device, dtype)
    tokenizer = load_tokenizer(whole)
    if getattr(model.config, "pad_token_id", None) is None:
        # A classifier finds the end of a padded text by it.
        model.config.pad_token_id = tokenizer.pad_token_id
    _untie_head(model, delta)
    if apart is not None or delta.edits:
        read = ((name, *delta.read(name)) for name in delta.select())
        _write(model, ((name, tensor if base is None else base + tensor) for name, tensor, base in read))
    return model, tokenizer


def _write(model: PreTrainedModel, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    parameters = parameters_of(model)
    with torch.no_grad():
        for name, weight in weights:
            whole = _with_other_rows(parameters.get(name), weight)
            matching(parameters, name, whole).copy_(whole)


def _with_other_rows(whole: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    """The weight of all tokens, where the delta has only those that both vocabularies share."""
    rows = weight.shape[0] if weight.dim() else 0
    if whole is None or weight.shape == whole.shape or weight.shape[1:] != whole.shape[1:] or rows > len(whole):
        return weight
    return torch.cat([weight, whole[rows:].detach().to(weight)])


def _untie_head(model: PreTrainedModel, delta: Delta) -> None:
    """Give the model a head of its own where the delta changes the head and not the embeddings tied to it."""
    head = output_head(delta)
    parameters = parameters_of(model)
    if head in parameters and sum(parameter is parameters[head] for parameter in parameters.values()) > 1:
        own = torch.nn.Parameter(parameters[head].detach().clone())
        model.get_submodule(head.removesuffix(".weight")).register_parameter("weight", own)


@contextmanager
def patched(
    model: PreTrainedModel, weights: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
) -> Iterator[PreTrainedModel]:
    """The model with some of its weights replaced, restored bit for bit afterwards.

    Parameters
    ----------
    model : any model whose parameters bear the names in `weights`.
    weights : name -> new weight, or pairs of both, read one at a time.

    Raises
    ------
    ValueError
        A name that the model lacks, a shape that differs, or a weight that is NaN or infinite; the
        model is left as it was.
    """
    parameters = parameters_of(model)
    saved: dict[str, torch.Tensor] = {}
    try:
        with torch.no_grad():
            for name, weight in weights.items() if isinstance(weights, Mapping) else weights:
                parameter = matching(parameters, name, weight)
                saved[name] = parameter.clone()
                parameter.copy_(weight)
        yield model
    finally:
        with torch.no_grad():
            # In reverse, since a tied weight may have been saved twice, the second time already patched.
            for name, weight in reversed(saved.items()):
                parameters[name].copy_(weight)


def parameters_of(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Name -> parameter; tied ones appear under each of their names and share one storage."""
    return dict(model.named_parameters(remove_duplicate=False))


def matching(parameters: dict[str, torch.nn.Parameter], name: str, weight: torch.Tensor) -> torch.nn.Parameter:
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
