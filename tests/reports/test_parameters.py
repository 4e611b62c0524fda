from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from delta_analysis.evaluation import Classification, Evaluation, ExactMatch, LmEval, TextPerplexity
from delta_analysis.pruning import Dare
from delta_analysis.reports.family import SIZES, questions_file, sample_text_file
from delta_analysis.reports.merge_parameters import MergeParameters
from delta_analysis.reports.parameter_checks import ParameterError
from delta_analysis.reports.parameters import (
    AblationParameters,
    ContinualParameters,
    ModelSizeParameters,
    Parameters,
    ValueRangesParameters,
    trail_pairs,
)
from delta_analysis.sweeps.pairs import Edit, Pair
from tests.conftest import SaveCheckpoint

RANGES = ValueRangesParameters(base="", finetuned="", vocab="common", finetuned_is_delta=False, out_dir="runs/test")
SHARED: dict[str, Any] = {
    "base": "",
    "finetuned": "",
    "drop_rates": [0.5],
    "scope": "all",
    "first_seed": 0,
    "n_seeds": 5,
    "n_questions": 200,
    "evaluation": "",
    "chat_template": False,
    "device": "cpu",
    "out_dir": "runs/test",
}
ABLATION = AblationParameters(**SHARED)
PAIR = {"base": "zoo:small/base", "finetuned": "zoo:small/math"}


SWEEP = {name: value for name, value in SHARED.items() if name != "scope"}
EVERY: dict[type[Parameters], dict[str, Any]] = {
    ValueRangesParameters: asdict(RANGES),
    AblationParameters: SHARED,
    ModelSizeParameters: SHARED,
    ContinualParameters: {**SWEEP, "other_base": "", "inputs": ""},
    MergeParameters: {**SWEEP, "continued": "", "continued_evaluation": "", "scalings": 1.0},
}


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": 3}, "base: must be text, or empty; not 3"),
        ({"finetuned": None}, "finetuned: must be text"),
        ({"vocab": "rows"}, "vocab: must be one of 'common', 'error'; not 'rows'"),
        ({"finetuned_is_delta": "no"}, "finetuned_is_delta: must be True or False; not 'no'"),
        ({"drop_rates": [2]}, r"drop_rates: must be numbers in \[0, 1\]"),
        ({"n_seeds": 1}, "n_seeds: must be a whole number of at least 2; not 1"),
        ({"n_seeds": "5"}, "n_seeds: must be a whole number"),
        ({"n_seeds": True}, "n_seeds: must be a whole number"),
        ({"first_seed": -1}, "first_seed: must be a whole number of at least 0"),
        ({"n_questions": 0}, "n_questions: must be a whole number of at least"),
        ({"evaluation": 5}, "evaluation: must be text"),
        ({"evaluation": "math"}, "evaluation: needs base and finetuned"),
        ({"chat_template": 1}, "chat_template: must be True or False; not 1"),
        ({"device": "cud"}, "device: must be one of cpu.*; not 'cud'"),
        ({"scope": 3}, "scope: must be text"),
        ({"out_dir": ""}, "out_dir: must name a folder"),
        ({"out_dir": "README.md/below"}, "out_dir: must name a folder that can be made"),
    ],
)
def test_each_rule_of_a_field_holds_wherever_the_field_is(
    kind: type[Parameters], change: dict[str, Any], message: str
) -> None:
    if set(change) <= set(EVERY[kind]):
        with pytest.raises(ParameterError, match=f"^parameter {message}"):
            kind(**{**EVERY[kind], **change})


@pytest.mark.parametrize("kind", EVERY)
def test_a_cell_gives_its_parameters_and_no_other(kind: type[Parameters]) -> None:
    cell = {**EVERY[kind], "drop_rates": "0.9, 0.5", "In": ["x"], "_": 3, "UPPER": 1, "say": print}
    if "drop_rates" not in EVERY[kind]:
        del cell["drop_rates"]
    found = kind.from_cell(cell)
    assert found == kind(**{**EVERY[kind], **{name: cell[name] for name in EVERY[kind]}})
    with pytest.raises(ParameterError, match=r"^parameter out_dri: is unknown.*mean out_dir\? Known are .*base"):
        kind.from_cell({**cell, "out_dri": "runs"})


@pytest.mark.parametrize("kind", [AblationParameters, ModelSizeParameters])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "zoo:small/base"}, "finetuned: is empty while base is not"),
        ({"finetuned": "zoo:small/math"}, "base: is empty while finetuned is not"),
        ({"base": "zoo:small/bse", "finetuned": "zoo:small/math"}, "base: .*known are .*zoo:small/base"),
        ({"base": "no/such", "finetuned": "zoo:small/math"}, "base: no/such: no such file or directory"),
        ({"scope": "attn"}, "scope: base → instruct: scope 'attn' selects none of the 38 tensors"),
        ({"evaluation": "maths", **PAIR}, "evaluation: must be one of instruct, math, code"),
    ],
)
def test_wrong_values_are_refused_by_name(kind: type[AblationParameters], change: dict[str, str], message: str) -> None:
    with pytest.raises(ParameterError, match=f"^parameter {message}"):
        kind(**{**SHARED, **change})


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
    assert list(ABLATION.evaluations()) == [pair.name for pair in ABLATION.pairs()]
    assert ABLATION.evaluation_files() == [questions_file(task) for task in ("instruct", "math", "code", "code")]
    assert len(RANGES.relations()) == 5


