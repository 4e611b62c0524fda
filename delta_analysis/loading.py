"""Load the model and the tokenizer of a checkpoint, to evaluate it; never remote code, never random weights."""

from __future__ import annotations

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
from delta_analysis.checkpoint import Checkpoint, tokenizer_folder

CLASSIFIER = "ForSequenceClassification"
"""How the architecture of a model with a classification head ends."""


def load_model(checkpoint: Checkpoint, device: str = "cpu", dtype: str = "float32") -> PreTrainedModel:
    """The model of a checkpoint directory, for evaluation; never runs remote code.

    A model with a classification head if its configuration names such an architecture, a causal
    language model otherwise. `dtype` is `float32`, or `auto` for the checkpoint's own.

    Raises
    ------
    CheckpointError
        A directory that transformers cannot load, or that lacks weights of its own architecture.
    """
    if checkpoint.path is None or checkpoint.is_difference:
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
