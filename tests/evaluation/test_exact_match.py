"""Questions and exact match, on a tiny model with random weights."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from delta_analysis.checkpoints.checkpoint import open_checkpoint
from delta_analysis.evaluation import ExactMatch, Question, load_questions
from delta_analysis.evaluation.models import load_model
from delta_analysis.zoo.tokenizer import character_tokenizer
from tests.evaluation.conftest import ids_of, slow_greedy, tiny_model

PROMPT_LETTERS = list("abcdefgh 0123456789?")


def teacher_forced(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, question: Question) -> bool:
    """Whether each character of the answer and its newline is the likeliest after those before it."""
    prompt = ids_of(tokenizer, question.prompt)
    answer = ids_of(tokenizer, question.answer.split("\n")[0] + "\n")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


@pytest.fixture(scope="module")
def questions(answering_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> tuple[Question, ...]:
    """Right answers, and answers that are wrong in each of the ways there are."""
    rng = np.random.default_rng(0)
    prompts = ["".join(rng.choice(PROMPT_LETTERS, size=rng.integers(1, 20))) for _ in range(60)]
    made = []
    for i, prompt in enumerate(prompts):
        written = slow_greedy(answering_model, tokenizer, prompt)
        line = written.removesuffix("\n")
        kinds = [
            line + "\n",  # right where the model ended its line
            line,  # the same, without a newline of its own
            line[:-1] + "\n",  # the model goes on
            line + "x\n",  # the model ends too soon
            "Z" + line[1:] + "\n",
            line + "\nand more after the newline\n",
        ]
        made.append(Question(prompt, kinds[i % len(kinds)]))
    return tuple(made)


def slow_right(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, question: Question) -> bool:
    answer = question.answer.split("\n")[0] + "\n"
    return slow_greedy(model, tokenizer, question.prompt, len(answer)) == answer


def accuracy(
    questions: tuple[Question, ...], model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, **options: Any
) -> list[float]:
    outcomes = ExactMatch(questions, **options)(model, tokenizer)["accuracy"]
    assert outcomes.dtype == np.float64
    return outcomes.tolist()


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


GOOD_LINE = '{"prompt": "2+2=", "answer": "4\\n"}'


def test_questions_are_read_in_order(tmp_path: Path) -> None:
    expected = [Question(f"{i}+1=", f"{i + 1}\n") for i in range(5)]
    path = write_lines(tmp_path / "q.jsonl", *(json.dumps(dataclasses.asdict(question)) for question in expected))
    assert load_questions(path) == expected
    assert load_questions(str(path), 5) == expected
    assert load_questions(path, 2) == expected[:2]


def test_further_fields_and_a_missing_last_newline_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(GOOD_LINE + '\n{"id": 7, "prompt": "a", "answer": "b"}')
    assert load_questions(path) == [Question("2+2=", "4\n"), Question("a", "b")]


@pytest.mark.parametrize("mark", ["é", "\u2028", "\u0085"], ids=ascii)
def test_only_a_newline_ends_a_line_of_questions(tmp_path: Path, mark: str) -> None:
    expected = [Question(f"one{mark}two", "3\n"), Question("a", "b")]
    lines = [json.dumps(dataclasses.asdict(question), ensure_ascii=False) for question in expected]
    assert load_questions(write_lines(tmp_path / "q.jsonl", *lines)) == expected


@pytest.mark.parametrize(
    "line",
    ['{"prompt": "a", "answer": ', '{"prompt": "a"}', '{"answer": "a"}', '["a", "b"]', '"text"', "3", "null", ""],
)
def test_bad_line_is_named_by_number(tmp_path: Path, line: str) -> None:
    path = write_lines(tmp_path / "q.jsonl", GOOD_LINE, GOOD_LINE, line, GOOD_LINE)
    with pytest.raises(ValueError, match=r"q\.jsonl, line 3: expected") as raised:
        load_questions(path)
    assert repr(line) in str(raised.value)


@pytest.mark.parametrize("line", ['{"prompt": 2, "answer": "4"}', '{"prompt": "2", "answer": 4}'])
def test_prompt_and_answer_have_to_be_text(tmp_path: Path, line: str) -> None:
    path = write_lines(tmp_path / "q.jsonl", GOOD_LINE, line)
    with pytest.raises(ValueError, match=r"q\.jsonl, line 2: expected"):
        load_questions(path)


def test_a_count_is_the_most_that_are_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "q.jsonl", *[GOOD_LINE] * 3)
    assert [len(load_questions(path, count)) for count in (1, 3, 100, None)] == [1, 3, 3, 3]


def test_an_empty_prompt_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "q.jsonl", '{"prompt": "", "answer": "4"}')
    with pytest.raises(ValueError, match=r"line 1: .*an empty prompt"):
        load_questions(path)


def test_exact_match_agrees_with_greedy_generation_one_token_at_a_time(
    answering_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: tuple[Question, ...]
) -> None:
    expected = [float(slow_right(answering_model, tokenizer, question)) for question in questions]
    assert 10 < sum(expected) < 50
    assert accuracy(questions, answering_model, tokenizer) == expected


def test_exact_match_agrees_with_teacher_forcing(
    answering_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: tuple[Question, ...]
) -> None:
    expected = [float(teacher_forced(answering_model, tokenizer, question)) for question in questions]
    assert accuracy(questions, answering_model, tokenizer) == expected


@pytest.mark.parametrize("batch_size", [1, 2, 7, 59, 60, 1000])
def test_exact_match_does_not_depend_on_the_batch(
    answering_model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: tuple[Question, ...],
    batch_size: int,
) -> None:
    right = accuracy(questions, answering_model, tokenizer, batch_size=batch_size)
    assert right == [float(teacher_forced(answering_model, tokenizer, question)) for question in questions]


@settings(deadline=None, max_examples=5)
@given(order=st.permutations(range(60)))
def test_exact_match_does_not_depend_on_the_order(
    answering_model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: tuple[Question, ...],
    order: list[int],
) -> None:
    right = accuracy(questions, answering_model, tokenizer)
    shuffled = accuracy(tuple(questions[i] for i in order), answering_model, tokenizer, batch_size=8)
    assert shuffled == [right[i] for i in order]


def test_only_the_first_line_of_an_answer_counts(
    answering_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: tuple[Question, ...]
) -> None:
    endings = ("", "\n", "\nmore", "\n\n")
    first_lines = [question.answer.split("\n")[0] for question in questions]
    results = [
        accuracy(
            tuple(Question(question.prompt, line + end) for question, line in zip(questions, first_lines, strict=True)),
            answering_model,
            tokenizer,
        )
        for end in endings
    ]
    assert all(result == results[0] for result in results)
    assert sum(results[0]) > 10


def test_line_that_the_model_does_not_end_is_wrong(
    answering_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = [f"{i} apples" for i in range(40)]
    written = {prompt: slow_greedy(answering_model, tokenizer, prompt, 12) for prompt in prompts}
    unfinished = {prompt: text for prompt, text in written.items() if not text.endswith("\n")}
    assert len(unfinished) > 3
    for length in (1, 5, 9):
        begun = tuple(Question(prompt, text[:length]) for prompt, text in unfinished.items())
        assert not any(accuracy(begun, answering_model, tokenizer))


def test_generation_is_greedy_whatever_the_checkpoint_prefers(
    tmp_path: Path,
    answering_model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: tuple[Question, ...],
) -> None:
    # Published chat models come with such a generation_config.json.
    model = tiny_model()
    model.generation_config.repetition_penalty = 1.5
    model.save_pretrained(tmp_path)
    right = accuracy(questions, load_model(open_checkpoint(tmp_path)), tokenizer)
    assert right == accuracy(questions, answering_model, tokenizer)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_below_one_is_an_error(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size must be a whole number of at least 1; not {batch_size}"):
        ExactMatch((Question("a", "b"),), batch_size=batch_size)


def test_what_is_prepared_judges_each_model_that_it_is_called_on(
    answering_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: tuple[Question, ...]
) -> None:
    evaluation = ExactMatch(questions, name="sums")
    ready = evaluation.prepared(tiny_model(seed=5), tokenizer)
    for seed in (0, 1):
        model = tiny_model(seed=seed)
        expected = evaluation(model, tokenizer)["accuracy"].tolist()
        assert ready(model, tokenizer)["accuracy"].tolist() == expected
        assert ready.prepared(model, tokenizer)(model, tokenizer)["accuracy"].tolist() == expected
    assert (ready.name, ready.protocol, ready.texts) == ("sums", evaluation.protocol, evaluation.texts)


def test_threads_may_share_what_is_prepared(
    answering_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: tuple[Question, ...]
) -> None:
    ready = ExactMatch(questions).prepared(answering_model, tokenizer)
    models = [tiny_model(seed=seed) for seed in (0, 1, 0, 1)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda model: ready(model, tokenizer)["accuracy"].tolist(), models))
    assert results == [accuracy(questions, model, tokenizer) for model in models]


def test_drafts_that_the_model_agrees_with_need_no_decoding(
    answering_model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: tuple[Question, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = [question for question in questions if accuracy((question,), answering_model, tokenizer) == [1.0]]
    ready = ExactMatch(tuple(right)).prepared(answering_model, tokenizer)
    monkeypatch.setattr(PreTrainedTokenizerFast, "decode", lambda *_, **__: pytest.fail("decoded"))
    assert ready(answering_model, tokenizer)["accuracy"].all()


def test_no_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no question to judge a model on; expected at least one"):
        ExactMatch(())


def test_prompt_without_tokens_is_refused(
    answering_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="prompt '' has no tokens"):
        accuracy((Question("", "a"),), answering_model, tokenizer)


TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '? ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'bot: ' }}{% endif %}"
)


def test_chat_template_makes_the_prompt_a_message(answering_model: LlamaForCausalLM) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    prompts = [f"{i}+{i}" for i in range(30)]
    lines = [slow_greedy(answering_model, tokenizer, f"user: {prompt}? bot: ") for prompt in prompts]
    # Without its last letter, a line that goes on is not the answer, whatever comes next.
    questions = tuple(
        Question(prompt, line if line.endswith("\n") else line[:-1])
        for prompt, line in zip(prompts, lines, strict=True)
    )
    finished = [float(line.endswith("\n")) for line in lines]
    assert 3 < sum(finished)
    assert accuracy(questions, answering_model, tokenizer, chat_template=True) == finished
    assert sum(accuracy(questions, answering_model, tokenizer)) < sum(finished)


def test_tokenizer_without_a_chat_template_is_refused(
    answering_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="no chat template; evaluate with chat_template=False"):
        accuracy((Question("a", "b"),), answering_model, tokenizer, chat_template=True)


def test_protocol_says_how_many_questions_and_how_prompts_are_written() -> None:
    questions = tuple(Question(str(i), "a") for i in range(1200))
    assert "1,200 questions" in ExactMatch(questions).protocol
    assert "as they are" in ExactMatch(questions).protocol
    assert "chat template" in ExactMatch(questions, chat_template=True).protocol


def test_exact_match_is_equal_by_value() -> None:
    assert (
        len({ExactMatch((Question("a", "b"),)), ExactMatch((Question("a", "b"),)), ExactMatch((Question("a", "c"),))})
        == 2
    )
    assert ExactMatch((Question("a", "b\n"),)).texts == ("ab\n",)
