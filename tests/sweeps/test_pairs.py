"""Pairs in memory: what their models are while they are edited, and that they are as before afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from delta_analysis._errors import CheckpointError
from delta_analysis.checkpoints.checkpoint import open_checkpoint
from delta_analysis.deltas.delta import load_delta
from delta_analysis.deltas.selection import in_scope
from delta_analysis.evaluation import HiddenSimilarity, OutputDrift
from delta_analysis.evaluation.models import finetuned_model, load_model, parameters_of
from delta_analysis.pruning import Dare, Magnitude, MagPrune, Pruner, bind
from delta_analysis.pruning.transforms import Permuted, Scaled
from delta_analysis.sweeps import pairs as editable
from delta_analysis.sweeps.engine import sweep
from delta_analysis.sweeps.pairs import Edit, EditablePair, Pair, edited_source, held_pair, release_pairs
from delta_analysis.zoo.tokenizer import character_tokenizer
from tests.tiny_family import EMBED, NORM, QUERY, UP, Family, Judge, Reads, make_family

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def loaded(family: Family) -> EditablePair:
    return EditablePair.load(family.pair())


def weights_of(model: torch.nn.Module) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_bits(one: Weights, other: Weights) -> bool:
    """Also tells 0.0 and -0.0 apart, and NaN from NaN."""
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(torch.int32), other[name].view(torch.int32)) for name in one
    )


def under(loaded: EditablePair, edit: Edit | None, seed: int = 0) -> Weights:
    with loaded.edited(edit, seed) as edited:
        return weights_of(edited.model)


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.arange(10).reshape(2, 5)).logits.double().flatten().numpy()


def test_weights_in_memory_are_those_on_disk(family: Family, loaded: EditablePair) -> None:
    assert set(loaded.delta) == set(loaded.base) == set(family.base_weights)
    for name, base in family.base_weights.items():
        assert loaded.base[name].dtype == loaded.delta[name].dtype == torch.float32
        assert torch.equal(loaded.base[name], base)
        assert torch.equal(loaded.delta[name], family.delta[name])
    assert same_bits(weights_of(loaded.model), family.finetuned_weights)


def test_without_an_edit_it_is_the_finetuned_model(family: Family, loaded: EditablePair) -> None:
    with loaded.edited(None, 0) as edited:
        assert same_bits(weights_of(edited.model), family.finetuned_weights)
        assert edited.achieved_drop_rate == 0


@pytest.mark.parametrize("pruner", [Dare(1), Dare(1, "none"), Dare(1, 3.0), Magnitude(1), MagPrune(1)], ids=repr)
def test_at_drop_rate_one_it_is_the_base(family: Family, loaded: EditablePair, pruner: Pruner) -> None:
    assert same_bits(under(loaded, Edit(pruner)), family.base_weights)
    attention = under(loaded, Edit(pruner, "attention"))
    for name, weight in attention.items():
        assert torch.equal(weight, (family.base_weights if "self_attn" in name else family.finetuned_weights)[name])


PRUNERS = (
    st.floats(0, 1).map(Dare)
    | st.floats(0, 1).map(lambda p: Dare(p, "none"))
    | st.floats(0, 1).map(lambda p: Dare(p, 2.5))
    | st.floats(0, 1).map(Magnitude)
    | st.floats(0, 1).map(lambda p: Magnitude(p, "model"))
    | st.floats(0, 1).map(lambda p: Magnitude(p, "row", "l1"))
    | st.floats(0, 1).map(MagPrune)
)
SCOPES = st.sampled_from(["all", "linear", "attention", "mlp", "embeddings", "norms", "*.q_proj.*", "norms,mlp"])


@given(PRUNERS, SCOPES, st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_base_plus_pruned_delta_in_scope_and_finetuned_elsewhere(
    family: Family, loaded: EditablePair, pruner: Pruner, scope: str, seed: int
) -> None:
    delta = family.delta
    scoped = {name: delta[name] for name in in_scope(scope, {name: delta[name].dim() for name in loaded.delta})}
    # What a model-wide cut sees are the tensors in scope alone.
    prune = bind(pruner, scoped, seed)
    pruned = {name: prune(tensor, name=name, seed=seed) for name, tensor in scoped.items()}
    expected = {name: family.base_weights[name] + tensor for name, tensor in pruned.items()}
    nonzero, left = (sum(int((each != 0).sum()) for each in tensors.values()) for tensors in (scoped, pruned))
    with loaded.edited(Edit(pruner, scope), seed) as edited:
        assert same_bits(weights_of(edited.model), family.finetuned_weights | expected)
        assert edited.achieved_drop_rate == pytest.approx(1 - left / nonzero, abs=1e-12)
        here = edited.model
    assert same_bits(weights_of(here), family.finetuned_weights)
    assert same_bits(weights_of(loaded.model), family.finetuned_weights)


def test_achieved_drop_rate_is_of_the_scope_and_of_what_was_not_zero(loaded: EditablePair) -> None:
    # Half of all entries are zero to begin with.
    for scope, rate in (("all", 0.9), ("mlp", 0.3), ("embeddings", 0.9)):
        with loaded.edited(Edit(Dare(rate), scope), 0) as edited:
            assert edited.achieved_drop_rate == pytest.approx(rate, abs=0.06)
    with loaded.edited(Edit(Magnitude(0.5, "tensor"), "embeddings"), 0) as edited:
        assert edited.achieved_drop_rate == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("seed", [0, 1])
def test_an_error_while_it_lasts_restores_the_model(family: Family, loaded: EditablePair, seed: int) -> None:
    with pytest.raises(KeyboardInterrupt), loaded.edited(Edit(Dare(0.5)), seed) as edited:
        here = edited.model
        raise KeyboardInterrupt
    assert same_bits(weights_of(here), family.finetuned_weights)


def test_an_evaluation_that_writes_into_its_model_does_no_harm(family: Family, loaded: EditablePair) -> None:
    with loaded.edited(None, 0) as edited, torch.no_grad():
        for parameter in edited.model.parameters():
            parameter.fill_(torch.nan)
    assert same_bits(under(loaded, None), family.finetuned_weights)


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        (NORM, torch.full((8,), torch.nan), "has 8 NaN or infinite entries of 8"),
    ],
)
def test_a_weight_that_cannot_be_written_is_refused(
    family: Family, loaded: EditablePair, name: str, weight: torch.Tensor, message: str
) -> None:
    strange = replace(
        loaded,
        base=loaded.base | {name: weight},
        delta=loaded.delta | {name: weight},
        nonzero=loaded.nonzero | {name: weight.numel()},
    )
    with pytest.raises(ValueError, match=message), strange.edited(Edit(Dare(0.5)), 0):
        raise AssertionError("never entered")
    assert same_bits(under(strange, None), family.finetuned_weights)


def test_a_scope_that_selects_nothing_is_refused(family: Family, loaded: EditablePair) -> None:
    with pytest.raises(ValueError, match="'attn' selects none of the"), loaded.edited(Edit(Dare(0.5), "attn"), 0):
        raise AssertionError("never entered")
    assert same_bits(under(loaded, None), family.finetuned_weights)


def test_threads_edit_models_of_their_own(family: Family) -> None:
    loaded = EditablePair.load(family.pair())
    dropped, whole = Edit(Dare(1)), None
    with loaded.edited(dropped, 0) as one, loaded.edited(whole, 0) as two:
        models = {one.model, two.model, loaded.model}
        assert len(models) == 3
        assert same_bits(weights_of(one.model), family.base_weights)
        assert same_bits(weights_of(two.model), family.finetuned_weights)
    # A later edit takes one of these again.
    with loaded.edited(Edit(Dare(0.5), "mlp"), 0) as again:
        assert again.model in models
    edits = [(Edit(Dare(p), scope), seed) for p in (0.3, 0.9) for scope in ("all", "mlp") for seed in range(10)]
    alone = [under(loaded, *each) for each in edits]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda each: under(loaded, *each), edits))
    assert all(map(same_bits, alone, together))
    assert same_bits(weights_of(loaded.model), family.finetuned_weights)


class CountsPreparations(Judge):
    def __init__(self) -> None:
        self.models: list[PreTrainedModel] = []

    def prepared(self, untouched: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> CountsPreparations:
        self.models.append(untouched)
        return self


def test_an_evaluation_is_prepared_once_on_the_untouched_model(family: Family) -> None:
    loaded, evaluation = EditablePair.load(family.pair()), CountsPreparations()
    with ThreadPoolExecutor(4) as pool, loaded.edited(Edit(Dare(1)), 0):
        list(pool.map(loaded.prepared, [evaluation] * 8))  # type: ignore[list-item]
    assert evaluation.models == [loaded.model]


def test_a_finetune_equal_to_its_base_drops_nothing(family: Family) -> None:
    loaded = EditablePair.load(Pair("same", str(family.base), str(family.base)))
    with loaded.edited(Edit(Dare(0.5)), 0) as edited:
        assert edited.achieved_drop_rate == 0
        assert same_bits(weights_of(edited.model), family.base_weights)


def test_without_a_base_the_finetuned_weights_themselves_are_dropped(family: Family) -> None:
    loaded = EditablePair.load(Pair("tuned", None, str(family.finetuned)))
    tuned = family.finetuned_weights[UP]
    assert torch.equal(under(loaded, Edit(Dare(0.5)), 2)[UP], Dare(0.5)(tuned, name=UP, seed=2))
    assert not any(weight.any() for weight in under(loaded, Edit(Dare(1))).values())


def test_tensors_that_the_base_lacks_stay_finetuned(family: Family, save_checkpoint: Callable[..., Path]) -> None:
    base = save_checkpoint("part", {name: family.base_weights[name] for name in (UP, EMBED)})
    loaded = EditablePair.load(Pair("part → tuned", str(base), str(family.finetuned)))
    expected = family.finetuned_weights | {name: family.base_weights[name] for name in (UP, EMBED)}
    assert same_bits(under(loaded, Edit(Dare(1))), expected)
    with pytest.raises(ValueError, match="'attention' selects none"), loaded.edited(Edit(Dare(1), "attention"), 0):
        raise AssertionError("never entered")


def test_a_grown_vocabulary_keeps_rows_of_its_own(family: Family, tmp_path: Path) -> None:
    torch.manual_seed(1)
    tuned = load_model(open_checkpoint(family.finetuned))
    tuned.resize_token_embeddings(99, mean_resizing=False)
    tuned.save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    loaded = EditablePair.load(Pair("base → grown", str(family.base), str(tmp_path)))
    grown = tuned.get_input_embeddings().weight.detach()
    assert torch.equal(under(loaded, None)[EMBED], grown)
    assert torch.equal(under(loaded, Edit(Dare(1)))[EMBED], torch.cat([family.base_weights[EMBED], grown[97:]]))
    assert torch.equal(under(loaded, None)[EMBED], grown)


@pytest.fixture
def adapter(family: Family, tmp_path: Path) -> Callable[..., Path]:
    def save(*modules: str) -> Path:
        config = LoraConfig(r=2, target_modules=list(modules))
        wrapped = get_peft_model(load_model(open_checkpoint(family.base)), config)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
        wrapped.save_pretrained(tmp_path)
        return tmp_path

    return save


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_edits_its_base(family: Family, adapter: Callable[..., Path]) -> None:
    folder = adapter("q_proj", "up_proj")
    model = load_model(open_checkpoint(family.base))
    peft = logits(PeftModel.from_pretrained(model, folder))
    loaded = EditablePair.load(Pair("base → adapter", str(family.base), str(folder)))
    assert set(loaded.delta) == {QUERY, UP}
    with loaded.edited(None, 0) as edited:
        np.testing.assert_allclose(logits(edited.model), peft, rtol=1e-4, atol=1e-5)
    assert same_bits(under(loaded, Edit(Dare(1))), family.base_weights)
    attention = under(loaded, Edit(Dare(1), "attention"))
    assert torch.equal(attention[QUERY], family.base_weights[QUERY])
    assert torch.equal(attention[UP], family.base_weights[UP] + loaded.delta[UP])


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing:FutureWarning",
    "ignore:Model has .tie_word_embeddings=True.:UserWarning",
    "ignore:Setting .save_embedding_layers.:UserWarning",
    r"ignore:.*'lm_head\.base_layer\.weight':UserWarning",
)
def test_a_change_of_a_tied_head_leaves_the_embeddings(family: Family, adapter: Callable[..., Path]) -> None:
    folder = adapter("lm_head")
    model = load_model(open_checkpoint(family.base))
    base, peft = logits(model), logits(PeftModel.from_pretrained(model, folder))
    assert np.abs(peft - base).max() > 0.1
    loaded = EditablePair.load(Pair("base → adapter", str(family.base), str(folder)))
    with loaded.edited(None, 0) as edited:
        np.testing.assert_allclose(logits(edited.model), peft, rtol=1e-4, atol=1e-5)
        assert torch.equal(edited.model.get_input_embeddings().weight, family.base_weights[EMBED])
    with loaded.edited(Edit(Dare(1)), 0) as edited:
        np.testing.assert_array_equal(logits(edited.model), base)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_what_is_edited_is_the_base_of_what_is_no_model(family: Family, adapter: Callable[..., Path]) -> None:
    base, tuned = str(family.base), str(family.finetuned)
    assert edited_source(Pair("whole", base, tuned)) == tuned
    assert edited_source(Pair("alone", None, tuned)) == tuned
    assert edited_source(Pair("adapter", base, str(adapter("up_proj")))) == base


def test_the_finetuned_model_alone_has_the_weights_on_disk(family: Family) -> None:
    delta = load_delta(base=family.base, finetuned=family.finetuned)
    for dtype, expected in (("float32", torch.float32), ("auto", torch.bfloat16)):
        model, tokenizer = finetuned_model(delta, dtype=dtype)
        assert not model.training
        assert model.dtype == expected
        assert same_bits({n: w.float() for n, w in weights_of(model).items()}, family.finetuned_weights)
        assert tokenizer("abc", add_special_tokens=False)["input_ids"]
        assert model.config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_the_finetuned_model_of_an_adapter_is_its_base_with_the_delta(
    family: Family, adapter: Callable[..., Path]
) -> None:
    folder = adapter("q_proj", "up_proj")
    delta = load_delta(base=family.base, finetuned=folder)
    peft = logits(PeftModel.from_pretrained(load_model(open_checkpoint(family.base)), folder))
    model, _ = finetuned_model(delta)
    np.testing.assert_allclose(logits(model), peft, rtol=1e-4, atol=1e-5)
    changed = {name: family.base_weights[name] + tensor for name, tensor in delta.items()}
    assert same_bits(weights_of(model), family.base_weights | changed)
    stored = weights_of(finetuned_model(delta, dtype="auto")[0])
    assert torch.equal(stored[UP], changed[UP].bfloat16())
    # Without its base there is no model.
    with pytest.raises(CheckpointError, match="holds differences alone; give the base"):
        finetuned_model(load_delta(base=None, finetuned=folder))


def test_editable_are_the_tensors_of_the_delta_but_no_classifiers_head(family: Family) -> None:
    assert set(load_delta(base=family.base, finetuned=family.finetuned).select()) == set(family.base_weights)
    for base in ("zoo:encoder/base", None):
        delta = load_delta(base=base, finetuned="zoo:encoder/strings")
        loaded = EditablePair.load(Pair("classifier", base, "zoo:encoder/strings"))
        assert list(delta.select()) == list(loaded.delta)
        left_out = set(delta) - set(loaded.delta)
        assert all("classifier" in name for name in left_out)
        assert bool(left_out) == (base is None)
    # A language model may have a tensor of that name.
    assert set(load_delta(finetuned="zoo:small/math", base=None).select()) == set(open_checkpoint("zoo:small/math"))


@pytest.mark.parametrize("base", ["zoo:encoder/base", "zoo:encoder/code", None])
def test_the_head_of_a_classifier_is_not_edited(base: str | None) -> None:
    loaded = EditablePair.load(Pair("classifier", base, "zoo:encoder/strings"))
    tuned = {name: tensor.float() for name, tensor in open_checkpoint("zoo:encoder/strings").items()}
    start = {name: tensor.float() for name, tensor in open_checkpoint(base).items()} if base else {}
    heads = [name for name in tuned if name.startswith("classifier")]
    assert heads
    dropped = under(loaded, Edit(Dare(1)))
    changed = {name for name, weight in dropped.items() if not torch.equal(weight, tuned[name])}
    assert changed
    for name, weight in dropped.items():
        if name in heads or (base and name not in start):
            assert torch.equal(weight, tuned[name])
        else:
            assert torch.equal(weight, start.get(name, torch.zeros_like(weight)))
    with (
        pytest.raises(ValueError, match=r"'classifier\.\*' selects none"),
        loaded.edited(Edit(Dare(1), "classifier.*"), 0),
    ):
        raise AssertionError("never entered")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Nothing is held yet; the names of the pairs that are loaded."""
    names: list[str] = []
    load = EditablePair.load

    def counted(pair: Pair, device: str = "cpu") -> EditablePair:
        names.append(pair.name)
        return load(pair, device)

    monkeypatch.setattr(editable, "_held", {})
    monkeypatch.setattr(EditablePair, "load", counted)
    yield names


