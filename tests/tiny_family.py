"""A tiny base and its fine-tune on disk, and evaluations that read the weights they are given, also in processes."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from delta_analysis.evaluation import Kind
from delta_analysis.sweeps.pairs import Pair
from delta_analysis.zoo.tokenizer import character_tokenizer

NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"
UP, QUERY = "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"


class Family(NamedTuple):
    """Weights on disk and in memory; all on the grid of bfloat16, so that differences and sums are exact."""

    base: Path
    finetuned: Path
    base_weights: dict[str, torch.Tensor]
    finetuned_weights: dict[str, torch.Tensor]

    def pair(self, name: str = "base → tuned") -> Pair:
        return Pair(name, str(self.base), str(self.finetuned))

    @property
    def delta(self) -> dict[str, torch.Tensor]:
        return {name: self.finetuned_weights[name] - base for name, base in self.base_weights.items()}


def make_family(folder: Path) -> Family:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=True,
        )
    ).to(torch.bfloat16)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            # The first half of each tensor is fine-tuned.
            parameter.view(-1)[: parameter.numel() // 2] += 2.0**-7
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(folder / name)
        character_tokenizer().save_pretrained(folder / name)
    weights = ({name: weight.detach().float() for name, weight in each.named_parameters()} for each in (base, tuned))
    return Family(folder / "base", folder / "tuned", *weights)


def flat(weights: dict[str, torch.Tensor], *names: str) -> np.ndarray:
    return torch.cat([weights[name].detach().double().flatten() for name in names]).numpy()


def without_seconds(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(columns="seconds")


class Judge:
    """What the evaluations below have in common."""

    kind: ClassVar[Kind] = "score"
    protocol = "reads weights"
    texts = ("text",)

    def prepared(self, untouched: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Self:
        return self


@dataclass(frozen=True)
class Reads(Judge):
    """Gives the entries of some parameters as outcomes."""

    names: tuple[str, ...] = (NORM,)
    metric: str = "accuracy"
    name: str = "reads"

    @property
    def kind(self) -> Kind:  # type: ignore[override]
        return "perplexity" if self.metric == "perplexity" else "score"

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, np.ndarray]:
        assert not model.training
        assert tokenizer.padding_side == "left"
        return {self.metric: flat(dict(model.named_parameters()), *self.names)}


@dataclass(frozen=True)
class Logs(Judge):
    """A number that is another for other weights, which it also appends to a file, a line a call."""

    log: str
    seconds: float = 0.0
    name: str = "logs"

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, np.ndarray]:
        entries = flat(dict(model.named_parameters()), UP, QUERY)
        value = float(entries @ np.sqrt(np.arange(1, 1 + len(entries))))
        with Path(self.log).open("a") as file:
            file.write(f"{value!r}\n")
        time.sleep(self.seconds)
        return {"accuracy": np.array([value])}


def calls(logs: Logs) -> int:
    """How often the evaluation has been called since this was asked last."""
    log = Path(logs.log)
    count = len(log.read_text().splitlines()) if log.exists() else 0
    log.unlink(missing_ok=True)
    return count


def cells_of(out_dir: Path) -> list[Path]:
    return sorted(out_dir.rglob("*.parquet"))


@dataclass(frozen=True)
class Fails(Judge):
    """Fails while a file is there, on weights that are not those of the fine-tune."""

    file: str
    name: str = "fails"

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, np.ndarray]:
        if Path(self.file).exists():
            raise RuntimeError("the cause is there")
        return {"accuracy": np.ones(3)}


@dataclass(frozen=True)
class KillsItsProcess(Judge):
    """Kills the process that it runs in, unless a file is there."""

    file: str
    name: str = "kills"

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, np.ndarray]:
        if not Path(self.file).exists():
            os.kill(os.getpid(), 9)
        return {"accuracy": np.ones(3)}


class Inline(Executor):
    """Runs a call when it is submitted, in no thread of its own."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future
