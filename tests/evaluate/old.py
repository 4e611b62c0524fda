"""Questions, patched weights, exact match and perplexity, on a tiny model with random weights."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from delta_analysis.checkpoint import open_checkpoint
from delta_analysis.evaluate import (
    ExactMatch,
    Question,
    TextPerplexity,
    load_model,
    load_questions,
    load_tokenizer,
    patched,
)
from delta_analysis.zoo.tokenizer import character_tokenizer

NORM, EMBED, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
PROMPT_LETTERS = list("abcdefgh 0123456789?")
MOST_NEW = 10


def tiny_model(*, seed: int = 0, tied: bool = False) -> LlamaForCausalLM:
    """A Llama whose weights are large enough for its output to depend on every character of a prompt."""
    tokenizer = character_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    if not tied:
        with torch.no_grad():
            model.lm_head.weight[tokenizer.eos_token_id] *= 2.5  # so that answers end now and then
    return model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer()


@pytest.fixture(scope="module")
def answering_model() -> LlamaForCausalLM:
    """Shared, so a test that changes it has to change it back."""
    return tiny_model()


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def slow_greedy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, most_new: int = MOST_NEW
) -> str:
    """What the model writes after the prompt, one full forward pass a token, up to and with a newline."""
    ids = ids_of(tokenizer, prompt)
    start = len(ids)
    while len(ids) < start + most_new and ids[-1:] != [tokenizer.eos_token_id]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:])


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


def state(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_as_before(model: LlamaForCausalLM, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], tensor) for name, tensor in before.items())


def random_weights(model: LlamaForCausalLM, *names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {name: torch.randn(model.get_parameter(name).shape, generator=generator) for name in names}


def test_patched_weights_hold_inside_and_are_gone_afterwards() -> None:
    model = tiny_model()
    before = state(model)
    weights = random_weights(model, NORM, EMBED, "model.layers.1.mlp.up_proj.weight")
    with patched(model, weights) as inside:
        assert inside is model
        now = state(model)
        for name, tensor in now.items():
            assert torch.equal(tensor, weights.get(name, before[name]))
        assert not is_as_before(model, before)
    assert is_as_before(model, before)


def test_patching_keeps_storage_and_the_need_for_gradients() -> None:
    model = tiny_model()
    parameter = model.get_parameter(NORM)
    place = parameter.data_ptr()
    with patched(model, random_weights(model, NORM)):
        assert model.get_parameter(NORM) is parameter
    assert parameter.data_ptr() == place
    assert parameter.requires_grad
    assert parameter.grad_fn is None


def test_patched_logits_are_those_of_a_model_with_these_weights(tokenizer: PreTrainedTokenizerFast) -> None:
    model, other = tiny_model(seed=0), tiny_model(seed=1)
    ids = torch.tensor([ids_of(tokenizer, "one two three")])
    with torch.no_grad():
        own, theirs = (each(input_ids=ids).logits for each in (model, other))
        with patched(model, dict(other.named_parameters())):
            assert torch.equal(model(input_ids=ids).logits, theirs)
        assert torch.equal(model(input_ids=ids).logits, own)


def test_exception_inside_restores_the_model() -> None:
    model = tiny_model()
    before = state(model)
    with pytest.raises(RuntimeError, match="evaluation failed"), patched(model, random_weights(model, NORM, EMBED)):
        raise RuntimeError("evaluation failed")
    assert is_as_before(model, before)


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        ("model.norm.bias", torch.ones(32), "'model.norm.bias' has no place in the model"),
        (NORM, torch.ones(31), r"'model.norm.weight' has shape \(31,\), the model's \(32,\)"),
        (NORM, torch.ones(1), r"shape \(1,\)"),
        (NORM, torch.ones(1, 32), r"shape \(1, 32\)"),
        (NORM, torch.tensor([math.nan, *[1.0] * 31]), "'model.norm.weight' has 1 NaN or infinite entries of 32"),
        (NORM, torch.tensor([math.inf, -math.inf, *[1.0] * 30]), "has 2 NaN or infinite entries of 32"),
    ],
    ids=["name", "shape", "broadcast", "dimensions", "nan", "infinite"],
)
def test_bad_weight_in_the_middle_leaves_the_model_as_it_was(name: str, weight: torch.Tensor, message: str) -> None:
    model = tiny_model()
    before = state(model)
    first, last = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    weights = random_weights(model, first, last)
    with (
        pytest.raises(ValueError, match=message),
        patched(model, {first: weights[first], name: weight, last: weights[last]}),
    ):
        pytest.fail("a model with a bad weight was handed out")
    assert is_as_before(model, before)


class Unreadable(Mapping[str, torch.Tensor]):
    """Weights read one at a time, the second of which cannot be read."""

    def __getitem__(self, name: str) -> torch.Tensor:
        if name == EMBED:
            raise OSError("disk on fire")
        return torch.ones(32)

    def __iter__(self) -> Iterator[str]:
        return iter((NORM, EMBED))

    def __len__(self) -> int:
        return 2


def test_weight_that_cannot_be_read_leaves_the_model_as_it_was() -> None:
    model = tiny_model()
    before = state(model)
    with pytest.raises(OSError, match="disk on fire"), patched(model, Unreadable()):
        pytest.fail("a model with a missing weight was handed out")
    assert is_as_before(model, before)


@pytest.mark.parametrize("names", [(EMBED,), (HEAD,), (EMBED, HEAD), (HEAD, EMBED)], ids=" then ".join)
def test_tied_embeddings_are_patched_under_each_name_and_restored(names: tuple[str, ...]) -> None:
    model = tiny_model(tied=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = state(model)
    weight = torch.randn(97, 32, generator=torch.Generator().manual_seed(0))
    with patched(model, dict.fromkeys(names, weight)):
        assert torch.equal(model.lm_head.weight, weight)
        assert torch.equal(model.model.embed_tokens.weight, weight)
    assert is_as_before(model, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_patches_may_stand_inside_each_other() -> None:
    model = tiny_model()
    before = state(model)
    with patched(model, {NORM: torch.full((32,), 2.0)}):
        with patched(model, {NORM: torch.full((32,), 3.0)}):
            assert model.get_parameter(NORM).tolist() == [3.0] * 32
        assert model.get_parameter(NORM).tolist() == [2.0] * 32
    assert is_as_before(model, before)


def test_model_and_tokenizer_of_a_checkpoint(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    saved = tiny_model(seed=3)
    saved.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    model, read = load_model(checkpoint), load_tokenizer(checkpoint)
    assert model.dtype == torch.float32
    assert not model.training
    assert is_as_before(model, {name: tensor.float() for name, tensor in saved.state_dict().items()})
    assert read.padding_side == "left"
    assert (read.pad_token_id, read.eos_token_id) == (0, 96)
    assert ids_of(read, "a+b\n") == ids_of(tokenizer, "a+b\n")


def test_tokenizer_without_padding_pads_with_its_end(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tokenizer = character_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    read = load_tokenizer(open_checkpoint(tmp_path))
    assert read.pad_token == "\n"
    assert read(["a", "abc"], padding=True)["attention_mask"] == [[0, 0, 1], [1, 1, 1]]


def test_exact_match_agrees_with_greedy_generation_one_token_at_a_time(
    answering_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: tuple[Question, ...]
) -> None:
    expected = [float(slow_right(answering_model, tokenizer, question)) for question in questions]
    assert 10 < sum(expected) < 50
    right = ExactMatch(questions)(answering_model, tokenizer)
    assert right.tolist() == expected


def test_exact_match_agrees_with_teacher_forcing(
    answering_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: tuple[Question, ...]
) -> None:
    expected = [float(teacher_forced(answering_model, tokenizer, question)) for question in questions]
    assert ExactMatch(questions)(answering_model, tokenizer).tolist() == expected


@pytest.mark.parametrize("batch_size", [1, 2, 7, 59, 60, 1000])
def test_exact_match_does_not_depend_on_the_batch(
    answering_model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: tuple[Question, ...],
    batch_size: int,
) -> None:
    right = ExactMatch(questions, batch_size)(answering_model, tokenizer)
    assert right.tolist() == [float(teacher_forced(answering_model, tokenizer, question)) for question in questions]


@settings(deadline=None, max_examples=5)
@given(order=st.permutations(range(60)))
def test_exact_match_does_not_depend_on_the_order(
    answering_model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: tuple[Question, ...],
    order: list[int],
) -> None:
    right = ExactMatch(questions)(answering_model, tokenizer)
    shuffled = ExactMatch(tuple(questions[i] for i in order), 8)(answering_model, tokenizer)
    assert shuffled.tolist() == right[order].tolist()


def test_only_the_first_line_of_an_answer_counts(
    answering_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: tuple[Question, ...]
) -> None:
    endings = ("", "\n", "\nmore", "\n\n")
    first_lines = [question.answer.split("\n")[0] for question in questions]
    results = [
        ExactMatch(
            tuple(Question(question.prompt, line + end) for question, line in zip(questions, first_lines, strict=True))
        )(answering_model, tokenizer).tolist()
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
        assert not ExactMatch(begun)(answering_model, tokenizer).any()


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
    right = ExactMatch(questions)(load_model(open_checkpoint(tmp_path)), tokenizer)
    assert right.tolist() == ExactMatch(questions)(answering_model, tokenizer).tolist()


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_below_one_is_an_error(
    answering_model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: tuple[Question, ...],
    batch_size: int,
) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        ExactMatch(questions, batch_size)(answering_model, tokenizer)


def window_ends(length: int, window: int, stride: int) -> list[int]:
    """Where windows that advance by the stride end; the last ends with the text."""
    ends = [min(window, length)]
    while ends[-1] < length:
        ends.append(min(ends[-1] + stride, length))
    return ends


def slow_losses(model: LlamaForCausalLM, ids: list[int], window: int, stride: int) -> list[float]:
    """The loss of each token but the first, in the first window that holds it."""
    losses = []
    for position in range(1, len(ids)):
        end = next(end for end in window_ends(len(ids), window, stride) if end > position)
        begin = max(0, end - window)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[begin:position]]), use_cache=False).logits[0, -1].double()
        losses.append(float(logits.logsumexp(0) - logits[ids[position]]))
    return losses


TEXT = "the quick brown fox jumps over the lazy dog, and 12 + 34 = 46 while abc reversed is cba"


@pytest.mark.parametrize("length", [2, 3, 40, 64])
def test_perplexity_of_a_short_text_is_exp_of_its_mean_loss(
    answering_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, length: int
) -> None:
    ids = ids_of(tokenizer, TEXT[:length])
    with torch.no_grad():
        logits = answering_model(input_ids=torch.tensor([ids])).logits[0].double().numpy()
    by_hand = [
        math.log(sum(math.exp(x - max(row)) for x in row)) + max(row) - row[following]
        for row, following in zip(logits, ids[1:], strict=False)
    ]
    losses = TextPerplexity(TEXT[:length], window=64, stride=32)(answering_model, tokenizer)
    assert losses.dtype == np.float64
    assert losses == pytest.approx(by_hand, rel=1e-6)
    with torch.no_grad():
        mean = answering_model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert math.exp(losses.mean()) == pytest.approx(math.exp(float(mean)), rel=1e-4)


class Endless(AssertionError):
    """More windows than the text has tokens."""


def recording_model(model: LlamaForCausalLM, parts: list[list[int]]) -> SimpleNamespace:
    """The model as far as an evaluation of texts sees it; writes down each window and stops a loop without end."""

    class Recording(SimpleNamespace):
        def __call__(self, *, input_ids: torch.Tensor, **options: Any) -> Any:
            if len(parts) > 200:
                raise Endless
            parts.append(input_ids[0].tolist())
            return model(input_ids=input_ids, **options)

    return Recording(device=model.device)


WINDOWS = [(8, 4), (8, 7), (8, 3), (8, 2), (8, 1), (20, 10), (2, 1), (86, 43), (87, 40), (64, 32)]


@pytest.mark.parametrize(("window", "stride"), WINDOWS)
def test_perplexity_of_a_long_text_scores_each_token_once(
    answering_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, window: int, stride: int
) -> None:
    ids = ids_of(tokenizer, TEXT)
    losses = TextPerplexity(TEXT, window, stride)(answering_model, tokenizer)
    assert len(losses) == len(ids) - 1
    assert losses == pytest.approx(slow_losses(answering_model, ids, window, stride), rel=1e-4)


@pytest.mark.parametrize(("window", "stride"), WINDOWS)
def test_windows_advance_by_the_stride(
    answering_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, window: int, stride: int
) -> None:
    parts: list[list[int]] = []
    TextPerplexity(TEXT, window, stride)(recording_model(answering_model, parts), tokenizer)
    ids = ids_of(tokenizer, TEXT)
    ends = window_ends(len(ids), window, stride)
    assert parts == [ids[max(0, end - window) : end] for end in ends]


@pytest.mark.parametrize("text", ["", "a"])
def test_text_too_short_to_be_scored(
    answering_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    with pytest.raises(ValueError, match=rf"at least two tokens; this one has {len(text)}"):
        TextPerplexity(text)(answering_model, tokenizer)


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 9), (8, 0), (8, -1), (1, 1), (0, 1)])
def test_bad_stride(window: int, stride: int) -> None:
    with pytest.raises(ValueError, match=rf"stride must be between 1 and window - 1 = {window - 1}; not {stride}"):
        TextPerplexity(TEXT, window, stride)


def test_evaluations_name_their_metric() -> None:
    assert ExactMatch(()).metric == "accuracy"
    assert TextPerplexity(TEXT).metric == "perplexity"
