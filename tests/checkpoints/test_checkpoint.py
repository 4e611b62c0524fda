from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from delta_analysis._errors import CheckpointError
from delta_analysis.checkpoints import paths
from delta_analysis.checkpoints.checkpoint import COMPARED_AT_ONCE, Checkpoint, open_checkpoint
from delta_analysis.checkpoints.folders import LAYOUTS
from delta_analysis.checkpoints.tensors import InFile
from tests.conftest import SaveCheckpoint

INDEX = LAYOUTS[0][1]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TENSORS = {
    "model.norm.weight": torch.tensor([1.0, 2.0], dtype=torch.float16),
    "model.layers.10.a.weight": torch.arange(6.0).reshape(2, 3),
    "model.layers.2.b.bias": torch.tensor([0.5, -0.25, 8.0], dtype=torch.bfloat16),
    "model.layers.2.a.weight": torch.ones(1, 2, 3, dtype=torch.float64),
    "model.embed_tokens.weight": torch.full((4, 2), -1.5),
    "scale": torch.tensor(7.0),
}
IN_ORDER = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "scale",
    "model.layers.2.a.weight",
    "model.layers.2.b.bias",
    "model.layers.10.a.weight",
]
SHARDS = {"model-00001-of-00002.safetensors": IN_ORDER[::2], "model-00002-of-00002.safetensors": IN_ORDER[1::2]}


def refusal(source: str | Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source)
    return str(caught.value)


def tiny_llama(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        **options,
    )
    return LlamaForCausalLM(config)


def assert_holds(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint) == set(tensors)
    for name, tensor in tensors.items():
        read = checkpoint[name]
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def test_a_single_file_is_read(save_checkpoint: SaveCheckpoint) -> None:
    file = save_checkpoint("one", TENSORS) / "model.safetensors"
    checkpoint = open_checkpoint(file)
    assert_holds(checkpoint, TENSORS)
    assert (checkpoint.path, checkpoint.source) == (file, str(file))
    assert checkpoint.files() == [file]
    assert checkpoint.config == {}


def test_entries_tell_file_shape_and_dtype(save_checkpoint: SaveCheckpoint) -> None:
    folder = save_checkpoint("sharded", TENSORS, shards=SHARDS)
    entries = open_checkpoint(folder).references
    for shard, names in SHARDS.items():
        for name in names:
            entry = entries[name]
            assert isinstance(entry, InFile)
            assert (entry.files, entry.shape, entry.dtype) == (
                (folder / shard,),
                tuple(TENSORS[name].shape),
                TENSORS[name].dtype,
            )
            assert (entry.name, entry.strides) == (name, None)


def test_iteration_is_by_layer_then_by_name(save_checkpoint: SaveCheckpoint) -> None:
    assert list(open_checkpoint(save_checkpoint("one", TENSORS))) == IN_ORDER
    assert list(open_checkpoint(save_checkpoint("sharded", TENSORS, shards=SHARDS))) == IN_ORDER


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_keeps_its_stored_dtype_and_bits(save_checkpoint: SaveCheckpoint, dtype: torch.dtype) -> None:
    stored = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 5))).to(dtype)
    read = open_checkpoint(save_checkpoint("one", {"a.weight": stored}))["a.weight"]
    assert read.dtype == dtype
    assert torch.equal(read, stored)


def test_it_is_a_mapping(save_checkpoint: SaveCheckpoint) -> None:
    checkpoint = open_checkpoint(save_checkpoint("one", TENSORS))
    assert len(checkpoint) == len(TENSORS)
    assert "scale" in checkpoint
    assert "absent" not in checkpoint
    assert [name for name, _ in checkpoint.items()] == IN_ORDER
    with pytest.raises(KeyError, match="absent"):
        checkpoint["absent"]


def test_weights_are_read_on_access_and_not_kept(save_checkpoint: SaveCheckpoint) -> None:
    file = save_checkpoint("one", {"a.weight": torch.zeros(2)}) / "model.safetensors"
    checkpoint = open_checkpoint(file)
    for value in (1.0, 2.0):
        save_file({"a.weight": torch.full((2,), value)}, file)
        assert checkpoint["a.weight"].tolist() == [value, value]