def test_a_pair_is_loaded_once_for_all_threads(family: Family, loads: list[str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: held_pair(family.pair(), ("a", "b"), "cpu"), range(8)))
    assert len(set(map(id, found))) == 1
    assert loads == ["base → tuned"]
    # Under another name it is the same; with other content it is not.
    assert held_pair(family.pair("renamed"), ("a", "b"), "cpu") is found[0]
    assert held_pair(family.pair(), ("a", "changed"), "cpu") is not found[0]
    assert len(loads) == 2


def test_pairs_are_held_while_there_is_room(family: Family, loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["one", "two", "three"]
    first = held_pair(family.pair("one"), ["one"], "cpu")
    entries = sum(weight.numel() for weight in family.base_weights.values())
    assert first.nbytes == 4 * 4 * entries
    monkeypatch.setattr(editable, "HELD_BYTES", 2 * first.nbytes)
    for name in names[1:]:
        held_pair(family.pair(name), [name], "cpu")
    assert held_pair(family.pair("one"), ["one"], "cpu") is first
    release_pairs()
    # The oldest has gone.
    held_pair(family.pair("three"), ["three"], "cpu")
    assert loads == names
    held_pair(family.pair("one"), ["one"], "cpu")
    assert loads == [*names, "one"]


def test_two_large_pairs_are_never_held_together(
    family: Family, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editable, "HELD_BYTES", 0)
    held_pair(family.pair("one"), ["one"], "cpu")
    held_pair(family.pair("two"), ["two"], "cpu")
    assert len(editable._held) == 1
    release_pairs()
    assert not editable._held


def test_a_known_pair_stands_for_its_two_sources() -> None:
    named = "pair:wizardmath-13b"
    sources = ("meta-llama/Llama-2-13b-hf", "WizardLMTeam/WizardMath-13B-V1.0")
    assert Pair("a", named, named) == Pair("a", *sources)
    assert Pair("a", None, named) == Pair("a", None, sources[1])
    assert Pair("a", "base", named) == Pair("a", "base", sources[1])


@pytest.mark.parametrize("rate", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("scope", ["all", "mlp"])
def test_a_change_is_made_before_the_pruner(family: Family, loaded: EditablePair, rate: float, scope: str) -> None:
    for change in (Scaled(3.0), Permuted()):
        with loaded.edited(Edit(Dare(rate), scope, change), seed=5) as edited:
            found = {name: weight.detach().clone() for name, weight in parameters_of(edited.model).items()}
        for name in in_scope(scope, {name: tensor.dim() for name, tensor in family.delta.items()}):
            pruned = Dare(rate)(change(family.delta[name], name=name, seed=0), name=name, seed=5)
            assert torch.equal(found[name], family.base_weights[name] + pruned), (change, name)


def test_an_edited_delta_has_a_model(family: Family) -> None:
    delta = load_delta(base=family.base, finetuned=family.finetuned)
    model, _ = finetuned_model(delta.pruned(Scaled(3.0), seed=0))
    for name, weight in parameters_of(model).items():
        if name in family.delta:
            assert torch.equal(weight.detach(), family.base_weights[name] + 3 * family.delta[name])


def test_cells_of_changed_deltas_are_kept_apart(family: Family, tmp_path: Path) -> None:
    edits = [Edit(Dare(0.0)), Edit(Dare(0.0), change=Scaled(3.0)), Edit(Dare(0.0), change=Scaled(3.001))]
    table = sweep([family.pair()], [*edits, Edit(Dare(1.0), change=Scaled(3.0))], [Reads((UP,))], [0, 1], tmp_path)
    outcomes = [np.array(values) for values in table["outcomes"]]
    start, delta = (weights[UP].numpy().ravel() for weights in (family.base_weights, family.delta))
    expected = [start + delta, start + 3 * delta, start + np.float32(3.001) * delta, start]
    np.testing.assert_allclose(outcomes, expected, rtol=1e-6)
    assert table["method"].tolist() == ["DARE", "size × 3, DARE", "size × 3, DARE", "size × 3, DARE"]


def test_matrices_of_several_blocks_are_judged_by_two_threads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 544, "intermediate_size": 544, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, max_position_embeddings=64, **sizes))
    for name in ("base", "tuned"):
        model.save_pretrained(tmp_path / name)
        character_tokenizer().save_pretrained(tmp_path / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
    pair = Pair("base → tuned", str(tmp_path / "base"), str(tmp_path / "tuned"))
    pruners = [Dare(0.9), MagPrune(0.9), Magnitude(0.5, within="model"), Dare(0.5, "l2")]
    judges = [OutputDrift(("two texts", "of some length")), HiddenSimilarity(("a text",))]
    before = torch.get_num_threads()
    try:
        tables = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            tables.append(sweep([pair], pruners, judges, [0, 1], tmp_path / str(threads)))
    finally:
        torch.set_num_threads(before)
    columns = ["method", "seed", "metric", "value", "achieved_drop_rate"]
    pd.testing.assert_frame_equal(tables[0][columns], tables[1][columns], rtol=1e-4)
