"""What is saved is base + delta, transformers loads it, and nothing half-written is left."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkServerContext
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.special import ndtr
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from delta_analysis._errors import NotHomologousError
from delta_analysis.checkpoints.checkpoint import open_checkpoint
from delta_analysis.deltas import saving
from delta_analysis.deltas.delta import load_delta
from delta_analysis.pruning import Dare, Magnitude
from tests import architectures
from tests.checkpoints.test_checkpoint import tiny_llama
from tests.conftest import SaveCheckpoint
from tests.deltas.test_delta import normal

INDEX = "model.safetensors.index.json"


def moved(model: PreTrainedModel, spread: float = 0.01) -> PreTrainedModel:
    """A copy with noise on every parameter, so that tied ones stay tied."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for i, parameter in enumerate(moved.parameters()):
            parameter += spread * normal(i, *parameter.shape)
    return moved


def tiny_bert(seed: int = 0) -> BertForMaskedLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=11, max_position_embeddings=16, **sizes))


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, bos_token_id=0, eos_token_id=0, **sizes))


def tiny_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=11, num_key_value_heads=1, num_local_experts=3, **sizes))


MODELS = {
    "untied llama": lambda: tiny_llama(tie_word_embeddings=False),
    "tied llama": lambda: tiny_llama(tie_word_embeddings=True),
    "bert": tiny_bert,
    "gpt2": tiny_gpt2,
    "mixtral": tiny_mixtral,
}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(10).reshape(2, 5)).logits


@pytest.mark.parametrize("max_shard_size", ["5GB", 1500])
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_saved_is_loaded_as_the_fine_tuned_model(tmp_path: Path, kind: str, max_shard_size: int | str) -> None:
    model = MODELS[kind]()
    tuned = moved(model)
    model.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "finetuned", max_shard_size="2KB")
    delta = load_delta(base=tmp_path / "base", finetuned=tmp_path / "finetuned")
    out = tmp_path / "new" / "out"
    table = saving.save_checkpoint(open_checkpoint(tmp_path / "base"), delta, out, max_shard_size=max_shard_size)
    loaded, info = type(model).from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (name, parameter), expected in zip(loaded.named_parameters(), tuned.parameters(), strict=True):
        # float32(base) + float32(fine-tuned - base) is off by a rounding of each.
        torch.testing.assert_close(parameter, expected, rtol=2e-7, atol=1e-8, msg=name)
    torch.testing.assert_close(logits(loaded), logits(tuned), rtol=1e-5, atol=1e-6)
    assert set(table["tensor"]) == set(open_checkpoint(out))
    assert (out / INDEX).exists() == (max_shard_size != "5GB")
    assert sorted({*table["file"]}) == sorted(file.name for file in out.glob("*.safetensors"))


def test_a_bfloat16_pair_is_saved_to_the_last_bit(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    model.bfloat16().save_pretrained(tmp_path / "base")
    moved(model).bfloat16().save_pretrained(tmp_path / "finetuned")
    delta = load_delta(base=tmp_path / "base", finetuned=tmp_path / "finetuned")
    table = saving.save_checkpoint(open_checkpoint(tmp_path / "base"), delta, tmp_path / "out")
    assert set(table["dtype"]) == {"bfloat16"}
    saved, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "finetuned"))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    assert table["lost"].sum() == 0