@pytest.mark.parametrize("max_shard_size", ["1GB", "1KB"])
def test_what_transformers_saves_is_what_is_read(tmp_path: Path, max_shard_size: str) -> None:
    model = tiny_llama(tie_word_embeddings=False).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    checkpoint = open_checkpoint(tmp_path)
    assert_holds(checkpoint, {name: parameter.detach() for name, parameter in model.named_parameters()})
    assert (len(checkpoint.files()) > 1) == (max_shard_size == "1KB")
    assert checkpoint.config["hidden_size"] == 8


def test_a_tied_head_that_is_stored_is_counted_once(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert "lm_head.weight" not in checkpoint
    assert set(checkpoint.skipped) == {"lm_head.weight"}
    assert "tied to model.embed_tokens.weight" in checkpoint.skipped["lm_head.weight"]
    # transformers counts shared parameters once.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(tensor.numel() for tensor in checkpoint.values()) == loaded.num_parameters()


@pytest.mark.parametrize("embedding", ["model.embed_tokens.weight", "transformer.wte.weight"])
def test_a_head_is_tied_only_if_config_says_so_and_embeddings_are_there(
    save_checkpoint: SaveCheckpoint, embedding: str
) -> None:
    head = {"lm_head.weight": torch.ones(4, 2)}
    both = {embedding: torch.ones(4, 2), **head}
    tied, untied = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
    assert set(open_checkpoint(save_checkpoint("tied", both, config=tied))) == {embedding}
    assert set(open_checkpoint(save_checkpoint("untied", both, config=untied))) == set(both)
    assert set(open_checkpoint(save_checkpoint("no config", both))) == set(both)
    # GPT-2's own file says nothing of it, and its head is tied.
    assert set(open_checkpoint(save_checkpoint("silent", both, config={"model_type": "gpt2"}))) == {embedding}
    assert set(open_checkpoint(save_checkpoint("head only", head, config=tied))) == set(head)


def test_a_head_that_differs_from_the_embeddings_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"] + 1
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(open_checkpoint(tmp_path)) == {name for name, _ in loaded.named_parameters()}


def test_a_head_that_differs_in_its_last_entries_is_no_tied_one(save_checkpoint: SaveCheckpoint) -> None:
    embedding = torch.ones(3, COMPARED_AT_ONCE // 2)
    head = embedding.clone()
    both = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    for changed, names in ((0.0, {"model.embed_tokens.weight"}), (1.0, set(both))):
        head[-1, -1] += changed
        folder = save_checkpoint(f"changed by {changed}", both, config={"tie_word_embeddings": True})
        assert set(open_checkpoint(folder)) == names


def test_integer_buffers_are_skipped_with_a_reason(save_checkpoint: SaveCheckpoint) -> None:
    buffers = {"embeddings.position_ids": torch.arange(4), "attn.mask": torch.tensor([True, False])}
    checkpoint = open_checkpoint(save_checkpoint("one", {"a.weight": torch.ones(2), **buffers}))
    assert list(checkpoint) == ["a.weight"]
    assert checkpoint.skipped == {
        "embeddings.position_ids": "int64 buffer, not a weight",
        "attn.mask": "bool buffer, not a weight",
    }


@pytest.mark.parametrize(
    ("name", "buffer"),
    [
        ("transformer.h.0.attn.causal_mask", torch.ones(1, 1, 4, 4, dtype=torch.uint8)),
        ("transformer.h.0.attn.attention.bias", torch.ones(1, 1, 4, 4, dtype=torch.bool)),
        ("transformer.h.0.attn.bias", torch.ones(1, 1, 4, 4)),
        ("decoder.causal", torch.ones(1, 1, 4, 4, dtype=torch.uint8)),
        ("embeddings.position_ids", torch.arange(4, dtype=torch.int32)),
    ],
)
def test_masks_and_positions_are_no_weights(save_checkpoint: SaveCheckpoint, name: str, buffer: torch.Tensor) -> None:
    checkpoint = open_checkpoint(save_checkpoint("one", {"a.weight": torch.ones(2), name: buffer}))
    assert (list(checkpoint), list(checkpoint.skipped)) == (["a.weight"], [name])


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize(
    "wrapper",
    ["_orig_mod.{}", "module.{}", "module._orig_mod.module.{}", "model.layers.0._checkpoint_wrapped_module.{1}"]
    + [f"model.layers.0.{name}.{name}.{{1}}" for name in ("_orig_mod", "_fsdp_wrapped_module")],
)
def test_what_training_puts_into_names_is_taken_off(tmp_path: Path, ending: str, wrapper: str) -> None:
    bare = "model.layers.0.q_proj.weight"
    stored = wrapper.format(bare, bare.removeprefix("model.layers.0."))
    tensors = {stored: torch.ones(2, 3), "model.norm.weight": torch.ones(3)}
    file = tmp_path / ("model.safetensors" if ending == "safetensors" else "pytorch_model.bin")
    save_file(tensors, file) if ending == "safetensors" else torch.save(tensors, file)
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint) == ["model.norm.weight", bare]
    reference = checkpoint.references[bare]
    # Its own name in the file, for errors.
    assert isinstance(reference, InFile) and reference.name == stored


def test_a_compiled_model_has_the_names_of_the_model() -> None:
    model = tiny_llama()
    assert set(open_checkpoint(torch.compile(model, backend="eager"))) == set(open_checkpoint(model))


def test_names_that_would_be_one_stay_as_they_are(save_checkpoint: SaveCheckpoint) -> None:
    both = {"module.a.weight": torch.ones(2), "a.weight": torch.zeros(2)}
    assert_holds(open_checkpoint(save_checkpoint("one", both)), both)


def test_weights_that_zero_3_kept_elsewhere_are_told(save_checkpoint: SaveCheckpoint) -> None:
    folder = save_checkpoint("one", {"a.weight": torch.empty(0), "b.bias": torch.empty(0), "c.weight": torch.ones(2)})
    message = refusal(folder)
    assert message.startswith(f"{folder}: 2 of 3 tensors have no entries, such as 'a.weight': DeepSpeed's ZeRO-3 ")
    assert "zero_to_fp32.py" in message


def test_settings_of_quantisation_beside_full_weights_are_left_out_and_said(save_checkpoint: SaveCheckpoint) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    folder = save_checkpoint("one", {"a.weight": torch.ones(2)}, config=config)
    with pytest.warns(UserWarning, match="has a quantization_config, though its weights are in full precision"):
        checkpoint = open_checkpoint(folder)
    assert checkpoint.config == {"model_type": "llama"}


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("model.layers.0.self_attn.q_proj.lora_a", "mlx_lm.fuse"),
        ("lora_unet_down_blocks.lora_down.weight", "kohya"),
        ("layers.0.attn.q_proj.lora_a.weight", "torchtune"),
        ("base_model.model.layers.0.q_proj.lora_A.weight", "give the folder with its adapter_config.json"),
    ],
)
def test_factors_of_an_adapter_are_told_by_the_tool_that_wrote_them(
    save_checkpoint: SaveCheckpoint, name: str, way_out: str
) -> None:
    message = refusal(save_checkpoint("one", {name: torch.ones(2, 2)}))
    assert f"{name!r} is a factor of an adapter" in message
    assert way_out in message


