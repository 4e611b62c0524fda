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


def ways(noise: pd.DataFrame, numel: Mapping[str, int], drop_rate: float) -> dict[str, tuple[Pruner, ...]]:
    """Ways to drop a share of a delta, each with the pruners that it has to choose from.

    Parameters
    ----------
    noise : a table of `layer_noise` with inputs and one pruner, a row for every tensor.
    numel : name of each tensor of the delta -> its number of entries.
    drop_rate : p, in (0, 1).

    Raises
    ------
    ValueError
        A drop rate of 0 or 1, or outside; a tensor without a row in `noise`.

    Examples
    --------
    >>> noise = pd.DataFrame({"tensor": ["w"], "signal": [2.0], "noise": [1.0], "noise_share": [0.1]})
    >>> [round(pruner.drop_rate, 9) for pruner in ways(noise, {"w": 100}, 0.75)["DARE, least noise"]]
    [0.75]
    """
    *inner, _ = factor_grid(drop_rate, FACTORS)
    window = 0.9 * min(drop_rate, 1 - drop_rate)
    return {
        "DARE": (Dare(drop_rate),),
        "one factor (DAREx-q)": tuple(inner),
        "factors by layer": tuple(factors_by_layer(noise, drop_rate, weight) for weight in WEIGHTS),
        "MAGPRUNE": (MagPrune(drop_rate), MagPrune(drop_rate, window)),
        "proportional": (Proportional(drop_rate),),
        "proportional by model": (Proportional(drop_rate, "model"),),
        "DARE, least noise": (allot(noise, numel, drop_rate),),
        "DARE, equal noise": (allot(noise, numel, drop_rate, rule="equal"),),
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
    `lead` over DARE with `lead_low, lead_high`; most kept first.

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
    worth = choosing[choosing["drop_rate"] > 0].groupby("method")["value"].mean()
    worth = -worth if name == "perplexity" else worth
    (dare,) = offered["DARE"]
    rows = []
    for way, pruners in offered.items():
        methods = [each.method for each in pruners]
        if way in ("one factor (DAREx-q)", "factors by layer"):
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
                }
            )
    return pd.DataFrame(rows).sort_values("kept", ascending=False, kind="stable", ignore_index=True)
