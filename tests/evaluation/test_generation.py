"""Generation that looks for an answer finds what token-by-token generation writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from delta_analysis.evaluation.generation import matches, plan
from delta_analysis.zoo.tokenizer import character_tokenizer
from tests.evaluation.conftest import slow_greedy

HEADER = "answer each of these questions in one word, please, and then end the line: "
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.5,
    "bos_token_id": None,
    "pad_token_id": 0,
    "eos_token_id": 96,
}
KINDS = {
    "llama": lambda sizes: LlamaForCausalLM(LlamaConfig(**sizes)),
    "gpt2": lambda sizes: GPT2LMHeadModel(
        GPT2Config(**{name: size for name, size in sizes.items() if name != "num_key_value_heads"})
    ),
    "sliding": lambda sizes: MistralForCausalLM(MistralConfig(**sizes, sliding_window=8)),
    "mamba": lambda sizes: MambaForCausalLM(MambaConfig(**sizes, use_conv_bias=True)),
}


def random_model(kind: str = "llama", *, seed: int = 0, end_scale: float = 2.0, **sizes: Any) -> PreTrainedModel:
    """A model whose choices depend on all that it can see, and which ends a line now and then."""
    torch.manual_seed(seed)
    model: PreTrainedModel = KINDS[kind](SIZES | sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(0.5 * torch.randn_like(parameter))
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.clone())
        head.weight[model.config.eos_token_id] *= end_scale
    return model


def subword_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and some merges of them, so that a text has several tokenisations; a newline is no end here."""
    letters = ["Ċ", "Ġ", "Ã", "©", *"abcd:"]
    merges = [("a", "b"), ("c", "d"), ("ab", "cd"), ("Ã", "©"), ("Ġ", "a"), ("b", "Ċ")]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", *letters, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def answers_to(texts: list[str]) -> tuple[list[str], list[float]]:
    """Answers that are what the model itself writes or begin like it, and whether each is right."""
    answers = []
    for i, text in enumerate(texts):
        line = text.split("\n")[0]
        # Without its last letter, a line that goes on is not the answer, whatever comes next.
        wrong = [line[:-1], line + "a", "b" + line[1:]][i % 3] if "\n" in text else line[:-1]
        answers.append(line if "\n" in text and i % 5 else wrong)
    right = [float("\n" in text and text.split("\n")[0] == answer) for text, answer in zip(texts, answers, strict=True)]
    return answers, right


def check(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], *batch_sizes: int
) -> list[list[int]]:
    """Compare with token-by-token generation; returns the prefixes of the batches for each batch size."""
    answers, expected = answers_to([slow_greedy(model, tokenizer, prompt, 14) for prompt in prompts])
    assert 2 < sum(expected) < len(expected)
    plans = [plan(model, tokenizer, prompts, answers, batch_size) for batch_size in batch_sizes]
    for made in plans:
        assert matches(model, tokenizer, made).tolist() == expected
    return [[batch.prefix for batch in made.batches] for made in plans]