@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
def test_the_dtype_asked_for_is_that_of_files_and_configuration(
    save_checkpoint: SaveCheckpoint, tmp_path: Path, dtype: str | None
) -> None:
    stored = {"a.weight": torch.float16, "b.weight": torch.bfloat16, "c.weight": torch.float64, "d.weight": None}
    base = {name: normal(i, 5).to(kept or torch.float32) for i, (name, kept) in enumerate(stored.items())}
    finetuned = {name: normal(9, 5).to(tensor.dtype) for name, tensor in base.items()}
    folder = save_checkpoint("base", base)
    config = {"dtype": "float16", "hidden_size": 5}
    delta = load_delta(base=folder, finetuned=save_checkpoint("finetuned", finetuned, config=config))
    table = saving.save_checkpoint(open_checkpoint(folder), delta, tmp_path / "out", dtype=dtype).set_index("tensor")
    # safetensors that transformers loads are no wider than float32.
    each = ["float16", "bfloat16", "float32", "float32"] if dtype is None else [dtype] * 4
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for (name, tensor), expected in zip(saved.items(), each, strict=True):
        assert tensor.dtype == getattr(torch, expected)
        assert table.loc[name, "dtype"] == expected
        # What was not pruned is the fine-tune's own.
        assert torch.equal(tensor, finetuned[name].to(tensor.dtype))
    # Of 5 entries each most bytes are float32, whatever the fine-tune's configuration said.
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"dtype": dtype or "float32", "hidden_size": 5}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"hidden_size": 4}, {"hidden_size": 4, "dtype": "bfloat16"}),
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        (
            {"dtype": "float32", "text_config": {"dtype": "float16", "hidden_size": 4}},
            {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "hidden_size": 4}},
        ),
    ],
    ids=["silent", "old key", "nested"],
)
def test_the_configuration_names_the_dtype_of_most_bytes(
    save_checkpoint: SaveCheckpoint, tmp_path: Path, config: dict[str, Any], expected: dict[str, Any]
) -> None:
    # More tensors are float32; more bytes are bfloat16.
    small = {f"{name}.bias": torch.ones(2) for name in "abc"}
    folder = save_checkpoint("base", {**small, "a.weight": torch.ones(4, 4, dtype=torch.bfloat16)}, config=config)
    saving.save_checkpoint(open_checkpoint(folder), load_delta(base=folder, finetuned=folder), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == expected


def test_shards_and_index_are_as_transformers_writes_them(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    delta = load_delta(base=tmp_path / "base", finetuned=tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    table = saving.save_checkpoint(base, delta, tmp_path / "out", max_shard_size=1000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"] == dict(zip(table["tensor"], table["file"], strict=True))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in base.values())
    for file in set(table["file"]):
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            names = list(opened.keys())
            assert opened.metadata() == {"format": "pt"}
            assert sorted(names) == sorted(table.loc[table["file"] == file, "tensor"])
            nbytes = sum(opened.get_tensor(name).nbytes for name in names)
        assert nbytes <= 1000 or len(names) == 1


@pytest.mark.parametrize("pruner", [Dare(0.5), Magnitude(0.5, "model")], ids=lambda pruner: pruner.method)
def test_a_pruned_delta_is_added_as_pruned(tmp_path: Path, pruner: Any) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    moved(model).save_pretrained(tmp_path / "finetuned")
    base = open_checkpoint(tmp_path / "base")
    pruned = load_delta(base=tmp_path / "base", finetuned=tmp_path / "finetuned").pruned(pruner, seed=1)
    table = saving.save_checkpoint(base, pruned, tmp_path / "out").set_index("tensor")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, base[name] + pruned[name])
        assert table.loc[name, "changed"] == torch.count_nonzero(pruned[name])


def test_configuration_and_tokenizer_come_along(tmp_path: Path) -> None:
    base = open_checkpoint("zoo:small/base")
    delta = load_delta(base="zoo:small/base", finetuned="zoo:small/instruct")
    table = saving.save_checkpoint(base, delta.pruned(Dare(0.9), seed=0), tmp_path / "out", dtype="bfloat16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.tie_word_embeddings
    saved, original = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "out", delta.finetuned.path))
    assert saved.get_vocab() == original.get_vocab()
    assert saved("23 plus 45 is 68")["input_ids"] == original("23 plus 45 is 68")["input_ids"]
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert not [file.name for file in (tmp_path / "out").iterdir() if file.name == "training.json"]
    assert table["numel"].sum() == loaded.num_parameters()


def test_a_folder_of_a_tokenizers_name_is_left_behind(save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    base = save_checkpoint("base", {"a.weight": torch.ones(2)}, config={})
    (base / "tokenizer").mkdir()
    (base / "tokenizer.model").write_bytes(b"pieces")
    saving.save_checkpoint(open_checkpoint(base), load_delta(base=base, finetuned=base), tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["model.safetensors", "tokenizer.model"]


@pytest.mark.parametrize("own", [(), ("generation_config.json",)], ids=["nothing", "generation only"])
def test_a_tokenizer_that_the_fine_tune_lacks_is_the_bases(
    save_checkpoint: SaveCheckpoint, tmp_path: Path, own: tuple[str, ...]
) -> None:
    folders = {name: save_checkpoint(name, {"a.weight": torch.ones(2)}, config={}) for name in ("base", "finetuned")}
    # As the first BERTs have it: a vocabulary alone.
    (folders["base"] / "vocab.txt").write_text("base")
    for name in own:
        (folders["finetuned"] / name).write_text("{}")
    saving.save_checkpoint(open_checkpoint(folders["base"]), load_delta(**folders), tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_text() == "base"
    (folders["finetuned"] / "vocab.txt").write_text("finetuned")
    saving.save_checkpoint(open_checkpoint(folders["base"]), load_delta(**folders), tmp_path / "own")
    assert (tmp_path / "own" / "vocab.txt").read_text() == "finetuned"


def test_the_configuration_is_the_models_that_is_saved(save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    base = save_checkpoint("base", {"a.weight": torch.ones(2, 2)}, config={"rope_theta": 1e4})
    change = {"a.weight": torch.full((2, 2), 0.5)}
    longer = save_checkpoint("longer", change, config={"rope_theta": 1e6})
    bare = save_checkpoint("bare", change)
    for i, (finetuned, is_delta, theta) in enumerate(((longer, False, 1e6), (longer, True, 1e4), (bare, False, 1e4))):
        delta = load_delta(base=base, finetuned=finetuned, finetuned_is_delta=is_delta)
        saving.save_checkpoint(open_checkpoint(base), delta, tmp_path / str(i))
        assert json.loads((tmp_path / str(i) / "config.json").read_text()) == {
            "rope_theta": theta,
            "dtype": "float32",
        }


def test_a_delta_from_zero_is_refused(save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    folder = save_checkpoint("base", {"a.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="load it with its base"):
        saving.save_checkpoint(open_checkpoint(folder), load_delta(base=None, finetuned=folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_module_is_saved_as_its_folder_would_be(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    tuned = moved(model)
    saving.save_checkpoint(open_checkpoint(model), load_delta(base=model, finetuned=tuned), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(tuned), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("source", ["finetuned", "finetuned/model.safetensors"])  # a bare file has no configuration
def test_a_head_of_its_own_is_saved_beside_embeddings_that_the_base_ties(tmp_path: Path, source: str) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    untied = tiny_llama(seed=1, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    untied.save_pretrained(tmp_path / "finetuned")
    delta = load_delta(base=tmp_path / "base", finetuned=tmp_path / source)
    base = open_checkpoint(tmp_path / "base")
    saving.save_checkpoint(base, delta, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not loaded.config.tie_word_embeddings
    torch.testing.assert_close(logits(loaded), logits(untied), rtol=1e-5, atol=1e-6)
    # Without any delta left the head is what the base computes its logits with.
    saving.save_checkpoint(base, delta.pruned(Dare(1.0), seed=0), tmp_path / "empty")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "empty")), logits(model))


def test_what_the_delta_does_not_cover_is_the_fine_tunes_own(tmp_path: Path) -> None:
    model = tiny_bert()
    model.save_pretrained(tmp_path / "base")
    tuned = BertForSequenceClassification(model.config)
    tuned.save_pretrained(tmp_path / "finetuned")
    delta = load_delta(base=tmp_path / "base", finetuned=tmp_path / "finetuned")
    table = saving.save_checkpoint(open_checkpoint(tmp_path / "base"), delta, tmp_path / "out").set_index("tensor")
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter, dict(tuned.named_parameters())[name], rtol=2e-7, atol=1e-7)
    assert table.loc["classifier.weight", "changed"] == 0


def test_a_published_delta_is_added_to_its_wrapped_base(tmp_path: Path) -> None:
    model = tiny_bert()
    model.save_pretrained(tmp_path / "base")
    change = tiny_bert(seed=3)
    change.bert.save_pretrained(tmp_path / "change")
    delta = load_delta(base=tmp_path / "base", finetuned=tmp_path / "change", finetuned_is_delta=True)
    saving.save_checkpoint(open_checkpoint(tmp_path / "base"), delta, tmp_path / "out")
    loaded = BertForMaskedLM.from_pretrained(tmp_path / "out")
    changes = dict(change.named_parameters())
    for (name, parameter), start in zip(loaded.named_parameters(), model.parameters(), strict=True):
        expected = start + changes[name] if name.startswith("bert.") else start
        torch.testing.assert_close(parameter, expected, rtol=2e-7, atol=1e-8)


@pytest.mark.parametrize(("base_rows", "tuned_rows"), [(9, 11), (11, 9)])
def test_rows_of_a_vocabulary_are_those_of_the_fine_tune(
    save_checkpoint: SaveCheckpoint, tmp_path: Path, base_rows: int, tuned_rows: int
) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    base = {name: normal(i, base_rows, 4) for i, name in enumerate(names)}
    tuned = {name: normal(i + 5, tuned_rows, 4) for i, name in enumerate(names)}
    config = {"tie_word_embeddings": False}
    folder = save_checkpoint("base", base, config={**config, "vocab_size": base_rows})
    delta = load_delta(
        base=folder, finetuned=save_checkpoint("tuned", tuned, config={**config, "vocab_size": tuned_rows})
    )
    table = saving.save_checkpoint(open_checkpoint(folder), delta, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for name in names:
        torch.testing.assert_close(saved[name], tuned[name], rtol=1e-6, atol=1e-6)
        assert torch.equal(saved[name][9:], tuned[name][9:])
    assert table["changed"].tolist() == [36, 36]
    assert table["numel"].tolist() == [4 * tuned_rows] * 2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == tuned_rows


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of peft, about itself
@pytest.mark.parametrize("with_base", [True, False])
def test_an_adapter_is_merged_as_peft_merges_it(tmp_path: Path, with_base: bool) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for i, (name, parameter) in enumerate(wrapped.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.1 * normal(i, *parameter.shape))
    wrapped.save_pretrained(tmp_path / "adapter")
    delta = load_delta(base=tmp_path / "base" if with_base else None, finetuned=tmp_path / "adapter")
    table = saving.save_checkpoint(open_checkpoint(tmp_path / "base"), delta, tmp_path / "out").set_index("tensor")
    merged = wrapped.merge_and_unload()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for (name, parameter), expected in zip(loaded.named_parameters(), merged.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=1e-7)
        assert (table.loc[name, "changed"] > 0) == name.endswith(("q_proj.weight", "up_proj.weight"))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_is_no_base_to_save(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    delta = load_delta(base=tmp_path / "base", finetuned=tmp_path / "adapter")
    with pytest.raises(NotHomologousError, match="adapter: is an adapter, not a base; give the model"):
        saving.save_checkpoint(open_checkpoint(tmp_path / "adapter"), delta, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """To the nearest bfloat16, to even in the middle, in integers alone."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)


ROUNDINGS = {"bfloat16": round_to_bfloat16, "float16": lambda x: x.astype(np.float16), "float32": np.copy}


@pytest.mark.parametrize("dtype", ROUNDINGS)
@pytest.mark.parametrize("spread", [1e-8, 1e-5, 1e-3])
def test_lost_entries_are_those_that_numpy_counts(
    save_checkpoint: SaveCheckpoint, tmp_path: Path, dtype: str, spread: float
) -> None:
    base = {"a.weight": normal(0, 50, 40) * 0.02, "b.weight": torch.ones(300)}
    finetuned = {name: tensor + spread * normal(5, *tensor.shape) for name, tensor in base.items()}
    folder = save_checkpoint("base", base)
    delta = load_delta(base=folder, finetuned=save_checkpoint("finetuned", finetuned)).pruned(Dare(0.5), seed=0)
    table = saving.save_checkpoint(open_checkpoint(folder), delta, tmp_path / "out", dtype=dtype).set_index("tensor")
    for name, start in base.items():
        change = delta[name].numpy()
        stored, without = (ROUNDINGS[dtype](values) for values in (start.numpy() + change, start.numpy()))
        changed, lost = (change != 0).sum(), ((change != 0) & (stored == without)).sum()
        assert table.loc[name, ["changed", "lost"]].tolist() == [changed, lost]
        assert table.loc[name, "lost_share"] == pytest.approx(lost / changed if changed else 0.0)
        saved = load_file(tmp_path / "out" / "model.safetensors")[name]
        np.testing.assert_array_equal(saved.float().numpy(), stored.astype(np.float32))


def share_lost(base_spread: float, spread: float, digits: int) -> float:
    """P(|δ| < half a step at w), for normal w and δ and w itself a stored number: a sum over the binades of w."""
    share = 0.0
    for exponent in range(-60, 3):
        in_binade = 2 * (ndtr(2.0 ** (exponent + 1) / base_spread) - ndtr(2.0**exponent / base_spread))
        half_step = 2.0 ** (exponent - digits - 1)
        share += in_binade * (2 * ndtr(half_step / spread) - 1)
    return share


@pytest.mark.parametrize(("spread", "simulated"), [(1e-5, 0.88), (5e-5, 0.53), (2e-4, 0.17), (1e-3, 0.036)])
def test_the_share_lost_to_bfloat16_is_that_of_normal_weights(
    save_checkpoint: SaveCheckpoint, tmp_path: Path, spread: float, simulated: float
) -> None:
    n = 200_000
    base = save_checkpoint("base", {"a.weight": (normal(0, n) * 0.02).bfloat16()})
    change = save_checkpoint("change", {"a.weight": normal(1, n) * spread})
    delta = load_delta(base=base, finetuned=change, finetuned_is_delta=True)
    (lost_share,) = saving.save_checkpoint(open_checkpoint(base), delta, tmp_path / "out")["lost_share"]
    expected = share_lost(0.02, spread, digits=7)
    assert lost_share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / n))
    assert lost_share == pytest.approx(simulated, abs=0.02)


@pytest.fixture
def small(save_checkpoint: SaveCheckpoint) -> tuple[Path, Path]:
    names = [f"model.layers.{i}.a.weight" for i in range(4)]
    base = save_checkpoint("base", {name: normal(0, 10, 10) for name in names})
    return base, save_checkpoint("finetuned", {name: normal(1, 10, 10) for name in names})


def test_nothing_is_overwritten(small: tuple[Path, Path], tmp_path: Path) -> None:
    base, delta = open_checkpoint(small[0]), load_delta(base=small[0], finetuned=small[1])
    with pytest.raises(FileExistsError, match="exists already; choose another out_dir"):
        saving.save_checkpoint(base, delta, small[0])
    file = tmp_path / "a file"
    file.write_text("kept")
    with pytest.raises(FileExistsError):
        saving.save_checkpoint(base, delta, file)
    assert file.read_text() == "kept"
    (tmp_path / "empty").mkdir()
    saving.save_checkpoint(base, delta, tmp_path / "empty")
    with pytest.raises(FileExistsError):
        saving.save_checkpoint(base, delta, tmp_path / "empty")
    assert set(open_checkpoint(tmp_path / "empty")) == set(base)


def test_a_link_to_an_empty_folder_is_saved_to(small: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk", target_is_directory=True)
    base, delta = open_checkpoint(small[0]), load_delta(base=small[0], finetuned=small[1])
    saving.save_checkpoint(base, delta, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert set(open_checkpoint(tmp_path / "link")) == set(open_checkpoint(tmp_path / "disk")) == set(base)
    with pytest.raises(FileExistsError):
        saving.save_checkpoint(base, delta, tmp_path / "link")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_middle_leaves_nothing(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    base, delta = open_checkpoint(small[0]), load_delta(base=small[0], finetuned=small[1])
    before = sorted(tmp_path.rglob("*"))

    class Failing:
        method = "failing"

        def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
            if "layers.2" in name:
                assert len(sorted(tmp_path.rglob("*"))) > len(before)
                assert not (tmp_path / "out").exists()
                raise error
            return tensor

    with pytest.raises(error):
        saving.save_checkpoint(base, delta.pruned(Failing(), seed=0), tmp_path / "out", max_shard_size=500)
    assert sorted(tmp_path.rglob("*")) == before
    saving.save_checkpoint(base, delta, tmp_path / "out", max_shard_size=500)
    assert set(open_checkpoint(tmp_path / "out")) == set(base)


class Killing:
    """Kills the process that it runs in when it comes to the third layer."""

    method = "killing"

    def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
        if "layers.2" in name:
            os.kill(os.getpid(), signal.SIGKILL)
        return tensor


def save_and_die(base: Path, finetuned: Path, out: Path) -> None:
    delta = load_delta(base=base, finetuned=finetuned).pruned(Killing(), seed=0)
    saving.save_checkpoint(open_checkpoint(base), delta, out, max_shard_size=500)


def test_a_process_killed_in_the_middle_leaves_nothing_under_the_name(
    small: tuple[Path, Path], tmp_path: Path, processes: ForkServerContext
) -> None:
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "out"
    process = processes.Process(target=save_and_die, args=(*small, out))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    (left,) = set(tmp_path.iterdir()) - set(before)
    assert re.fullmatch(r"\.out\.[\w-]+\.partial", left.name)
    assert list(left.glob("*.safetensors"))
    base, delta = open_checkpoint(small[0]), load_delta(base=small[0], finetuned=small[1])
    saving.save_checkpoint(base, delta, out)
    assert set(open_checkpoint(out)) == set(base)
    # What the killed one left may be that of another that still runs, and stays.
    assert sorted(tmp_path.iterdir()) == sorted([*before, out, left])
    assert not list(out.glob("model-0*"))


def test_of_two_saves_at_once_one_wins_whole(small: tuple[Path, Path], tmp_path: Path) -> None:
    base, delta = open_checkpoint(small[0]), load_delta(base=small[0], finetuned=small[1])
    before, both, out = sorted(tmp_path.iterdir()), Barrier(2), tmp_path / "out"

    class Meeting:
        """Comes to the end of a save only when the other save does."""

        method = "meeting"

        def __init__(self, factor: float) -> None:
            self.factor = factor

        def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
            if "layers.3" in name:
                both.wait(timeout=60)
            return tensor * self.factor

    with ThreadPoolExecutor(2) as threads:
        saves = [
            threads.submit(saving.save_checkpoint, base, delta.pruned(Meeting(factor), seed=0), out, max_shard_size=500)
            for factor in (0.0, 1.0)
        ]
        errors = [save.exception() for save in saves]
    (winner,) = (factor for factor, error in zip((0.0, 1.0), errors, strict=True) if error is None)
    assert isinstance(next(error for error in errors if error is not None), OSError)
    saved = open_checkpoint(out)
    assert set(saved) == set(base)
    expected = delta.finetuned if winner else base
    assert all(torch.equal(saved[name], expected[name]) for name in base)
    assert sorted(tmp_path.iterdir()) == sorted([*before, out])


def test_a_weight_beyond_float16_is_refused_and_nothing_is_left(
    save_checkpoint: SaveCheckpoint, tmp_path: Path
) -> None:
    base = save_checkpoint("base", {"a.weight": torch.tensor([1.0, 65504.0]), "b.weight": torch.tensor([1.0, 2.0])})
    tuned = save_checkpoint("tuned", {"a.weight": torch.tensor([1.0, 65520.0]), "b.weight": torch.tensor([1.0, 3.0])})
    checkpoint, delta = open_checkpoint(base), load_delta(base=base, finetuned=tuned)
    with pytest.raises(
        ValueError, match=r"'a\.weight' has 1 entries beyond the range of float16; save in bfloat16 or float32"
    ):
        saving.save_checkpoint(checkpoint, delta, tmp_path / "out", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]
    saving.save_checkpoint(checkpoint, delta, tmp_path / "out", dtype="bfloat16")
    assert load_file(tmp_path / "out" / "model.safetensors")["a.weight"].tolist() == [1.0, 65536.0]


def test_an_infinite_weight_of_the_base_is_no_overflow(save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    base = save_checkpoint("base", {"a.weight": torch.tensor([torch.inf, torch.nan, 1.0])})
    change = save_checkpoint("change", {"a.weight": torch.tensor([2.0, 2.0, 3.0])})
    delta = load_delta(base=base, finetuned=change, finetuned_is_delta=True)
    saving.save_checkpoint(open_checkpoint(base), delta, tmp_path / "out", dtype="float16")
    saved = load_file(tmp_path / "out" / "model.safetensors")["a.weight"]
    np.testing.assert_array_equal(saved, np.array([np.inf, np.nan, 4.0], dtype=np.float16))


def test_an_own_row_beyond_float16_is_refused_too(save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    base = save_checkpoint("base", {name: torch.ones(2, 3)})
    tuned = save_checkpoint("tuned", {name: torch.tensor([[1.0] * 3, [2.0] * 3, [70000.0, torch.inf, 1.0]])})
    checkpoint, delta = open_checkpoint(base), load_delta(base=base, finetuned=tuned)
    with pytest.raises(ValueError, match="has 1 entries beyond the range of float16"):
        saving.save_checkpoint(checkpoint, delta, tmp_path / "out", dtype="float16")
    saving.save_checkpoint(checkpoint, delta, tmp_path / "out", dtype="bfloat16")
    assert load_file(tmp_path / "out" / "model.safetensors")[name][2].tolist() == [70144.0, torch.inf, 1.0]


@pytest.mark.parametrize("dtype", ["float64", "int8", "bf16", ""])
def test_an_unknown_dtype_is_refused(small: tuple[Path, Path], tmp_path: Path, dtype: str) -> None:
    delta = load_delta(base=small[0], finetuned=small[1])
    with pytest.raises(ValueError, match="dtype must be one of 'float32', 'float16', 'bfloat16'; not"):
        saving.save_checkpoint(open_checkpoint(small[0]), delta, tmp_path / "out", dtype=dtype)


def test_a_delta_of_another_model_is_refused(
    small: tuple[Path, Path], save_checkpoint: SaveCheckpoint, tmp_path: Path
) -> None:
    delta = load_delta(base=small[0], finetuned=small[1])
    for tensors, shape in (
        ({"other.weight": torch.ones(3)}, None),
        ({name: torch.ones(10, 9) for name in delta}, (10, 9)),
    ):
        folder = save_checkpoint(f"another {shape}", tensors)
        with pytest.raises(NotHomologousError) as caught:
            saving.save_checkpoint(open_checkpoint(folder), delta, tmp_path / "out")
        assert f"'model.layers.0.a.weight' has shape {shape}, where the delta's base has (10, 10)" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_base_with_more_rows_than_the_deltas_own_is_refused(save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    base, other, tuned = (save_checkpoint(f"rows {rows}", {name: normal(rows, rows, 4)}) for rows in (9, 12, 11))
    delta = load_delta(base=base, finetuned=tuned)
    with pytest.raises(
        NotHomologousError, match=r"has shape \(12, 4\), where the delta's base has \(9, 4\); save with"
    ):
        saving.save_checkpoint(open_checkpoint(other), delta, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("is_delta", [True, False], ids=["published delta", "fine-tune"])
def test_the_same_base_under_another_prefix_is_fine(small: tuple[Path, Path], tmp_path: Path, is_delta: bool) -> None:
    delta = load_delta(base=small[0], finetuned=small[1], finetuned_is_delta=is_delta)
    tensors = load_file(small[0] / "model.safetensors")
    bare = tmp_path / "bare.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, bare)
    saving.save_checkpoint(open_checkpoint(bare), delta, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert set(saved) == ({name.removeprefix("model.") for name in tensors} if is_delta else set(tensors))
    for name, tensor in tensors.items():
        expected = tensor + delta[name] if is_delta else delta.finetuned[name]
        assert torch.equal(saved[name.removeprefix("model.") if is_delta else name], expected)


def test_scalars_and_empty_tensors_are_saved(save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    base = {"scale": torch.tensor(2.0), "empty.weight": torch.ones(0, 3), "flat": torch.ones(3)}
    tuned = {"scale": torch.tensor(5.0), "empty.weight": torch.ones(0, 3), "flat": torch.zeros(3)}
    folder = save_checkpoint("base", base)
    delta = load_delta(base=folder, finetuned=save_checkpoint("tuned", tuned))
    table = saving.save_checkpoint(open_checkpoint(folder), delta, tmp_path / "out")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, tuned[name])
    assert table.set_index("tensor")["numel"].to_dict() == {"empty.weight": 0, "flat": 3, "scale": 1}
    assert table["lost_share"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("name", "alias"), [("Llama, tied", "lm_head.weight"), ("T5", "decoder.embed_tokens.weight")])
def test_a_tied_matrix_under_its_second_name_is_compared_and_saved(tmp_path: Path, name: str, alias: str) -> None:
    base = architectures.tiny_model(name)
    tuned = architectures.moved(base, seed=1)
    for side, model in {"base": base, "tuned": tuned}.items():
        model.save_pretrained(tmp_path / side)
    file = tmp_path / "tuned" / "model.safetensors"
    tensors = load_file(file)
    tensors[alias] = tensors.pop(base.all_tied_weights_keys[alias])
    save_file(tensors, file, metadata={"format": "pt"})
    delta = load_delta(base=tmp_path / "base", finetuned=tmp_path / "tuned")
    assert delta.coverage()["status"].eq("compared").all()
    saving.save_checkpoint(open_checkpoint(tmp_path / "base"), delta, tmp_path / "out")
    again, report = type(base).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(architectures.outputs(again.eval()), architectures.outputs(tuned))


def test_a_setting_of_quantisation_is_left_out_and_told(small: tuple[Path, Path], tmp_path: Path) -> None:
    file = small[1] / "config.json"
    config = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(config | {"model_type": "strange", "quantization_config": {"load_in_4bit": True}}))
    with pytest.warns(UserWarning, match="has a quantization_config, though its weights are in full precision"):
        delta = load_delta(base=small[0], finetuned=small[1])
    saving.save_checkpoint(open_checkpoint(small[0]), delta, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
