"""Each check names the parameter, what was given and what is allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from delta_analysis.checkpoints import find_root
from delta_analysis.evaluation import Classification, ExactMatch, LmEval, TextPerplexity, load_labelled
from delta_analysis.reports.family import TASK_PAIRS, TASKS, Relation, questions_file, sample_text_file
from delta_analysis.reports.parameter_checks import (
    ParameterError,
    check_model,
    check_pair,
    check_scope,
    choose_evaluation,
    evaluation_file,
    made_folder,
    named_sources,
    parse_drop_rates,
)
from tests.conftest import SaveCheckpoint

MATH = Relation("zoo:small/base", "zoo:small/math", "SFT", "math")
LABELLED = '{"text": "1+1=2", "label": 1}\n{"text": "1+1=3", "label": 0}\n'


@pytest.mark.parametrize(
    ("given", "rates"),
    [
        ("0.1,0.5", (0.0, 0.1, 0.5, 1.0)),
        ("[0.1, 0.5]", (0.0, 0.1, 0.5, 1.0)),
        (0.5, (0.0, 0.5, 1.0)),
        ([0.9, 0.1, 0.9, 0, 1], (0.0, 0.1, 0.9, 1.0)),
    ],
)
def test_drop_rates_come_in_every_form_that_papermill_passes(given: object, rates: tuple[float, ...]) -> None:
    assert parse_drop_rates(given) == rates  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["", "a,b", [1.5], [-0.1, 0.5], [], None, [0, 1], "nan", [None]])
def test_wrong_drop_rates_are_refused_by_name(given: object) -> None:
    with pytest.raises(ValueError, match=r"^must be numbers in \[0, 1\]"):
        parse_drop_rates(given)  # type: ignore[arg-type]


def test_the_folder_of_results_is_made_or_refused(tmp_path: Path) -> None:
    assert made_folder(str(tmp_path / "a" / "b")) == str(tmp_path / "a" / "b")
    # Wherever a notebook runs.
    assert made_folder("runs/test") == str(find_root() / "runs" / "test")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    # The last one is there, and not even root can write in it.
    for wrong in ("", str(tmp_path / "file"), str(tmp_path / "file" / "below"), "/proc/self"):
        with pytest.raises(ValueError, match="^must name a folder that can be made"):
            made_folder(wrong)


def test_sources_have_commas_between_and_paths_may_have_them_inside(tmp_path: Path) -> None:
    for name in ("a,b", "c"):
        (tmp_path / name).mkdir()
    both = f"{tmp_path}/a,b, {tmp_path}/c"
    assert named_sources(both) == [f"{tmp_path}/a,b", f"{tmp_path}/c"]
    assert named_sources(f"zoo:small/math,{both}") == ["zoo:small/math", f"{tmp_path}/a,b", f"{tmp_path}/c"]
    assert named_sources("a,b,,") == ["a", "b", "", ""]
    assert named_sources("") == [""]


@pytest.mark.parametrize(
    ("name", "kind"), [("q.jsonl", ExactMatch), ("l.jsonl", Classification), ("t.txt", TextPerplexity)]
)
def test_a_file_of_the_hubs_cache_is_judged_by_the_name_of_its_link(tmp_path: Path, name: str, kind: type) -> None:
    lines = {"q.jsonl": {"prompt": "2+2=", "answer": "4"}, "l.jsonl": {"text": "a", "label": 1}, "t.txt": {}}
    # A blank last line is no question.
    (tmp_path / "0123abcd").write_text(json.dumps(lines[name]) + "\n\n")
    (tmp_path / name).symlink_to("0123abcd")
    assert type(choose_evaluation(str(tmp_path / name), 10)) is kind


def test_an_adapter_stands_without_its_base_but_answers_with_it_only(tmp_path: Path) -> None:
    factors = {
        "base_model.model.w.lora_A.weight": torch.ones(1, 2),
        "base_model.model.w.lora_B.weight": torch.ones(2, 1),
    }
    save_file(factors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    check_pair("", str(tmp_path))
    with pytest.raises(ParameterError, match="parameter base: is empty: evaluation needs a directory with config.json"):
        check_model("", str(tmp_path))
    with pytest.raises(ParameterError, match="parameter base: is empty while finetuned is not"):
        check_pair("", "zoo:small/math")


def test_a_model_to_evaluate_has_configuration_and_tokenizer(save_checkpoint: SaveCheckpoint) -> None:
    check_model("zoo:small/base", "zoo:small/math")
    bare = save_checkpoint("bare", {"w": torch.ones(2)}, config={"model_type": "llama"})
    with pytest.raises(ParameterError, match="parameter finetuned: .*bare: evaluation needs a directory"):
        check_model("zoo:small/base", str(bare))


@pytest.mark.parametrize("scope", ["all", "linear", "attention", "mlp, norms", "*.layers.0.*"])
def test_scopes_that_select_something_are_accepted(scope: str) -> None:
    check_scope(scope, TASK_PAIRS)


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        ("attn", "parameter scope: base → math: scope 'attn' selects none of the 38 tensors.*expected all, linear"),
        ("mlp, *.layers.9.*", r"parameter scope: base → math: scope '\*.layers.9.\*' selects none"),
        ("", "parameter scope: base → math: scope '' selects none"),
    ],
)
def test_scopes_that_select_nothing_are_refused_by_name(scope: str, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        check_scope(scope, [MATH])


def test_a_scope_is_looked_up_in_the_delta_and_not_in_the_model(save_checkpoint: SaveCheckpoint) -> None:
    both = {"model.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}
    base = save_checkpoint("base", both)
    tuned = save_checkpoint("tuned", both | {"model.norm.weight": torch.ones(2)})
    check_scope("mlp", [Relation(str(base), str(tuned), "", "")])
    with pytest.raises(ParameterError, match="parameter scope: base → tuned: scope 'norms' selects none of the 1"):
        check_scope("norms", [Relation(str(base), str(tuned), "", "")])


def test_files_of_evaluations_are_found_by_task_path_or_default(tmp_path: Path) -> None:
    assert [evaluation_file(task) for task in TASKS] == [questions_file(task) for task in TASKS]
    assert evaluation_file("") == sample_text_file()
    assert evaluation_file("lm-eval:gsm8k") is None
    own = tmp_path / "own.txt"
    own.write_text("text")
    assert evaluation_file(str(own)) == own
    for wrong in ("maths", str(tmp_path)):
        with pytest.raises(
            ParameterError, match="parameter evaluation: must be one of instruct, math, code, .*lm-eval:"
        ):
            evaluation_file(wrong)


@pytest.mark.parametrize("task", ["instruct", "math", "code"])
def test_tasks_of_decoders_are_questions(task: str) -> None:
    chosen = choose_evaluation(task, 3, chat_template=True)
    assert isinstance(chosen, ExactMatch)
    assert (chosen.name, len(chosen.questions), chosen.chat_template) == (task, 3, True)


@pytest.mark.parametrize("task", ["strings-right", "code-right"])
def test_tasks_of_encoders_are_texts_with_labels(task: str) -> None:
    examples = load_labelled(questions_file(task), 3)
    assert choose_evaluation(task, 3) == Classification(tuple(examples), name=task)


def test_a_file_of_texts_with_labels_is_a_classification(tmp_path: Path) -> None:
    labelled = tmp_path / "own.jsonl"
    labelled.write_text(LABELLED)
    chosen = choose_evaluation(str(labelled), 10)
    assert isinstance(chosen, Classification)
    assert chosen.name == "own.jsonl"
    assert [(example.text, example.label) for example in chosen.examples] == [("1+1=2", 1), ("1+1=3", 0)]
    assert len(choose_evaluation(str(labelled), 1).texts) == 1
    labelled.write_text(LABELLED + '{"text": "1+1=4", "label": "no"}\n')
    with pytest.raises(ParameterError, match="parameter evaluation: .*own.jsonl, line 3"):
        choose_evaluation(str(labelled), 10)


def test_tasks_of_the_harness_are_named_with_commas_between() -> None:
    chosen = choose_evaluation("lm-eval:gsm8k, ifeval", 7, chat_template=True)
    assert chosen == LmEval(("gsm8k", "ifeval"), limit=7, chat_template=True)


def test_a_text_is_for_perplexity_and_goes_by_its_file(tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("some text")
    assert choose_evaluation(str(text), 5) == TextPerplexity("some text", name="own.txt")
    for unreadable in (b"", "text".encode("utf-16")):
        text.write_bytes(unreadable)
        with pytest.raises(ParameterError, match="parameter evaluation: .*own.txt"):
            choose_evaluation(str(text), 5)
