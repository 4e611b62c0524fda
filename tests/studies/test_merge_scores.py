"""What merges are worth, on cells made up by hand: halves, chosen settings, means over tasks and gains."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import delta_analysis as da
from delta_analysis.evaluation import ExactMatch, Question
from delta_analysis.reports.family import questions_file
from delta_analysis.studies.merging import (
    ALL_TASKS,
    SETTING,
    best_settings,
    gain,
    halved,
    joined,
    judge_merges,
    of_setting,
    offer,
    saturation,
    scores,
    trail_outcomes,
)
from delta_analysis.studies.rescaling import validation_and_test
from delta_analysis.sweeps.comparison import paired_difference
from delta_analysis.sweeps.intervals import MEAN, metric_interval
from delta_analysis.sweeps.merges import MergeSource, Merging, merge_source
from delta_analysis.sweeps.pairs import Pair

SOURCES = tuple(MergeSource("base", name, ("0", name), ()) for name in ("one", "two"))
HALF, WHOLE, TWICE = (Merging(SOURCES, da.merging.TaskArithmetic(scaling)) for scaling in (0.5, 1.0, 2.0))
DROPPED = Merging(SOURCES, da.merging.TaskArithmetic(1.0), da.Dare(0.9))
HEAVY = Merging(SOURCES, da.merging.TaskArithmetic(1.0), weights=(1.0, 2.0))
TIES = Merging(SOURCES, da.merging.Ties(0.8))
OFFERED = offer({"task arithmetic": [HALF, WHOLE, TWICE, DROPPED], "weighted": [HEAVY], "TIES": [TIES]})
A, B, C = "task a", "task b", "task c"


def cells(merging: Merging, outcomes: dict[str, Sequence[Sequence[float]]]) -> list[dict[str, object]]:
    """Rows of a sweep of one merge: task -> seeds -> outcomes."""
    labels = {column: str(getattr(merging, column)) for column in SETTING}
    return [
        {**labels, "evaluation": task, "seed": seed, "value": float(np.mean(row)), "outcomes": list(row)}
        for task, rows in outcomes.items()
        for seed, row in enumerate(rows)
    ]


def right(count: int, of: int) -> list[float]:
    return [1.0] * count + [0.0] * (of - count)


def table(found: dict[Merging, dict[str, Sequence[Sequence[float]]]]) -> pd.DataFrame:
    return pd.DataFrame([row for merging, outcomes in found.items() for row in cells(merging, outcomes)])


TRIALS = table(
    {
        HALF: {A: [right(9, 10)], B: [right(1, 10)], C: [right(10, 10)]},
        WHOLE: {A: [right(6, 10)], B: [right(6, 10)], C: [right(0, 10)]},
        TWICE: {A: [right(2, 10)], B: [right(7, 10)], C: [right(0, 10)]},
        DROPPED: {A: [right(5, 10), right(3, 10)], B: [right(8, 10), right(8, 10)], C: [right(0, 10)] * 2},
        HEAVY: {A: [right(3, 10)], B: [right(3, 10)], C: [right(0, 10)]},
        TIES: {A: [right(4, 10)], B: [right(4, 10)], C: [right(0, 10)]},
    }
)


def chosen(settings: pd.DataFrame) -> dict[str, Merging]:
    return dict(zip(settings["way"], settings["merging"], strict=True))


@given(st.integers(4, 60))
def test_halves_of_the_questions_are_disjoint_and_are_all_of_them(count: int) -> None:
    whole = ExactMatch(tuple(Question(f"{i}", f"{i}") for i in range(count)), name="own", chat_template=True)
    validation, test = halved(whole)
    one, other = ({question.prompt for question in half.questions} for half in (validation, test))
    assert not one & other
    assert one | other == {question.prompt for question in whole.questions}
    assert len(test.questions) - len(validation.questions) == count % 2
    # All else is that of the whole, and it is drawn the same each time.
    assert dataclasses.replace(validation, questions=whole.questions) == whole
    assert halved(whole) == (validation, test)
    assert [int(question.prompt) for question in test.questions] == validation_and_test(count)[1].tolist()


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 3), st.integers(0, 10**6))
def test_the_mean_of_what_is_joined_is_the_mean_over_tasks(sizes: list[int], seeds: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    outcomes = {f"task {i}": rng.integers(0, 2, (seeds, size)).astype(float) for i, size in enumerate(sizes)}
    rows = table({HALF: {task: each.tolist() for task, each in outcomes.items()}})
    found = joined(rows, list(outcomes))
    assert found.shape == (seeds, sum(sizes))
    assert found.mean() == pytest.approx(np.mean([each.mean() for each in outcomes.values()]))
    by_seed = np.mean([each.mean(axis=1) for each in outcomes.values()], axis=0)
    np.testing.assert_allclose(found.mean(axis=1), by_seed, atol=1e-12)
    # Tasks do not differ any more, and of each the spread is as it was, but for its weight.
    parts = np.split(found, np.cumsum(sizes)[:-1], axis=1)
    for part, own in zip(parts, outcomes.values(), strict=True):
        assert part.mean() == pytest.approx(found.mean())
        weight = sum(sizes) / (len(sizes) * own.shape[1])
        np.testing.assert_allclose(part - part.mean(), weight * (own - own.mean()), atol=1e-12)


def test_tasks_are_joined_in_the_order_asked_for_and_seeds_by_number() -> None:
    rows = table({HALF: {A: [[1, 0], [0, 0]], B: [[1, 0], [1, 1]]}}).sample(frac=1, random_state=0)
    # Of a the mean is a quarter, of b three of them: half a question more, and half less.
    assert joined(rows, [B, A]).tolist() == [[0.75, -0.25, 1.25, 0.25], [0.75, 0.75, 0.25, 0.25]]
    assert joined(rows, [A]).tolist() == [[1, 0], [0, 0]]


def test_a_task_that_no_seed_changes_is_the_same_under_all() -> None:
    rows = table({HALF: {A: [[1, 0], [1, 0]], B: [[0, 1]]}})
    assert joined(rows, [A, B]).tolist() == [[1, 0, 0, 1]] * 2


def test_how_far_tasks_lie_apart_is_no_uncertainty() -> None:
    """The tasks are these and no others: of one all right and one all wrong the mean is certain."""
    rows = table({HALF: {A: [right(20, 20)], B: [right(0, 20)]}, WHOLE: {A: [right(0, 20)], B: [right(0, 20)]}})
    found = scores(rows, OFFERED.head(2).assign(promised=0.0), [A, B])
    assert found[["value", "low", "high"]].iloc[2].tolist() == [0.5, 0.5, 0.5]
    assert gain(rows, OFFERED.iloc[0], OFFERED.iloc[1], [A, B]) == pytest.approx((0.5, 0.5, 0.5))


def test_what_is_offered_is_found_in_a_sweep() -> None:
    assert OFFERED["way"].tolist() == ["task arithmetic"] * 4 + ["weighted", "TIES"]
    assert OFFERED["merging"].tolist() == [HALF, WHOLE, TWICE, DROPPED, HEAVY, TIES]
    assert OFFERED["drop_rate"].tolist() == [0, 0, 0, 0.9, 0, 0.8]
    assert OFFERED["scaling"].tolist() == [0.5, 1, 2, 1, 1, 1]
    assert OFFERED["weights"].tolist() == ["()"] * 4 + ["(1.0, 2.0)", "()"]
    assert not OFFERED.duplicated(SETTING).any()
    for _, row in OFFERED.iterrows():
        own = of_setting(TRIALS, row)
        assert len(own) == (6 if row["merging"] is DROPPED else 3)
        assert (own[SETTING] == row[SETTING].tolist()).all(axis=None)


def test_the_best_setting_is_that_of_the_highest_mean_over_tasks() -> None:
    best = best_settings(TRIALS, OFFERED, [A, B], ["way"])
    # Of the half (.9 + .1) / 2, of the whole .6, of what was dropped (.4 + .8) / 2; of equal ones the first.
    assert chosen(best) == {"task arithmetic": WHOLE, "weighted": HEAVY, "TIES": TIES}
    assert best["promised"].tolist() == pytest.approx([0.6, 0.3, 0.4])
    turned = best_settings(TRIALS, OFFERED.iloc[::-1], [A, B], ["way"])
    assert chosen(turned)["task arithmetic"] == DROPPED
    # The task that is not asked for does not choose.
    assert chosen(best_settings(TRIALS, OFFERED, [A], ["way"]))["task arithmetic"] == HALF
    assert chosen(best_settings(TRIALS, OFFERED, [B], ["way"]))["task arithmetic"] == DROPPED
    assert chosen(best_settings(TRIALS, OFFERED, [A, B, C], ["way"]))["task arithmetic"] == HALF


def test_tasks_count_alike_whatever_their_questions() -> None:
    trials = table({HALF: {A: [right(90, 100)], B: [right(0, 2)]}, WHOLE: {A: [right(50, 100)], B: [right(1, 2)]}})
    best = best_settings(trials, OFFERED, [A, B], ["way"])
    assert chosen(best) == {"task arithmetic": WHOLE}
    assert best["promised"].tolist() == [0.5]


def test_groups_choose_by_themselves() -> None:
    best = best_settings(TRIALS, OFFERED, [A, B], ["way", "drop_rate"])
    assert best["merging"].tolist() == [WHOLE, DROPPED, HEAVY, TIES]
    assert best.index.tolist() == [0, 1, 2, 3]
    assert set(best.columns) == {*OFFERED.columns, "promised"}
    # What was not run is not chosen.
    without = TRIALS[TRIALS["prune"] == "None"]
    assert best_settings(without, OFFERED, [A, B], ["way", "drop_rate"])["merging"].tolist() == [WHOLE, HEAVY, TIES]


def test_a_merge_that_two_ways_offer_is_found_by_both() -> None:
    both = offer({"one": [HALF, WHOLE], "two": [WHOLE]})
    assert chosen(best_settings(TRIALS, both, [A, B], ["way"])) == {"one": WHOLE, "two": WHOLE}


def test_scores_are_those_of_each_task_and_of_their_mean() -> None:
    best = best_settings(TRIALS, OFFERED, [A, B], ["way"])
    judged = table(
        {
            WHOLE: {A: [right(3, 4)], B: [right(2, 8)]},
            HEAVY: {A: [right(4, 4)], B: [right(4, 8)]},
            TIES: {A: [right(0, 4)], B: [right(8, 8)]},
            TWICE: {A: [right(0, 4)], B: [right(0, 8)]},
        }
    )
    found = scores(judged, best, [A, B])
    assert found["task"].tolist() == [A, B, ALL_TASKS] * 3
    assert found["way"].tolist() == [way for way in ("task arithmetic", "weighted", "TIES") for _ in range(3)]
    assert found["value"].tolist() == pytest.approx([0.75, 0.25, 0.5, 1, 0.5, 0.75, 0, 1, 0.5])
    assert "merging" not in found and {*SETTING, "promised", "low", "high"} <= set(found)
    assert (found["low"] <= found["value"]).all() and (found["value"] <= found["high"]).all()
    for row in found[found["task"] != ALL_TASKS].itertuples():
        own = of_setting(judged, best[best["way"] == row.way].iloc[0])
        outcomes = np.array(own[own["evaluation"] == row.task]["outcomes"].tolist())
        assert (row.value, row.low, row.high) == metric_interval(MEAN, outcomes)
    assert found["low"].min() >= 0 and found["high"].max() <= 1
    # A single task is its own mean.
    assert scores(judged, best, [A])["task"].tolist() == [A] * 3


def test_masks_make_an_interval_wider() -> None:
    best = best_settings(TRIALS, OFFERED[OFFERED["drop_rate"] > 0.8], [A], ["way"]).query("way == 'task arithmetic'")
    same, differ = (
        table({DROPPED: {A: [right(first, 100), right(50, 100), right(100 - first, 100)]}}) for first in (50, 20)
    )
    one, other = (scores(each, best, [A]).iloc[0] for each in (same, differ))
    assert one["value"] == other["value"] == 0.5
    assert other["high"] - other["low"] > 2 * (one["high"] - one["low"])


def test_intervals_of_accuracies_end_at_none_and_at_all() -> None:
    best = best_settings(TRIALS, OFFERED[OFFERED["drop_rate"] == 0.9], [A], ["way"])
    for some, of_b in ((right(2, 8), right(0, 8)), (right(6, 8), right(8, 8))):
        judged = table({DROPPED: {A: [of_b, some], B: [of_b, of_b]}})
        mean = scores(judged, best, [A, B]).iloc[2]
        assert (mean["low"], mean["high"])[of_b[0] == 1] == of_b[0]


def test_a_gain_is_the_difference_on_the_same_questions() -> None:
    rng = np.random.default_rng(0)
    outcomes = {
        merging: {task: rng.integers(0, 2, (seeds, size)).astype(float).tolist() for task, size in ((A, 20), (B, 30))}
        for merging, seeds in ((HALF, 1), (WHOLE, 1), (DROPPED, 3))
    }
    judged = table(outcomes)
    half, whole, _, dropped = (row for _, row in OFFERED.head(4).iterrows())
    for one, other in ((half, whole), (dropped, whole), (whole, dropped)):
        parts = [joined(of_setting(judged, each), [A, B]) for each in (one, other)]
        found = gain(judged, one, other, [A, B])
        assert found == paired_difference(*parts)
        assert found.value == pytest.approx(parts[0].mean() - parts[1].mean())
        several = gain(judged, one, other, [A, B], looks=5)
        assert several == paired_difference(*parts, looks=5)
    assert gain(judged, dropped, dropped, [A, B]) == (0, 0, 0)


def test_outcomes_along_a_trail_are_those_of_one_way_on_one_task() -> None:
    asked = [("TIES", A, "math"), ("TIES", B, "math"), ("TIES", A, "instruct"), ("average", A, "math")]
    cells = pd.DataFrame(
        [
            {
                "way": way,
                "evaluation": task,
                "fine_tune": tuned,
                "steps": steps,
                "seed": seed,
                "outcomes": [i, steps + seed],
            }
            for i, (way, task, tuned) in enumerate(asked)
            for steps in (4000, 100)
            for seed in (1, 0)
        ]
    )
    for i, which in enumerate(asked):
        found = trail_outcomes(cells, *which)
        assert list(found) == [100, 4000]
        assert {steps: each.tolist() for steps, each in found.items()} == {
            steps: [[i, steps], [i, steps + 1]] for steps in (100, 4000)
        }
    assert trail_outcomes(cells, "average", B, "math") == {}


def test_growth_that_slows_down_saturates() -> None:
    """By half of the questions up to step 300, and afterwards by few, by as many, or by all there were before."""
    right_at = {"none": 0, "half": 200, "some": 240, "all": 400}
    answers = {name: np.concatenate([np.ones(count), np.zeros(400 - count)])[None] for name, count in right_at.items()}

    def found(start: str, middle: str, end: str) -> tuple[float, float, float]:
        # Of 20 and 300 the latter is nearer to 100, the middle of 10 and 1000, on a logarithmic scale.
        trail = {1000: answers[end], 10: answers[start], 300: answers[middle], 20: answers["all"]}
        saturated = saturation(trail)
        assert saturated.middle == 300
        assert saturated.early == paired_difference(answers[middle], answers[start])
        assert saturated.late == paired_difference(answers[end], answers[middle])
        assert saturated.change.value == pytest.approx(saturated.late.value - saturated.early.value)
        return saturated.change

    assert found("none", "half", "some") == pytest.approx((-0.4, -0.4, -0.4), abs=0.08)
    low, high = found("none", "half", "all")[1:]
    assert low < 0 < high
    assert found("none", "some", "half")[2] < 0 < found("half", "some", "all")[1]


def test_on_a_real_sweep(tmp_path: Path) -> None:
    pairs = [Pair(f"base → {each}", "zoo:tiny/base", f"zoo:tiny/{each}") for each in ("instruct", "math")]
    parts = tuple(map(merge_source, pairs))
    offered = offer(
        {
            "task arithmetic": [Merging(parts, da.merging.TaskArithmetic(scaling)) for scaling in (0.5, 1)],
            "DARE": [Merging(parts, da.merging.TaskArithmetic(scaling), da.Dare(0.5)) for scaling in (0.5, 1)],
            "weighted": [Merging(parts, da.merging.TaskArithmetic(), weights=(0.5, 1.0))],
        }
    )
    tasks = ["instruct", "math"]
    whole = [ExactMatch(tuple(da.evaluation.load_questions(questions_file(task), 16)), name=task) for task in tasks]
    validation, test = zip(*map(halved, whole), strict=True)
    tables = [judge_merges(pairs[0], offered["merging"], half, [0, 1], out_dir=tmp_path) for half in (validation, test)]
    assert set(SETTING) <= set(tables[0])
    best = best_settings(tables[0], offered, tasks, ["way"])
    assert best["way"].tolist() == ["task arithmetic", "DARE", "weighted"]
    for row in best.itertuples():
        trials = {
            each["scaling"]: of_setting(tables[0], each)["value"].mean()
            for _, each in offered[offered["way"] == row.way].iterrows()
        }
        assert row.promised == pytest.approx(max(trials.values()))
        assert trials[row.scaling] == pytest.approx(row.promised)
    found = scores(tables[1], best, tasks)
    assert len(found) == 3 * 3
    assert found.groupby("way")["value"].apply(lambda each: each.iloc[:2].mean() - each.iloc[2]).abs().max() < 1e-12
    first, second = best.iloc[0], best.iloc[1]
    means = found[found["task"] == ALL_TASKS].set_index("way")["value"]
    ahead = gain(tables[1], first, second, tasks)
    assert ahead.value == pytest.approx(means["task arithmetic"] - means["DARE"])
    assert ahead.low <= ahead.value <= ahead.high