def test_an_adapter_of_mlx_is_told_with_the_way_out(tmp_path: Path) -> None:
    save_file({"model.layers.0.self_attn.q_proj.lora_a": torch.ones(4, 2)}, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"fine_tune_type": "lora"}')
    message = refusal(tmp_path)
    assert message.startswith(
        f"{tmp_path / 'adapter_config.json'}: an adapter of MLX (lora), not of peft: fuse it with "
    )


@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [
        ("model.layers.0.q_proj.weight", torch.int8, "int8: int8 codes"),
        ("model.layers.0.q_proj.weight", torch.int64, "int64: packed codes"),
        ("model.layers.0.q_proj.qweight", torch.int32, "int32: packed codes"),
        ("model.layers.0.q_proj.qzeros", torch.int32, "int32: packed codes"),
        ("model.layers.0.q_proj.weight", torch.uint8, "uint8: packed codes"),
        ("model.layers.0.q_proj.weight", torch.float8_e4m3fn, "float8_e4m3fn: fp8 codes"),
        ("model.layers.0.q_proj.weight", torch.float8_e5m2, "float8_e5m2: fp8 codes"),
    ],
)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_quantised_weights_are_refused(tmp_path: Path, file: str, name: str, dtype: torch.dtype, kind: str) -> None:
    tensors = {"a.weight": torch.ones(2), name: torch.ones(2, 2).to(dtype)}
    save_file(tensors, tmp_path / file) if file.endswith("safetensors") else torch.save(tensors, tmp_path / file)
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / file}: tensor {name!r} is stored as {kind}, which mean nothing without ")
    assert "expected float64, float32, float16 or bfloat16" in message
    assert "dequantize" in message


