"""Hidden-state similarity, against cosines by hand, states read one text at a time, and the embedded models."""

from __future__ import annotations

import copy
import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from delta_analysis.checkpoints.checkpoint import open_checkpoint
from delta_analysis.checkpoints.paths import find_root
from delta_analysis.evaluation.hidden_states import HiddenSimilarity
from delta_analysis.evaluation.models import load_model, load_tokenizer
from delta_analysis.zoo.tokenizer import character_tokenizer, encode

LAYERS = 3
METRICS = [f"similarity/{layer}" for layer in range(LAYERS + 1)]
TOKENIZER = character_tokenizer()


def tiny_model(seed: int = 0, hidden_size: int = 16) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=hidden_size,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        initializer_range=0.5,
        pad_token_id=0,
        eos_token_id=96,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def without_blocks(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Every block passes on what it gets."""
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    return model


MODEL, OTHER = tiny_model(0), tiny_model(1)
TEXTS = ("a", "two of them", "2+2=4", "and a much longer text, of many more tokens than the others", "abc")


@torch.no_grad()
def slow_states(model: LlamaForCausalLM, text: str) -> list[np.ndarray]:
    """Embedding output, then each block's output, of a text on its own, without hooks."""
    inner = model.model
    ids = torch.from_numpy(encode(text))[None]
    state = inner.embed_tokens(ids)
    states = [state]
    positions = inner.rotary_emb(state, torch.arange(ids.shape[1])[None])
    for layer in inner.layers:
        state = layer(state, position_embeddings=positions, attention_mask=None)
        states.append(state)
    # That these are the states of the model, its own output tells.
    torch.testing.assert_close(model.lm_head(inner.norm(state)), model(input_ids=ids).logits)
    return [state[0].double().numpy() for state in states]


def slow_similarity(untouched: LlamaForCausalLM, judged: LlamaForCausalLM, text: str) -> list[float]:
    return [
        float(np.mean([u @ v / np.sqrt((u @ u) * (v @ v)) for u, v in zip(own, other, strict=True)]))
        for own, other in zip(slow_states(untouched, text), slow_states(judged, text), strict=True)
    ]


def test_each_layer_is_the_mean_cosine_of_its_tokens() -> None:
    outcomes = HiddenSimilarity(TEXTS).prepared(MODEL, TOKENIZER)(OTHER, TOKENIZER)
    assert list(outcomes) == METRICS
    for values in outcomes.values():
        assert values.shape == (len(TEXTS),)
        assert values.dtype == np.float64
    expected = np.array([slow_similarity(MODEL, OTHER, text) for text in TEXTS])
    np.testing.assert_allclose(np.stack(list(outcomes.values()), axis=1), expected, atol=1e-5)


def test_cosines_by_hand() -> None:
    untouched, judged = without_blocks(tiny_model(hidden_size=4)), without_blocks(tiny_model(hidden_size=4))
    a, b, c, d = encode("abcd")
    with torch.no_grad():
        for model, rows in (
            (untouched, [[1.0, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]),
            (judged, [[1.0, 1, 0, 0], [0, -1, 0, 0], [0, 0, 0, 0], [0, 0, 2, 0]]),
        ):
            model.model.embed_tokens.weight[[a, b, c, d]] = torch.tensor(rows)
    evaluation = HiddenSimilarity(("ab", "a", "b", "c", "d", "cd")).prepared(untouched, TOKENIZER)
    root = np.sqrt(0.5)
    expected = [(root - 1) / 2, root, -1, 1, 0, 0.5]
    for values in evaluation(judged, TOKENIZER).values():
        np.testing.assert_allclose(values, expected, atol=1e-6)


def test_an_identical_model_is_wholly_similar() -> None:
    outcomes = HiddenSimilarity(TEXTS).prepared(MODEL, TOKENIZER)(copy.deepcopy(MODEL), TOKENIZER)
    for values in outcomes.values():
        np.testing.assert_allclose(values, 1, atol=1e-6)
        assert values.max() <= 1


def test_scale_does_not_matter_and_the_last_block_is_seen_without_the_final_norm() -> None:
    scaled, normed, turned = (copy.deepcopy(MODEL) for _ in range(3))
    with torch.no_grad():
        # RMS norms undo the scale of the states, up to their epsilon.
        scaled.model.embed_tokens.weight *= 8
        for layer in scaled.model.layers:
            layer.self_attn.o_proj.weight *= 8
            layer.mlp.down_proj.weight *= 8
        normed.model.norm.weight[::2] *= -1
        turned.model.layers[-1].mlp.down_proj.weight *= -0.5
    evaluation = HiddenSimilarity(TEXTS).prepared(MODEL, TOKENIZER)
    for model in (scaled, normed):
        for values in evaluation(model, TOKENIZER).values():
            np.testing.assert_allclose(values, 1, atol=1e-5)
    *before, last = evaluation(turned, TOKENIZER).values()
    assert all(values.min() > 0.99999 for values in before)
    assert last.max() < 0.99


@settings(deadline=None, max_examples=10)
@given(chosen=st.lists(st.sampled_from(range(len(TEXTS))), min_size=1, max_size=8))
def test_a_text_is_judged_the_same_in_any_company(chosen: list[int]) -> None:
    alone = [HiddenSimilarity((text,)).prepared(MODEL, TOKENIZER)(OTHER, TOKENIZER) for text in TEXTS]
    outcomes = HiddenSimilarity(tuple(TEXTS[i] for i in chosen)).prepared(MODEL, TOKENIZER)(OTHER, TOKENIZER)
    for metric, values in outcomes.items():
        np.testing.assert_allclose(values, [alone[i][metric][0] for i in chosen], atol=1e-5)


def test_texts_are_cut() -> None:
    whole, cut = ("abcdefgh" * 20,), ("abcdefgh" * 2,)
    short = HiddenSimilarity(whole, most_tokens=16).prepared(MODEL, TOKENIZER)(OTHER, TOKENIZER)
    same = HiddenSimilarity(cut).prepared(MODEL, TOKENIZER)(OTHER, TOKENIZER)
    assert {metric: values.tolist() for metric, values in short.items()} == {
        metric: values.tolist() for metric, values in same.items()
    }


def test_several_threads_share_what_is_prepared() -> None:
    evaluation = HiddenSimilarity(TEXTS).prepared(MODEL, TOKENIZER)
    models = [tiny_model(seed) for seed in range(4)]
    one_by_one = [evaluation(model, TOKENIZER) for model in models]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda model: evaluation(model, TOKENIZER), models))
    for one, other in zip(one_by_one, together, strict=True):
        for metric in METRICS:
            np.testing.assert_allclose(one[metric], other[metric], atol=1e-6)


