"""The candidates that report 08 compares: the merges that each method has to choose from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from delta_analysis.evaluation import ExactMatch
from delta_analysis.merging import Average, Della, Fisher, MergeMethod, RegMean, Slack, TaskArithmetic, Ties, Widen
from delta_analysis.pruning import Dare, Pruner
from delta_analysis.studies.rescaling import validation_and_test
from delta_analysis.sweeps import (
    MEAN,
    Interval,
    MergeSource,
    Merging,
    Pair,
    metric_interval,
    outcome_matrix,
    paired_difference,
    sweep,
)

SUM, ELECTED, PUBLISHED = "task arithmetic", "TIES, sum", "TIES"
"""Ways along continual pre-training: the sum of both deltas, that without what is outvoted, and TIES as published."""


BEFORE, AFTERWARDS = "before merging", "fine-tuned afterwards"


TRIMMED, DELLA = "TIES, trimmed", "DELLA"


AFTER_DARE = ("average", SUM, "Fisher", "RegMean", "TIES")
"""The methods that DARE's paper puts DARE before."""


PUBLISHED_TRIM = 0.8
"""TIES keeps a fifth of each delta."""


SLACKS = (1.0, 3.0, 10.0, math.inf)


WEIGHTS = (0.5, 0.75)
"""Weights of a fine-tune, beside 1, that are offered where it meets a far larger delta."""


Sources = tuple[MergeSource, ...]


def slack_name(relative: float) -> str:
    """What the election with slack is called.

    Examples
    --------
    >>> slack_name(1.0), slack_name(math.inf)
    ('slack 1', 'slack ∞')
    """
    return f"slack {relative:g}".replace("inf", "∞")


def candidates(sources: Sources, rates: Sequence[float], scalings: Sequence[float]) -> dict[str, list[Merging]]:
    """Name of each method -> its candidates, merges at every drop rate (0 among them) and scaling.

    DARE comes before a method, but for TIES that trims by itself and DELLA; in `average` nothing is scaled.
    """
    after_dare: dict[str, Callable[[float], MergeMethod]] = {
        "average": lambda s: Average(),
        SUM: TaskArithmetic,
        "Fisher": Fisher,
        "RegMean": RegMean,
        "WIDEN": Widen,
        "TIES": lambda s: Ties(0.0, scaling=s),
    }
    found = {
        way: [
            _merging(sources, make(s), Dare(p) if p else None)
            for p in rates
            for s in (scalings if way != "average" else [1.0])
        ]
        for way, make in after_dare.items()
    }
    found[TRIMMED] = [_merging(sources, Ties(p, scaling=s)) for p in rates for s in scalings]
    found[DELLA] = [_merging(sources, Della(p, scaling=s)) for p in rates for s in scalings]
    return found


def trail_candidates(sources: Sources) -> dict[str, Merging]:
    """Merges of a continually pre-trained model with a fine-tune, as they are: weights and scaling are 1."""
    return {SUM: _merging(sources, TaskArithmetic()), PUBLISHED: _merging(sources, Ties(PUBLISHED_TRIM))}


def election_candidates(sources: Sources) -> dict[str, Merging]:
    """The sum of what is not outvoted, without slack and with more and more of it for the second delta."""
    slacks = {slack_name(r): _merging(sources, Ties(0.0, fuse="sum", slack=Slack(1, relative=r))) for r in SLACKS}
    return {ELECTED: _merging(sources, Ties(0.0, fuse="sum")), **slacks}


def unequal_candidates(sources: Sources, scalings: Sequence[float], drop_rate: float) -> dict[str, list[Merging]]:
    """Merges of two deltas the first of which is far larger, each with settings to choose from."""
    plain: dict[str, Callable[[float], MergeMethod]] = {
        "Fisher": Fisher,
        "RegMean": RegMean,
        "WIDEN": Widen,
        PUBLISHED: lambda s: Ties(PUBLISHED_TRIM, scaling=s),
        DELLA: lambda s: Della(drop_rate, scaling=s),
    }
    sums = [_merging(sources, TaskArithmetic(s)) for s in scalings]
    sums += [Merging(sources, TaskArithmetic(), weights=(1.0, weight)) for weight in WEIGHTS]
    return {
        "average": [_merging(sources, Average())],
        SUM: sums,
        f"DARE + {SUM}": [_merging(sources, TaskArithmetic(s), Dare(drop_rate)) for s in scalings],
        **{way: [_merging(sources, make(s)) for s in scalings] for way, make in plain.items()},
    }


