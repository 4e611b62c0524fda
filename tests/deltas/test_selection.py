"""Scopes on the parameters of real architectures; the oracle is the class of the modules, not their names."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import delta_analysis as da
from delta_analysis.checkpoints.names import parse_name
from delta_analysis.deltas.selection import PARTS, SCOPES, in_scope, parts_and_layers

SMALL = {
    "vocab_size": 12,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}
BART = {
    "vocab_size": 12,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 16,
}
MODELS = {
    "LlamaForCausalLM": SMALL,
    "Qwen3ForCausalLM": SMALL | {"head_dim": 4},
    "Gemma2ForCausalLM": SMALL | {"head_dim": 4},
    "MixtralForCausalLM": SMALL | {"num_local_experts": 2},
    "GPTNeoXForCausalLM": SMALL,
    "GPT2LMHeadModel": {"vocab_size": 12, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16},
    "OPTForCausalLM": SMALL | {"ffn_dim": 16, "word_embed_proj_dim": 8},
    "FalconForCausalLM": {"vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2},
    "BertForMaskedLM": SMALL,
    "RobertaForSequenceClassification": SMALL,
    "DistilBertForMaskedLM": {"vocab_size": 12, "dim": 8, "hidden_dim": 16, "n_layers": 2, "n_heads": 2},
    "BartForConditionalGeneration": BART,
    "T5ForConditionalGeneration": {
        "vocab_size": 12,
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 16,
        "num_layers": 2,
        "num_heads": 2,
    },
}


def model_of(architecture: str) -> torch.nn.Module:
    kind = getattr(transformers, architecture)
    with torch.device("meta"):
        return kind(kind.config_class(**MODELS[architecture]))


def part_of(model: torch.nn.Module, name: str) -> str:
    """By the classes of the module that holds a parameter and of those around it."""
    path = name.split(".")[:-1]
    classes = [type(model.get_submodule(".".join(path[: i + 1]))).__name__ for i in range(len(path))]
    in_layer = any(part.isdecimal() for part in path)
    attention = any("Attention" in each for each in classes)
    if "Norm" in classes[-1]:
        return "norms"
    if "Embedding" in classes[-1] and not attention:
        return "embeddings"
    return "" if not in_layer else "attention" if attention else "mlp"


@pytest.mark.parametrize("architecture", MODELS)
def test_parts_are_what_the_classes_of_the_modules_say(architecture: str) -> None:
    model = model_of(architecture)
    tensors = {name: parameter.dim() for name, parameter in model.named_parameters()}
    found = {part: set(in_scope(part, tensors)) for part in PARTS}
    expected: dict[str, set[str]] = {part: set() for part in (*PARTS, "")}
    for name in tensors:
        expected[part_of(model, name)].add(name)
    assert found == {part: expected[part] for part in PARTS}
    # Outside all of them: heads and poolers.
    rest = tensors.keys() - set().union(*found.values())
    assert all(name.startswith(("lm_head", "embed_out", "cls", "vocab_", "classifier")) for name in rest)


@pytest.mark.parametrize("architecture", MODELS)
def test_linear_is_the_matrices_of_attention_and_mlp(architecture: str) -> None:
    tensors = {name: parameter.dim() for name, parameter in model_of(architecture).named_parameters()}
    inside = in_scope("attention, mlp", tensors)
    assert in_scope("linear", tensors) == [name for name in inside if tensors[name] > 1]
    assert in_scope("all", tensors) == list(tensors)


# Real names, as they stand in published files, some without the prefix of the wrapping module.
@pytest.mark.parametrize(
    ("name", "ndim", "part"),
    [
        ("transformer.h.0.attn.c_attn.weight", 2, "attention"),
        ("transformer.h.0.attn.c_attn.bias", 1, "attention"),
        ("h.11.attn.c_proj.weight", 2, "attention"),
        ("h.11.ln_1.weight", 1, "norms"),
        ("h.11.ln_1.bias", 1, "norms"),
        ("transformer.ln_f.bias", 1, "norms"),
        ("transformer.h.0.mlp.c_fc.bias", 1, "mlp"),
        ("wpe.weight", 2, "embeddings"),
        ("bert.embeddings.token_type_embeddings.weight", 2, "embeddings"),
        ("bert.embeddings.LayerNorm.gamma", 1, "norms"),
        ("bert.encoder.layer.0.attention.self.query.bias", 1, "attention"),
        ("bert.encoder.layer.0.attention.output.dense.weight", 2, "attention"),
        ("bert.encoder.layer.0.attention.output.LayerNorm.beta", 1, "norms"),
        ("encoder.layer.0.attention.output.LayerNorm.weight", 1, "norms"),
        ("encoder.layer.0.intermediate.dense.weight", 2, "mlp"),
        ("encoder.layer.0.output.dense.weight", 2, "mlp"),
        ("encoder.layer.0.output.LayerNorm.bias", 1, "norms"),
        ("bert.pooler.dense.weight", 2, ""),
        ("bert.pooler.dense.bias", 1, ""),
        ("cls.predictions.transform.dense.weight", 2, ""),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", 2, "attention"),
        ("encoder.block.0.layer.0.layer_norm.weight", 1, "norms"),
        ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 2, "mlp"),
        ("decoder.block.3.layer.1.EncDecAttention.o.weight", 2, "attention"),
        ("decoder.final_layer_norm.weight", 1, "norms"),
        ("shared.weight", 2, "embeddings"),
        ("model.layers.0.self_attn.q_norm.weight", 1, "norms"),
        ("model.layers.0.post_attention_layernorm.weight", 1, "norms"),
        ("model.layers.0.self_attn.o_proj.bias", 1, "attention"),
        ("model.layers.0.linear_attn.in_proj_qkvz.weight", 2, "attention"),
        ("model.layers.0.mlp.experts.7.down_proj.weight", 2, "mlp"),
        ("model.decoder.layers.0.encoder_attn.k_proj.weight", 2, "attention"),
        ("gpt_neox.layers.0.attention.query_key_value.weight", 2, "attention"),
        ("gpt_neox.layers.0.mlp.dense_h_to_4h.weight", 2, "mlp"),
        ("gpt_neox.embed_in.weight", 2, "embeddings"),
        ("embed_out.weight", 2, ""),
        ("lm_head.weight", 2, ""),
        ("base_model.model.model.layers.0.self_attn.v_proj.weight", 2, "attention"),
    ],
)
def test_names_of_published_files(name: str, ndim: int, part: str) -> None:
    tensors = {name: ndim, "of no part": 2}
    selected = [each for each in PARTS if parses_to(each, tensors, name)]
    assert selected == ([part] if part else [])


def parses_to(part: str, tensors: dict[str, int], name: str) -> bool:
    try:
        return name in in_scope(part, tensors)
    except ValueError:
        return False


WORDS = st.sampled_from(
    "model encoder layers h 0 12 self_attn attention mlp experts embed wte ln_1 norm q_norm LayerNorm word_embeddings "
    "output dense pooler lm_head weight bias".split()
)
NAMES = st.dictionaries(
    st.lists(WORDS, min_size=1, max_size=6).map(".".join), st.integers(0, 3), min_size=1, max_size=12
)


@given(NAMES)
def test_no_two_parts_share_a_tensor_and_linear_has_no_vector(tensors: dict[str, int]) -> None:
    selected = [name for part in PARTS for name in tensors if parses_to(part, tensors, name)]
    assert len(selected) == len(set(selected))
    linear = [name for name in tensors if parses_to("linear", tensors, name)]
    assert all(parse_name(name, tensors[name]).kind == "linear" for name in linear)


@given(NAMES, st.lists(st.sampled_from([*SCOPES, "*", "*attn*"]), min_size=1, max_size=3))
def test_a_list_is_the_union_in_the_order_of_the_tensors(tensors: dict[str, int], parts: list[str]) -> None:
    present = [part for part in parts if any(parses_to(part, tensors, name) for name in tensors)]
    if present:
        expected = [name for name in tensors if any(parses_to(part, tensors, name) for part in present)]
        assert in_scope(" , ".join(present), tensors) == expected


def test_globs_match_whole_names_with_case() -> None:
    tensors = {"model.layers.0.mlp.up_proj.weight": 2, "model.layers.10.mlp.up_proj.weight": 2, "model.norm.weight": 1}
    first, tenth, norm = tensors
    assert in_scope("*.layers.0.*", tensors) == [first]
    assert in_scope("*.layers.[01]*.mlp.*", tensors) == [first, tenth]
    assert in_scope("norms,*.layers.10.*", tensors) == [tenth, norm]
    assert in_scope(norm, tensors) == [norm]


@pytest.mark.parametrize("scope", ["Attention", "layers.0", "*NORM*", "", "norms,", "norms, attention", "mpl"])
def test_a_part_that_selects_nothing_is_refused(scope: str) -> None:
    with pytest.raises(ValueError, match="selects none of the 1 tensors, which begin with .*expected all, linear, att"):
        in_scope(scope, {"model.norm.weight": 1})


@pytest.mark.parametrize("architecture", MODELS)
def test_scopes_that_take_a_model_apart_select_what_they_say(architecture: str) -> None:
    tensors = {name: weight.dim() for name, weight in model_of(architecture).named_parameters()}
    found = parts_and_layers(tensors)
    for scope, names in found.items():
        assert names == in_scope(scope, tensors)
        assert names
    assert [scope for scope in found if scope in PARTS] == [part for part in PARTS if parts_of(part, tensors)]
    layers = {scope: names for scope, names in found.items() if scope not in PARTS}
    depths = [{parse_name(name, tensors[name]).layer for name in names} for names in layers.values()]
    # Each scope is one layer, and all layers that there are have one, from first to last.
    assert [len(depth) for depth in depths] == [1] * len(layers)
    assert [min(depth) for depth in depths] == sorted({parse_name(*each).layer for each in tensors.items()} - {-1})


def parts_of(part: str, tensors: dict[str, int]) -> bool:
    return any(parses_to(part, tensors, name) for name in tensors)


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [
        (1, 4, [0]),
        (3, 4, [0, 1, 2]),
        (4, 4, [0, 1, 2, 3]),
        (5, 4, [0, 1, 3, 4]),
        (10, 4, [0, 3, 6, 9]),
        (32, 4, [0, 10, 21, 31]),
        (32, 2, [0, 31]),
        (32, 1, [0]),
        (12, 0, []),
    ],
)
def test_layers_are_taken_evenly_from_first_to_last(count: int, most: int, expected: list[int]) -> None:
    tensors = {
        f"model.layers.{layer}.{name}.weight": 2 for layer in range(count) for name in ("self_attn.q_proj", "mlp.up")
    }
    found = parts_and_layers(tensors, most_layers=most)
    assert list(found) == ["attention", "mlp", *(f"model.layers.{layer}.*" for layer in expected)]
    for layer in expected:
        assert found[f"model.layers.{layer}.*"] == [name for name in tensors if f"layers.{layer}." in name]


def test_layers_come_in_the_order_of_their_numbers_whatever_that_of_the_tensors() -> None:
    tensors = {f"h.{layer}.mlp.weight": 2 for layer in (10, 2, 0, 1)}
    assert list(parts_and_layers(tensors)) == ["mlp", "h.0.*", "h.1.*", "h.2.*", "h.10.*"]


def test_what_has_no_layers_has_parts_only() -> None:
    assert parts_and_layers({"model.norm.weight": 1}) == {"norms": ["model.norm.weight"]}
    assert parts_and_layers({"lm_head.weight": 2}) == {}


@pytest.mark.parametrize("pruner", [da.Dare(0.5), da.Magnitude(0.5, within="model")], ids=repr)
def test_a_part_of_a_delta_is_a_delta_whether_selected_before_or_after_pruning(pruner: da.Dare) -> None:
    delta = da.load_delta(base="zoo:tiny/base", finetuned="zoo:tiny/math")
    part = delta.select("mlp, norms")
    assert list(part) == in_scope("mlp,norms", {name: tensor.dim() for name, tensor in delta.items()})
    assert da.value_ranges(part)["tensor"].tolist() == list(part)
    before, after = part.pruned(pruner, seed=1), delta.pruned(pruner, seed=1).select("mlp,norms")
    assert list(before) == list(after) == list(part)
    for name in part:
        assert torch.equal(part[name], delta[name])
        assert torch.equal(before[name], after[name])
    with pytest.raises(ValueError, match="selects none of the"):
        delta.select("*nowhere*")
