"""Settings that change what weights mean, in configurations as transformers writes and wrote them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from delta_analysis.checkpoints.configs import SETTINGS, config_differences
from delta_analysis.deltas.delta import load_delta
from tests.conftest import SaveCheckpoint


def found(base: dict[str, Any], finetuned: dict[str, Any]) -> dict[str, tuple[str, str]]:
    table = config_differences(base, finetuned)
    assert table.columns.tolist() == ["setting", "base", "finetuned"]
    return {row.setting: (row.base, row.finetuned) for row in table.itertuples()}


CONFIGS = [LlamaConfig(), BertConfig(), GPT2Config(), MixtralConfig(), Qwen2Config()]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_a_configuration_differs_from_itself_in_nothing(config: PreTrainedConfig) -> None:
    assert found(config.to_dict(), config.to_dict()) == {}
    assert found(config.to_diff_dict(), config.to_dict()) == {}


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (LlamaConfig, {"rope_theta": 1e6}, {"rope theta": ("10000", "1000000")}),
        (LlamaConfig, {"rms_norm_eps": 1e-5}, {"norm epsilon": ("1e-06", "1e-05")}),
        (LlamaConfig, {"vocab_size": 32001}, {"vocabulary size": ("32000", "32001")}),
        (LlamaConfig, {"tie_word_embeddings": True}, {"tied embeddings": ("False", "True")}),
        (LlamaConfig, {"hidden_act": "gelu"}, {"activation": ("silu", "gelu")}),
        (
            LlamaConfig,
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
            {"rope scaling": ("none", "factor 4, rope_type linear")},
        ),
        (
            LlamaConfig,
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            {"rope scaling": ("none", "factor 2, rope_type dynamic")},
        ),
        (BertConfig, {"layer_norm_eps": 1e-5}, {"norm epsilon": ("1e-12", "1e-05")}),
        (GPT2Config, {"activation_function": "relu"}, {"activation": ("gelu_new", "relu")}),
        (
            GPT2Config,
            {"layer_norm_epsilon": 1e-6, "n_head": 16},
            {"norm epsilon": ("1e-05", "1e-06"), "attention heads": ("12", "16")},
        ),
        (MixtralConfig, {"num_experts_per_tok": 1}, {"experts a token": ("2", "1")}),
        (Qwen2Config, {"sliding_window": 99, "use_sliding_window": True}, {"sliding window": ("not stated", "99")}),
    ],
    ids=str,
)
@pytest.mark.parametrize("stated", ["all", "what differs from defaults"])
def test_what_differs_is_listed_with_both_values(
    kind: type[PreTrainedConfig], options: dict[str, Any], expected: dict[str, tuple[str, str]], stated: str
) -> None:
    sides = [kind(), kind(**options)]
    base, finetuned = (side.to_dict() if stated == "all" else side.to_diff_dict() for side in sides)
    assert found(base, finetuned) == expected
    assert found(finetuned, base) == {setting: (b, a) for setting, (a, b) in expected.items()}


def test_rope_as_older_and_newer_files_state_it_is_the_same() -> None:
    older = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    newer = {"model_type": "llama", "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}
    assert found(older, newer) == {}
    assert found({**older, "rope_theta": 1e4}, newer) == {"rope theta": ("10000", "500000")}


def test_theta_and_scaling_of_each_kind_of_layer_are_told_apart() -> None:
    base = Gemma3TextConfig().to_dict()
    full = {**base["rope_parameters"]["full_attention"], "rope_theta": 5e5}
    longer = {**full, "rope_type": "linear", "factor": 8.0}
    for changed, settings in ((full, {"rope theta"}), (longer, {"rope theta", "rope scaling"})):
        finetuned = {**base, "rope_parameters": {**base["rope_parameters"], "full_attention": changed}}
        differences = found(base, finetuned)
        assert differences.keys() == settings
        assert differences["rope theta"] == (
            "full_attention 1000000, sliding_attention 10000",
            "full_attention 500000, sliding_attention 10000",
        )
    assert differences["rope scaling"][1] == "full_attention factor 8, rope_type linear, sliding_attention none"


def test_comparing_changes_no_configuration() -> None:
    sides = [
        {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": factor}}
        for factor in (2.0, 4.0)
    ]
    before = copy.deepcopy(sides)
    found(*sides)
    assert sides == before


def test_large_numbers_that_differ_in_their_last_digit_differ() -> None:
    base = {"vocab_size": 1_000_000}
    assert found(base, {"vocab_size": 1_000_001}) == {"vocabulary size": ("1000000", "1000001")}
    assert found(base, {"vocab_size": 10**400})["vocabulary size"][0] == "1000000"


def test_a_setting_that_is_not_stated_has_the_default_of_its_model() -> None:
    # A Llama without rope_theta turns by 10000, as if it were stated.
    silent = {"model_type": "llama"}
    assert found(silent, {**silent, "rope_theta": 10000.0, "rms_norm_eps": 1e-6}) == {}
    assert found(silent, {**silent, "rope_theta": 1e6}) == {"rope theta": ("10000", "1000000")}


def test_settings_of_a_model_that_transformers_does_not_know_are_compared_as_stated() -> None:
    base, finetuned = ({"model_type": "newcomer", "norm_eps": eps, "vocab_size": 7} for eps in (1e-5, 1e-6))
    assert found(base, finetuned) == {"norm epsilon": ("1e-05", "1e-06")}
    del base["norm_eps"]
    assert found(base, finetuned) == {"norm epsilon": ("not stated", "1e-06")}


@pytest.mark.parametrize(
    "broken",
    [
        {"hidden_size": "eight"},
        {"text_config": None},
        {"text_config": [3]},
        {"rope_scaling": 3},
        {"num_attention_heads": None},
        {"rope_parameters": {"rope_type": "x"}},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_a_configuration_that_transformers_refuses_is_no_error(broken: dict[str, Any]) -> None:
    base = {"model_type": "llama", "vocab_size": 11}
    assert found({**base, **broken}, {**base, **broken, "vocab_size": 12})["vocabulary size"] == ("11", "12")


def test_the_text_part_of_a_model_of_images_is_compared() -> None:
    text = {"model_type": "llama", "rms_norm_eps": 1e-5}
    base = {"model_type": "llava", "text_config": text}
    assert found(base, {**base, "text_config": {**text, "rms_norm_eps": 1e-6}}) == {"norm epsilon": ("1e-05", "1e-06")}


def test_what_is_not_about_weights_is_not_listed() -> None:
    base = LlamaConfig().to_dict()
    assert (
        found(base, {**base, "dtype": "bfloat16", "use_cache": False, "transformers_version": "4.0", "bos_token_id": 7})
        == {}
    )


@pytest.mark.parametrize("sides", [({}, {"vocab_size": 3}), ({"vocab_size": 3}, {}), ({}, {})])
def test_without_a_configuration_nothing_differs(sides: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert found(*sides) == {}


def test_a_delta_tells_how_its_sides_differ(save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(2)}
    folders = {
        side: save_checkpoint(side, tensors, config={"model_type": "llama", "rope_theta": theta})
        for side, theta in (("base", 1e4), ("finetuned", 1e6))
    }
    table = load_delta(**folders).config_differences()
    assert table.to_dict("records") == [{"setting": "rope theta", "base": "10000", "finetuned": "1000000"}]
    assert load_delta(base=None, finetuned=folders["finetuned"]).config_differences().empty
    table.to_parquet(tmp_path / "table.parquet")


def test_every_setting_of_the_wrong_base_experiment_is_looked_at() -> None:
    assert {"rope theta", "rope scaling", "norm epsilon", "tied embeddings", "activation", "vocabulary size"} <= set(
        SETTINGS
    )