def test_no_hook_stays_on_a_model() -> None:
    model = tiny_model()
    HiddenSimilarity(TEXTS).prepared(model, TOKENIZER)(model, TOKENIZER)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_is_prepared_says_what_it_is() -> None:
    evaluation = HiddenSimilarity(TEXTS, most_tokens=12)
    prepared = evaluation.prepared(MODEL, TOKENIZER)
    assert (prepared.name, prepared.protocol, prepared.texts) == ("hidden similarity", evaluation.protocol, TEXTS)
    assert "5 texts cut to 12 tokens" in evaluation.protocol
    again = prepared.prepared(OTHER, TOKENIZER)(OTHER, TOKENIZER)
    assert all(values.min() > 0.99999 for values in again.values())


def test_an_evaluation_is_a_value() -> None:
    assert hash(HiddenSimilarity(TEXTS)) == hash(HiddenSimilarity(TEXTS))
    assert HiddenSimilarity(TEXTS) == HiddenSimilarity(TEXTS) != HiddenSimilarity(TEXTS, most_tokens=8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        HiddenSimilarity(TEXTS).most_tokens = 8  # type: ignore[misc]


def test_it_has_to_be_prepared() -> None:
    with pytest.raises(ValueError, match=r"hidden similarity .*call \.prepared\(untouched, tokenizer\) first"):
        HiddenSimilarity(TEXTS)(MODEL, TOKENIZER)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="no text to judge"):
        HiddenSimilarity(())
    with pytest.raises(ValueError, match="most_tokens must be a whole number of at least 1; not 0"):
        HiddenSimilarity(TEXTS, most_tokens=0)
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        HiddenSimilarity(("a", "")).prepared(MODEL, TOKENIZER)


def test_a_model_without_a_list_of_its_blocks() -> None:
    model = tiny_model()
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="LlamaForCausalLM has no list of its 7 blocks"):
        HiddenSimilarity(TEXTS).prepared(model, TOKENIZER)


def test_embedded_decoders_differ_more_with_depth() -> None:
    lines = (find_root() / "data" / "zoo" / "tasks" / "instruct.jsonl").read_text().splitlines()[:40]
    prompts = tuple(json.loads(line)["prompt"] for line in lines)
    instruct, base = open_checkpoint("zoo:small/instruct"), open_checkpoint("zoo:small/base")
    tokenizer = load_tokenizer(instruct)
    evaluation = HiddenSimilarity(prompts).prepared(load_model(instruct), tokenizer)
    layers = [values.mean() for values in evaluation(load_model(base), tokenizer).values()]
    assert len(layers) == 5
    assert layers[0] > 0.999
    assert 0.5 < layers[-1] < 0.99


def test_an_embedded_encoder_is_judged_by_its_blocks() -> None:
    checkpoint = open_checkpoint("zoo:encoder/strings")
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.weight *= 0.5
    outcomes = HiddenSimilarity(("fqn spelled backwards is nqf\n", "short\n")).prepared(model, tokenizer)(
        other, tokenizer
    )
    means = [values.mean() for values in outcomes.values()]
    np.testing.assert_allclose(means[:2], 1, atol=1e-6)
    assert max(means[2:]) < 0.9999
    # One text at a time, as transformers tells its hidden states.
    for i, text in enumerate(("fqn spelled backwards is nqf\n", "short\n")):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            pair = [each(input_ids=ids, output_hidden_states=True).hidden_states for each in (model, other)]
        expected = [float(torch.cosine_similarity(u, v, dim=-1).mean()) for u, v in zip(*pair, strict=True)]
        np.testing.assert_allclose([values[i] for values in outcomes.values()], expected, atol=1e-5)
