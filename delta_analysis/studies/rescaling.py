"""The factor that dropping is followed by: between 1 (drop only) and 1/(1-p) (DARE), chosen with and without labels."""

from __future__ import annotations

import numpy as np
import pandas as pd

from delta_analysis.pruning import Dare
from delta_analysis.sweeps import Interval, lead


def factor_grid(drop_rate: float, count: int) -> list[Dare]:
    """`count` prunings at one drop rate, whose factors 1/q go from 1 to 1/(1-p) in equal ratios.

    The first is drop only (q = 1), the last is DARE (q = 1 - p): the range that DAREx searches.

    Examples
    --------
    >>> [round(1 / each.rescale, 3) for each in factor_grid(0.75, 5)[1:-1]]
    [0.707, 0.5, 0.354]
    """
    inner = [(1 / (1 - drop_rate)) ** (k / (count - 1)) for k in range(1, count - 1)]
    return [Dare(drop_rate, "none"), *(Dare(drop_rate, factor) for factor in inner), Dare(drop_rate)]


def factor_of(cells: pd.DataFrame) -> pd.Series:
    """The factor 1/q of each row of a sweep of `factor_grid`."""
    plain = {"none": pd.Series(1.0, cells.index), "inverse_keep": 1 / (1 - cells["drop_rate"])}
    numbers = pd.to_numeric(cells["rescale"].where(~cells["rescale"].isin(list(plain))))
    for name, values in plain.items():
        numbers = numbers.where(cells["rescale"] != name, values)
    return numbers


def best_factors(cells: pd.DataFrame, *, drift: str = "top5_logit_mse") -> pd.DataFrame:
    """The best factor of each pair and drop rate, chosen on validation questions, judged on test questions.

    `cells` is a sweep of `factor_grid` and of drop rate 0, with an accuracy and the metric `drift` on texts of
    validation questions. With labels the factor of highest accuracy wins, without that of least drift (q_v and q_e of
    DAREx, arXiv 2410.09344); of equal ones the largest, nearest to DARE's.

    One row a `pair`, `drop_rate` and `chosen_by` (`labels`, `no labels`): `factor` and its `q`; `dare`, whether it is
    DARE's own; `kept`, the share of the untouched accuracy, and `dare_kept`; `lead` over DARE with its 95% interval
    `low, high`; `regret`, how much more the factor chosen with labels keeps, with `regret_low, regret_high`.
    """
    cells = cells.assign(factor=factor_of(cells))
    rows = []
    for (pair, rate), here in cells[cells["drop_rate"] > 0].groupby(["pair", "drop_rate"], sort=False):
        untouched = cells[(cells["pair"] == pair) & (cells["drop_rate"] == 0) & (cells["metric"] == "accuracy")]
        answers = here[here["metric"] == "accuracy"]
        scores = {
            "labels": on_validation(answers).groupby("factor")["value"].mean(),
            "no labels": -here[here["metric"] == drift].groupby("factor")["value"].mean(),
        }
        test = on_test(pd.concat([untouched, answers]))
        start = test.loc[test["drop_rate"] == 0, "value"].iloc[0]
        own = float(answers["factor"].max())
        for chosen_by, score in scores.items():
            factor = _best(score)
            row = {"pair": pair, "drop_rate": rate, "chosen_by": chosen_by, "factor": factor, "q": 1 / factor}
            kept = test[(test["drop_rate"] > 0)].groupby("factor")["value"].mean() / start
            row |= {"dare": factor == own, "kept": kept[factor], "dare_kept": kept[own]}
            labelled = _best(scores["labels"])
            ahead, regret = _lead(test, factor, own), _lead(test, labelled, factor)
            row |= {"lead": ahead.value, "low": ahead.low, "high": ahead.high}
            rows.append({**row, "regret": regret.value, "regret_low": regret.low, "regret_high": regret.high})
    return pd.DataFrame(rows)


def validation_and_test(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The halves of `count` items that choose and that judge, drawn once and for all: kinds of items may alternate."""
    order = np.random.default_rng(count).permutation(count)
    return np.sort(order[: count // 2]), np.sort(order[count // 2 :])


def on_validation(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells on the half of their items that chooses."""
    return _on_half(cells, 0)


def on_test(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells on the half of their items that judges."""
    return _on_half(cells, 1)


def _on_half(cells: pd.DataFrame, half: int) -> pd.DataFrame:
    outcomes = [np.asarray(values)[validation_and_test(len(values))[half]].tolist() for values in cells["outcomes"]]
    return cells.assign(outcomes=outcomes, value=[float(np.mean(values)) for values in outcomes])


def _best(scores: pd.Series) -> float:
    """The factor of the highest score, the largest of equal ones."""
    return float(scores[scores == scores.max()].index.max())


def _lead(cells: pd.DataFrame, factor: float, other: float) -> Interval:
    """How much more one factor keeps than another."""
    if factor == other:
        return Interval(0.0, 0.0, 0.0)
    named = cells.assign(method=[repr(float(each)) for each in cells["factor"]])
    chosen = named[(named["drop_rate"] == 0) | named["factor"].isin([factor, other])]
    return lead(chosen, repr(factor), repr(other))


def agreement(cells: pd.DataFrame, *, drift: str = "top5_logit_mse") -> pd.DataFrame:
    """Spearman's `correlation` over factors of less drift with accuracy, both means over seeds, by `pair, drop_rate`.

    It is missing where accuracy does not vary.
    """
    cells = cells.assign(factor=factor_of(cells))
    rows = []
    for (pair, rate), here in cells[cells["drop_rate"] > 0].groupby(["pair", "drop_rate"], sort=False):
        means = here.pivot_table(index="factor", columns="metric", values="value")
        ranks = means[["accuracy", drift]].rank()
        varies = means["accuracy"].max() > means["accuracy"].min()
        correlation = -float(np.corrcoef(ranks["accuracy"], ranks[drift])[0, 1]) if varies else np.nan
        rows.append({"pair": pair, "drop_rate": rate, "correlation": correlation})
    return pd.DataFrame(rows)
