"""The expected error of pruners at the inputs that a weight meets, and its bound."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from delta_analysis.delta import Delta
from delta_analysis.laws import Law, Lawful, Number
from delta_analysis.meeting import Meeting, energy
from delta_analysis.pruning import Prune, Pruner, prepared

GAMMA = 0.05
"""The bound holds for an output with probability 1 - γ at least."""


@dataclass(frozen=True)
class ReadyPruners:
    """Pruners made ready for a delta."""

    delta: Delta
    pruners: tuple[Pruner, ...]
    seed: int
    ready: tuple[Prune, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for pruner in self.pruners:
            if pruner.random and not isinstance(pruner, Lawful):
                raise ValueError(
                    f"pruners: {pruner} is random and has no method law(tensor, name=…), so no closed form"
                )
        object.__setattr__(self, "ready", tuple(prepared(each, self.delta, self.seed) for each in self.pruners))

    def errors(self, meeting: Meeting, name: str, tensor: torch.Tensor, noise: float) -> Iterator[tuple[float, float]]:
        """Error and bound of each pruner, on the delta's tensor at the inputs of the meeting."""
        for pruner, prune in zip(self.pruners, self.ready, strict=True):
            if pruner.random and isinstance(prune, Lawful):
                yield expected_error(meeting, tensor, prune.law(tensor, name=name), noise)
            else:
                dropped = energy(meeting.outputs(prune(tensor, name=name, seed=self.seed) - tensor))
                yield dropped, dropped


def expected_error(meeting: Meeting, delta: torch.Tensor, law: Law, noise: float) -> tuple[float, float]:
    """The expected squared error of a law at some inputs, and its bound, summed over positions and outputs.

    `noise` is the noise base `Σ D_ij² x_j²`. The error is `‖B x‖² + Σ v_ij D_ij² x_j²`, with B the delta times
    the law's bias and v its variance. The bound of an output is `|B x| + √(ln(2/γ) Σ_j t_ij D_ij² x_j²)` with t
    the law's tail: DAREx (arXiv 2410.09344), appendix E.1, equation 8, for any law.
    """
    logarithm = math.log(2 / GAMMA)
    random = _random(meeting, delta, law.variance, noise)
    if not _any(law.bias):
        return random, logarithm * _random(meeting, delta, law.tail, noise)
    shift = meeting.outputs(_scaled(delta, law.bias))
    bound = shift.abs() + (logarithm * meeting.spread(_scaled(delta, _root(law.tail)))).sqrt()
    return energy(shift) + random, energy(bound)


def _random(meeting: Meeting, delta: torch.Tensor, variance: Number, noise: float) -> float:
    """The noise base of a delta each of whose entries has a variance; with a variance of 1 for all it is `noise`."""
    return variance * noise if isinstance(variance, float) else meeting.spread_sum(_scaled(delta, _root(variance)))


def _scaled(delta: torch.Tensor, by: Number) -> torch.Tensor:
    return delta * (by if isinstance(by, float) else by.to(delta))


def _root(variance: Number) -> Number:
    return variance**0.5


def _any(bias: Number) -> bool:
    """Whether a mean is off by more than rounding."""
    return bool((torch.as_tensor(bias).abs() > 1e-12).any())
