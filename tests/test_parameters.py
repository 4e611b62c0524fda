from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from delta_analysis.evaluate import ExactMatch, TextPerplexity
from delta_analysis.family import questions_file
from delta_analysis.parameters import (
    AblationParameters,
    ParameterError,
    ValueRangesParameters,
    parse_drop_rates,
)
from tests.conftest import SaveCheckpoint

RANGES = ValueRangesParameters(base="", finetuned="", vocab="common", finetuned_is_delta=False, out_dir="runs/test")
ABLATION = AblationParameters(
    base="",
    finetuned="",
    drop_rates=[0.5],
    first_seed=0,
    n_seeds=5,
    n_questions=200,
    evaluation="",
    device="cpu",
    out_dir="runs/test",
)
PAIR = {"base": "zoo:small/base", "finetuned": "zoo:small/math"}


@pytest.mark.parametrize(
    ("given", "rates"),
    [
        ("0.1,0.5", (0.0, 0.1, 0.5, 1.0)),
        (0.5, (0.0, 0.5, 1.0)),
        ([0.9, 0.1, 0.9, 0, 1], (0.0, 0.1, 0.9, 1.0)),
    ],
)
def test_drop_rates_come_in_every_form_that_papermill_passes(given: object, rates: tuple[float, ...]) -> None:
    assert parse_drop_rates(given) == rates  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["", "a,b", [1.5], [-0.1, 0.5], [], None, [0, 1], "nan", [None]])
def test_wrong_drop_rates_are_refused_by_name(given: object) -> None:
    with pytest.raises(ParameterError, match=r"parameter drop_rates: must be numbers in \[0, 1\]"):
        parse_drop_rates(given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "zoo:small/base"}, "parameter finetuned: is empty while base is not"),
        ({"finetuned": "zoo:small/math"}, "parameter base: is empty while finetuned is not"),
        ({"base": "zoo:small/bse", "finetuned": "zoo:small/math"}, "parameter base: .*known are .*zoo:small/base"),
        ({"base": "no/such", "finetuned": "zoo:small/math"}, "parameter base: no/such: no such file or directory"),
        ({"base": 3, "finetuned": "zoo:small/math"}, "parameter base: must be a path"),
        ({"n_seeds": 1}, "parameter n_seeds: must be an integer of at least 2; not 1"),
        ({"n_seeds": "5"}, "parameter n_seeds"),
        ({"n_seeds": True}, "parameter n_seeds"),
        ({"first_seed": -1}, "parameter first_seed: must be an integer of at least 0"),
        ({"n_questions": 0}, "parameter n_questions"),
        ({"device": "cud"}, "parameter device: must be one of cpu"),
        ({"out_dir": ""}, "parameter out_dir"),
        ({"out_dir": "README.md"}, "parameter out_dir: must name a folder that can be made"),
        ({"out_dir": "README.md/below"}, "parameter out_dir: must name a folder that can be made"),
        ({"evaluation": 5, **PAIR}, "parameter evaluation: must be one of instruct"),
        ({"evaluation": "math"}, "parameter evaluation: 'math' needs a pair"),
        ({"evaluation": "maths", **PAIR}, "parameter evaluation: must be one of instruct, math, code"),
    ],
)
def test_wrong_values_are_refused_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        replace(ABLATION, **change)  # type: ignore[arg-type]


def test_pairs_that_are_not_homologous_are_refused(save_checkpoint: SaveCheckpoint) -> None:
    other = save_checkpoint("other", {"w": torch.ones(2)})
    with pytest.raises(ParameterError, match="parameter base: .*no tensor in common"):
        replace(RANGES, base=str(other), finetuned="zoo:small/math")


def test_the_family_is_the_default() -> None:
    assert [pair.name for pair in ABLATION.pairs()] == [
        "base → instruct",
        "base → math",
        "code-cpt → code",
        "base → code",
    ]
    assert len(RANGES.relations()) == 5


def test_evaluations_follow_the_model_the_name_or_the_file(tmp_path: Path) -> None:
    def evaluation(**change: str) -> object:
        return replace(ABLATION, **{**PAIR, **change}).pairs()[0].evaluation  # type: ignore[arg-type]

    by_model, by_name = evaluation(), evaluation(evaluation="instruct")
    assert isinstance(by_model, ExactMatch)
    assert len(by_model.questions) == 200
    assert by_name != by_model
    assert isinstance(evaluation(finetuned="zoo:small/base"), TextPerplexity)

    questions = tmp_path / "own.jsonl"
    questions.write_text('{"prompt": "a", "answer": "b"}\n')
    own = evaluation(evaluation=str(questions))
    assert isinstance(own, ExactMatch)
    assert [question.answer for question in own.questions] == ["b"]
    questions.write_text("{}\n")
    with pytest.raises(ParameterError, match="parameter evaluation: .*line 1"):
        evaluation(evaluation=str(questions))
    text = tmp_path / "own.txt"
    text.write_text("some text")
    assert evaluation(evaluation=str(text)) == TextPerplexity("some text")
    for unreadable in (b"", "text".encode("utf-16")):
        text.write_bytes(unreadable)
        with pytest.raises(ParameterError, match="parameter evaluation: .*own.txt"):
            evaluation(evaluation=str(text))


def test_a_bare_file_is_measured_but_not_evaluated() -> None:
    files = {name: f"{source.replace('zoo:', 'data/zoo/')}/model.safetensors" for name, source in PAIR.items()}
    assert replace(RANGES, **files).relations()[0].name == "model.safetensors → model.safetensors"
    with pytest.raises(ParameterError, match="parameter finetuned: .*evaluation needs a directory"):
        replace(ABLATION, **files)


def test_the_evaluation_shown_is_the_one_used() -> None:
    chosen = replace(ABLATION, **PAIR, evaluation="instruct")  # type: ignore[arg-type]
    assert chosen.relations()[0].task == "instruct"
    assert chosen.evaluation_files() == [questions_file("instruct")]


def test_seeds_are_consecutive() -> None:
    assert replace(ABLATION, first_seed=7, n_seeds=3).seeds == [7, 8, 9]


def test_every_parameter_has_a_field() -> None:
    own = {"vocab", "finetuned_is_delta"}
    assert {field.name for field in fields(RANGES)} - own < {field.name for field in fields(ABLATION)}


def test_either_side_of_a_known_pair_may_be_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delta_analysis.parameters.pair_sources", lambda pair: (PAIR["base"], PAIR["finetuned"]))
    other = {"base": "zoo:small/code-cpt", "finetuned": "zoo:small/code"}
    for given, sources in (
        ({"base": "pair:known", "finetuned": other["finetuned"]}, (PAIR["base"], other["finetuned"])),
        ({"base": other["base"], "finetuned": "pair:known"}, (other["base"], PAIR["finetuned"])),
        ({"base": "pair:known", "finetuned": "pair:known"}, tuple(PAIR.values())),
        ({"base": "pair:known"}, tuple(PAIR.values())),
        ({"finetuned": "pair:known"}, tuple(PAIR.values())),
    ):
        for parameters in (replace(RANGES, **given), replace(ABLATION, **given)):  # type: ignore[arg-type]
            assert (parameters.base, parameters.finetuned) == sources