def _merging(sources: Sources, by: MergeMethod, prune: Pruner | None = None) -> Merging:
    """The merge of sources, which have texts only where the method needs data: they are a part of a cell's key."""
    needed = sources if by.statistic else tuple(source.without_texts() for source in sources)
    return Merging(needed, by, prune)


SETTING = ["by", "prune", "weights"]
"""Columns that tell one merge of some sources from another: its method, its pruner and its weights, in full."""


ALL_TASKS = "mean over tasks"


def halved(evaluation: ExactMatch) -> tuple[ExactMatch, ExactMatch]:
    """The questions in two halves (`validation_and_test`), one to choose settings on, one to judge them.

    Examples
    --------
    >>> from delta_analysis.evaluation import Question
    >>> each = ExactMatch(tuple(Question(str(i), str(i)) for i in range(5)))
    >>> [len(half.questions) for half in halved(each)]
    [2, 3]
    """
    validation, test = (
        replace(evaluation, questions=tuple(evaluation.questions[i] for i in half))
        for half in validation_and_test(len(evaluation.questions))
    )
    return validation, test


def judge_merges(
    pair: Pair, merges: Iterable[Merging], evaluations: Sequence[ExactMatch], seeds: Sequence[int], **engine: Any
) -> pd.DataFrame:
    """A sweep of merges of one pair, with the columns of `SETTING`; `engine` goes to `sweep`."""
    cells = sweep([pair], list(merges), evaluations, seeds, **engine)
    return cells.rename(columns={f"option_{column}": column for column in SETTING})


def joined(cells: pd.DataFrame, tasks: Sequence[str]) -> np.ndarray:
    """Outcomes of one merge on several tasks, (seeds, questions), whose mean is the mean over the tasks.

    The tasks are these and no others, so that questions differ from the mean of their task: by that the
    outcomes are moved to the common mean. Where tasks have different numbers of questions, those of a task
    with few count for more; a task that no seed changes has the same outcomes under all.
    """
    by_task = [outcome_matrix(cells[cells["evaluation"] == task]) for task in tasks]
    if len(by_task) == 1:
        return by_task[0]
    seeds, whole = max(len(each) for each in by_task), sum(each.shape[1] for each in by_task)
    mean = float(np.mean([each.mean() for each in by_task]))
    weights = [whole / (len(tasks) * each.shape[1]) for each in by_task]
    moved = [mean + (each - each.mean()) * weight for each, weight in zip(by_task, weights, strict=True)]
    return np.concatenate([np.broadcast_to(each, (seeds, each.shape[1])) for each in moved], axis=1)


