"""Which tensors belong together, on models as transformers and torch save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from delta_analysis._errors import NotHomologousError
from delta_analysis.checkpoints.lora import STORED_WHOLE
from delta_analysis.deltas.delta import Delta, load_delta
from tests.checkpoints.test_checkpoint import tiny_llama
from tests.conftest import SaveCheckpoint
from tests.deltas.test_delta import normal

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def bert_config(**options: Any) -> BertConfig:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertConfig(**{**sizes, "vocab_size": 11, "max_position_embeddings": 16, **options})


def gpt2_config() -> GPT2Config:
    return GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=16, vocab_size=11, bos_token_id=0, eos_token_id=0)


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def by_tensor(delta: Delta) -> pd.DataFrame:
    coverage = delta.coverage()
    assert coverage["tensor"].is_unique
    assert (coverage["numel_compared"] <= coverage["numel"]).all()
    assert coverage.loc[coverage["status"] != "compared", "numel_compared"].sum() == 0
    assert coverage["numel_compared"].sum() == sum(tensor.numel() for tensor in delta.values())
    return coverage.set_index("tensor")


def assert_differences(delta: Delta, finetuned: PreTrainedModel, base: PreTrainedModel, prefix: str = "") -> None:
    """Each tensor of the delta is the difference of the parameters of these two, under the name of the first."""
    ours, theirs = (dict(model.named_parameters()) for model in (finetuned, base))
    assert set(delta) <= set(ours)
    for name, tensor in delta.items():
        partner = theirs.get(name, theirs.get(prefix + name, theirs.get(name.removeprefix(prefix))))
        assert partner is not None, name
        assert torch.equal(tensor, (ours[name] - partner).detach()), name


@pytest.mark.parametrize("bare_side", ["base", "finetuned"])
def test_llama_without_its_head_is_the_model_inside(tmp_path: Path, bare_side: str) -> None:
    whole, bare = tiny_llama(0, tie_word_embeddings=False), tiny_llama(1, tie_word_embeddings=False).model
    sides = (bare, whole) if bare_side == "base" else (whole, bare)
    folders = {key: saved(model, tmp_path / key) for key, model in zip(("base", "finetuned"), sides, strict=True)}
    delta = load_delta(**folders)
    assert len(delta) == len(list(bare.parameters()))
    assert_differences(delta, sides[1], sides[0], prefix="model.")
    rows = by_tensor(delta)
    only = rows[rows["status"] != "compared"]
    assert only["status"].to_dict() == {HEAD: f"only in {'base' if bare_side == 'finetuned' else 'finetuned'}"}
    assert only.loc[HEAD, "numel"] == 11 * 8
    assert rows["numel_compared"].sum() == bare.num_parameters()
    name = "layers.0.mlp.up_proj.weight" if bare_side == "finetuned" else "model.layers.0.mlp.up_proj.weight"
    assert rows.loc[name, "reason"].startswith("with ")


BERTS: dict[str, Any] = {
    "bare": lambda: BertModel(bert_config()),
    "masked": lambda: BertForMaskedLM(bert_config()),
    "classifier": lambda: BertForSequenceClassification(bert_config()),
}


@pytest.mark.parametrize("base", BERTS)
@pytest.mark.parametrize("finetuned", BERTS)
def test_berts_of_any_head_share_their_encoder(tmp_path: Path, base: str, finetuned: str) -> None:
    torch.manual_seed(0)
    models = {"base": BERTS[base](), "finetuned": BERTS[finetuned]()}
    delta = load_delta(**{side: saved(model, tmp_path / side) for side, model in models.items()})
    assert_differences(delta, models["finetuned"], models["base"], prefix="bert.")
    rows = by_tensor(delta)
    shared = {name.removeprefix("bert.") for name, _ in models["base"].named_parameters()}
    shared &= {name.removeprefix("bert.") for name, _ in models["finetuned"].named_parameters()}
    assert {name.removeprefix("bert.") for name in delta} == shared
    counted = rows.groupby("status")["numel"].sum()
    assert counted["compared"] == rows["numel_compared"].sum()
    for side, model in models.items():
        assert counted["compared"] + counted.get(f"only in {side}", 0) == model.num_parameters()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_gpt2_whose_bin_repeats_its_tied_head_is_compared_once(tmp_path: Path, legacy: bool) -> None:
    torch.manual_seed(0)
    base, finetuned = GPT2LMHeadModel(gpt2_config()), GPT2LMHeadModel(gpt2_config())
    for side, model in (("base", base), ("finetuned", finetuned)):
        state = model.state_dict()
        assert state[HEAD].data_ptr() == state["transformer.wte.weight"].data_ptr()
        # As older files have it: the causal mask in each layer.
        state |= {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
        saved(model, tmp_path / side)
        (tmp_path / side / "model.safetensors").unlink()
        torch.save(state, tmp_path / side / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    delta = load_delta(base=tmp_path / "base", finetuned=tmp_path / "finetuned")
    assert_differences(delta, finetuned, base)
    rows = by_tensor(delta)
    assert rows["numel_compared"].sum() == finetuned.num_parameters()
    assert rows.loc[HEAD, ["status", "reason"]].tolist() == ["skipped", "tied to transformer.wte.weight, counted there"]
    assert rows.loc["transformer.h.0.attn.bias", "status"] == "skipped"


TIED: dict[str, Any] = {
    "bert": lambda: BertForMaskedLM(bert_config()),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**bert_config().to_diff_dict() | {"model_type": "roberta"})),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, vocab_size=11)
    ),
}


@pytest.mark.parametrize("kind", TIED)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("pickled", ["base", "finetuned"])
def test_each_tied_weight_of_a_bin_is_compared_once(tmp_path: Path, kind: str, legacy: bool, pickled: str) -> None:
    torch.manual_seed(0)
    models = {side: TIED[kind]() for side in ("base", "finetuned")}
    folders = {side: saved(model, tmp_path / side) for side, model in models.items()}
    (folders[pickled] / "model.safetensors").unlink()
    state = models[pickled].state_dict()
    torch.save(state, folders[pickled] / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    delta = load_delta(**folders)
    assert_differences(delta, models["finetuned"], models["base"])
    rows = by_tensor(delta)
    assert rows["numel_compared"].sum() == models["finetuned"].num_parameters()
    parameters = dict(models["finetuned"].named_parameters())
    assert rows.loc[rows["status"] == "skipped"].index.tolist() == sorted(
        name for name in state if name not in parameters and state[name].is_floating_point()
    )
    assert rows.loc[rows["status"] == "skipped", "reason"].str.startswith("tied to ").all()
    assert set(rows["status"]) == {"compared", "skipped"}


def test_gpt2_as_its_first_files_name_it_is_the_model_inside(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, finetuned = GPT2Model(gpt2_config()), GPT2LMHeadModel(gpt2_config())
    delta = load_delta(base=saved(base, tmp_path / "base"), finetuned=saved(finetuned, tmp_path / "finetuned"))
    assert_differences(delta, finetuned, base, prefix="transformer.")
    assert by_tensor(delta)["numel_compared"].sum() == base.num_parameters() == finetuned.num_parameters()


@pytest.mark.parametrize("prefix", ["base_model.model.", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_what_wrappers_put_before_a_name_is_no_difference(tmp_path: Path, prefix: str, side: str) -> None:
    models = {"base": tiny_llama(0, tie_word_embeddings=False), "finetuned": tiny_llama(1, tie_word_embeddings=False)}
    folders = {key: saved(model, tmp_path / key) for key, model in models.items()}
    file = folders[side] / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(file).items()}, file)
    delta = load_delta(**folders)
    parameters = {key: dict(model.named_parameters()) for key, model in models.items()}
    assert len(delta) == len(parameters["base"])
    for name, tensor in delta.items():
        plain = name.removeprefix(prefix)
        assert torch.equal(tensor, (parameters["finetuned"][plain] - parameters["base"][plain]).detach())
    assert set(by_tensor(delta)["status"]) == {"compared"}


def test_a_name_without_its_prefix_that_fits_two_tensors_fits_none(save_checkpoint: SaveCheckpoint) -> None:
    base = {"a.weight": normal(0, 2), "model.x.weight": normal(1, 2), "bert.x.weight": normal(2, 2)}
    finetuned = {"a.weight": normal(3, 2), "x.weight": normal(4, 2)}
    delta = load_delta(base=save_checkpoint("base", base), finetuned=save_checkpoint("finetuned", finetuned))
    assert by_tensor(delta)["status"].to_dict() == {
        "a.weight": "compared",
        "bert.x.weight": "only in base",
        "model.x.weight": "only in base",
        "x.weight": "only in finetuned",
    }


def test_the_same_name_is_preferred_to_a_name_without_prefix(save_checkpoint: SaveCheckpoint) -> None:
    base = {"x.weight": torch.tensor([1.0]), "model.x.weight": torch.tensor([10.0])}
    finetuned = {"x.weight": torch.tensor([2.0]), "model.x.weight": torch.tensor([30.0])}
    delta = load_delta(base=save_checkpoint("base", base), finetuned=save_checkpoint("finetuned", finetuned))
    assert {name: tensor.item() for name, tensor in delta.items()} == {"x.weight": 1.0, "model.x.weight": 20.0}


def test_a_tied_base_against_a_fine_tune_with_a_head_of_its_own(tmp_path: Path) -> None:
    base, finetuned = tiny_llama(0, tie_word_embeddings=True), tiny_llama(1, tie_word_embeddings=False)
    delta = load_delta(base=saved(base, tmp_path / "base"), finetuned=saved(finetuned, tmp_path / "finetuned"))
    embeddings = base.model.embed_tokens.weight
    assert torch.equal(delta[HEAD], (finetuned.lm_head.weight - embeddings).detach())
    assert torch.equal(delta[EMBEDDINGS], (finetuned.model.embed_tokens.weight - embeddings).detach())
    rows = by_tensor(delta)
    assert rows.loc[HEAD, "reason"] == f"with {EMBEDDINGS} of the base"
    assert rows.loc[HEAD, ["base_shape", "base_dtype"]].tolist() == ["(11, 8)", "float32"]
    assert rows["numel_compared"].sum() == finetuned.num_parameters()


def test_a_tied_fine_tune_against_a_base_with_a_head_of_its_own(tmp_path: Path) -> None:
    base, finetuned = tiny_llama(0, tie_word_embeddings=False), tiny_llama(1, tie_word_embeddings=True)
    delta = load_delta(base=saved(base, tmp_path / "base"), finetuned=saved(finetuned, tmp_path / "finetuned"))
    assert HEAD not in delta
    rows = by_tensor(delta)
    assert rows.loc[HEAD, "status"] == "only in base"
    assert rows.loc[HEAD, "reason"] == f"the fine-tuned model ties its head to {EMBEDDINGS}"
    assert rows["numel_compared"].sum() == finetuned.num_parameters()


GROWN = [(11, 13), (13, 11)]


@pytest.mark.parametrize(("base_rows", "tuned_rows"), GROWN)
@pytest.mark.parametrize("tied", [False, True])
def test_of_vocabularies_of_two_sizes_the_common_rows_are_compared(
    tmp_path: Path, base_rows: int, tuned_rows: int, tied: bool
) -> None:
    base, finetuned = tiny_llama(0, tie_word_embeddings=tied), tiny_llama(1, tie_word_embeddings=tied)
    for model, rows in ((base, base_rows), (finetuned, tuned_rows)):
        model.resize_token_embeddings(rows, mean_resizing=False)
    delta = load_delta(base=saved(base, tmp_path / "base"), finetuned=saved(finetuned, tmp_path / "finetuned"))
    rows = by_tensor(delta)
    assert set(rows["status"]) == {"compared"}
    ours, theirs = dict(finetuned.named_parameters()), dict(base.named_parameters())
    for name in [EMBEDDINGS] if tied else [EMBEDDINGS, HEAD]:
        assert torch.equal(delta[name], (ours[name][:11] - theirs[name][:11]).detach())
        assert torch.equal(delta.read(name)[1], theirs[name][:11].detach())
        assert rows.loc[name, ["base_shape", "finetuned_shape"]].tolist() == [f"({base_rows}, 8)", f"({tuned_rows}, 8)"]
        assert rows.loc[name, ["numel", "numel_compared"]].tolist() == [8 * 13, 88]
        longer = "finetuned" if tuned_rows > base_rows else "base"
        assert rows.loc[name, "reason"] == f"the first 11 rows; 2 more in {longer}"
    smaller = min(base, finetuned, key=LlamaForCausalLM.num_parameters)
    assert rows["numel_compared"].sum() == smaller.num_parameters()
    # What is counted is the larger side.
    assert rows["numel"].sum() == max(base.num_parameters(), finetuned.num_parameters())


@pytest.mark.parametrize(("base_rows", "tuned_rows"), GROWN)
def test_vocabularies_of_two_sizes_are_refused_if_asked(tmp_path: Path, base_rows: int, tuned_rows: int) -> None:
    folders = {}
    for side, rows in (("base", base_rows), ("finetuned", tuned_rows)):
        model = tiny_llama(tie_word_embeddings=False)
        model.resize_token_embeddings(rows, mean_resizing=False)
        folders[side] = saved(model, tmp_path / side)
    with pytest.raises(NotHomologousError) as caught:
        load_delta(**folders, vocab="error")
    message = str(caught.value)
    assert message.startswith(f"{folders['base']} and {folders['finetuned']}: ")
    assert f"vocabularies of different sizes, ({base_rows}, 8) against ({tuned_rows}, 8); " in message
    assert "vocab='common'" in message
    with pytest.raises(ValueError, match="vocab must be one of 'common', 'error'; not 'union'"):
        load_delta(**folders, vocab="union")


@pytest.mark.parametrize(("base_rows", "tuned_rows"), GROWN)
def test_a_bias_over_the_vocabulary_is_cut_and_positions_are_not(
    tmp_path: Path, base_rows: int, tuned_rows: int
) -> None:
    # BERT's head has a bias for each token, and its position embeddings are no vocabulary.
    torch.manual_seed(0)
    base = BertForMaskedLM(bert_config(vocab_size=base_rows))
    finetuned = BertForMaskedLM(bert_config(vocab_size=tuned_rows, max_position_embeddings=24))
    delta = load_delta(base=saved(base, tmp_path / "base"), finetuned=saved(finetuned, tmp_path / "finetuned"))
    rows = by_tensor(delta)
    bias, words = "cls.predictions.bias", "bert.embeddings.word_embeddings.weight"
    positions = "bert.embeddings.position_embeddings.weight"
    ours, theirs = dict(finetuned.named_parameters()), dict(base.named_parameters())
    for name, size in ((bias, 11), (words, 88)):
        assert torch.equal(delta[name], (ours[name][:11] - theirs[name][:11]).detach())
        assert rows.loc[name, "numel_compared"] == size
    assert positions not in delta
    assert rows.loc[positions, ["status", "reason", "numel_compared"]].tolist() == [
        "shape differs",
        "(16, 8) against (24, 8)",
        0,
    ]


def test_rows_that_are_as_many_as_tokens_by_chance_are_compared_as_they_are(save_checkpoint: SaveCheckpoint) -> None:
    # A square matrix of the hidden size equals the vocabulary on one side only: nothing is cut.
    base = {EMBEDDINGS: normal(0, 8, 8), "model.layers.0.a.weight": normal(1, 8, 8)}
    finetuned = {EMBEDDINGS: normal(2, 10, 8), "model.layers.0.a.weight": normal(3, 8, 8)}
    delta = load_delta(base=save_checkpoint("base", base), finetuned=save_checkpoint("finetuned", finetuned))
    assert {name: tuple(tensor.shape) for name, tensor in delta.items()} == {
        EMBEDDINGS: (8, 8),
        "model.layers.0.a.weight": (8, 8),
    }


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.a.weight", "model.layers.0.a.bias"])
def test_what_only_happens_to_have_a_row_for_each_token_is_not_cut(save_checkpoint: SaveCheckpoint, name: str) -> None:
    size = (4,) if name == "model.layers.0.a.weight" else ()
    base = {EMBEDDINGS: normal(0, 9, 4), name: normal(1, 9, *size)}
    finetuned = {EMBEDDINGS: normal(2, 11, 4), name: normal(3, 11, *size)}
    folders = {"base": save_checkpoint("base", base), "finetuned": save_checkpoint("finetuned", finetuned)}
    assert by_tensor(load_delta(**folders))["status"].to_dict() == {EMBEDDINGS: "compared", name: "shape differs"}


@pytest.mark.parametrize("old_side", ["base", "finetuned"])
def test_norms_under_the_names_of_the_first_berts_are_todays(tmp_path: Path, old_side: str) -> None:
    torch.manual_seed(0)
    models = {side: BertForMaskedLM(bert_config()) for side in ("base", "finetuned")}
    folders = {side: saved(model, tmp_path / side) for side, model in models.items()}
    file = folders[old_side] / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(tuple(old))]:
        today = ".".join(name.split(".")[-2:])
        tensors[name.removesuffix(today) + old[today]] = tensors.pop(name)
    save_file(tensors, file)
    delta = load_delta(**folders)
    assert set(by_tensor(delta)["status"]) == {"compared"}
    assert len(delta) == len(list(models["base"].named_parameters()))


def adapter_of(model: PreTrainedModel, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Save a random adapter of the model; what peft itself says each weight gains, where it adapts some."""
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, **options))
    with torch.no_grad():
        for i, (name, parameter) in enumerate(wrapped.named_parameters()):
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(normal(i, *parameter.shape))
    wrapped.save_pretrained(folder)
    return {
        f"{name.removeprefix('base_model.model.')}.weight": module.get_delta_weight("default").detach()
        for name, module in wrapped.named_modules()
        if hasattr(module, "get_delta_weight")
    }


