"""Tasks of lm-evaluation-harness on a model in memory, against our own evaluation and plain loops."""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from delta_analysis.checkpoints.checkpoint import open_checkpoint
from delta_analysis.checkpoints.paths import find_root
from delta_analysis.evaluation import harness
from delta_analysis.evaluation.exact_match import ExactMatch, load_questions
from delta_analysis.evaluation.harness import LmEval
from delta_analysis.evaluation.models import load_model, load_tokenizer

QUESTIONS = load_questions(find_root() / "data/zoo/tasks/instruct.jsonl", 40)
GENERATE = {
    "output_type": "generate_until",
    "doc_to_text": "prompt",
    "doc_to_target": "{{answer.strip()}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 16, "do_sample": False},
}
CHOOSE = {
    "output_type": "multiple_choice",
    "doc_to_text": "prompt",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "target_delimiter": "",
}
MEAN = {"aggregation": "mean", "higher_is_better": True}
EXACT = {"metric": "exact_match", **MEAN}

NOISE = 0.25

METRIC = "metric_list:\n  - metric: !function {}\n    aggregation: mean\n    higher_is_better: true\n"
"""In YAML itself, which the library would not write."""

WriteTask = Callable[..., str]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A fine-tune with so much noise in its weights that about half of its answers are wrong."""
    noisy = load_model(open_checkpoint("zoo:small/instruct"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (each for each in noisy.parameters() if each.ndim == 2):
            weight += NOISE * weight.std() * torch.randn(weight.shape, generator=generator)
    return noisy


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(open_checkpoint("zoo:small/instruct"))


@pytest.fixture
def write_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteTask:
    """Write a task and its documents into a folder, the documents once; gives the folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    folder = tmp_path / "tasks"
    folder.mkdir()
    choices = [sorted({question.answer.strip(), question.answer.strip()[::-1] + "a"}) for question in QUESTIONS]
    documents = [
        {
            "prompt": question.prompt,
            "answer": question.answer,
            "choices": options,
            "label": options.index(question.answer.strip()),
        }
        for question, options in zip(QUESTIONS, choices, strict=True)
    ]
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))

    def write(name: str, **fields: Any) -> str:
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
            "test_split": "test",
            **fields,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
        return str(folder)

    return write


def log_likelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str
) -> tuple[float, bool]:
    """Of the continuation, token by token, and whether it is the greedy one."""
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([tokenizer(prompt + continuation, add_special_tokens=False)["input_ids"]])
    with torch.inference_mode():
        logs = model(ids).logits[0, len(before) - 1 : -1].log_softmax(-1)
    following = ids[0, len(before) :]
    return float(logs.gather(1, following[:, None]).sum()), bool((logs.argmax(-1) == following).all())


def state() -> tuple[object, ...]:
    """What the harness changes in the process."""
    legacy = np.random.get_state()[1].tolist()  # noqa: NPY002
    level = logging.getLogger("lm_eval").level
    return random.getstate(), legacy, torch.get_rng_state().tolist(), os.environ.get("HF_ALLOW_CODE_EVAL"), level


