"""The inputs of a layer, and how entries in the place of its weight respond to them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.pytorch_utils import Conv1D

from delta_analysis.evaluation import Batch


class LayerInputs(Protocol):
    """Inputs x of a weight; `entries` T are a tensor of its shape, or of its first rows."""

    def responses(self, entries: torch.Tensor) -> torch.Tensor:
        """`T x` of each input: (positions, outputs)."""
        ...

    def noise_base(self, entries: torch.Tensor) -> float:
        """`Σ_ij T_ij² x_j²`, summed over positions."""
        ...


@dataclass(frozen=True, eq=False)
class Matrix:
    """Of a matrix (outputs, inputs), or the other way round if transposed: inputs (positions, inputs)."""

    x: torch.Tensor
    transposed: bool = False

    def responses(self, entries: torch.Tensor) -> torch.Tensor:
        return self.x @ (entries if self.transposed else entries.T)

    def noise_base(self, entries: torch.Tensor) -> float:
        # Second moments of the inputs are enough, and take no product of matrices.
        moments = self.x.square().sum(dim=0)
        squares = entries.square()
        return float((moments @ squares if self.transposed else squares @ moments).sum(dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class Elementwise:
    """Of a norm's weight, or a bias, each entry of which feeds an output of its own: inputs (positions, outputs)."""

    x: torch.Tensor

    def responses(self, entries: torch.Tensor) -> torch.Tensor:
        return self.x[:, : len(entries)] * entries

    def noise_base(self, entries: torch.Tensor) -> float:
        return energy(self.responses(entries))


@dataclass(frozen=True, eq=False)
class Rows:
    """Of an embedding, of which every input takes a row: a call of it."""

    module: torch.nn.Module
    arguments: tuple[Any, ...]
    batch: Batch

    def responses(self, entries: torch.Tensor) -> torch.Tensor:
        rows = len(self.module.get_parameter("weight"))
        whole = entries if len(entries) == rows else torch.nn.functional.pad(entries, (0, 0, 0, rows - len(entries)))
        return positions(_twin(self.module, weight=whole).forward(*self.arguments), self.batch)

    def noise_base(self, entries: torch.Tensor) -> float:
        return energy(self.responses(entries))


@dataclass(frozen=True, eq=False)
class Isotropic:
    """Of a weight of whose inputs nothing is known: they are taken as independent, each of mean square 1."""

    def responses(self, entries: torch.Tensor) -> torch.Tensor:
        return entries

    def noise_base(self, entries: torch.Tensor) -> float:
        return energy(entries)


def layer_inputs(
    module: torch.nn.Module, parameter: str, arguments: tuple[Any, ...], made: torch.Tensor, batch: Batch
) -> LayerInputs:
    """What a parameter of a linear layer, embedding or norm is applied to in the call that made the rows `made`."""
    if parameter == "bias":
        return Elementwise(torch.ones_like(made))
    if isinstance(module, torch.nn.Linear | Conv1D):
        return Matrix(positions(arguments[0], batch), isinstance(module, Conv1D))
    if isinstance(module, torch.nn.Embedding):
        return Rows(module, arguments, batch)
    return Elementwise(_normed(module, arguments, batch))


def _normed(module: torch.nn.Module, arguments: tuple[Any, ...], batch: Batch) -> torch.Tensor:
    """What a norm multiplies by its weight: its output at a weight of one, less that at zero."""
    arguments = tuple(each.float() if isinstance(each, torch.Tensor) else each for each in arguments)
    one = torch.ones_like(module.get_parameter("weight"), dtype=torch.float32)
    at_one, at_zero = (_twin(module, weight=weight).forward(*arguments) for weight in (one, torch.zeros_like(one)))
    return positions(at_one - at_zero, batch)


def _twin(module: torch.nn.Module, **parameters: torch.Tensor) -> torch.nn.Module:
    """The module with other parameters, in float32 all of them; it itself is left alone."""
    others = {name: own.detach().float() for name, own in module.named_parameters() if name not in parameters}
    twin = copy.copy(module)
    vars(twin)["_parameters"] = {**module._parameters, **others, **parameters}
    return twin


def energy(values: torch.Tensor) -> float:
    """The sum of squares: a row at a time in float32, over rows in float64, without a copy of the values."""
    return float(torch.linalg.vector_norm(values, dim=-1).double().square().sum())


def positions(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Inputs or outputs of a module as float32 rows, without padding where it can be told."""
    values = values.detach().float()
    texts, longest = batch.mask.shape
    if values.dim() == 2 and len(values) == texts * longest:
        values = values.unflatten(0, (texts, longest))
    elif values.dim() > 2 and values.shape[:2] == (1, longest):
        # Embeddings of positions are made once for all texts.
        values = values.expand(texts, *values.shape[1:])
    if values.dim() > 2 and values.shape[:2] == batch.mask.shape:
        values = batch.tokens(values)
    return values.flatten(0, -2)