def _judged_by(**change: object) -> Evaluation:
    """What a single pair is judged by."""
    (evaluations,) = replace(ABLATION, **{**PAIR, **change}).evaluations().values()
    (evaluation,) = evaluations
    return evaluation


def test_evaluations_follow_the_model_the_name_or_the_file(tmp_path: Path) -> None:
    by_model, by_name = _judged_by(), _judged_by(evaluation="instruct")
    assert isinstance(by_model, ExactMatch)
    assert isinstance(by_name, ExactMatch)
    assert (len(by_model.questions), by_model.name, by_name.name) == (200, "math", "instruct")
    assert by_model.questions != by_name.questions
    assert isinstance(_judged_by(finetuned="zoo:small/base"), TextPerplexity)

    questions = tmp_path / "own.jsonl"
    questions.write_text('{"prompt": "a", "answer": "b"}\n')
    own = _judged_by(evaluation=str(questions))
    assert isinstance(own, ExactMatch)
    assert [question.answer for question in own.questions] == ["b"]
    questions.write_text("{}\n")
    with pytest.raises(ParameterError, match="parameter evaluation: .*line 1"):
        _judged_by(evaluation=str(questions))
    text = tmp_path / "own.txt"
    text.write_text("some text")
    assert _judged_by(evaluation=str(text)) == TextPerplexity("some text", name="own.txt")


@pytest.mark.parametrize("size", SIZES)
def test_the_task_of_an_embedded_model_is_known_whatever_its_size(size: str) -> None:
    for name in ("instruct", "math", "code"):
        evaluation = _judged_by(base=f"zoo:{size}/base", finetuned=f"zoo:{size}/{name}", n_questions=7)
        assert isinstance(evaluation, ExactMatch)
        assert (evaluation.name, len(evaluation.questions)) == (name, 7)


@pytest.mark.parametrize(("name", "task"), [("strings", "strings-right"), ("code", "code-right")])
def test_the_task_of_an_embedded_encoder_is_known(name: str, task: str) -> None:
    evaluation = _judged_by(base="zoo:encoder/base", finetuned=f"zoo:encoder/{name}", n_questions=7)
    assert isinstance(evaluation, Classification)
    assert evaluation == _judged_by(
        base="zoo:encoder/base", finetuned="zoo:encoder/strings", evaluation=task, n_questions=7
    )


def test_texts_to_read_are_those_of_the_evaluation_or_the_sample() -> None:
    of_harness = replace(ABLATION, **PAIR, evaluation="lm-eval:gsm8k")
    (((sample,),),) = (of_harness.readable().values(),)
    assert sample == TextPerplexity(sample_text_file().read_text(), name=sample.name)
    assert ABLATION.readable() == ABLATION.evaluations()
    every = ModelSizeParameters(**SHARED)
    assert every.readable() == every.evaluations()


def test_a_file_of_labels_makes_it_a_classification(tmp_path: Path) -> None:
    encoder = {"base": "zoo:encoder/base", "finetuned": "zoo:encoder/strings"}
    by_name = _judged_by(**encoder, evaluation="strings-right", n_questions=9)
    assert isinstance(by_name, Classification)
    assert len(by_name.examples) == 9
    own = tmp_path / "own.jsonl"
    own.write_text('{"text": "1+1=2\\n", "label": 1}\n')
    assert isinstance(_judged_by(**encoder, evaluation=str(own)), Classification)


def test_a_task_of_the_harness_has_no_file() -> None:
    chosen = replace(ABLATION, **PAIR, evaluation="lm-eval:gsm8k", chat_template=True)
    assert list(chosen.evaluations().values()) == [(LmEval(("gsm8k",), limit=200, chat_template=True),)]
    assert chosen.evaluation_files() == []


def test_the_chat_template_reaches_every_question() -> None:
    for (plain,), (templated,) in zip(
        ABLATION.evaluations().values(), replace(ABLATION, chat_template=True).evaluations().values(), strict=True
    ):
        assert isinstance(plain, ExactMatch)
        assert templated == replace(plain, chat_template=True)


def test_an_edit_has_the_scope() -> None:
    assert ABLATION.edit(Dare(0.5)) == Edit(Dare(0.5), "all")
    assert replace(ABLATION, scope="mlp,norms").edit(Dare(0.5)) == Edit(Dare(0.5), "mlp,norms")