def mean_of(outcomes: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of several (seeds, items) on the same items; what no seed changes is the same under all.

    Examples
    --------
    >>> mean_of([np.ones((1, 2)), np.zeros((3, 2))]).tolist()
    [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    """
    return np.mean(np.broadcast_arrays(*outcomes), axis=0)


def trail_outcomes(cells: pd.DataFrame, way: str, task: str, fine_tune: str) -> dict[int, np.ndarray]:
    """Steps of continual pre-training -> outcomes of a way on a task, least first; empty if there are none."""
    rows = cells[(cells["way"] == way) & (cells["evaluation"] == task) & (cells["fine_tune"] == fine_tune)]
    return {int(steps): outcome_matrix(group) for steps, group in rows.groupby("steps")}


def offer(candidates: Mapping[str, Sequence[Merging]]) -> pd.DataFrame:
    """The merges that each way has to choose from, a row each, with the columns that find them in a sweep.

    Columns: `way`; those of `SETTING`; `drop_rate`, of the pruner or else of the method's own; `scaling`; `merging`.
    """
    return pd.DataFrame(
        [
            {
                "way": way,
                **{column: str(getattr(each, column)) for column in SETTING},
                "drop_rate": each.drop_rate,
                "scaling": each.by.scaling,
                "merging": each,
            }
            for way, merges in candidates.items()
            for each in merges
        ]
    )


def best_settings(cells: pd.DataFrame, offered: pd.DataFrame, tasks: Sequence[str], by: Sequence[str]) -> pd.DataFrame:
    """The merge of highest accuracy in each group of those offered, of equal ones the first.

    Parameters
    ----------
    cells : a sweep of the merges on questions that choose, with `weights`.
    offered : as from `offer`.
    tasks : whose mean decides.
    by : columns of `offered` that make a group, such as `["way", "drop_rate"]`.

    Returns
    -------
    DataFrame, the chosen rows of `offered` with `promised`, the accuracy on the questions that chose.
    """
    chosen = cells[cells["evaluation"].isin(list(tasks))]
    means = chosen.groupby([*SETTING, "evaluation"])["value"].mean().groupby(SETTING).mean()
    # Rounded, so that equal means of other summands are equal.
    promised = means.round(12).rename("promised").reset_index()
    known = offered.merge(promised, on=SETTING, how="inner")
    return known.loc[known.groupby(list(by), sort=False)["promised"].idxmax()].reset_index(drop=True)


def of_setting(cells: pd.DataFrame, setting: pd.Series) -> pd.DataFrame:
    """The rows of one merge."""
    return cells[(cells[SETTING] == setting[SETTING]).all(axis=1)]


def scores(cells: pd.DataFrame, settings: pd.DataFrame, tasks: Sequence[str]) -> pd.DataFrame:
    """The accuracy of merges on each task and on their mean, on the questions that judge.

    Returns
    -------
    DataFrame, one row a row of `settings` and task, `mean over tasks` last: the columns of `settings` without
    `merging`; `task`; `value` with its 95% interval `low, high` over masks and questions.
    """
    rows = []
    for _, setting in settings.drop(columns="merging").iterrows():
        own = of_setting(cells, setting)
        judged = {task: [task] for task in tasks} | ({ALL_TASKS: list(tasks)} if len(tasks) > 1 else {})
        for task, named in judged.items():
            value, low, high = metric_interval(MEAN, joined(own, named))
            rows.append({**setting, "task": task, "value": value, "low": max(low, 0.0), "high": min(high, 1.0)})
    return pd.DataFrame(rows)


def gain(cells: pd.DataFrame, one: pd.Series, other: pd.Series, tasks: Sequence[str], *, looks: int = 1) -> Interval:
    """How much more accurate one merge is than another, on the mean over tasks, with the interval of `difference`.

    Both answer the same questions, under the same masks where they are random.
    """
    return paired_difference(*(joined(of_setting(cells, each), tasks) for each in (one, other)), looks=looks)


class Saturation(NamedTuple):
    """Gains over the two halves of a trail, and how much larger the later one is: below 0 it saturates."""

    middle: int
    early: Interval
    late: Interval
    change: Interval


def saturation(outcomes: Mapping[int, np.ndarray]) -> Saturation:
    """Whether accuracy grows less in the later half of a trail, on a logarithmic scale of steps.

    The middle is the stop that is nearest to the root of first times last.

    Parameters
    ----------
    outcomes : steps -> outcomes, (seeds, items), of three stops at least, on the same items.

    Examples
    --------
    >>> grown = {1: np.zeros((1, 9)), 10: np.ones((1, 9)), 100: np.ones((1, 9))}
    >>> saturation(grown).middle, saturation(grown).change
    (10, Interval(value=-1.0, low=-1.0, high=-1.0))
    """
    first, *inner, last = sorted(outcomes)
    middle = min(inner, key=lambda steps: abs(math.log(steps**2 / (first * last))))
    start, between, end = (outcomes[steps] for steps in (first, middle, last))
    return Saturation(
        middle,
        paired_difference(between, start),
        paired_difference(end, between),
        paired_difference(end + start, 2 * between),
    )
