"""LoRA adapters as deltas: peft says what each of them adds to its base."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from delta_analysis._errors import CheckpointError
from delta_analysis.checkpoints.lora import VARIANTS, WAY_OUT, LoraProduct, adapter_differences, is_adapter
from delta_analysis.checkpoints.tensors import InMemory

# peft asks transformers for this by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

Q_PROJ = "base_model.model.layers.0.q_proj"
FACTORS = {f"{Q_PROJ}.lora_A.weight": torch.ones(2, 5), f"{Q_PROJ}.lora_B.weight": torch.ones(3, 2)}
A, B = FACTORS
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 5, r"^model.*\.1.*k_proj": 3, "1.*v_proj": 7},
    "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 32, r".*\.0\..*_proj": 1, "self_attn.(k|v)_proj": 9},
    "target_modules": ["q_proj", "k_proj", "v_proj"],
}


def llama(**options: Any) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=11,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            **options,
        )
    )


def bert() -> nn.Module:
    size = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=11, **size))


def gpt2() -> nn.Module:
    size = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 4}
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, bos_token_id=0, eos_token_id=0, **size))


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, (2, 3)), nn.Conv2d(4, 5, 1), nn.Conv1d(3, 4, 2), nn.Conv3d(2, 3, 2))


def train(model: nn.Module, folder: Path, config: LoraConfig, **options: Any) -> Path:
    """Save an adapter of the model, whose factors are random."""
    wrapped = get_peft_model(copy.deepcopy(model), config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(folder, **options)
    return folder


def peft_deltas(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """What a base model gains where peft loads a saved adapter and merges it."""
    merged = PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload().state_dict()
    base = model.state_dict()
    assert merged.keys() == base.keys()
    return {name: merged[name] - base[name] for name in base if not torch.equal(merged[name], base[name])}


def assert_is_pefts(model: nn.Module, folder: Path) -> None:
    entries, _, _ = adapter_differences(folder)
    deltas = peft_deltas(model, folder)
    assert entries.keys() == deltas.keys()
    for name, delta in deltas.items():
        read = entries[name].read()
        assert entries[name].shape == read.shape
        assert entries[name].dtype == read.dtype == torch.float32
        assert read.is_contiguous()
        torch.testing.assert_close(read, delta, rtol=1e-6, atol=1e-6)


def write(
    folder: Path,
    tensors: Mapping[str, torch.Tensor] | None = FACTORS,
    **changes: Any,
) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    if tensors is not None:
        save_file(dict(tensors), folder / "adapter_model.safetensors")
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        adapter_differences(folder)
    return str(caught.value)


@pytest.mark.parametrize("safe_serialization", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (llama, {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}),
        (llama, {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "use_rslora": True}),
        (llama, {"r": 4, "target_modules": ["o_proj", "down_proj"], "layers_to_transform": [1]}),
        (llama, {"r": 4, "lora_alpha": 7, **PATTERNS}),
        (llama, {"r": 4, "lora_alpha": 7, "use_rslora": True, **PATTERNS}),
        (llama, {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
        (llama, {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
        (llama, {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "mica"}),
        (bert, {"r": 2, "lora_alpha": 3, "target_modules": ["query", "dense"]}),
        (gpt2, {"r": 2, "lora_alpha": 3, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
        (convolutions, {"r": 2, "lora_alpha": 3, "target_modules": ["0", "1", "2", "3"]}),
        (convolutions, {"r": 2, "target_modules": ["0", "1"], "fan_in_fan_out": True}),
    ],
)
def test_deltas_are_what_peft_merges(
    tmp_path: Path, base: Any, changes: dict[str, Any], safe_serialization: bool
) -> None:
    torch.manual_seed(0)
    model = base()
    assert_is_pefts(model, train(model, tmp_path, LoraConfig(**changes), safe_serialization=safe_serialization))


@pytest.mark.parametrize(
    ("base", "changes", "whole"),
    [
        (llama, {"target_modules": ["embed_tokens", "q_proj"]}, {"model.embed_tokens.base_layer.weight"}),
        (llama, {"target_modules": ["lm_head", "embed_tokens"], "use_rslora": True}, {"lm_head.base_layer.weight"}),
        (gpt2, {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}, {"transformer.wte.base_layer.weight"}),
    ],
)
def test_deltas_of_embeddings_and_heads_are_what_peft_merges(
    tmp_path: Path, base: Any, changes: dict[str, Any], whole: set[str]
) -> None:
    torch.manual_seed(0)
    model = base()
    model.config.tie_word_embeddings = False
    # Otherwise GPT-2's head is the embedding itself, and changes with it.
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    train(model, tmp_path, LoraConfig(r=2, lora_alpha=3, **changes), save_embedding_layers=True)
    assert_is_pefts(model, tmp_path)
    assert adapter_differences(tmp_path)[2].keys() >= whole


@pytest.mark.filterwarnings("ignore:OLoRA changes the base weights:UserWarning")
@pytest.mark.parametrize("changes", [{}, {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 5}}])
def test_a_converted_adapter_is_the_difference_from_the_original_base(tmp_path: Path, changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = llama()
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights="olora", **changes)
    wrapped = get_peft_model(copy.deepcopy(model), config)
    wrapped.save_pretrained(tmp_path / "start")
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    wrapped.save_pretrained(tmp_path / "raw")
    assert "olora" in refusal(tmp_path / "raw")
    folder = tmp_path / "converted"
    wrapped.save_pretrained(folder, path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    trained = wrapped.merge_and_unload().state_dict()
    for name, entry in adapter_differences(folder)[0].items():
        torch.testing.assert_close(entry.read(), trained[name] - model.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_what_is_stored_whole_is_named_and_left_out(tmp_path: Path) -> None:
    config = LoraConfig(
        r=2,
        target_modules=["query"],
        bias="lora_only",
        modules_to_save=["classifier", "pooler"],
        trainable_token_indices={"word_embeddings": [1, 2]},
    )
    entries, _, skipped = adapter_differences(train(bert(), tmp_path, config))
    query = "bert.encoder.layer.0.attention.self.query"
    assert entries.keys() == {f"{query}.weight"}
    assert skipped.keys() == {
        f"{query}.base_layer.bias",
        "classifier.weight",
        "classifier.bias",
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "bert.embeddings.word_embeddings.token_adapter.trainable_tokens_delta",
    }
    assert all("replaces the base's weight" in reason for reason in skipped.values())


def test_every_stored_tensor_is_a_factor_or_skipped(tmp_path: Path) -> None:
    train(bert(), tmp_path, LoraConfig(r=2, target_modules=["query"], bias="all", task_type="SEQ_CLS"))
    entries, _, skipped = adapter_differences(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) == 2 * len(entries) + len(skipped)
    assert not entries.keys() & skipped.keys()


def test_a_weight_stored_beside_its_factors_is_a_factored_one(tmp_path: Path) -> None:
    entries, _, skipped = adapter_differences(write(tmp_path, FACTORS | {f"{Q_PROJ}.weight": torch.ones(3, 5)}))
    assert entries.keys() == {"layers.0.q_proj.weight"}
    assert skipped == {}


def test_an_adapters_name_may_stand_in_its_tensors(tmp_path: Path) -> None:
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in FACTORS.items()}
    embedding = {f"base_model.model.wte.lora_embedding_{side}.default": torch.ones(2, 2) for side in "AB"}
    entries, _, _ = adapter_differences(write(tmp_path, named | embedding))
    assert entries.keys() == {"layers.0.q_proj.weight", "wte.weight"}
    assert torch.equal(entries["layers.0.q_proj.weight"].read(), torch.full((3, 5), 4.0))
    assert entries["wte.weight"].transposed


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    entries, _, _ = adapter_differences(write(tmp_path))
    entry = entries["layers.0.q_proj.weight"]
    file = tmp_path / "adapter_model.safetensors"
    assert entry.files == (file,)
    file.unlink()
    assert entry.shape == (3, 5)
    with pytest.raises(CheckpointError, match="changed"):
        entry.read()


def test_safetensors_come_before_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"not a pickle")
    assert adapter_differences(write(tmp_path))[0].keys() == {"layers.0.q_proj.weight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_products_are_formed_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = {name: torch.randn(tensor.shape, dtype=dtype) for name, tensor in FACTORS.items()}
    entries, _, _ = adapter_differences(write(tmp_path, tensors))
    down, up = (tensor.double() for tensor in tensors.values())
    read = entries["layers.0.q_proj.weight"].read()
    assert read.dtype == torch.float32
    torch.testing.assert_close(read.double(), 2 * up @ down, rtol=1e-6, atol=1e-6)


@given(
    out=st.integers(0, 5),
    inside=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    rank=st.integers(1, 4),
    scale=st.floats(-8, 8, width=32),
    transposed=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_low_rank_difference_is_a_sum_over_its_ranks(
    out: int, inside: list[int], rank: int, scale: float, transposed: bool, seed: int
) -> None:
    transposed = transposed and len(inside) == 1
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *inside, generator=generator)
    up = torch.randn(out, rank, *(1 for _ in inside[1:]), generator=generator)
    kept = down.clone(), up.clone()
    entry = LoraProduct(InMemory(down), InMemory(up), scale, transposed)
    expected = scale * torch.einsum("or,r...->o...", up.flatten(1).double(), down.double())
    read = entry.read()
    assert entry.shape == read.shape
    assert entry.files == ()
    torch.testing.assert_close(read.double(), expected.T if transposed else expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(down, kept[0])
    assert torch.equal(up, kept[1])
    assert torch.equal(entry.read(), read)


PARTS = st.sampled_from(["layers", "0", "1", "10", "self_attn", "q_proj", "v_proj", "x_q_proj"])
MODULE = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
PATTERN = MODULE | st.sampled_from(
    ["^q_proj", r".*\.0\..*", "(q|v)_proj", "layers.1", "q_proj|v_proj", "^layers", "proj", r"\d+", ".*q_proj$", ""]
)


@given(
    modules=st.sets(MODULE, min_size=1, max_size=6),
    patterns=st.dictionaries(PATTERN, st.integers(1, 99), max_size=4),
    rslora=st.booleans(),
)
def test_patterns_match_as_in_peft(modules: set[str], patterns: dict[str, int], rslora: bool) -> None:
    tensors = {}
    for module in modules:
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(2, 1)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(1, 2)
    with tempfile.TemporaryDirectory() as folder:
        entries, _, _ = adapter_differences(write(Path(folder), tensors, alpha_pattern=patterns, use_rslora=rslora))
    for module in modules:
        alpha = patterns.get(get_pattern_key(patterns.keys(), module), CONFIG["lora_alpha"])
        assert entries[f"{module}.weight"].scale == alpha / (math.sqrt(2) if rslora else 2)


def test_an_adapter_is_known_by_its_config_beside_its_weights(tmp_path: Path) -> None:
    assert not is_adapter(tmp_path)
    assert not is_adapter(tmp_path / "missing")
    # A training run may leave the config of its adapter in the folder of the merged model.
    assert not is_adapter(write(tmp_path, None))
    assert is_adapter(write(tmp_path))
    (tmp_path / "adapter_config.json").unlink()
    assert not is_adapter(tmp_path)


def test_an_endless_config_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_config.json").symlink_to("/dev/zero")
    assert "expected a file of JSON of at most" in refusal(tmp_path)


def test_every_variant_of_the_installed_peft_is_refused() -> None:
    variants = {field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    assert "use_dora" in variants
    assert variants <= VARIANTS.keys()


@pytest.mark.parametrize("key", VARIANTS)
def test_variants_are_refused_by_name(tmp_path: Path, key: str) -> None:
    message = refusal(write(tmp_path, **{key: {"some": "setting"}}))
    assert str(tmp_path / "adapter_config.json") in message
    assert f"{key} is set: {VARIANTS[key]}" in message
    assert "merge_and_unload" in message
    assert adapter_differences(write(tmp_path, **{key: None}))[0]


def test_a_dora_that_peft_saved_is_refused(tmp_path: Path) -> None:
    train(llama(), tmp_path, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    assert "DoRA" in refusal(tmp_path)
    # Its config alone does not make plain LoRA of it.
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))
    assert "lora_magnitude_vector' is no factor of plain LoRA" in refusal(tmp_path)


@pytest.mark.parametrize("config", [IA3Config(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")])
def test_other_adapters_are_refused_by_name(tmp_path: Path, config: IA3Config | PromptTuningConfig) -> None:
    config.save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert f"peft_type {config.peft_type.value!r}, not LORA" in message
    assert "merge_and_unload" in message


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "PiSSA", ["pissa"]])
def test_starts_that_change_the_base_are_refused_by_name(tmp_path: Path, start: object) -> None:
    message = refusal(write(tmp_path, init_lora_weights=start))
    assert f"init_lora_weights is {start!r}" in message
    assert "path_initial_model_for_weight_conversion" in message


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"r": "2"}, f"{A!r} has rank 2, and adapter_config.json says '2'"),
        ({"r": -2}, "has rank 2, and adapter_config.json says -2"),
        ({"r": 0}, "has rank 2, and adapter_config.json says 0"),
        ({"r": None}, "has rank 2, and adapter_config.json says None"),
        ({"r": 8}, "has rank 2, and adapter_config.json says 8"),
        ({"rank_pattern": {"q_proj": 3}}, "has rank 2, and adapter_config.json says 3"),
        ({"rank_pattern": [3]}, "rank_pattern is [3]; expected an object"),
        ({"alpha_pattern": "q_proj"}, "alpha_pattern is 'q_proj'; expected an object"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern holds no regular expression"),
        (
            {"rank_pattern": {"(.*)*x": 3}},
            "rank_pattern has the pattern '(.*)*x', which repeats",
        ),
        ({"rank_pattern": {"(a|a)+$": 3}}, "which repeats a group"),
        ({"alpha_pattern": {".*" * 30 + "x": 3}}, "so that matching it may never end; name the modules instead"),
        ({"alpha_pattern": {"q?" * 30: 3}}, "so that matching it may never end"),
        ({"alpha_pattern": {"a{99999999999999999999}": 3}}, "alpha_pattern holds no regular expression"),
        ({"alpha_pattern": {"q_proj": True}}, "module 'layers.0.q_proj' has alpha True; expected a finite number"),
        ({"lora_alpha": math.nan}, "has alpha nan"),
        ({"lora_alpha": -math.inf}, "has alpha -inf"),
        ({"lora_alpha": 10**400}, "expected a finite number"),
        ({"lora_alpha": "16"}, "has alpha '16'"),
        ({"lora_alpha": None}, "has alpha None"),
        ({"use_rslora": "false"}, "use_rslora is 'false'; expected true or false"),
        ({"fan_in_fan_out": 1}, "fan_in_fan_out is 1; expected true or false"),
        ({"peft_type": None}, "an adapter of peft_type None"),
        ({"peft_type": ["LORA"]}, "an adapter of peft_type ['LORA']"),
    ],
)
def test_configs_that_make_no_sense_are_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    message = refusal(write(tmp_path, **changes))
    assert str(tmp_path) in message
    assert problem in message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "LORA", "q_proj", "8", "pissa"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["q_proj", "(", ""]), inner, max_size=2)
    ),
    max_leaves=4,
)
SETTINGS = sorted({field.name for field in dataclasses.fields(LoraConfig)})


@given(changes=st.dictionaries(st.sampled_from(SETTINGS), JSON, min_size=1, max_size=2))
def test_any_config_gives_a_finite_scale_or_an_error(changes: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), **changes)
        try:
            entries, _, _ = adapter_differences(Path(folder))
        except CheckpointError as error:
            assert str(error).startswith(folder)
        else:
            assert math.isfinite(entries["layers.0.q_proj.weight"].scale)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"LORA"', "[" * 100_000, "\ud800"])
def test_configs_that_cannot_be_read_are_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    message = refusal(tmp_path)
    assert message.startswith(str(tmp_path / "adapter_config.json"))
    assert "fetch it again" in message


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({A: FACTORS[A]}, f"{A!r} is not one of a pair"),
        ({B: FACTORS[B]}, f"{B!r} is not one of a pair"),
        (FACTORS | {f"{Q_PROJ}.lora_A.default.weight": torch.ones(2, 5)}, "is not one of a pair"),
        ({A: FACTORS[A], f"{Q_PROJ}.lora_embedding_B": FACTORS[B]}, "is not one of a pair"),
        ({A: FACTORS[A], B: torch.ones(2, 3)}, f"{A!r} has shape (2, 5) and its partner (2, 3)"),
        ({A: torch.ones(0), B: torch.ones(0)}, f"{A!r} has shape (0,) and its partner (0,)"),
        ({A: torch.ones(2), B: torch.ones(3, 2)}, f"{A!r} has shape (2,) and its partner (3, 2)"),
        ({A: torch.ones(2, 5, 3), B: torch.ones(3, 2)}, f"{A!r} has shape (2, 5, 3) and its partner (3, 2)"),
        ({A: torch.ones(2, 5, 3), B: torch.ones(3, 2, 3)}, "its partner (3, 2, 3)"),
        # A convolution in two groups.
        ({A: torch.ones(2, 4, 3), B: torch.ones(6, 1, 1)}, "from no grouped convolution"),
        ({A: torch.ones(0, 5), B: torch.ones(3, 0)}, "has rank 0, and adapter_config.json says 2"),
        ({A: FACTORS[A], B: torch.ones(3, 2, dtype=torch.int8)}, f"{B!r} is stored as int8"),
        ({A: FACTORS[A], B: torch.ones(3, 2, dtype=torch.int64)}, f"{B!r} is stored as int64"),
        ({A: FACTORS[A].to(torch.float8_e4m3fn), B: FACTORS[B]}, f"{A!r} is stored as float8_e4m3fn"),
        (FACTORS | {f"{Q_PROJ}.lora_diag": torch.ones(2)}, f"'{Q_PROJ}.lora_diag' is no factor of plain LoRA"),
        (FACTORS | {f"{Q_PROJ}.lora_B.bias": torch.ones(3)}, f"'{Q_PROJ}.lora_B.bias' is no factor of plain LoRA"),
        ({f"{Q_PROJ}.lora_down.weight": torch.ones(2, 5)}, "lora_down.weight' is no factor of plain LoRA"),
        ({A.removeprefix("base_model."): FACTORS[A]}, "is no factor of plain LoRA; expected base_model.model.…"),
        ({"base_model.model.classifier.weight": torch.ones(2, 5)}, "holds no LoRA factor among 1 tensors"),
        ({}, "holds no LoRA factor among 0 tensors"),
    ],
)
def test_factors_that_make_no_product_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], problem: str
) -> None:
    message = refusal(write(tmp_path, tensors))
    assert message.startswith(str(tmp_path / "adapter_model.safetensors"))
    assert problem in message


def test_factors_of_no_rank_are_refused(tmp_path: Path) -> None:
    empty = {A: torch.ones(0, 5), B: torch.ones(3, 0)}
    assert "expected the same whole number above 0" in refusal(write(tmp_path, empty, r=0))


def test_missing_files_are_named(tmp_path: Path) -> None:
    assert "adapter_config.json" in refusal(tmp_path)
    message = refusal(write(tmp_path, None))
    assert "neither adapter_model.safetensors nor adapter_model.bin" in message
    assert WAY_OUT not in message


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert str(file) in refusal(tmp_path)
