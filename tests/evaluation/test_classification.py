"""Labelled texts, and the accuracy of a classifier on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from delta_analysis.checkpoints.checkpoint import open_checkpoint
from delta_analysis.checkpoints.paths import find_root
from delta_analysis.evaluation.classification import Classification, Labelled, load_labelled
from delta_analysis.evaluation.models import load_model, load_tokenizer
from delta_analysis.sweeps.pairs import EditablePair, Pair
from delta_analysis.zoo.tokenizer import character_tokenizer, encode

TOKENIZER = character_tokenizer()
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}
CLASSES = 4


def classifier(kind: str) -> BertForSequenceClassification | LlamaForSequenceClassification:
    torch.manual_seed(0)
    if kind == "encoder":
        return BertForSequenceClassification(BertConfig(num_labels=CLASSES, **SIZES)).eval()
    return LlamaForSequenceClassification(LlamaConfig(num_labels=CLASSES, **SIZES)).eval()


@pytest.fixture(scope="module")
def examples() -> tuple[Labelled, ...]:
    rng = np.random.default_rng(0)
    letters = list("abcdefgh 0123")
    return tuple(Labelled("".join(rng.choice(letters, rng.integers(1, 30))), i % CLASSES) for i in range(60))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_each_example_is_right_or_wrong_as_on_its_own(
    examples: tuple[Labelled, ...], kind: str, batch_size: int
) -> None:
    model = classifier(kind)
    expected = []
    for example in examples:
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(encode(example.text))[None]).logits
        expected.append(float(logits[0].argmax() == example.label))
    assert 5 < sum(expected) < 55
    evaluation = Classification(examples, batch_size=batch_size)
    outcomes = evaluation.prepared(model, TOKENIZER)(model, TOKENIZER)
    assert list(outcomes) == ["accuracy"]
    assert outcomes["accuracy"].dtype == np.float64
    assert outcomes["accuracy"].tolist() == expected
    assert evaluation(model, TOKENIZER)["accuracy"].tolist() == expected


@pytest.mark.parametrize("pad", [None, 0, 9], ids=["none", "the tokenizer's", "another"])
def test_a_decoder_finds_the_end_of_a_padded_text(
    examples: tuple[Labelled, ...], tmp_path: Path, pad: int | None
) -> None:
    model = classifier("decoder")
    model.config.pad_token_id = pad
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    assert open_checkpoint(tmp_path).config.get("pad_token_id") == pad
    expected = []
    for example in examples:
        with torch.no_grad():
            hidden = model.model(input_ids=torch.from_numpy(encode(example.text))[None]).last_hidden_state
        expected.append(float(model.score(hidden[0, -1]).argmax() == example.label))
    loaded = EditablePair.load(Pair("alone", None, str(tmp_path)))
    for size in (1, 50):
        evaluation = loaded.prepared(Classification(examples, batch_size=size))
        with loaded.edited(None, 0) as edited:
            assert evaluation(edited.model, loaded.tokenizer)["accuracy"].tolist() == expected


def test_an_embedded_encoder_reaches_the_accuracy_of_its_training() -> None:
    zoo = find_root() / "data" / "zoo"
    recorded = json.loads((zoo / "encoder" / "manifest.json").read_text())
    checkpoint = open_checkpoint("zoo:encoder/strings")
    evaluation = Classification(tuple(load_labelled(zoo / "tasks" / "strings-right.jsonl")))
    accuracy = evaluation(load_model(checkpoint), load_tokenizer(checkpoint))["accuracy"]
    assert len(accuracy) == 500
    assert round(accuracy.mean(), 4) == recorded["models"]["strings"]["accuracy"]["strings-right"]


def test_what_is_prepared_says_what_it_is(examples: tuple[Labelled, ...]) -> None:
    evaluation = Classification(examples)
    prepared = evaluation.prepared(classifier("encoder"), TOKENIZER)
    assert evaluation.texts == tuple(example.text for example in examples)
    assert (prepared.name, prepared.protocol, prepared.texts) == (
        "classification",
        evaluation.protocol,
        evaluation.texts,
    )
    assert "60 labelled texts" in evaluation.protocol
    assert hash(evaluation) == hash(Classification(examples))


def test_a_model_that_does_not_classify_texts_is_refused(examples: tuple[Labelled, ...]) -> None:
    language_model = LlamaForCausalLM(LlamaConfig(**SIZES))
    tagger = BertForTokenClassification(BertConfig(num_labels=CLASSES, **SIZES))
    for model in (language_model, tagger):
        with pytest.raises(ValueError, match=f"{type(model).__name__} is no sequence classifier; expected num_labels"):
            Classification(examples)(model, TOKENIZER)


@pytest.mark.parametrize("label", [CLASSES, -1])
def test_a_label_that_the_model_does_not_have(label: int) -> None:
    examples = (Labelled("a", 0), Labelled("bc", label))
    with pytest.raises(ValueError, match=rf"example 1 has label {label}; expected 0 to 3, .*'bc'"):
        Classification(examples).prepared(classifier("encoder"), TOKENIZER)


def test_bad_arguments(examples: tuple[Labelled, ...]) -> None:
    with pytest.raises(ValueError, match="no example"):
        Classification(())
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1; not 0"):
        Classification(examples, batch_size=0)
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        Classification((Labelled("a", 0), Labelled("", 0)))(classifier("encoder"), TOKENIZER)


GOOD_LINE = '{"text": "a", "label": 1}'


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_examples_are_read_in_order(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", GOOD_LINE, '{"id": 7, "label": 0, "text": "one\u2028two\\n"}', GOOD_LINE)
    expected = [Labelled("a", 1), Labelled("one\u2028two\n", 0), Labelled("a", 1)]
    assert load_labelled(path) == load_labelled(str(path), 100) == expected
    assert load_labelled(path, 2) == expected[:2]


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "a", "label": ',
        '{"text": "a"}',
        '{"label": 1}',
        '["a", 1]',
        '"a"',
        "null",
        "",
        '{"text": 2, "label": 1}',
        '{"text": "", "label": 1}',
        '{"text": "a", "label": "1"}',
        '{"text": "a", "label": 1.0}',
        '{"text": "a", "label": true}',
        '{"text": "a", "label": -1}',
    ],
)
def test_bad_line_is_named_by_number(tmp_path: Path, line: str) -> None:
    path = write_lines(tmp_path / "t.jsonl", GOOD_LINE, line, GOOD_LINE)
    with pytest.raises(ValueError, match=r'line 2: expected \{"text": …, "label": …\}, got') as raised:
        load_labelled(path)
    assert repr(line) in str(raised.value)
