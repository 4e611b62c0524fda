from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    RobertaConfig,
)

from delta_analysis.checkpoints.names import (
    NO_LAYER,
    WRAPPERS,
    Kind,
    bare_name,
    input_embedding,
    output_head,
    parse_name,
    reading_order,
)

SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 11}
PART = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True)


@pytest.mark.parametrize(
    ("name", "ndim", "layer", "module", "kind"),
    [
        ("model.layers.0.mlp.down_proj.weight", 2, 0, "mlp.down_proj", "linear"),
        ("model.layers.12.input_layernorm.weight", 1, 12, "input_layernorm", "norm"),
        ("model.layers.7.self_attn.q_proj.bias", 1, 7, "self_attn.q_proj.bias", "bias"),
        ("model.layers.4.block_sparse_moe.experts.31.w1.weight", 2, 4, "block_sparse_moe.experts.*.w1", "linear"),
        ("model.layers.4.mlp.experts.gate_up_proj", 3, 4, "mlp.experts.gate_up_proj", "linear"),
        ("transformer.h.11.attn.c_attn.weight", 2, 11, "attn.c_attn", "linear"),
        ("transformer.h.11.ln_1.weight", 1, 11, "ln_1", "norm"),
        ("transformer.h.11.ln_1.bias", 1, 11, "ln_1.bias", "bias"),
        ("wte.weight", 2, NO_LAYER, "wte", "embedding"),
        ("transformer.wpe.weight", 2, NO_LAYER, "wpe", "embedding"),
        ("bert.embeddings.word_embeddings.weight", 2, NO_LAYER, "embeddings.word_embeddings", "embedding"),
        ("bert.embeddings.LayerNorm.weight", 1, NO_LAYER, "embeddings.LayerNorm", "norm"),
        ("bert.embeddings.LayerNorm.bias", 1, NO_LAYER, "embeddings.LayerNorm.bias", "bias"),
        ("model.norm.weight", 1, NO_LAYER, "norm", "norm"),
        ("lm_head.weight", 2, NO_LAYER, "lm_head", "linear"),
        ("embed_out.weight", 2, NO_LAYER, "embed_out", "linear"),  # the output head of GPT-NeoX and Pythia
        ("lm_head.bias", 1, NO_LAYER, "lm_head.bias", "bias"),
        ("temperature", 0, NO_LAYER, "temperature", "norm"),
        ("bias", 1, NO_LAYER, "bias", "bias"),
        ("layers.3", 2, 3, "layers.3", "linear"),
    ],
)
def test_known_names_are_read(name: str, ndim: int, layer: int, module: str, kind: str) -> None:
    assert parse_name(name, ndim) == (layer, module, kind)


def expected_kind(owner: torch.nn.Module, name: str) -> str:
    if isinstance(owner, torch.nn.Embedding):
        return "embedding"
    if name.endswith("bias"):
        return "bias"
    return "norm" if "Norm" in type(owner).__name__ else "linear"


@pytest.mark.parametrize(
    ("config", "model_class", "stack"),
    [
        (LlamaConfig(**SIZES, attention_bias=True), AutoModelForCausalLM, "layers"),
        (Qwen2Config(**SIZES, num_key_value_heads=2), AutoModelForCausalLM, "layers"),
        (GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=11), AutoModelForCausalLM, "h"),
        (BertConfig(**SIZES), AutoModel, "layer"),
        (OPTConfig(hidden_size=8, ffn_dim=12, num_hidden_layers=3, num_attention_heads=2), AutoModel, "layers"),
        (GPTNeoXConfig(**SIZES), AutoModelForCausalLM, "layers"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PretrainedConfig) else "",
)
def test_layer_and_kind_agree_with_the_modules_of_transformers(
    config: PretrainedConfig, model_class: type, stack: str
) -> None:
    with torch.device("meta"):
        model = model_class.from_config(config)
    layers = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and path.split(".")[-1] == stack:
            layers = {f"{path}.{i}.": i for i in range(len(module))}
    assert len(layers) == 3
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        layer = next((i for prefix, i in layers.items() if name.startswith(prefix)), NO_LAYER)
        parsed = parse_name(name, parameter.ndim)
        assert (parsed.layer, parsed.kind) == (layer, expected_kind(owner, name)), name


