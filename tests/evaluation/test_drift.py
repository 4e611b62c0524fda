"""Drift of the outputs, against scipy and numpy on one text at a time."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import entropy
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from delta_analysis.evaluation.drift import OutputDrift
from delta_analysis.zoo.tokenizer import character_tokenizer, encode

TOKENIZER = character_tokenizer()
TEXTS = ("a", "two of them", "2+2=4", "and a much longer text, of many more tokens than the others", "abc")
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}


def decoder(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, **SIZES)).eval()


def classifier(seed: int, classes: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(vocab_size=97, num_labels=classes, **SIZES)).eval()


MODEL, OTHER = decoder(0), decoder(1)


def slow_logits(model: PreTrainedModel, text: str) -> np.ndarray:
    """One row a prediction, of a text on its own."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(encode(text))[None]).logits
    return logits.reshape(-1, logits.shape[-1]).double().numpy()


def slow_drift(untouched: PreTrainedModel, judged: PreTrainedModel, text: str, k: int) -> tuple[float, float]:
    z, y = slow_logits(untouched, text), slow_logits(judged, text)
    kl = entropy(softmax(z, axis=-1), softmax(y, axis=-1), axis=-1).mean()
    top = np.argsort(z, axis=-1)[:, -k:]
    return kl, np.mean((np.take_along_axis(z, top, -1) - np.take_along_axis(y, top, -1)) ** 2)


@pytest.mark.parametrize("k", [1, 5, 97])
def test_drift_of_next_token_predictions(k: int) -> None:
    outcomes = OutputDrift(TEXTS, top_k=k).prepared(MODEL, TOKENIZER)(OTHER, TOKENIZER)
    assert list(outcomes) == ["kl", f"top{k}_logit_mse"]
    assert all(values.dtype == np.float64 for values in outcomes.values())
    expected = np.array([slow_drift(MODEL, OTHER, text, k) for text in TEXTS])
    assert expected.min() > 0.1
    np.testing.assert_allclose(np.stack(list(outcomes.values()), axis=1), expected, rtol=1e-4)


@pytest.mark.parametrize("classes", [2, 3, 8])
def test_drift_of_a_classifier_is_of_its_classes(classes: int) -> None:
    untouched, judged = classifier(0, classes), classifier(1, classes)
    outcomes = OutputDrift(TEXTS).prepared(untouched, TOKENIZER)(judged, TOKENIZER)
    expected = np.array([slow_drift(untouched, judged, text, 5) for text in TEXTS])
    np.testing.assert_allclose(outcomes["kl"], expected[:, 0], rtol=1e-4)
    np.testing.assert_allclose(outcomes["top5_logit_mse"], expected[:, 1], rtol=1e-4)


def test_drift_by_hand() -> None:
    # Without blocks, and with an embedding that the norm leaves alone, the head's rows are the logits.
    models = []
    for rows in ([[2.0, 1.0, -1.0]], [[0.0, 4.0, -3.0]]):
        model = decoder(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            model.model.norm.weight.fill_(1.0)
            model.model.embed_tokens.weight.fill_(1.0)
            model.lm_head.weight[:, 0] = -1e4
            model.lm_head.weight[:3, 0] = torch.tensor(rows)
        models.append(model)
    outcomes = OutputDrift(("xy", "z"), top_k=2).prepared(models[0], TOKENIZER)(models[1], TOKENIZER)
    p, q = (np.exp(logits) / np.exp(logits).sum() for logits in ([2.0, 1.0, -1.0], [0.0, 4.0, -3.0]))
    np.testing.assert_allclose(outcomes["kl"], np.sum(p * np.log(p / q)), rtol=1e-5)
    np.testing.assert_allclose(outcomes["top2_logit_mse"], (2.0**2 + 3.0**2) / 2, rtol=1e-5)


@pytest.mark.parametrize("model", [MODEL, classifier(0, 3)])
def test_an_identical_model_has_not_moved(model: PreTrainedModel) -> None:
    outcomes = OutputDrift(TEXTS).prepared(model, TOKENIZER)(copy.deepcopy(model), TOKENIZER)
    for values in outcomes.values():
        np.testing.assert_allclose(values, 0, atol=1e-9)
        assert values.min() >= 0


def test_a_constant_on_all_logits_moves_no_probability() -> None:
    untouched = classifier(0, 3)
    shifted = copy.deepcopy(untouched)
    with torch.no_grad():
        shifted.classifier.bias += 2.0
    outcomes = OutputDrift(TEXTS).prepared(untouched, TOKENIZER)(shifted, TOKENIZER)
    np.testing.assert_allclose(outcomes["kl"], 0, atol=1e-6)
    np.testing.assert_allclose(outcomes["top5_logit_mse"], 4, rtol=1e-5)


@settings(deadline=None, max_examples=10)
@given(chosen=st.lists(st.sampled_from(range(len(TEXTS))), min_size=1, max_size=8), classes=st.sampled_from([0, 3]))
def test_a_text_is_judged_the_same_in_any_company(chosen: list[int], classes: int) -> None:
    untouched, judged = (classifier(i, classes) if classes else decoder(i) for i in (0, 1))
    alone = [OutputDrift((text,)).prepared(untouched, TOKENIZER)(judged, TOKENIZER) for text in TEXTS]
    outcomes = OutputDrift(tuple(TEXTS[i] for i in chosen)).prepared(untouched, TOKENIZER)(judged, TOKENIZER)
    for metric, values in outcomes.items():
        np.testing.assert_allclose(values, [alone[i][metric][0] for i in chosen], rtol=1e-4)


def test_texts_are_cut() -> None:
    long = OutputDrift(("abcdefgh" * 20,), most_tokens=16).prepared(MODEL, TOKENIZER)(OTHER, TOKENIZER)
    short = OutputDrift(("abcdefgh" * 2,)).prepared(MODEL, TOKENIZER)(OTHER, TOKENIZER)
    assert long["kl"].tolist() == short["kl"].tolist()


def test_what_is_prepared_says_what_it_is() -> None:
    evaluation = OutputDrift(TEXTS, top_k=3)
    prepared = evaluation.prepared(MODEL, TOKENIZER)
    assert (prepared.name, prepared.protocol, prepared.texts) == ("output drift", evaluation.protocol, TEXTS)
    assert "the 3 logits that are largest in the unedited model" in evaluation.protocol


def test_it_has_to_be_prepared() -> None:
    with pytest.raises(ValueError, match=r"output drift .*call \.prepared\(untouched, tokenizer\) first"):
        OutputDrift(TEXTS)(MODEL, TOKENIZER)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="no text to judge"):
        OutputDrift(())
    with pytest.raises(ValueError, match="most_tokens must be a whole number of at least 1; not 0"):
        OutputDrift(TEXTS, most_tokens=0)
    with pytest.raises(ValueError, match="top_k must be a whole number of at least 1; not 0"):
        OutputDrift(TEXTS, top_k=0)