PEFT_WARNINGS = [
    "ignore:.is_gradient_checkpointing:FutureWarning",  # about itself
    "ignore:fan_in_fan_out is set to:UserWarning",
    "ignore:Model has .tie_word_embeddings=True.:UserWarning",
    "ignore:Setting .save_embedding_layers.:UserWarning",
]


@pytest.mark.filterwarnings(*PEFT_WARNINGS)
def test_factors_that_the_one_flag_has_the_wrong_way_round_are_turned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(gpt2_config())
    base = saved(model, tmp_path / "base")
    # The flag that peft keeps is that of the head, which is a Linear; c_attn is GPT-2's Conv1D.
    changes = adapter_of(model, tmp_path / "adapter", target_modules=["c_attn", "lm_head"])
    assert '"fan_in_fan_out": false' in (tmp_path / "adapter" / "adapter_config.json").read_text()
    delta = load_delta(base=base, finetuned=tmp_path / "adapter")
    assert delta.keys() == changes.keys() == {HEAD, *(f"transformer.h.{i}.attn.c_attn.weight" for i in (0, 1))}
    for name, change in changes.items():
        torch.testing.assert_close(delta[name], change, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings(*PEFT_WARNINGS)
def test_a_wrong_flag_beside_a_square_module_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(gpt2_config())
    base = saved(model, tmp_path / "base")
    adapter_of(model, tmp_path / "adapter", target_modules=["c_attn", "c_proj", "lm_head"])
    with pytest.raises(NotHomologousError) as caught:
        load_delta(base=base, finetuned=tmp_path / "adapter")
    message = str(caught.value)
    assert message.startswith(
        f"{tmp_path / 'adapter'}: fan_in_fan_out is wrong for 'transformer.h.0.attn.c_attn.weight'"
    )
    assert "the square 'transformer.h.0.attn.c_proj.weight' cannot be told; merge the adapter into its base" in message


@pytest.mark.filterwarnings(*PEFT_WARNINGS)
def test_what_an_adapter_holds_whole_is_part_of_its_delta_where_the_base_is_at_hand(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    base = saved(model, tmp_path / "base")
    adapter_of(model, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    delta = load_delta(base=base, finetuned=tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(delta[HEAD], stored - load_file(base / "model.safetensors")[HEAD])
    assert torch.equal(delta.weight(HEAD), stored)
    assert by_tensor(delta).loc[EMBEDDINGS, "reason"] == "the fine-tune leaves it as it is"
    # Without a base nothing can be subtracted.
    with pytest.warns(
        UserWarning, match=r"adapter: 1 of its tensors are not in the delta, such as 'lm_head\.weight' \("
    ):
        delta = load_delta(base=None, finetuned=tmp_path / "adapter")
    assert by_tensor(delta).loc[HEAD, ["status", "reason"]].tolist() == ["skipped", STORED_WHOLE]


@pytest.mark.filterwarnings(*PEFT_WARNINGS)
def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    base = saved(model, tmp_path / "base")
    adapter_of(model, tmp_path / "adapter", target_modules=["q_proj"])
    for finetuned in (base, tmp_path / "adapter"):
        with pytest.raises(NotHomologousError, match="adapter: is an adapter, not a base; give the model that it was"):
            load_delta(base=tmp_path / "adapter", finetuned=finetuned)


def test_a_vocabulary_is_not_cut_where_the_hidden_size_differs(save_checkpoint: SaveCheckpoint) -> None:
    base = {EMBEDDINGS: normal(0, 9, 8), "model.norm.weight": normal(1, 3)}
    finetuned = {EMBEDDINGS: normal(2, 10, 6), "model.norm.weight": normal(3, 3)}
    folders = {"base": save_checkpoint("base", base), "finetuned": save_checkpoint("finetuned", finetuned)}
    for vocab in ("common", "error"):
        assert by_tensor(load_delta(**folders, vocab=vocab)).loc[EMBEDDINGS, "status"] == "shape differs"


def test_a_grown_vocabulary_beside_a_tied_base(save_checkpoint: SaveCheckpoint) -> None:
    base = {EMBEDDINGS: normal(0, 9, 4)}
    finetuned = {EMBEDDINGS: normal(1, 11, 4), HEAD: normal(2, 11, 4)}
    delta = load_delta(
        base=save_checkpoint("base", base, config={"tie_word_embeddings": True}),
        finetuned=save_checkpoint("finetuned", finetuned, config={"tie_word_embeddings": False}),
    )
    assert torch.equal(delta[HEAD], finetuned[HEAD][:9] - base[EMBEDDINGS])
    assert (
        by_tensor(delta).loc[HEAD, "reason"] == f"with {EMBEDDINGS} of the base; the first 9 rows; 2 more in finetuned"
    )


def test_a_published_delta_says_nothing_of_what_it_leaves_alone(save_checkpoint: SaveCheckpoint) -> None:
    base = {"a.weight": normal(0, 4), "b.weight": normal(1, 4)}
    folders = {
        "base": save_checkpoint("base", base),
        "finetuned": save_checkpoint("change", {"a.weight": normal(2, 4)}),
    }
    rows = by_tensor(load_delta(**folders, finetuned_is_delta=True))
    assert rows.loc["b.weight", ["status", "reason"]].tolist() == ["only in base", "the fine-tune leaves it as it is"]
    assert rows.loc["a.weight", ["status", "reason"]].tolist() == ["compared", ""]


def test_buffers_of_a_published_delta_are_not_warned_of(save_checkpoint: SaveCheckpoint) -> None:
    tensors = {"a.weight": normal(0, 4), "a.rotary_emb.inv_freq": normal(1, 4)}
    folders = {"base": save_checkpoint("base", tensors), "finetuned": save_checkpoint("change", tensors)}
    assert list(load_delta(**folders, finetuned_is_delta=True)) == ["a.weight"]


def test_a_published_delta_is_noticed_and_not_subtracted_from(save_checkpoint: SaveCheckpoint) -> None:
    base = {f"layers.{i}.a.weight": normal(i, 20, 30) for i in range(8)}
    change = {name: 0.003 * normal(9, 20, 30) for name in base}
    folders = {"base": save_checkpoint("base", base), "finetuned": save_checkpoint("change", change)}
    with pytest.warns(UserWarning, match=r"weights are 0.003 times the size of the base's; .*finetuned_is_delta=True"):
        load_delta(**folders)
    delta = load_delta(**folders, finetuned_is_delta=True)
    assert all(torch.equal(delta[name], tensor) for name, tensor in change.items())
    assert torch.equal(delta.read("layers.0.a.weight")[1], base["layers.0.a.weight"])
