"""A weight and the inputs that it meets: the outputs that entries of its shape make there, and their energies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from delta_analysis.evaluate.texts import Batch


class Meeting(Protocol):
    """A weight at some inputs x; `entries` T are a tensor of its shape, or of its first rows."""

    def outputs(self, entries: torch.Tensor) -> torch.Tensor:
        """What the entries make of each input, `T x`: (positions, outputs)."""
        ...

    def spread(self, entries: torch.Tensor) -> torch.Tensor:
        """The squares of what each entry makes, summed for each output, `Σ_j T_ij² x_j²`: (positions, outputs)."""
        ...

    def spread_sum(self, entries: torch.Tensor) -> float:
        """The sum of `spread` over positions and outputs."""
        ...


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix (outputs, inputs), or the other way round if transposed, and its inputs (positions, inputs)."""

    x: torch.Tensor
    transposed: bool = False

    def outputs(self, entries: torch.Tensor) -> torch.Tensor:
        return self.x @ (entries if self.transposed else entries.T)

    def spread(self, entries: torch.Tensor) -> torch.Tensor:
        return Matrix(self.x.square(), self.transposed).outputs(entries.square())

    def spread_sum(self, entries: torch.Tensor) -> float:
        # Second moments of the inputs are enough, and take no product of matrices.
        moments = self.x.square().sum(dim=0, dtype=torch.float64)
        return float(entries.square().sum(dim=1 if self.transposed else 0, dtype=torch.float64) @ moments)


@dataclass(frozen=True, eq=False)
class Elementwise:
    """A weight whose every entry feeds an output alone: of an embedding, a norm or a bias; and a call of its module.

    The module's output is linear in the weight, so what entries make is its output with them as the
    weight, less that with zeros.
    """

    module: torch.nn.Module
    weight: torch.nn.Parameter
    arguments: tuple[Any, ...]
    batch: Batch

    def outputs(self, entries: torch.Tensor) -> torch.Tensor:
        whole = torch.zeros_like(self.weight, dtype=torch.float32)
        without = self._called_with(whole)
        whole[: len(entries)] = entries
        return self._called_with(whole) - without

    def spread(self, entries: torch.Tensor) -> torch.Tensor:
        return self.outputs(entries).square()

    def spread_sum(self, entries: torch.Tensor) -> float:
        return float(self.spread(entries).sum(dtype=torch.float64))

    def _called_with(self, weight: torch.Tensor) -> torch.Tensor:
        kept = self.weight.data
        try:
            self.weight.data = weight
            return positions(self.module.forward(*self.arguments), self.batch)
        finally:
            self.weight.data = kept


@dataclass(frozen=True, eq=False)
class Isotropic:
    """A weight of whose inputs nothing is known: they are taken as independent, each of mean square 1."""

    def outputs(self, entries: torch.Tensor) -> torch.Tensor:
        return entries

    def spread(self, entries: torch.Tensor) -> torch.Tensor:
        return entries.square()

    def spread_sum(self, entries: torch.Tensor) -> float:
        return float(entries.square().sum(dtype=torch.float64))


def positions(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Inputs or outputs of a module as float32 rows, without padding where it can be told."""
    values = values.detach().float()
    of_batch = values.dim() == 3 and values.shape[:2] == batch.mask.shape
    return batch.tokens(values) if of_batch else values.flatten(0, -2)
