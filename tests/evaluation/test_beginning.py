"""The beginning-of-text token: which tokenizers put one before a text, and that evaluations do as they do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from delta_analysis.evaluation import ExactMatch, Question, TextPerplexity
from delta_analysis.evaluation.generation import plan
from delta_analysis.evaluation.tokens import beginning, token_batches
from delta_analysis.zoo.tokenizer import character_tokenizer, encode
from tests.evaluation.conftest import slow_greedy

BOS = 97
MODEL_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def tokenizer_of(template: str, *, bos: str | None = "<s>") -> PreTrainedTokenizerFast:
    """Characters, `<s>` (97) and `<e>` (98); to a text it adds what the template has around `$A`."""
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "<e>"]})
    if bos:
        tokenizer.bos_token = bos
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), ("<e>", BOS + 1)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99,
        max_position_embeddings=60,
        initializer_range=0.5,
        bos_token_id=BOS,
        eos_token_id=character_tokenizer().eos_token_id,
        pad_token_id=0,
        **MODEL_SIZES,
    )
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        made.lm_head.weight[made.config.eos_token_id] *= 2.5
    return made


ADDS = tokenizer_of("<s> $A")


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (ADDS, [BOS]),
        (tokenizer_of("<s> $A <e>"), [BOS]),
        # It has the token and does not add it, as Qwen's; it adds another; it adds it behind; it has none.
        (tokenizer_of("$A"), []),
        (tokenizer_of("<e> $A"), []),
        (tokenizer_of("$A <e>"), []),
        (tokenizer_of("<s> $A", bos=None), []),
        (character_tokenizer(), []),
    ],
    ids=["bos", "bos and end", "never added", "another", "behind", "no bos", "none at all"],
)
def test_beginning_is_the_bos_that_the_tokenizer_adds(tokenizer: PreTrainedTokenizerFast, expected: list[int]) -> None:
    assert beginning(tokenizer) == expected


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A <e>"])
def test_a_decoder_reads_texts_after_it(model: LlamaForCausalLM, template: str) -> None:
    (batch,) = token_batches(("abc", "b"), model, tokenizer_of(template), most_tokens=3)
    assert batch.places == [1, 0]
    # It counts as a token of the text; what stands behind a text is not added.
    assert batch.tokens(batch.ids).tolist() == [BOS, *encode("b").tolist(), BOS, *encode("ab").tolist()]
    (batch,) = token_batches(("abc",), model, tokenizer_of("$A"), most_tokens=3)
    assert batch.ids.tolist() == [encode("abc").tolist()]


def test_perplexity_is_that_of_the_text_after_it(model: LlamaForCausalLM) -> None:
    text = "12 + 30 = 42"
    ids = torch.tensor([[BOS, *encode(text).tolist()]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").numpy()
    losses = TextPerplexity(text, 64, 32)(model, ADDS)["perplexity"]
    # The first character is predicted too.
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert len(losses) == len(text)
    assert len(TextPerplexity(text, 64, 32)(model, tokenizer_of("$A"))["perplexity"]) == len(text) - 1


def test_a_prompt_stands_after_it_once() -> None:
    prompts = ["2+2=", "<s>2+2="]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=99, **MODEL_SIZES)).eval()
    expected = [BOS, *encode("2+2=").tolist()]
    assert [draft.prompt for draft in plan(model, ADDS, prompts, ["4", "4"], 2).drafts] == [expected] * 2
    own = [draft.prompt for draft in plan(model, tokenizer_of("$A"), prompts, ["4", "4"], 2).drafts]
    assert own == [expected[1:], expected]


@pytest.mark.parametrize("chat_template", [False, True])
def test_exact_match_is_generation_after_it(model: LlamaForCausalLM, chat_template: bool) -> None:
    tokenizer = tokenizer_of("<s> $A")
    # As published templates do, this one writes the token itself.
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ 'Q' + m.content + '? ' }}{% endfor %}"
    prompts = [f"{i}+{i * i}" for i in range(40)]
    read = [f"<s>Q{prompt}? " if chat_template else f"<s>{prompt}" for prompt in prompts]
    lines = [slow_greedy(model, tokenizer, prompt) for prompt in read]
    # Without its last letter, a line that goes on is not the answer, whatever comes next.
    questions = tuple(
        Question(prompt, line if line.endswith("\n") else line[:-1])
        for prompt, line in zip(prompts, lines, strict=True)
    )
    finished = [float(line.endswith("\n")) for line in lines]
    assert 3 < sum(finished) < 40
    outcomes = ExactMatch(questions, chat_template=chat_template)(model, tokenizer)["accuracy"]
    assert outcomes.tolist() == finished
    without = tokenizer_of("$A")
    without.chat_template = tokenizer.chat_template.removeprefix("{{ bos_token }}")
    assert ExactMatch(questions, chat_template=chat_template)(model, without)["accuracy"].sum() < sum(finished)