def test_a_bare_file_is_measured_but_not_evaluated() -> None:
    files = {name: f"{source.replace('zoo:', 'data/zoo/')}/model.safetensors" for name, source in PAIR.items()}
    assert replace(RANGES, **files).relations()[0].name == "model.safetensors → model.safetensors"
    with pytest.raises(ParameterError, match="parameter finetuned: .*evaluation needs a directory"):
        replace(ABLATION, **files)


def test_the_evaluation_shown_is_the_one_used() -> None:
    chosen = replace(ABLATION, **PAIR, evaluation="instruct")
    assert chosen.relations()[0].task == "instruct"
    assert chosen.evaluation_files() == [questions_file("instruct")]


def test_seeds_are_consecutive() -> None:
    assert replace(ABLATION, first_seed=7, n_seeds=3).seeds == [7, 8, 9]


def _sizes(base: str, finetuned: str, **change: object) -> ModelSizeParameters:
    return ModelSizeParameters(**{**SHARED, "base": base, "finetuned": finetuned, **change})


def test_every_size_of_the_family_is_the_default() -> None:
    parameters = _sizes("", "")
    assert parameters.embedded
    names = [pair.name for pair in parameters.pairs()]
    own = ["base → instruct", "base → math", "code-cpt → code", "base → code"]
    assert names == [f"{size}, {name}" for size in SIZES for name in own]
    assert list(parameters.evaluations()) == names
    tasks = [evaluation.name for (evaluation,) in parameters.evaluations().values()]
    assert tasks == ["instruct", "math", "code", "code"] * len(SIZES)
    assert len(parameters.evaluation_files()) == len(names)


def test_sizes_are_given_with_commas_between() -> None:
    parameters = _sizes("zoo:small/base, zoo:small/code-cpt", "zoo:small/math,zoo:small/code", n_questions=7)
    assert not parameters.embedded
    assert parameters.pairs() == [
        Pair("small, base → math", "zoo:small/base", "zoo:small/math"),
        Pair("small, code-cpt → code", "zoo:small/code-cpt", "zoo:small/code"),
    ]
    judged = {name: (each.name, len(each.texts)) for name, (each,) in parameters.evaluations().items()}
    assert judged == {"small, base → math": ("math", 7), "small, code-cpt → code": ("code", 7)}
    assert parameters.evaluation_files() == [questions_file("math"), questions_file("code")]
    assert parameters.edit(Dare(0.5)) == Edit(Dare(0.5), "all")
    assert parameters.seeds == [0, 1, 2, 3, 4]


def test_one_evaluation_serves_every_size() -> None:
    parameters = _sizes("zoo:small/base,zoo:small/code-cpt", "zoo:small/math,zoo:small/code", evaluation="instruct")
    assert {each.name for (each,) in parameters.evaluations().values()} == {"instruct"}


@pytest.mark.parametrize(
    ("base", "finetuned", "message"),
    [
        ("zoo:small/base", "zoo:small/math,zoo:small/code", "parameter base: names 1 checkpoints and finetuned 2"),
        ("zoo:small/base,zoo:small/base", "", "parameter base: names 2 checkpoints and finetuned 1"),
        ("zoo:small/base,", "zoo:small/math,", "parameter base: names nothing between two commas or at an end"),
        ("zoo:small/base,zoo:small/bas", "zoo:small/math,zoo:small/code", "parameter base: zoo:small/bas: no such"),
        ("zoo:small/base,zoo:small/base", "zoo:small/math, zoo:small/math", "two pairs .* called 'small, base → math'"),
    ],
)
def test_lists_that_do_not_fit_are_refused(base: str, finetuned: str, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        _sizes(base, finetuned)


def test_the_trail_leads_from_a_small_part_of_the_way_to_the_true_base() -> None:
    pairs = trail_pairs()
    assert [pair.name for pair in pairs] == ["code-cpt-0640 → code", "code-cpt-1600 → code"]
    assert {pair.finetuned for pair in pairs} == {"zoo:small/code"}
    assert [pair.base for pair in pairs] == ["zoo:small/code-cpt-0640", "zoo:small/code-cpt-1600"]


def test_either_side_of_a_known_pair_may_be_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "delta_analysis.reports.parameters.pair_sources", lambda pair: (PAIR["base"], PAIR["finetuned"])
    )
    other = {"base": "zoo:small/code-cpt", "finetuned": "zoo:small/code"}
    for given, sources in (
        ({"base": "pair:known", "finetuned": other["finetuned"]}, (PAIR["base"], other["finetuned"])),
        ({"base": other["base"], "finetuned": "pair:known"}, (other["base"], PAIR["finetuned"])),
        ({"base": "pair:known", "finetuned": "pair:known"}, tuple(PAIR.values())),
        ({"base": "pair:known"}, tuple(PAIR.values())),
        ({"finetuned": "pair:known"}, tuple(PAIR.values())),
    ):
        for parameters in (replace(RANGES, **given), replace(ABLATION, **given)):
            assert (parameters.base, parameters.finetuned) == sources
