"""What recovers a delta that breaks under DARE: ways to drop as much, and how much each of them keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from delta_analysis.comparison import lead
from delta_analysis.curve import outcome_matrix
from delta_analysis.factors import factor_grid, on_half
from delta_analysis.intervals import kept_interval, metric_named
from delta_analysis.mending import LowRank, allot, factors_by_layer
from delta_analysis.proportional import Proportional
from delta_analysis.pruning import Dare, Magnitude, MagPrune, Pruner

FACTORS = 3
WEIGHTS = (0.1, 1.0)
DRIFT = "top5_logit_mse"
FACTORED = ("one factor", "factors by layer")
"""Ways that choose among factors, of which DARE's own is one."""


def ways(noise: pd.DataFrame, numel: Mapping[str, int], drop_rate: float) -> dict[str, tuple[Pruner, ...]]:
    """Ways to drop a share of a delta, each with the pruners that it has to choose from.

    Parameters
    ----------
    noise : a table of `layer_noise` with inputs and one pruner. Ways that go by it are left out unless it has
        a row for every tensor, and tensors with noise have enough entries.
    numel : name of each tensor of the delta -> its number of entries.
    drop_rate : p, in (0, 1).

    Raises
    ------
    ValueError
        A drop rate of 0 or 1, or outside.

    Examples
    --------
    >>> noise = pd.DataFrame({"tensor": ["w"], "signal": [2.0], "noise": [1.0], "noise_share": [0.1]})
    >>> [round(pruner.drop_rate, 9) for pruner in ways(noise, {"w": 100}, 0.75)["DARE, least noise"]]
    [0.75]
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
        "rank + residual": (LowRank(drop_rate),),
        "MP": (Magnitude(drop_rate),),
        "MP by row": (Magnitude(drop_rate, scope="row"),),
    }


def recovered(cells: pd.DataFrame, offered: Mapping[str, Sequence[Pruner]]) -> pd.DataFrame:
    """How much each way keeps of the untouched metric, on items that chose nothing.

    One half of the items chooses, the other judges (`halves`). Where a way has several pruners, the one
    that keeps most of the metric is chosen with labels, and the one whose output drifts least without;
    DARE itself is among those that may be chosen for a factor.

    Parameters
    ----------
    cells : rows of `sweep` for one pair: drop rate 0 and one other, the pruners of all ways, with the
        metric that judges and the metric `top5_logit_mse` of `OutputDrift` on texts of choosing items.
    offered : as from `ways`, DARE among them.

    Returns
    -------
    DataFrame, one row a `way` and `chosen_by` (`labels`, `no labels`, or `-` where there is no choice):
    `method`, the pruner; `kept, low, high`, the share of the untouched metric with its 95% interval;
    `lead` over DARE with `lead_low, lead_high`; `promised`, the share kept on choosing items. Those that
    promised most come first, so that the first is the best without having been picked by what judges it.

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
    name = str(judged["metric"].iloc[0])
    metric = metric_named(name)
    choosing, judging = on_half(judged, 0), on_half(judged, 1)
    start = outcome_matrix(judging[judging["drop_rate"] == 0].head(1))
    chosen_start = outcome_matrix(choosing[choosing["drop_rate"] == 0].head(1)).mean()
    worth = choosing[choosing["drop_rate"] > 0].groupby("method")["value"].mean()
    worth = -worth if name == "perplexity" else worth
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
            promised = choosing[(choosing["method"] == method) & (choosing["drop_rate"] > 0)]
            own = judging[(judging["method"] == method) & (judging["drop_rate"] > 0)]
            kept = kept_interval(metric, outcome_matrix(own), start)
            both = judging[(judging["drop_rate"] == 0) | judging["method"].isin([method, dare.method])]
            ahead = lead(both, method, dare.method)
            rows.append(
                {
                    "way": way,
                    "chosen_by": chosen_by,
                    "method": method,
                    **dict(zip(("kept", "low", "high"), kept, strict=True)),
                    **dict(zip(("lead", "lead_low", "lead_high"), ahead, strict=True)),
                    "promised": float(metric.kept_share(outcome_matrix(promised).mean(), chosen_start)),
                }
            )
    return pd.DataFrame(rows).sort_values("promised", ascending=False, kind="stable", ignore_index=True)
