"""What the results of 08_merging say about each claim on merges.

As in `claim_effects`, a function takes the results of the report and returns an `Interval`. The DARE merge
is task arithmetic after DARE; of each way the drop rate and the scaling are those that promised most on the
questions that chose, and effects are of the questions that judge, paired by question and mask.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from delta_analysis.reports.claims.measures import NotMeasuredError, greatest, least
from delta_analysis.studies import (
    AFTER_DARE,
    AFTERWARDS,
    BEFORE,
    DELLA,
    ELECTED,
    SETTING,
    SLACKS,
    SUM,
    joined,
    mean_of,
    saturation,
    slack_name,
    trail_outcomes,
    validation_and_test,
)
from delta_analysis.sweeps import MEAN, Interval, kept_interval, outcome_matrix, paired_difference

DARE_MERGE = SUM


def tasks_of(results: pd.DataFrame) -> list[str]:
    """The tasks of the fine-tunes that are merged."""
    return list(dict.fromkeys(results.loc[results["table"] == "merge", "evaluation"]))


def chosen(results: pd.DataFrame, way: str, *, dropped: bool) -> pd.DataFrame:
    """The cells of a way at what promised most, with something dropped before or by it, or with nothing."""
    rows = results[(results["table"] == "merge") & (results["role"] == "at each drop rate") & (results["way"] == way)]
    rows = rows[(rows["drop_rate"] > 0) == dropped]
    if rows.empty:
        raise NotMeasuredError(f"no merge by {way}")
    best = rows.loc[rows["promised"].idxmax(), SETTING]
    return rows[(rows[SETTING] == best).all(axis=1)]


def mean_outcomes(results: pd.DataFrame, way: str, *, dropped: bool) -> np.ndarray:
    """Outcomes over all tasks of a way, (seeds, questions)."""
    return joined(chosen(results, way, dropped=dropped), tasks_of(results))


def specialists(results: pd.DataFrame) -> pd.DataFrame:
    """The cells of the fine-tunes by themselves, with `own_task`."""
    rows = results[results["table"] == "single"]
    return rows[rows["own_task"].notna()]


def over_sources(results: pd.DataFrame, *, own: bool) -> list[Interval]:
    """The DARE merge's accuracy less that of each source, on the source's own task or on each other one."""
    merge = chosen(results, DARE_MERGE, dropped=True)
    return [
        paired_difference(
            outcome_matrix(merge[merge["evaluation"] == task]), outcome_matrix(source[source["evaluation"] == task])
        )
        for _, source in specialists(results).groupby("way", sort=False)
        for task in tasks_of(results)
        if (task == source["own_task"].iloc[0]) == own
    ]


def merge_gains(results: pd.DataFrame) -> Interval:
    return least(over_sources(results, own=False))


def merge_surpasses(results: pd.DataFrame) -> Interval:
    return greatest(over_sources(results, own=True))


def merge_retains(results: pd.DataFrame) -> Interval:
    """The share that the first source keeps on its own task."""
    merge, sources = chosen(results, DARE_MERGE, dropped=True), specialists(results)
    first = sources[sources["way"] == sources["way"].iloc[0]]
    task = first["own_task"].iloc[0]
    return kept_interval(MEAN, *(outcome_matrix(rows[rows["evaluation"] == task]) for rows in (merge, first)))


def dare_helps(results: pd.DataFrame) -> Interval:
    """The gain by DARE, the mean over merge methods."""
    with_dare, without = (
        mean_of([mean_outcomes(results, way, dropped=dropped) for way in AFTER_DARE]) for dropped in (True, False)
    )
    return paired_difference(with_dare, without)


def dare_helps_ties_most(results: pd.DataFrame) -> Interval:
    """The gain by DARE with TIES less that with each other method, the least."""
    gained = {way: [mean_outcomes(results, way, dropped=dropped) for dropped in (True, False)] for way in AFTER_DARE}
    after, before = gained.pop("TIES")
    return least(paired_difference(after + plain, before + dared) for dared, plain in gained.values())


def della_over(results: pd.DataFrame, way: str, *, dropped: bool = True) -> Interval:
    return paired_difference(
        mean_outcomes(results, DELLA, dropped=True),
        mean_outcomes(results, way, dropped=dropped),
    )


def on_trail(results: pd.DataFrame, way: str) -> dict[int, np.ndarray]:
    """Steps -> outcomes of a way on the new domain, with the first fine-tune; least first."""
    rows = results[results["table"] == "trail"]
    if rows.empty:
        raise NotMeasuredError("no continually pre-trained model")
    new = rows.loc[~rows["evaluation"].isin(tasks_of(results)), "evaluation"].iloc[0]
    found = trail_outcomes(rows, way, new, rows["fine_tune"].iloc[0])
    if not found:
        raise NotMeasuredError(f"no model {way}")
    return found


def merge_brings(results: pd.DataFrame) -> Interval:
    merged, alone = (on_trail(results, way) for way in (SUM, BEFORE))
    return paired_difference(merged[max(merged)], alone[max(alone)])


def merge_over_tuning(results: pd.DataFrame) -> Interval:
    """Merging less fine-tuning afterwards, at the least continual pre-training that has both."""
    merged, tuned = (on_trail(results, way) for way in (SUM, AFTERWARDS))
    return paired_difference(merged[min(tuned)], tuned[min(tuned)])


def merge_saturates(results: pd.DataFrame) -> Interval:
    """The last stop, after the decay of the learning rate, is left out."""
    merged = on_trail(results, SUM)
    before_decay = {steps: outcomes for steps, outcomes in merged.items() if steps < max(merged)}
    if len(before_decay) < 3:
        raise NotMeasuredError("fewer than four models on the way of continual pre-training")
    return saturation(before_decay).change


def slack_helps(results: pd.DataFrame) -> Interval:
    """At the end, with the slack that is best on one half of the questions; on the other half."""
    ends = {way: found[max(found)] for way in map(slack_name, SLACKS) for found in [on_trail(results, way)]}
    plain = on_trail(results, ELECTED)
    validation, test = validation_and_test(plain[max(plain)].shape[1])
    best = max(ends, key=lambda way: ends[way][:, validation].mean())
    return paired_difference(ends[best][:, test], plain[max(plain)][:, test])