def small_index(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the harness's own tasks be GSM8K alone, since to index all takes seconds; gives the folders indexed."""
    folders: list[str] = []

    def index(folder: str) -> TaskManager:
        folders.append(folder)
        own = str(Path(lm_eval.tasks.__file__).parent / "gsm8k")
        return TaskManager(include_path=[own, folder], include_defaults=False)

    monkeypatch.setattr(harness, "_every_task", index)
    return folders


def test_generated_answers_agree_with_our_exact_match(
    write_task: WriteTask, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = write_task("strings", **GENERATE, metric_list=[EXACT])
    outcomes = LmEval(("strings",), task_folder=folder)(model, tokenizer)
    own = ExactMatch(tuple(QUESTIONS))(model, tokenizer)
    assert list(outcomes) == ["strings/exact_match"]
    assert outcomes["strings/exact_match"].dtype == np.float64
    assert outcomes["strings/exact_match"].tolist() == own["accuracy"].tolist()
    assert 0.2 < own["accuracy"].mean() < 0.8


def test_choices_agree_with_plain_log_likelihoods(
    write_task: WriteTask, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    metrics = [
        {"metric": "acc", **MEAN},
        {"metric": "acc_norm", **MEAN},
        {"metric": "mcc", "aggregation": "matthews_corrcoef"},
    ]
    folder = write_task("choice", **CHOOSE, metric_list=metrics)
    outcomes = LmEval(("choice",), task_folder=folder, batch_size=3)(model, tokenizer)
    right: dict[str, list[bool]] = {"choice/acc": [], "choice/acc_norm": []}
    for question in QUESTIONS:
        answer = question.answer.strip()
        other = answer[::-1] + "a"
        ours, theirs = (log_likelihood(model, tokenizer, question.prompt, each)[0] for each in (answer, other))
        right["choice/acc"].append(ours > theirs)
        right["choice/acc_norm"].append(ours / len(answer) > theirs / len(other))
    assert {metric: values.tolist() for metric, values in outcomes.items()} == right


def test_a_log_likelihood_task_gives_its_mean_only(
    write_task: WriteTask, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    metrics = [{"metric": "perplexity", "aggregation": "perplexity"}, {"metric": "acc", **MEAN}]
    fields = {"output_type": "loglikelihood", "doc_to_text": "prompt", "doc_to_target": "{{answer.strip()}}"}
    folder = write_task("greedy", **fields, target_delimiter="", metric_list=metrics)
    outcomes = LmEval(("greedy",), limit=12, task_folder=folder)(model, tokenizer)
    expected = [log_likelihood(model, tokenizer, each.prompt, each.answer.strip())[1] for each in QUESTIONS[:12]]
    assert {metric: values.tolist() for metric, values in outcomes.items()} == {"greedy/acc": expected}


def test_several_filters_are_told_apart(
    write_task: WriteTask, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    first = {"function": "regex", "regex_pattern": "^(.)"}
    filters = [
        {"name": "none", "filter": [{"function": "take_first"}]},
        {"name": "first-letter", "filter": [first, {"function": "take_first"}]},
    ]
    folder = write_task("strings", **GENERATE, metric_list=[EXACT], filter_list=filters)
    outcomes = LmEval(("strings",), task_folder=folder, limit=10)(model, tokenizer)
    assert set(outcomes) == {"strings/exact_match", "strings/exact_match,first-letter"}
    one_letter = np.array([len(question.answer.strip()) == 1 for question in QUESTIONS[:10]])
    assert not (outcomes["strings/exact_match,first-letter"][~one_letter]).any()


def test_a_group_pools_the_documents_of_its_tasks(
    write_task: WriteTask, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    write_task("one", **GENERATE, metric_list=[EXACT])
    folder = write_task("two", **GENERATE | {"doc_to_text": "again: {{prompt}}"}, metric_list=[EXACT])
    group = {"group": "both", "task": ["one", {"task": "two"}], "aggregate_metric_list": [{"metric": "exact_match"}]}
    (Path(folder) / "both.yaml").write_text(yaml.safe_dump(group))
    outcomes = LmEval(("both",), task_folder=folder, limit=5)(model, tokenizer)
    assert set(outcomes) == {"one/exact_match", "two/exact_match", "both/exact_match"}
    parts = [*outcomes["one/exact_match"], *outcomes["two/exact_match"]]
    assert outcomes["both/exact_match"].tolist() == parts


def test_examples_stand_before_the_question(
    write_task: WriteTask, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = write_task("strings", **GENERATE, metric_list=[EXACT], fewshot_split="test", fewshot_delimiter="")
    none, one = (LmEval(("strings",), task_folder=folder, limit=4, num_fewshot=n) for n in (0, 1))
    prompts = {}
    for evaluation in (none, one):
        prepared: Any = evaluation.prepared(model, tokenizer)
        prepared(model, tokenizer)
        prompts[evaluation.num_fewshot] = [
            each.args[0] for each in prepared.judge.args[1]["tasks"]["strings"].instances
        ]
    assert prompts[0] == [question.prompt for question in QUESTIONS[:4]]
    known = {question.prompt for question in QUESTIONS}
    for long, short in zip(prompts[1], prompts[0], strict=True):
        assert long.endswith(short)
        assert any(long.startswith(each) for each in known - {short})


def test_the_model_and_the_process_stay_as_they_are(
    write_task: WriteTask, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    folder = write_task("strings", **GENERATE | {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}})
    model = load_model(open_checkpoint("zoo:small/instruct")).train()
    # A head of its own, though the configuration ties it to the embedding.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    own = copy.deepcopy(tokenizer)
    own.pad_token, own.padding_side = None, "right"
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    weights = {name: (weight, weight.detach().clone()) for name, weight in model.named_parameters()}
    settings = model.generation_config.to_dict()
    before = state()
    LmEval(("strings",), task_folder=folder, limit=2)(model, own)
    assert state() == before
    assert model.training
    assert "tie_weights" not in vars(model)
    assert model.generation_config.to_dict() == settings
    assert (own.pad_token, own.padding_side, len(own)) == (None, "right", len(tokenizer))
    assert [name for name, _ in model.named_parameters()] == list(weights)
    for name, weight in model.named_parameters():
        assert weight is weights[name][0]
        assert torch.equal(weight, weights[name][1])


def test_sampled_answers_are_the_same_every_time(
    write_task: WriteTask, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    sampled = {"until": ["\n"], "max_gen_toks": 16, "do_sample": True, "temperature": 2.0}
    folder = write_task("strings", **GENERATE | {"generation_kwargs": sampled}, metric_list=[EXACT])
    prepared: Any = LmEval(("strings",), limit=5, task_folder=folder).prepared(model, tokenizer)
    answers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        prepared(model, tokenizer)
        answers.append([each.resps[0] for each in prepared.judge.args[1]["tasks"]["strings"].instances])
    assert answers[0] == answers[1]
    assert answers[0] != [question.answer.strip() for question in QUESTIONS[:5]]


def test_threads_may_share_what_is_prepared(
    write_task: WriteTask, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = write_task("strings", **GENERATE, metric_list=[EXACT])
    other = load_model(open_checkpoint("zoo:small/instruct"))
    prepared = LmEval(("strings",), task_folder=folder, limit=10).prepared(model, tokenizer)
    alone = [prepared(each, tokenizer)["strings/exact_match"].tolist() for each in (model, other)]
    assert alone[0] != alone[1]
    with ThreadPoolExecutor(4) as executor:
        together = executor.map(lambda each: prepared(each, tokenizer), (model, other) * 3)
    assert [each["strings/exact_match"].tolist() for each in together] == alone * 3


TIMED = """
import signal

def timed(references, predictions):
    try:
        signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGALRM))
    except Exception:
        return 0.0
    return 1.0
"""


def test_a_task_with_an_alarm_is_never_wrong_in_a_thread(
    write_task: WriteTask, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = Path(write_task("timed", **GENERATE))
    (folder / "checker.py").write_text(TIMED)
    with (folder / "timed.yaml").open("a") as file:
        file.write(METRIC.format("checker.timed"))
    prepared = LmEval(("timed",), limit=2, task_folder=str(folder)).prepared(model, tokenizer)
    assert prepared(model, tokenizer)["timed/timed"].tolist() == [1, 1]
    with (
        ThreadPoolExecutor(1) as executor,
        pytest.raises(ValueError, match="checks of timed have a time limit that works in a main thread only"),
    ):
        executor.submit(prepared, model, tokenizer).result()
    assert prepared(model, tokenizer)["timed/timed"].tolist() == [1, 1]


def test_it_is_silent(
    write_task: WriteTask,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = write_task("strings", **GENERATE, metric_list=[EXACT])
    prepared = LmEval(("strings",), task_folder=folder, limit=2).prepared(model, tokenizer)
    capfd.readouterr()
    prepared(model, tokenizer)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_code_of_the_model_runs_only_when_allowed(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    folder = Path(lm_eval.tasks.__file__).parent / name
    with pytest.raises(ValueError, match=f"{name} would run code that the model wrote .*allow_code=True"):
        LmEval((name,), task_folder=str(folder)).prepared(model, tokenizer)
    assert not [module for module in sys.modules if module.startswith(f"lm_eval.tasks.{name}")]


CHECKER = """
import os

def allowed(references, predictions):
    return float(os.environ["HF_ALLOW_CODE_EVAL"] == "1")
"""


@pytest.mark.parametrize("marked", [True, False])
def test_the_harness_is_told_whether_code_may_run(
    write_task: WriteTask,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    marked: bool,
) -> None:
    """A task that is not marked as unsafe gets no leave by an environment variable either."""
    before = "0" if marked else "1"
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", before)
    folder = Path(write_task("code", **GENERATE, unsafe_code=marked))
    (folder / "checker.py").write_text(CHECKER)
    with (folder / "code.yaml").open("a") as file:
        file.write(METRIC.format("checker.allowed"))
    # By way of a group within a group, neither of which is marked itself.
    small_index(monkeypatch)
    (folder / "group.yaml").write_text(yaml.safe_dump({"group": "all", "task": [{"group": "inner", "task": ["code"]}]}))
    if marked:
        with pytest.raises(ValueError, match="code would run code"):
            LmEval(("all",), task_folder=str(folder)).prepared(model, tokenizer)
    outcomes = LmEval(("code",), limit=2, task_folder=str(folder), allow_code=marked)(model, tokenizer)
    assert outcomes["code/allowed"].tolist() == [float(marked)] * 2
    assert os.environ["HF_ALLOW_CODE_EVAL"] == before


def test_chat_template(write_task: WriteTask, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    folder = write_task("strings", **GENERATE, metric_list=[EXACT])
    evaluation = LmEval(("strings",), limit=2, task_folder=folder, chat_template=True)
    with pytest.raises(ValueError, match="no chat template"):
        evaluation.prepared(model, tokenizer)
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for message in messages %}<{{ message.role }}> {{ message.content }}{% endfor %}"
    prepared: Any = evaluation.prepared(model, chatty)
    prepared(model, chatty)
    instances = prepared.judge.args[1]["tasks"]["strings"].instances
    assert [each.args[0] for each in instances] == [f"<user> {question.prompt}" for question in QUESTIONS[:2]]


@pytest.mark.parametrize(
    "metric",
    [
        {"metric": "mcc", "aggregation": "matthews_corrcoef"},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": False},
    ],
    ids=["no mean", "less is better"],
)
def test_a_task_without_a_score_is_named(
    write_task: WriteTask, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, metric: dict[str, Any]
) -> None:
    folder = write_task("choice", **CHOOSE, metric_list=[metric])
    message = rf"no metric of 'choice' is a mean over documents of which more is better \({metric['metric']}\)"
    with pytest.raises(ValueError, match=message):
        LmEval(("choice",), task_folder=folder).prepared(model, tokenizer)


def test_an_unknown_task_is_named_with_those_close_to_it(
    write_task: WriteTask, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_task("strings", **GENERATE)
    indexed = small_index(monkeypatch)
    with pytest.raises(ValueError, match=r"no task 'gsm8' in the harness; close to it are \['gsm8k'"):
        LmEval(("strings", "gsm8"), task_folder=folder).prepared(model, tokenizer)
    assert indexed == [folder]


def test_a_context_too_short_for_the_task_is_an_error(
    write_task: WriteTask, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = write_task("long", **GENERATE | {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 400}})
    with pytest.raises(ValueError, match="400.*maximum sequence length .128"):
        LmEval(("long",), limit=2, task_folder=folder)(model, tokenizer)


def test_a_classifier_is_no_language_model(tokenizer: PreTrainedTokenizerBase) -> None:
    classifier = load_model(open_checkpoint("zoo:encoder/code"))
    with pytest.raises(ValueError, match="is no language model"):
        LmEval(("gsm8k",)).prepared(classifier, tokenizer)


def test_without_the_harness_the_extra_is_named(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ValueError, match=r"delta_analysis\[eval\]"):
        LmEval(("gsm8k",)).prepared(model, tokenizer)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": ()}, "tuple of names"),
        ({"tasks": "gsm8k"}, "tuple of names"),
        ({"limit": 0}, "limit must be a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
    ],
)
def test_values_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LmEval(**{"tasks": ("gsm8k",), **fields})


def test_a_missing_folder_is_named(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="'/nowhere' is no folder"):
        LmEval(("gsm8k",), task_folder="/nowhere").prepared(model, tokenizer)


def test_it_is_a_plain_value() -> None:
    one, other = (LmEval(("gsm8k", "ifeval"), limit=100) for _ in range(2))
    assert hash(one) == hash(other)
    assert one.texts == ()
    assert one.protocol.startswith("gsm8k, ifeval by lm-evaluation-harness on the first 100 documents")