def test_an_absent_path_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert message.startswith(f"{tmp_path / 'nowhere'}: no such file or directory; expected ")
    assert "checkpoint directory" in message
    assert ".safetensors or .bin file" in message
    assert "zoo:small/base" in message


@pytest.mark.parametrize("files", [[], ["config.json", "tf_model.h5", "training_args.bin"]])
def test_a_directory_without_weights_is_refused(tmp_path: Path, files: list[str]) -> None:
    for file in files:
        (tmp_path / file).write_text("{}")
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}: no weights here; expected model.safetensors or pytorch_model.bin")
    assert INDEX in message


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert refusal(file) == f"{file}: expected a .safetensors or .bin file; convert it with save_pretrained first"


@pytest.mark.parametrize("tensors", [{}, {"position_ids": torch.arange(4)}], ids=["empty", "only buffers"])
def test_a_file_without_any_weight_is_refused(
    save_checkpoint: SaveCheckpoint, tensors: dict[str, torch.Tensor]
) -> None:
    folder = save_checkpoint("empty", tensors)
    message = refusal(folder)
    assert message.startswith(f"{folder}: holds no ")


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.arange(6.0), "b.weight": torch.arange(3.0)}, file)
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        message = refusal(tmp_path)
        assert message.startswith(f"{file}: not a readable safetensors file"), size
        assert f"it has {size} bytes and may be truncated: fetch it again" in message


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a.weight"]}, {"weight_map": None}])
def test_an_index_without_a_weight_map_is_refused(save_checkpoint: SaveCheckpoint, index: dict[str, Any]) -> None:
    folder = save_checkpoint("one", TENSORS, shards=SHARDS)
    (folder / INDEX).write_text(json.dumps(index))
    assert refusal(folder) == f"{folder / INDEX}: has no 'weight_map'; fetch the index again"


def test_an_embedded_model_is_found_by_name_and_an_unknown_one_lists_the_known(
    tmp_path: Path, save_checkpoint: SaveCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tiny/base", "tiny/instruct", "large/base"):
        save_checkpoint(f"data/zoo/{name}", TENSORS, config={"name": name})
    (tmp_path / "data/zoo/tiny/not a model").mkdir()
    monkeypatch.setattr(paths, "find_root", lambda: tmp_path)
    found = open_checkpoint("zoo:tiny/instruct")
    assert (found.source, found.config) == ("zoo:tiny/instruct", {"name": "tiny/instruct"})
    assert refusal("zoo:tiny/absent") == (
        "zoo:tiny/absent: no such embedded model; known are zoo:large/base, zoo:tiny/base, zoo:tiny/instruct"
    )


def test_the_embedded_base_has_the_parameters_that_transformers_loads() -> None:
    checkpoint = open_checkpoint("zoo:small/base")
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype="auto")
    assert_holds(checkpoint, {name: parameter.detach() for name, parameter in loaded.named_parameters()})


def test_errors_are_value_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        open_checkpoint(tmp_path / "nowhere")
