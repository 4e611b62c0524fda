"""What an edit does to the weights, and to the outputs of the layers that they make."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from delta_analysis.deltas import load_delta
from delta_analysis.evaluation.models import parameters_of
from delta_analysis.evaluation.protocol import Evaluation, Outcomes, Prepared

LONGEST_TEXT = 256
"""Tokens that are read of each text."""
N_POSITIONS = 256
"""About how many positions, spread over all texts, have their layer inputs held."""


@dataclass(frozen=True)
class WeightDamage:
    """Errors of an edited delta: of its entries, and of what its layers make of their inputs.

    With D a layer's delta, D̂ the edited one and x the layer's input in the untouched fine-tune:
    `parameter_error` is `Σ(D̂-D)² / ΣD²` over all tensors, `layer_error` the median over linear layers
    of `Σ|D̂x-Dx|² / Σ|Dx|²`, and `signal_kept` that of `Σ⟨D̂x, Dx⟩ / Σ|Dx|²`. One outcome each: these are
    exact for the model and the texts, and vary with the seed alone.

    Attributes
    ----------
    base : source of the weights that the fine-tune started from; None for zero.
    texts : what the layers' inputs are taken from, up to 256 tokens of each.
    name : what tables call it.
    """

    base: str | None
    texts: tuple[str, ...]
    name: str = "weight damage"

    @property
    def protocol(self) -> str:
        """What is measured, on what."""
        return (
            "Relative squared error of the delta's entries and of each linear layer's output, and the share of a "
            f"layer's signal that is kept (medians over layers), on about {N_POSITIONS} positions of "
            f"{len(self.texts)} texts; exact for a mask, so intervals resample masks alone."
        )

    def prepared(self, untouched: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
        """The evaluation with the delta and the layers' inputs at hand.

        Raises
        ------
        ValueError
            No text, or a delta without a linear layer.
        """
        delta = dict(load_delta(base=self.base, finetuned=untouched).items())
        linear = {
            name: module
            for name, module in untouched.named_modules()
            if isinstance(module, torch.nn.Linear) and f"{name}.weight" in delta
        }
        texts = [tokenizer(text, add_special_tokens=False)["input_ids"][:LONGEST_TEXT] for text in self.texts]
        texts = [text for text in texts if text]
        if not (linear and texts):
            raise ValueError("no linear layer is in the delta, or no text is given; there is nothing to measure")
        stride = max(sum(map(len, texts)) // N_POSITIONS, 1)
        inputs: dict[str, list[torch.Tensor]] = {}
        with _recorded(linear, inputs, stride), torch.inference_mode():
            for text in texts:
                untouched(input_ids=torch.tensor([text], device=untouched.device), use_cache=False)
        weights = {name: _weight(untouched, name, tensor) for name, tensor in delta.items()}
        energy = sum(map(_energy, delta.values())) or 1.0
        positions = {name: torch.cat(rows) for name, rows in inputs.items()}

        def judge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Outcomes:
            wrong, layers = 0.0, []
            for name, tensor in delta.items():
                error = _weight(model, name, tensor) - weights[name]
                wrong += _energy(error)
                if name in positions:
                    layers.append(_layer_error(tensor, error, positions[name]))
            of_layers, kept = np.median(layers, axis=0)
            found = {"parameter_error": wrong / energy, "layer_error": of_layers, "signal_kept": kept}
            return {metric: np.array([value]) for metric, value in found.items()}

        return Prepared(self, judge)

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Outcomes:
        """Needs the untouched model first."""
        raise ValueError("WeightDamage compares with the untouched model; call .prepared(untouched, tokenizer) first")


@contextmanager
def _recorded(layers: dict[str, torch.nn.Linear], inputs: dict[str, list[torch.Tensor]], stride: int) -> Iterator[None]:
    """While it lasts, one in `stride` inputs of every layer is appended under its weight's name, (tokens, in)."""

    def record(name: str, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        rows = arguments[0].detach().flatten(0, -2)[::stride]
        inputs.setdefault(f"{name}.weight", []).append(rows.to("cpu", copy=True))

    hooks = [module.register_forward_pre_hook(partial(record, name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _weight(model: PreTrainedModel, name: str, delta: torch.Tensor) -> torch.Tensor:
    """The part of a weight that the delta covers: the rows of tokens that both vocabularies have."""
    weight = parameters_of(model)[name].detach()
    return (weight[: len(delta)] if weight.dim() else weight).to("cpu", copy=True)


def _energy(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().sum())


def _layer_error(delta: torch.Tensor, error: torch.Tensor, inputs: torch.Tensor) -> tuple[float, float]:
    """Relative error of a layer's output, and the part of the signal that is kept."""
    signal, wrong = (inputs @ delta.T).double(), (inputs @ error.T).double()
    energy = _energy(signal) or 1.0
    return _energy(wrong) / energy, 1 + float((wrong * signal).sum()) / energy