def endings(count: int, letters: str, *, least: int = 0) -> list[str]:
    rng = np.random.default_rng(1)
    return ["".join(rng.choice(list(letters), size=rng.integers(least, 12))) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_shared_beginnings_change_nothing(kind: str) -> None:
    model, tokenizer = random_model(kind, end_scale=4.0 if kind == "gpt2" else 2.0), character_tokenizer()
    prompts = [HEADER + ending for ending in endings(24, "abcde 0123456789?")]
    single, few, many = check(model, tokenizer, prompts, 1, 5, 40)
    assert len(single) == 24
    assert not any(single)
    # A recurrent state is not shared.
    assert any(few) == any(many) == (kind != "mamba")


def test_identical_prompts_and_prompts_that_begin_others() -> None:
    prompts = [HEADER[:length] for length in range(40, 75)] + [HEADER] * 5
    check(random_model(), character_tokenizer(), prompts, 1, 4, 40)


def test_prompts_of_one_token() -> None:
    prompts = [chr(code) for code in range(ord("a"), ord("z") + 1)] * 2
    assert not any(check(random_model(), character_tokenizer(), prompts, 40)[0])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("header", ["", "abcd: é" * 12], ids=["apart", "alike"])
def test_answers_in_other_tokens_than_the_tokenizers_count(header: str, seed: int) -> None:
    tokenizer = subword_tokenizer()
    model = random_model(seed=seed, vocab_size=len(tokenizer), eos_token_id=1, end_scale=1.4)
    prompts = [header + ending for ending in endings(24, "abcd: é", least=1)]
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    prefixes = check(model, tokenizer, prompts, 1, 8)
    assert any(map(any, prefixes)) == bool(header)
    answers, expected = answers_to([slow_greedy(model, tokenizer, prompt, 14) for prompt in prompts])
    made = plan(model, tokenizer, prompts, answers, 8)
    passes.clear()
    assert matches(model, tokenizer, made).tolist() == expected
    # Such answers there are: one pass over the tokenizer's own tokens does not settle them.
    assert len(passes) > sum(2 if batch.prefix else 1 for batch in made.batches)


def test_a_draft_across_the_seam_of_prompt_and_answer() -> None:
    # "a" then "bcd" is one token, "abcd", as a whole: the draft has to be that of the answer alone.
    tokenizer = subword_tokenizer()
    model = random_model(vocab_size=len(tokenizer), eos_token_id=1, end_scale=1.4)
    made = plan(model, tokenizer, ["a", "a:"], ["bcd", "bcd"], 4)
    ids = tokenizer.get_vocab()
    assert [draft.tokens for draft in made.drafts] == [[ids["b"], ids["cd"], ids["Ċ"]]] * 2
    assert [draft.right for draft in made.drafts] == [True, True]


def test_end_of_sequence_ends_an_answer_as_a_newline_does() -> None:
    tokenizer = subword_tokenizer()
    model = random_model(vocab_size=len(tokenizer), eos_token_id=1, end_scale=3.0)
    prompts = sorted(set(endings(40, "abcd: ", least=1)))
    texts = [slow_greedy(model, tokenizer, prompt, 8) for prompt in prompts]
    lines = [text[:-1] for text in texts]
    made = plan(model, tokenizer, prompts, lines, 8)
    finished = [float("\n" in text) for text in texts]
    assert matches(model, tokenizer, made).tolist() == finished
    # Its tokenizer's end is one too, whatever the model's configuration says.
    model.generation_config.eos_token_id = None
    assert matches(model, tokenizer, plan(model, tokenizer, prompts, lines, 8)).tolist() == finished
    # Without an end, the same model goes on.
    tokenizer.eos_token = None
    assert matches(model, tokenizer, plan(model, tokenizer, prompts, lines, 8)).sum() < sum(finished)


@pytest.mark.parametrize("ends", [[5, 3], 4, None])
def test_there_may_be_several_ends(ends: int | list[int] | None) -> None:
    tokenizer = subword_tokenizer()
    model = random_model(vocab_size=len(tokenizer), eos_token_id=1)
    model.generation_config.eos_token_id = ends
    own = [] if ends is None else np.atleast_1d(ends).tolist()
    assert plan(model, tokenizer, ["a"], ["b"], 1).ends == {*own, tokenizer.eos_token_id}


def test_generation_that_never_decides_stops() -> None:
    # An incomplete character, over and over, may always become the answer's.
    tokenizer = subword_tokenizer()
    model = random_model(vocab_size=len(tokenizer), eos_token_id=1)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
        model.get_output_embeddings().weight[tokenizer.get_vocab()["Ã"]] = 1e-3
    hidden = model(input_ids=torch.tensor([[4, 5]]), output_hidden_states=True).hidden_states[-1]
    with torch.no_grad():
        model.get_output_embeddings().weight[tokenizer.get_vocab()["Ã"]] = hidden[0, -1]
    assert matches(model, tokenizer, plan(model, tokenizer, ["ab"], ["éé"], 1)).tolist() == [0.0]
