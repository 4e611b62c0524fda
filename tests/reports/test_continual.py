"""Parameters of the report on continual pre-training: what is refused, and what each of them means."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from delta_analysis.checkpoints.paths import find_root
from delta_analysis.evaluation import ExactMatch, LmEval, TextPerplexity
from delta_analysis.reports.family import TASK_PAIRS, questions_file, sample_text_file
from delta_analysis.reports.parameter_checks import ParameterError
from delta_analysis.reports.parameters import MOST_TEXTS, ContinualParameters
from delta_analysis.sweeps.pairs import Pair
from tests.conftest import SaveCheckpoint

DEFAULTS: dict[str, Any] = {
    "base": "",
    "finetuned": "",
    "other_base": "",
    "inputs": "",
    "drop_rates": [0.5, 0.1],
    "first_seed": 0,
    "n_seeds": 3,
    "n_questions": 20,
    "evaluation": "",
    "chat_template": False,
    "device": "cpu",
    "out_dir": "runs/test",
}
PAIR = {"base": "zoo:tiny/code-cpt", "finetuned": "zoo:tiny/code"}
OTHER = {**PAIR, "other_base": "zoo:tiny/base"}
ZOO = find_root() / "data" / "zoo"


def continual(**change: object) -> ContinualParameters:
    return ContinualParameters(**{**DEFAULTS, **change})


@pytest.fixture
def questions(tmp_path: Path) -> str:
    """A file of 100 questions."""
    path = tmp_path / "own.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}+1=", "answer": "{i + 1}"}}\n' for i in range(100)))
    return str(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "no/such", "finetuned": "zoo:tiny/code"}, "base: no/such: no such file or directory"),
        ({"finetuned": "zoo:tiny/code"}, "base: is empty while finetuned is not"),
        ({"base": "zoo:tiny/base"}, "finetuned: is empty while base is not"),
        ({"other_base": "zoo:tiny/base"}, "other_base: needs base and finetuned"),
        ({"other_base": "pair:some", **PAIR}, "other_base: 'pair:some' names two models"),
        ({"other_base": "zoo:tiny/code-cpt", **PAIR}, "other_base: is the same as base"),
        ({"other_base": "zoo:small/code-cpt", **PAIR}, "other_base: is called 'code-cpt', as base is"),
        ({"other_base": "no/such", **PAIR}, "other_base: no/such: no such file or directory"),
        ({"other_base": "zoo:tiny/bas", **PAIR}, "other_base: zoo:tiny/bas: no such embedded model"),
        ({"inputs": "code"}, "inputs: needs base and finetuned"),
        ({"inputs": "no/such.txt", **PAIR}, "inputs: must be one of instruct.*not 'no/such.txt'"),
        ({"inputs": "no/such.txt", "evaluation": "code", **PAIR}, "inputs: must be one of instruct"),
        ({"inputs": "lm-eval:gsm8k", **PAIR}, "inputs: 'lm-eval:gsm8k' has no texts to read"),
        ({"evaluation": "code"}, "evaluation: needs base and finetuned"),
        ({"evaluation": "cod", "inputs": "code", **PAIR}, "evaluation: must be one of instruct.*not 'cod'"),
    ],
)
def test_wrong_values_are_refused_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError, match=f"^parameter {message}"):
        continual(**change)


def test_inputs_that_cannot_be_read_are_refused_by_name(tmp_path: Path) -> None:
    for name, content, problem in (
        ("empty.txt", "", "is empty"),
        ("empty.jsonl", "", "is empty"),
        ("wrong.jsonl", '{"prompt": "1+1="}\n', "line 1"),
        ("labels.jsonl", '{"text": "a", "label": "x"}\n', "line 1"),
    ):
        file = tmp_path / name
        file.write_text(content)
        with pytest.raises(ParameterError, match=f"^parameter inputs: .*{name}.*{problem}"):
            continual(inputs=str(file), **PAIR)
        with pytest.raises(ParameterError, match=f"^parameter evaluation: .*{name}.*{problem}"):
            continual(evaluation=str(file), **PAIR)


def test_an_other_base_of_another_architecture_is_refused(save_checkpoint: SaveCheckpoint) -> None:
    stranger = save_checkpoint("stranger", {"w": torch.ones(2)})
    with pytest.raises(ParameterError, match="^parameter other_base: .*no tensor in common"):
        continual(other_base=str(stranger), **PAIR)


def test_the_family_is_the_default() -> None:
    parameters = continual()
    assert parameters.embedded
    assert parameters.relations() == TASK_PAIRS[2:]
    assert parameters.pairs() == [relation.pair for relation in TASK_PAIRS[2:]]
    judge = parameters.evaluation_of()
    assert isinstance(judge, ExactMatch)
    assert (judge.name, len(judge.questions)) == ("code", 20)
    assert parameters.texts() == judge.texts
    assert parameters.evaluation_files() == [questions_file("code")]


def test_a_pair_by_itself_is_explained_on_its_base() -> None:
    parameters = continual(**PAIR)
    assert not parameters.embedded
    assert parameters.pairs() == [Pair("code-cpt → code", *PAIR.values())]
    (relation,) = parameters.relations()
    assert (relation.kind, relation.task) == ("given", "code")


def test_the_other_base_comes_second_and_has_the_same_task() -> None:
    near, far = continual(**OTHER).relations()
    assert (near.base, far.base) == ("zoo:tiny/code-cpt", "zoo:tiny/base")
    assert (near.name, far.name) == ("code-cpt → code", "base → code")
    assert near.finetuned == far.finetuned
    assert near.task == far.task == "code"


def test_paths_are_resolved_from_the_repository_or_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = "data/zoo/tiny/code-cpt", "data/zoo/tiny/base/"
    parameters = continual(base=near, finetuned="data/zoo/tiny/code", other_base=far)
    assert parameters.base == str(ZOO / "tiny" / "code-cpt")
    assert parameters.other_base == str(ZOO / "tiny" / "base")
    with pytest.raises(ParameterError, match="other_base: is the same as base"):
        continual(base=near, finetuned="data/zoo/tiny/code", other_base=f"{near}/")
    shutil.copytree(ZOO / "tiny" / "base", tmp_path / "earlier")
    (tmp_path / "own.txt").write_text("some text")
    monkeypatch.chdir(tmp_path)
    here = continual(**{**OTHER, "other_base": "earlier"}, inputs="own.txt")
    assert here.other_base == str(tmp_path / "earlier")
    assert [pair.name for pair in here.pairs()] == ["code-cpt → code", "earlier → code"]
    assert here.texts() == ("some text",)
    assert here.evaluation_files() == [tmp_path / "own.txt"]


def test_two_folders_of_one_name_are_refused(tmp_path: Path) -> None:
    shutil.copytree(ZOO / "tiny" / "base", tmp_path / "code-cpt")
    with pytest.raises(ParameterError, match="^parameter other_base: is called 'code-cpt', as base is"):
        continual(**{**OTHER, "other_base": str(tmp_path / "code-cpt")})


def test_inputs_judge_where_there_is_no_evaluation(questions: str) -> None:
    parameters = continual(**OTHER, inputs=questions)
    judge = parameters.evaluation_of()
    assert isinstance(judge, ExactMatch)
    assert (judge.name, len(judge.questions)) == ("own.jsonl", 20)
    # Layers may read more of them than are asked.
    assert parameters.texts() == tuple(f"{i}+1={i + 1}" for i in range(MOST_TEXTS))
    assert parameters.evaluation_files() == [Path(questions)]
    assert {relation.task for relation in parameters.relations()} == {questions}


def test_an_evaluation_judges_and_inputs_are_only_read(questions: str) -> None:
    parameters = continual(**PAIR, inputs=questions, evaluation="instruct")
    assert parameters.evaluation_of().name == "instruct"
    assert parameters.texts()[0] == "0+1=1"
    assert sorted(parameters.evaluation_files()) == sorted([Path(questions), questions_file("instruct")])


def test_labelled_texts_and_plain_text_serve_as_inputs(tmp_path: Path) -> None:
    labelled, plain = tmp_path / "labels.jsonl", tmp_path / "plain.txt"
    labelled.write_text('{"text": "a b", "label": 1}\n{"text": "c", "label": 0}\n')
    plain.write_text("some text")
    assert continual(**PAIR, evaluation="code", inputs=str(labelled)).texts() == ("a b", "c")
    alone = continual(**PAIR, inputs=str(plain))
    assert alone.evaluation_of() == TextPerplexity("some text", name="plain.txt")
    assert alone.texts() == ("some text",)


def test_without_texts_of_its_own_the_sample_is_read() -> None:
    sample = TextPerplexity(sample_text_file().read_text()).texts
    of_harness = continual(**PAIR, evaluation="lm-eval:gsm8k")
    assert of_harness.evaluation_of() == LmEval(("gsm8k",), limit=20, chat_template=False)
    assert of_harness.texts() == sample
    assert of_harness.evaluation_files() == []
    unknown = continual(base="zoo:tiny/base", finetuned="zoo:tiny/code-cpt")
    assert isinstance(unknown.evaluation_of(), TextPerplexity)
    assert unknown.texts() == sample
    assert unknown.evaluation_files() == [sample_text_file()]


def test_at_most_64_texts_are_read() -> None:
    assert len(continual(n_questions=200).texts()) == MOST_TEXTS
    assert len(continual(n_questions=7).texts()) == 7


def test_the_chat_template_reaches_the_questions(questions: str) -> None:
    for change in ({}, {**PAIR, "inputs": questions}):
        plain, templated = (continual(**change, chat_template=flag).evaluation_of() for flag in (False, True))
        assert isinstance(plain, ExactMatch)
        assert templated == replace(plain, chat_template=True)
