"""What recovers a delta: chosen on one half of the items and judged on the other, on cells made up by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import delta_analysis as da
from delta_analysis.evaluation import ExactMatch, OutputDrift
from delta_analysis.prediction.layers import delta_noise
from delta_analysis.pruning import Dare, Magnitude, MagPrune, Pruner
from delta_analysis.reports.family import questions_file
from delta_analysis.studies.mitigation import DRIFT, FACTORS, WEIGHTS, candidates, recovered
from delta_analysis.studies.rescaling import validation_and_test

N = 40
CHOOSING, JUDGING = validation_and_test(N)
P = 0.75
DARE, ONE, LARGE, WIDE, NARROW, MP = (
    Dare(P),
    Dare(P, "none"),
    Dare(P, 2.0),
    MagPrune(P),
    MagPrune(P, 0.2),
    Magnitude(P),
)
OFFERED: dict[str, tuple[Pruner, ...]] = {
    "DARE": (DARE,),
    "one factor": (ONE, LARGE),
    "MAGPRUNE": (WIDE, NARROW),
    "MP": (MP,),
}
COLUMNS = ["way", "chosen_by", "method", "kept", "low", "high", "lead", "lead_low", "lead_high", "promised"]


def answers(validation: float, test: float) -> list[float]:
    """N outcomes, of which these shares of the validation and of the test items are right, the first ones."""
    outcomes = np.zeros(N)
    outcomes[CHOOSING[: round(validation * len(CHOOSING))]] = 1
    outcomes[JUDGING[: round(test * len(JUDGING))]] = 1
    return outcomes.tolist()


def cell(pruner: Pruner, seed: int, metric: str, outcomes: list[float]) -> dict[str, object]:
    labels = {"pair": "a → b", "method": pruner.method, "drop_rate": pruner.drop_rate, "seed": seed, "metric": metric}
    kind = {"accuracy": "score", DRIFT: "error"}.get(metric, metric)
    return {**labels, "kind": kind, "value": float(np.mean(outcomes)), "outcomes": outcomes}


def made_up(
    found: Mapping[Pruner, tuple[float, float, float]], untouched: tuple[float, float] = (1.0, 1.0)
) -> pd.DataFrame:
    """Pruner -> accuracy on validation and on test items, and drift; a random one has two seeds that agree."""
    rows = [cell(Dare(0), 0, "accuracy", answers(*untouched)), cell(Dare(0), 0, DRIFT, [0.0, 0.0])]
    for pruner, (validation, test, drift) in found.items():
        for seed in (0, 1) if pruner.random else (0,):
            rows.append(cell(pruner, seed, "accuracy", answers(validation, test)))
            rows.append(cell(pruner, seed, DRIFT, [drift - 0.1, drift + 0.1]))
    return pd.DataFrame(rows)


FOUND: dict[Pruner, tuple[float, float, float]] = {
    DARE: (0.5, 0.6, 5.0),
    ONE: (0.4, 0.9, 1.0),
    LARGE: (0.9, 0.1, 4.0),
    WIDE: (0.2, 0.3, 2.0),
    NARROW: (0.7, 0.8, 3.0),
    MP: (1.0, 0.4, 0.5),
}


def by_way(table: pd.DataFrame) -> dict[tuple[str, str], dict[str, float]]:
    return {(row["way"], row["chosen_by"]): row for row in table.to_dict("records")}


def test_what_was_chosen_on_one_half_is_judged_on_the_other() -> None:
    table = recovered(made_up(FOUND), OFFERED)
    assert list(table.columns) == COLUMNS
    found = by_way(table)
    # The factor 2 is best where labels choose, and worst where they judge.
    factor = found["one factor", "labels"]
    assert (factor["method"], factor["kept"]) == (LARGE.method, pytest.approx(0.1))
    assert factor["lead"] == pytest.approx(0.1 - 0.6)
    assert factor["lead_low"] <= factor["lead"] <= factor["lead_high"]
    # The drift knows nothing of labels, and is least for drop only.
    without = found["one factor", "no labels"]
    assert (without["method"], without["kept"]) == (ONE.method, pytest.approx(0.9))
    assert found["MAGPRUNE", "labels"]["method"] == NARROW.method
    assert found["MAGPRUNE", "no labels"]["method"] == WIDE.method


def test_a_way_without_a_choice_has_one_row_and_the_others_two() -> None:
    table = recovered(made_up(FOUND), OFFERED)
    assert sorted(zip(table["way"], table["chosen_by"], strict=True)) == [
        ("DARE", "-"),
        ("MAGPRUNE", "labels"),
        ("MAGPRUNE", "no labels"),
        ("MP", "-"),
        ("one factor", "labels"),
        ("one factor", "no labels"),
    ]
    found = by_way(table)
    assert found["MP", "-"]["method"] == "MP"
    assert found["MP", "-"]["kept"] == pytest.approx(0.4)


def test_what_promised_most_comes_first_whatever_it_keeps() -> None:
    """The order is that of the validation half alone: the first has not been picked by what judges it."""
    table = recovered(made_up(FOUND), OFFERED)
    assert table["method"].tolist() == [pruner.method for pruner in (MP, LARGE, NARROW, DARE, ONE, WIDE)]
    assert table["promised"].tolist() == pytest.approx([1.0, 0.9, 0.7, 0.5, 0.4, 0.2])
    assert table["kept"].tolist() == pytest.approx([0.4, 0.1, 0.8, 0.6, 0.9, 0.3])
    assert table.index.tolist() == list(range(6))
    assert (table["low"] <= table["kept"]).all()
    assert (table["kept"] <= table["high"]).all()
    other = recovered(made_up({pruner: (a, 1 - b, c) for pruner, (a, b, c) in FOUND.items()}), OFFERED)
    for column in ("way", "chosen_by", "method", "promised"):
        assert other[column].tolist() == table[column].tolist()


def test_dare_itself_may_be_chosen_as_a_factor_but_not_as_a_window() -> None:
    best = {DARE: (0.95, 0.6, 0.2)}
    found = by_way(recovered(made_up(FOUND | best), OFFERED))
    for chosen_by in ("labels", "no labels"):
        factor = found["one factor", chosen_by]
        assert (factor["method"], factor["kept"], factor["lead"]) == ("DARE", pytest.approx(0.6), 0)
        assert found["MAGPRUNE", chosen_by]["method"] != "DARE"


def test_the_share_is_of_the_untouched_metric_on_the_judging_half() -> None:
    found = by_way(recovered(made_up(FOUND, untouched=(0.1, 0.8)), OFFERED))
    assert found["DARE", "-"]["kept"] == pytest.approx(0.6 / 0.8)
    # What was promised is of the untouched metric on the validation half.
    assert found["DARE", "-"]["promised"] == pytest.approx(0.5 / 0.1)
    assert found["MP", "-"]["lead"] == pytest.approx((0.4 - 0.6) / 0.8)


def test_of_perplexities_the_lowest_is_chosen() -> None:
    rng = np.random.default_rng(0)
    start = rng.exponential(size=N)

    def losses(validation: float, test: float) -> list[float]:
        added = np.zeros(N)
        added[CHOOSING], added[JUDGING] = validation, test
        return (start + added).tolist()

    rows = [cell(Dare(0), 0, "perplexity", start.tolist()), cell(Dare(0), 0, DRIFT, [0.0])]
    for pruner, added in {DARE: (1.0, 0.5), ONE: (0.2, 1.5), LARGE: (3.0, 0.1)}.items():
        for seed in (0, 1):
            rows += [cell(pruner, seed, "perplexity", losses(*added)), cell(pruner, seed, DRIFT, [added[1]])]
    offered = {"DARE": (DARE,), "one factor": (ONE, LARGE)}
    table = recovered(pd.DataFrame(rows), offered)
    assert table["method"].tolist() == [ONE.method, "DARE", LARGE.method]
    assert table["chosen_by"].tolist() == ["labels", "-", "no labels"]
    assert table["promised"].tolist() == pytest.approx([math.exp(-0.2), math.exp(-1.0), math.exp(-3.0)])
    # A loss that grows by x keeps exp(-x) of the probability of a token.
    assert table["kept"].tolist() == pytest.approx([math.exp(-1.5), math.exp(-0.5), math.exp(-0.1)])
    assert table["low"].to_numpy() == pytest.approx(table["high"].to_numpy())


def test_intervals_are_those_of_the_judging_half_alone() -> None:
    """Outcomes of the validation half that are all right or all wrong change no interval."""
    one = by_way(recovered(made_up(FOUND), OFFERED))
    other = by_way(recovered(made_up(FOUND | {MP: (0.0, 0.4, 0.5)}), OFFERED))
    assert one["MP", "-"] | {"promised": 0.0} == other["MP", "-"]
    assert one["MP", "-"]["promised"] == 1


TEXTS = ["reverse abc\n", "spell the word alphabet backwards\n"]


@pytest.fixture(scope="module")
def offered() -> dict[str, tuple[Pruner, ...]]:
    delta = da.load_delta(base="zoo:tiny/base", finetuned="zoo:tiny/instruct")
    return candidates(delta_noise(delta, TEXTS), {name: tensor.numel() for name, tensor in delta.items()}, P)


def test_every_way_drops_as_much(offered: dict[str, tuple[Pruner, ...]]) -> None:
    pruners = [pruner for own in offered.values() for pruner in own]
    assert {pruner.drop_rate for pruner in pruners} == {P}
    methods = [pruner.method for pruner in pruners]
    assert len(set(methods)) == len(methods)
    assert offered["DARE"] == (Dare(P),)
    # DARE's own factor is added where a factor is chosen.
    assert len(offered["one factor"]) == FACTORS - 1
    assert offered["one factor"][0] == Dare(P, "none")
    assert Dare(P) not in offered["one factor"]
    assert len(offered["factors by layer"]) == len(WEIGHTS)


BY_NOISE = {"factors by layer", "DARE, least noise", "DARE, equal noise"}


@pytest.mark.parametrize("share", [[0.1], [0.1, math.nan]], ids=["no row", "no share"])
def test_without_noise_of_every_tensor_no_way_goes_by_it(share: list[float]) -> None:
    noise = pd.DataFrame({"tensor": ["v", "w"], "signal": 1.0, "noise": 1.0}).head(len(share)).assign(noise_share=share)
    whole = pd.DataFrame({"tensor": ["v", "w"], "signal": 1.0, "noise": 1.0, "noise_share": 0.1})
    numel = {"v": 10, "w": 20}
    found, expected = candidates(noise, numel, P), candidates(whole, numel, P)
    assert set(expected) - set(found) == BY_NOISE
    assert found == {way: pruners for way, pruners in expected.items() if way not in BY_NOISE}


def test_on_a_real_pair(offered: dict[str, tuple[Pruner, ...]], tmp_path: Path) -> None:
    pair = da.Pair("base → instruct", "zoo:tiny/base", "zoo:tiny/instruct")
    questions = ExactMatch(tuple(da.evaluation.load_questions(questions_file("instruct"), 24)))
    evaluations = {pair.name: (questions, OutputDrift(tuple(TEXTS)))}
    edits = [Dare(0), *(pruner for own in offered.values() for pruner in own)]
    cells = da.sweep([pair], edits, evaluations, [0, 1], tmp_path)
    table = recovered(cells[cells["metric"].isin(["accuracy", DRIFT])], offered)
    assert set(table["way"]) == set(offered)
    assert len(table) == sum(1 if len(own) == 1 else 2 for own in offered.values())
    assert table["promised"].is_monotonic_decreasing
    # The row of DARE by hand: its answers on test questions.
    answers = cells[cells["metric"] == "accuracy"]
    half = validation_and_test(24)[1]
    dare = answers[(answers["method"] == "DARE") & (answers["drop_rate"] == P)]["outcomes"]
    start = np.mean(np.array(answers[answers["drop_rate"] == 0]["outcomes"].iloc[0])[half])
    own = table[table["way"] == "DARE"].iloc[0]
    assert own["kept"] == pytest.approx(np.mean([np.array(each)[half] for each in dare]) / start)