@settings(deadline=None)
@given(stack=PART, place=st.lists(PART, min_size=1, max_size=3), layers=st.lists(st.integers(0, 999), min_size=2))
def test_the_same_place_in_every_layer_is_the_same_module(stack: str, place: list[str], layers: list[int]) -> None:
    parsed = [parse_name(f"model.{stack}.{layer}.{'.'.join(place)}.weight", ndim=2) for layer in layers]
    assert [each.layer for each in parsed] == layers
    assert {each.module for each in parsed} == {".".join(place)}


@settings(deadline=None)
@given(layer=st.integers(0, 99), experts=st.lists(st.integers(0, 99), min_size=2))
def test_experts_are_merged_into_one_module(layer: int, experts: list[int]) -> None:
    assert {parse_name(f"model.layers.{layer}.experts.{expert}.w2.weight", ndim=2) for expert in experts} == {
        (layer, "experts.*.w2", "linear")
    }


@settings(deadline=None)
@given(name=st.text(min_size=1, max_size=30), ndim=st.integers(0, 4))
def test_any_name_is_read(name: str, ndim: int) -> None:
    layer, module, kind = parse_name(name, ndim)
    assert layer >= NO_LAYER
    assert module
    assert kind in get_args(Kind)
    assert (kind in ("linear", "embedding")) == (ndim >= 2)


@pytest.mark.parametrize("name", ["a.².weight", "a.①.weight"])
def test_a_digit_that_is_no_decimal_number_is_no_layer(name: str) -> None:
    # str.isdigit is true of superscripts, which int() does not take.
    assert parse_name(name, ndim=2).layer == NO_LAYER


def test_reading_order_is_by_layer_number_then_by_name() -> None:
    names = ["l.10.a.weight", "norm.weight", "l.2.b.weight", "l.2.a.weight", "embed.weight", "l.0.z.bias"]
    assert sorted(names, key=reading_order) == [
        "embed.weight",
        "norm.weight",
        "l.0.z.bias",
        "l.2.a.weight",
        "l.2.b.weight",
        "l.10.a.weight",
    ]


@pytest.mark.parametrize(
    ("config", "model_class"),
    [
        (LlamaConfig(**SIZES), AutoModelForCausalLM),
        (Qwen2Config(**SIZES, num_key_value_heads=2), AutoModelForCausalLM),
        (GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=11), AutoModelForCausalLM),
        (GPTNeoXConfig(**SIZES), AutoModelForCausalLM),
        (OPTConfig(hidden_size=8, ffn_dim=12, num_hidden_layers=3, num_attention_heads=2), AutoModelForCausalLM),
        (BertConfig(**SIZES), AutoModelForMaskedLM),
        (RobertaConfig(**SIZES), AutoModelForMaskedLM),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PretrainedConfig) else "",
)
def test_embeddings_and_head_are_those_of_transformers(config: PretrainedConfig, model_class: type) -> None:
    with torch.device("meta"):
        model = model_class.from_config(config)
    names = {module: f"{path}.weight" for path, module in model.named_modules()}
    stored = list(model.state_dict())
    assert input_embedding(stored) == names[model.get_input_embeddings()]
    assert output_head(stored) == names[model.get_output_embeddings()]
    assert bare_name(names[model.get_input_embeddings()]) == next(
        name for name in model.base_model.state_dict() if name == input_embedding(model.base_model.state_dict())
    )


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["model.layers.0.mlp.up_proj.weight"],
        ["not_embed_tokens.weight", "my_lm_head.weight"],  # another module, whose name ends alike
        ["embed_tokens.bias", "lm_head.bias"],
        ["embeddings.position_embeddings.weight", "score.weight", "classifier.weight"],
    ],
    ids=str,
)
def test_models_without_embeddings_and_head(names: list[str]) -> None:
    assert input_embedding(names) is None
    assert output_head(names) is None


@settings(deadline=None)
@given(wrappers=st.lists(st.sampled_from(WRAPPERS), max_size=4), name=st.lists(PART, min_size=1, max_size=3))
def test_any_number_of_wrappers_is_taken_off(wrappers: list[str], name: list[str]) -> None:
    inside = bare_name(".".join([*name, "weight"]))
    assert bare_name("".join(wrappers) + inside) == inside
    assert not inside.startswith(tuple(WRAPPERS))
