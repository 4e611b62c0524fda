"""Ways to drop from a delta that breaks under DARE: rates and factors by layer, a low-rank part kept whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from delta_analysis._errors import checked_number, one_of
from delta_analysis.pruning import Dare, Law, Lawful, Magnitude, MagPrune, Proportional, Pruner, checked_drop_rate
from delta_analysis.studies.rescaling import factor_grid, on_test, on_validation
from delta_analysis.sweeps import kept_interval, lead, metric_of, outcome_matrix

RULES = ("least", "equal")


STEPS = 200
"""Halvings of a bracket of logarithms, more than float64 can tell apart."""


@dataclass(frozen=True)
class PerTensor:
    """A pruner of its own for each tensor, by name; `drop_rate` only says what they come to together.

    Examples
    --------
    >>> pruner = PerTensor("by hand", 0.5, (("v", Dare(0)), ("w", Dare(1))))
    >>> [pruner(torch.ones(2), name=name, seed=0).tolist() for name in ("v", "w")]
    [[1.0, 1.0], [0.0, 0.0]]
    """

    label: str
    drop_rate: float
    pruners: tuple[tuple[str, Pruner], ...]
    rescale: str = "by tensor"

    @property
    def method(self) -> str:
        return self.label

    @property
    def random(self) -> bool:
        return any(pruner.random for _, pruner in self.pruners)

    def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
        return self._of(name)(tensor, name=name, seed=seed)

    def law(self, tensor: torch.Tensor, *, name: str) -> Law:
        pruner = self._of(name)
        assert isinstance(pruner, Lawful)
        return pruner.law(tensor, name=name)

    def _of(self, name: str) -> Pruner:
        found = dict(self.pruners).get(name)
        if found is None:
            raise ValueError(f"tensor {name!r} has no pruner of its own; {self.label!r} was made for other tensors")
        return found


def allot(noise: pd.DataFrame, numel: Mapping[str, int], drop_rate: float, *, rule: str = "least") -> PerTensor:
    """DARE with drop rates allotted to tensors so that the noise that is foretold is least, or equal.

    With keep rates k, tensor l makes noise `a_l (1/k_l - 1)`, a_l its noise base as a share of the
    output of its layer, summed over its uses. Under `Σ n_l k_l = (1-p) Σ n_l`,

    - the least sum has `-a_l/k_l² + μ n_l = 0`, so `k_l = min(1, c √(a_l/n_l))`: keep rates in proportion
      to the root of the noise base of an entry;
    - equal noise 1/c has `k_l = c a_l/(c a_l + 1)`.

    In both the one number c is found so that the budget is met. A tensor without noise keeps nothing. `noise` is a
    table of `layer_noise` with one pruner, `numel` has the number of entries of each tensor of the delta.
    """
    if rule not in RULES:
        raise ValueError(one_of("rule", rule, RULES))
    if not 0 < checked_drop_rate(drop_rate) < 1:
        raise ValueError(f"drop_rate: {drop_rate} leaves nothing to allot; give one between 0 and 1")
    shares = noise.groupby("tensor")["noise_share"].sum(min_count=1)
    if missing := [name for name in numel if not shares.get(name, np.nan) >= 0]:
        raise ValueError(f"noise has no share for tensor {missing[0]!r}, one of {len(missing)} that it lacks")
    n = np.array([numel[name] for name in numel], dtype=np.float64)
    a = np.array([shares[name] for name in numel])
    rates: dict[str, Callable[[float], np.ndarray]] = {
        "least": lambda c: np.minimum(1, c * np.sqrt(a / n)),
        "equal": lambda c: c * a / (c * a + 1),
    }
    budget = (1 - drop_rate) * n.sum()
    if (most := n[a > 0].sum()) < budget:
        raise ValueError(f"tensors with noise have {most:.0f} entries, fewer than the {budget:.0f} to be kept")
    keep = rates[rule](_solve(lambda c: float(n @ rates[rule](c)), budget))
    pruners = tuple((name, Dare(1 - float(k))) for name, k in zip(numel, keep, strict=True))
    return PerTensor(f"DARE, {rule} noise", drop_rate, pruners)


def _solve(kept: Callable[[float], float], budget: float) -> float:
    """The c at which a rising function reaches the budget."""
    low, high = -300.0, 300.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(float(np.exp(middle))) < budget else (low, middle)
    return float(np.exp(high))


def factors_by_layer(noise: pd.DataFrame, drop_rate: float, weight: float) -> PerTensor:
    """Dropping with a factor 1/q for each tensor that weighs lost signal against noise.

    The factor f minimises `((1-p) f - 1)² S + weight · p(1-p) f² N`, so `f = A / ((1-p) A + weight · p)`
    with the alignment gain A = S/N, and at least 1. A weight of 0 is DARE, one of 1 the least squared
    error of the layer's output, a large one drop only. DAREx (arXiv 2410.09344) chooses factors by layer
    from its bound, and likewise tunes one number for all layers; this rule is not its own.
    """
    checked_number("weight", weight, 0, math.inf)
    if checked_drop_rate(drop_rate) == 1:
        raise ValueError("drop_rate: at 1 nothing is left to be multiplied by a factor; give one below 1")
    if noise["signal"].isna().any():
        raise ValueError("noise has no signal; factors by layer need a table of layer_noise with inputs")
    # Each use by its share of the output of its layer, or the largest layer would decide for a tied tensor.
    scale = noise["output"].where(noise["output"] > 0, 1.0) if "output" in noise else 1.0
    sums = noise.assign(signal=noise["signal"] / scale, noise=noise["noise"] / scale)
    sums = sums.groupby("tensor", sort=False)[["signal", "noise"]].sum()
    gain = (sums["signal"] / sums["noise"]).fillna(1.0)
    factors = (gain / ((1 - drop_rate) * gain + weight * drop_rate)).clip(lower=1.0)
    pruners = tuple((str(name), Dare(drop_rate, float(factor))) for name, factor in factors.items())
    return PerTensor(f"drop × factors by layer, weight {weight:g}", drop_rate, pruners)


@dataclass(frozen=True)
class LowRankResidual:
    """The best low-rank part of each matrix, kept whole, plus DARE of what is left over.

    Of the `(1-p) · n` numbers that may be kept of a matrix (m, n'), the share `share` goes to
    `r = ⌊share · (1-p) n / (m + n')⌋` pairs of singular vectors, the others to the entries of the residual
    that are not dropped. From all that is no matrix entries are dropped as by DARE, as with a share of 0.

    Source: low-rank plus residual as in Delta-CoMe's comparison, arXiv 2406.08903.

    Examples
    --------
    >>> delta = torch.outer(torch.arange(1.0, 9), torch.arange(1.0, 9))
    >>> torch.allclose(LowRankResidual(0.7)(delta, name="w", seed=0), delta, atol=1e-3)
    False
    >>> torch.allclose(LowRankResidual(0.5)(delta, name="w", seed=0), delta, atol=1e-3)
    True
    """

    drop_rate: float
    share: float = 0.5
    rescale: str = "inverse_keep"

    def __post_init__(self) -> None:
        object.__setattr__(self, "drop_rate", checked_drop_rate(self.drop_rate))
        checked_number("share", self.share, 0, 1)

    @property
    def method(self) -> str:
        return f"rank + residual, {100 * self.share:g}%"

    @property
    def random(self) -> bool:
        return 0 < self.drop_rate < 1

    def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
        """The pruned tensor, dense, of the input's shape, dtype and device."""
        kept = (1 - self.drop_rate) * tensor.numel()
        size = sum(tensor.shape) if tensor.dim() == 2 else 0
        # Where nothing is to be dropped there is nothing to save.
        rank = int(self.share * kept / size) if size and self.drop_rate else 0
        if not rank:
            return Dare(self.drop_rate)(tensor, name=name, seed=seed)
        delta = tensor.detach().to(torch.float32)
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        low = (left[:, :rank] * values[:rank]) @ right[:rank]
        residual = Dare(1 - (kept - rank * size) / tensor.numel())(delta - low, name=name, seed=seed)
        return (low + residual).to(tensor.dtype)


FACTORS = 3


WEIGHTS = (0.1, 1.0)


DRIFT = "top5_logit_mse"


FACTORED = ("one factor", "factors by layer")
"""Ways that choose among factors, of which DARE's own is one."""


def candidates(noise: pd.DataFrame, numel: Mapping[str, int], drop_rate: float) -> dict[str, tuple[Pruner, ...]]:
    """Ways to drop a share in (0, 1) of a delta, each with the pruners that it has to choose from.

    `noise` is a table of `layer_noise` with inputs and one pruner. Ways that go by it are left out unless it has a row
    for every tensor of `numel`, and tensors with noise have enough entries.
    """
    *inner, _ = factor_grid(drop_rate, FACTORS)
    window = 0.9 * min(drop_rate, 1 - drop_rate)
    by_noise: dict[str, tuple[Pruner, ...]] = {}
    shares = noise.groupby("tensor")["noise_share"].sum(min_count=1)
    noisy = sum(count for name, count in numel.items() if shares.get(name, 0.0) > 0)
    # Frozen tensors make no noise, and may be more than are to be dropped.
    if set(numel) <= set(shares.dropna().index) and noisy >= (1 - drop_rate) * sum(numel.values()):
        by_noise = {
            "factors by layer": tuple(factors_by_layer(noise, drop_rate, weight) for weight in WEIGHTS),
            "DARE, least noise": (allot(noise, numel, drop_rate),),
            "DARE, equal noise": (allot(noise, numel, drop_rate, rule="equal"),),
        }
    return {
        "DARE": (Dare(drop_rate),),
        "one factor": tuple(inner),
        **by_noise,
        "MAGPRUNE": (MagPrune(drop_rate), MagPrune(drop_rate, window)),
        "proportional": (Proportional(drop_rate),),
        "proportional by model": (Proportional(drop_rate, "model"),),
        "rank + residual": (LowRankResidual(drop_rate),),
        "MP": (Magnitude(drop_rate),),
        "MP by row": (Magnitude(drop_rate, within="row"),),
    }


def recovered(cells: pd.DataFrame, offered: Mapping[str, Sequence[Pruner]]) -> pd.DataFrame:
    """How much each way keeps of the untouched metric, on test items that chose nothing.

    `cells` are rows of `sweep` for one pair: drop rate 0 and one other, all pruners `offered`, with the metric that
    judges and `top5_logit_mse` of `OutputDrift` on texts of validation items. Where a way has several pruners, the one
    that keeps most of the metric on validation items is chosen with labels, and the one whose output drifts least
    without; DARE itself is among those that may be chosen for a factor.

    One row a `way` and `chosen_by` (`labels`, `no labels`, or `-` where there is no choice): `method`, the pruner;
    `kept, low, high`, the share kept with its 95% interval; `lead` over DARE with `lead_low, lead_high`; `promised`,
    the share kept on validation items. Those that promised most come first, so that the first is the best without
    having been picked by what judges it.

    Examples
    --------
    >>> right, wrong = [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]
    >>> made_up = {"method": ["DARE", "DARE", "MP"], "drop_rate": [0.0, 0.5, 0.5], "outcomes": [right, wrong, right]}
    >>> cells = pd.DataFrame(made_up).assign(metric="accuracy", seed=0, value=0.0)
    >>> recovered(cells, {"DARE": (Dare(0.5),), "MP": (Magnitude(0.5),)})[["way", "kept", "lead"]].values.tolist()
    [['MP', 1.0, 1.0], ['DARE', 0.0, 0.0]]
    """
    drift = cells[(cells["metric"] == DRIFT) & (cells["drop_rate"] > 0)].groupby("method")["value"].mean()
    judged = cells[cells["metric"] != DRIFT]
    metric = metric_of(judged)
    validation, test = on_validation(judged), on_test(judged)
    start = outcome_matrix(test[test["drop_rate"] == 0].head(1))
    validation_start = outcome_matrix(validation[validation["drop_rate"] == 0].head(1)).mean()
    worth = validation[validation["drop_rate"] > 0].groupby("method")["value"].mean()
    worth = worth if metric.larger_is_better else -worth
    (dare,) = offered["DARE"]
    rows = []
    for way, pruners in offered.items():
        methods = [each.method for each in pruners]
        if way in FACTORED:
            methods.append(dare.method)
        choices = (
            {"-": methods[0]}
            if len(methods) == 1
            else {
                "labels": str(worth[methods].idxmax()),
                "no labels": str(drift[methods].idxmin()),
            }
        )
        for chosen_by, method in choices.items():
            promised = validation[(validation["method"] == method) & (validation["drop_rate"] > 0)]
            own = test[(test["method"] == method) & (test["drop_rate"] > 0)]
            kept = kept_interval(metric, outcome_matrix(own), start)
            both = test[(test["drop_rate"] == 0) | test["method"].isin([method, dare.method])]
            ahead = lead(both, method, dare.method)
            rows.append(
                {
                    "way": way,
                    "chosen_by": chosen_by,
                    "method": method,
                    **dict(zip(("kept", "low", "high"), kept, strict=True)),
                    **dict(zip(("lead", "lead_low", "lead_high"), ahead, strict=True)),
                    "promised": float(metric.kept_share(outcome_matrix(promised).mean(), validation_start)),
                }
            )
    return pd.DataFrame(rows).sort_values("promised", ascending=False, kind="stable", ignore_index=True)
