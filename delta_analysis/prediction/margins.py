"""Margins expanded in the noise that dropping makes: what is kept at any drop rate, from noise at one.

DARE at drop rate p adds noise of variance r·D² to the weights, r = p/(1-p). Normal noise of that variance at odds
r0 is added and taken away again: half the difference of the margins is their linear response, half the sum less
the untouched margins their shift. At odds r the margins are taken to be

    margins + (r/r0)^a·(mean shift + mix of the deviations of the shifts) + (r/r0)^b·(mix of the responses),

a = 1 and b = 1/2 while the noise is small, and as seen between two odds where it is not,
with independent normal weights in both mixes, and what a sweep would measure follows from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from delta_analysis._kernels import stream_key
from delta_analysis.evaluation import Margins, parameters_of
from delta_analysis.pruning import Dare
from delta_analysis.sweeps import HIGHEST, KEPT_SHARE, LOWEST, Floor, Metric, kept_shares, logit

ENDS = logit(LOWEST), logit(HIGHEST)
BEYOND = ENDS[0] - 6, ENDS[1] + 6
"""Where a curve is followed: also beyond the ends, so that an interval may end within."""
MIXES = 200
"""Each mix is one mask that might be."""
RESAMPLES = 200
PRECISION = 0.01

Change = Callable[[str, torch.Tensor], torch.Tensor]
"""What is added for a tensor of the delta, given its name; drawn anew each time, never held for all tensors."""


class Placed(Protocol):
    """Where stored tensors stand in the model, as a `Placement` knows."""

    @property
    def stored(self) -> tuple[str, ...]: ...
    def to_model(self, tensors: Mapping[str, torch.Tensor], /) -> dict[str, torch.Tensor]: ...


@dataclass(frozen=True, eq=False)
class Weights:
    """A model and a part of its delta, whose weights are changed in place and back.

    Adding and taking away rounds in float32, by some 1e-7 of what is added.
    """

    model: PreTrainedModel
    placed: Sequence[Placed]
    delta: Mapping[str, torch.Tensor]

    def add(self, change: Change, factor: float = 1.0) -> None:
        parameters = parameters_of(self.model)
        with torch.no_grad():
            for placement in self.placed:
                # Of tensors that are fused in the model, those out of scope stay as they are.
                own = [name for name in placement.stored if name in self.delta]
                changes = {name: change(name, self.delta[name].to(self.model.device)) for name in own}
                if not own:
                    continue
                stored = {name: changes.get(name, torch.zeros_like(changes[own[0]])) for name in placement.stored}
                for name, tensor in placement.to_model(stored).items():
                    # The delta may lack rows of tokens that only one vocabulary has.
                    target = parameters[name].data
                    (target[: len(tensor)] if tensor.dim() else target).add_(tensor.to(target), alpha=factor)

    def outcomes(self, change: Change, judged: Margins, factor: float = 1.0) -> np.ndarray:
        """Outcomes (items,) with a change."""
        self.add(change, factor)
        found = judged.read(self.model)[1]
        self.add(change, -factor)
        return found


def whole(name: str, delta: torch.Tensor) -> torch.Tensor:
    """The delta itself."""
    return delta


def noise(seed: int) -> Change:
    """The delta times normal numbers, which the device draws."""

    def drawn(name: str, delta: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator(delta.device).manual_seed(stream_key(seed, name)[0])
        return torch.empty_like(delta).normal_(generator=generator).mul_(delta)

    return drawn


def mask(drop_rate: float, seed: int) -> Change:
    """What DARE changes."""
    dare = Dare(drop_rate)
    return lambda name, delta: dare(delta, name=name, seed=seed).sub_(delta)


@dataclass(frozen=True, eq=False)
class Expansion:
    """Margins (rows, rivals), and their shifts and linear responses (noises, rows, rivals) at some odds."""

    odds: float
    margins: np.ndarray
    shifts: np.ndarray
    responses: np.ndarray

    def without(self, i: int) -> Expansion:
        """As if one of the noises had not been drawn."""
        return Expansion(self.odds, self.margins, np.delete(self.shifts, i, 0), np.delete(self.responses, i, 0))


def expand(weights: Weights, judged: Margins, odds: float, noises: int, seed: int) -> Expansion:
    """The expansion from so many noises, each added and taken away."""
    margins, _ = judged.read(weights.model)
    shifts, responses = [], []
    step = math.sqrt(odds)
    for i in range(noises):
        drawn = noise(seed + i)
        weights.add(drawn, step)
        plus, _ = judged.read(weights.model)
        weights.add(drawn, -2 * step)
        minus, _ = judged.read(weights.model)
        weights.add(drawn, step)
        shifts.append((plus + minus) / 2 - margins)
        responses.append((plus - minus) / 2)
    return Expansion(odds, *(np.asarray(each, dtype=np.float32) for each in (margins, shifts, responses)))


class Powers(NamedTuple):
    """With which powers of the odds the shifts and the responses grow."""

    shifts: float
    responses: float


SMALL = Powers(1.0, 0.5)
"""Those of small noise."""
STEP = 0.25
"""Odds nearer to each other than this, on their logarithm, tell no power."""


def powers_between(one: Expansion, other: Expansion) -> Powers:
    """The powers seen between two odds: less than those of small noise where norms and the like saturate."""
    step = math.log(other.odds / one.odds)
    if abs(step) < STEP:
        return SMALL
    sizes = [(np.square(each.shifts.mean(0)).mean(), np.square(each.responses).mean()) for each in (one, other)]
    found = [
        math.log(after / before) / 2 / step if before > 0 < after else small
        for before, after, small in zip(*sizes, SMALL, strict=True)
    ]
    return Powers(*(min(max(power, 0.0), 2 * small) for power, small in zip(found, SMALL, strict=True)))


@dataclass(frozen=True, eq=False)
class Scale:
    """How outcomes become a share of what the untouched model has above the floor."""

    metric: Metric
    untouched: np.ndarray
    floor: Floor

    def kept(self, outcomes: np.ndarray) -> float:
        """Of outcomes (masks, items)."""
        return kept_shares(self.metric, {0.0: self.untouched[None], 0.5: outcomes}, self.floor)[0.5]

    def item_variance(self, outcomes: np.ndarray) -> float:
        """Variance of what is kept over items that are drawn anew."""
        rng, count, found = np.random.default_rng(0), outcomes.shape[1], []
        means = outcomes.mean(0)
        for _ in range(RESAMPLES):
            drawn = rng.integers(count, size=count)
            left = self.floor.outcomes[:, drawn] if self.floor.outcomes.shape[1] == count else self.floor.outcomes
            scale = Scale(self.metric, self.untouched[drawn], Floor(left, self.floor.chance))
            found.append(scale.kept(means[None, drawn]))
        return float(np.var(found))


class Curve:
    """What is kept, foretold over log odds."""

    def __init__(self, found: Expansion, judged: Margins, scale: Scale, powers: Powers = SMALL) -> None:
        self.found, self.judged, self.scale, self.powers = found, judged, scale, powers
        count = len(found.responses)
        weights, others = np.random.default_rng(0).standard_normal((2, MIXES, count)).astype(np.float32)
        self.shift = found.shifts.mean(0)
        self.responses = np.tensordot(weights / math.sqrt(count), found.responses, 1)
        self.deviations = np.tensordot(others / math.sqrt(count - 1), found.shifts - self.shift, 1)

    def outcomes(self, x: float) -> np.ndarray:
        """Outcomes (mixes, items) at log odds x."""
        ratio = math.exp(x) / self.found.odds
        shifts, responses = (np.float32(ratio**power) for power in self.powers)
        return self.judged.outcomes(
            self.found.margins + shifts * (self.shift + self.deviations) + responses * self.responses
        )

    def kept(self, x: float) -> float:
        return self.scale.kept(self.outcomes(x))

    def spread(self, x: float) -> float:
        """Standard deviation of what is kept between mixes."""
        return float(np.std([self.scale.kept(one[None]) for one in self.outcomes(x)]))

    def tolerated(self, keep: float = KEPT_SHARE) -> float:
        """Log odds up to which so much is kept."""
        return crossing_down(self.kept, keep, *BEYOND)


def crossing_down(falling: Callable[[float], float], level: float, low: float, high: float) -> float:
    """Where a function falls below a level, by bisection; an end if it does not between them."""
    if falling(low) < level:
        return low
    if falling(high) >= level:
        return high
    while high - low > PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) >= level else (low, middle)
    return (low + high) / 2
