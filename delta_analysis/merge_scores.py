"""What merges are worth on questions that chose nothing: settings chosen on one half, judged on the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from delta_analysis.comparison import difference
from delta_analysis.curve import outcome_matrix
from delta_analysis.evaluate import ExactMatch
from delta_analysis.factors import halves
from delta_analysis.intervals import MEAN, Interval, metric_interval
from delta_analysis.merge_edit import Merging

SETTING = ["method", "drop_rate", "rescale", "weights"]
"""Columns that tell one merge from another."""
ALL_TASKS = "mean over tasks"


def halved(evaluation: ExactMatch) -> tuple[ExactMatch, ExactMatch]:
    """The questions in two halves (`halves`), one to choose settings on, one to judge them.

    Examples
    --------
    >>> from delta_analysis.evaluate import Question
    >>> each = ExactMatch(tuple(Question(str(i), str(i)) for i in range(5)))
    >>> [len(half.questions) for half in halved(each)]
    [2, 3]
    """
    choosing, judging = (
        replace(evaluation, questions=tuple(evaluation.questions[i] for i in half))
        for half in halves(len(evaluation.questions))
    )
    return choosing, judging


def joined(cells: pd.DataFrame, tasks: Sequence[str]) -> np.ndarray:
    """Outcomes of one merge on several tasks, (seeds, questions), whose mean is the mean over the tasks.

    Where tasks have different numbers of questions, those of a task with few count for more; a task that no
    seed changes has the same outcomes under all.
    """
    by_task = [outcome_matrix(cells[cells["evaluation"] == task]) for task in tasks]
    seeds, whole = max(len(each) for each in by_task), sum(each.shape[1] for each in by_task)
    even = len({each.shape[1] for each in by_task}) == 1
    weighed = [each if even else each * (whole / (len(tasks) * each.shape[1])) for each in by_task]
    return np.concatenate([np.broadcast_to(each, (seeds, each.shape[1])) for each in weighed], axis=1)


def offer(ways: Mapping[str, Sequence[Merging]]) -> pd.DataFrame:
    """The merges that each way has to choose from, a row each, with the columns that find them in a sweep.

    Columns: `way`; `method, drop_rate, rescale, weights`; `merging`.
    """
    return pd.DataFrame(
        [
            {
                "way": way,
                "method": each.method,
                "drop_rate": each.drop_rate,
                "rescale": str(each.rescale),
                "weights": str(each.weights),
                "merging": each,
            }
            for way, merges in ways.items()
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
    promised = chosen.groupby([*SETTING, "evaluation"])["value"].mean().groupby(SETTING).mean().rename("promised")
    known = offered.merge(promised.reset_index(), on=SETTING, how="inner")
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
            rows.append({**setting, "task": task, **metric_interval(MEAN, joined(own, named))._asdict()})
    return pd.DataFrame(rows)


def gain(cells: pd.DataFrame, one: pd.Series, other: pd.Series, tasks: Sequence[str]) -> Interval:
    """How much more accurate one merge is than another, on the mean over tasks, with its 95% interval.

    Both answer the same questions, under the same masks where they are random.
    """
    return difference(*(joined(of_setting(cells, each), tasks) for each in (one, other)))


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
        middle, difference(between, start), difference(end, between), difference(end + start, 2 * between)
    )
