"""Errors of weights and layers: closed forms on a real pair, and layer outputs recorded one text at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from delta_analysis.deltas.selection import in_scope
from delta_analysis.evaluation.models import parameters_of, patched
from delta_analysis.evaluation.protocol import Evaluation
from delta_analysis.evaluation.weight_error import N_POSITIONS, WeightDamage
from delta_analysis.pruning.pruners import Dare, Magnitude, MagPrune, Pruner
from delta_analysis.sweeps.pairs import Edit, EditablePair, Pair
from delta_analysis.zoo.tokenizer import character_tokenizer, masking_tokenizer
from tests.tiny_family import EMBED

BASE = "zoo:small/base"
TEXTS = ("2+2=4", "What is the third letter of apple?", "def double(x): return 2 * x")
WHOLE = (0.0, 0.0, 1.0)
"""Errors and signal where nothing is lost."""
GONE = (1.0, 1.0, 0.0)


@pytest.fixture(scope="module")
def loaded() -> EditablePair:
    return EditablePair.load(Pair("base → math", BASE, "zoo:small/math"))


@pytest.fixture(scope="module")
def damage(loaded: EditablePair) -> Evaluation:
    return WeightDamage(BASE, TEXTS).prepared(loaded.model, loaded.tokenizer)


def measured(damage: Evaluation, model: PreTrainedModel) -> tuple[float, float, float]:
    outcomes = damage(model, character_tokenizer())
    assert list(outcomes) == ["parameter_error", "layer_error", "signal_kept"]
    assert {(values.dtype, values.shape) for values in outcomes.values()} == {(np.dtype(np.float64), (1,))}
    error, of_layers, kept = (float(values[0]) for values in outcomes.values())
    return error, of_layers, kept


def under(damage: Evaluation, loaded: EditablePair, edit: Edit | None, seed: int = 0) -> tuple[float, float, float]:
    with loaded.edited(edit, seed) as edited:
        return measured(damage, edited.model)


def linear_layers(model: PreTrainedModel) -> dict[str, torch.nn.Linear]:
    return {f"{name}.weight": each for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[dict[str, list[torch.Tensor]]]:
    """The inputs of each linear layer while it lasts, (tokens, in) a forward pass."""
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in linear_layers(model)}
    handles = [
        layer.register_forward_hook(lambda _, x, __, name=name: inputs[name].append(x[0][0].double()))
        for name, layer in linear_layers(model).items()
    ]
    yield inputs
    for handle in handles:
        handle.remove()


def of_layers(
    loaded: EditablePair, pruned: dict[str, torch.Tensor], texts: tuple[str, ...], stride: int = 1
) -> tuple[float, float]:
    """Medians of the layers' errors and signals from matrices of inputs, one in `stride` of each text."""
    with recorded(loaded.model) as inputs, torch.no_grad():
        for text in texts:
            loaded.model(input_ids=torch.tensor([loaded.tokenizer(text)["input_ids"]]))
    errors, signals = [], []
    for name in inputs.keys() & loaded.delta.keys():
        x, delta = torch.cat([rows[::stride] for rows in inputs[name]]), loaded.delta[name].double()
        whole, part = x @ delta.T, x @ pruned[name].double().T
        errors.append(float(((part - whole) ** 2).sum() / (whole**2).sum()))
        signals.append(float((part * whole).sum() / (whole**2).sum()))
    assert len(errors) == 7 * loaded.model.config.num_hidden_layers
    return float(np.median(errors)), float(np.median(signals))


def test_nothing_dropped_is_exactly_nothing(loaded: EditablePair, damage: Evaluation) -> None:
    assert measured(damage, loaded.model) == WHOLE
    assert under(damage, loaded, None) == WHOLE


def test_all_dropped_is_exactly_everything(loaded: EditablePair, damage: Evaluation) -> None:
    assert under(damage, loaded, Edit(Dare(1.0))) == GONE


@given(st.floats(-4, 4, width=32))
@settings(deadline=None, max_examples=15)
def test_scaling_has_the_errors_of_the_formula(loaded: EditablePair, damage: Evaluation, factor: float) -> None:
    # A factor f leaves D̂ = f·D: the squared errors are (f - 1)², the signal kept is f.
    weights = {name: loaded.base[name] + factor * delta for name, delta in loaded.delta.items()}
    with patched(copy.deepcopy(loaded.model), weights) as model:
        expected = ((factor - 1) ** 2, (factor - 1) ** 2, factor)
        assert measured(damage, model) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("pruner", [Dare(0.5), Dare(0.9, "none"), Magnitude(0.7), MagPrune(0.5)], ids=repr)
@pytest.mark.parametrize("scope", ["all", "mlp", "*.layers.0.*"])
def test_errors_are_those_of_the_matrices(loaded: EditablePair, damage: Evaluation, pruner: Pruner, scope: str) -> None:
    scoped = in_scope(scope, {name: tensor.dim() for name, tensor in loaded.delta.items()})
    pruned = {n: pruner(t, name=n, seed=3) if n in scoped else t for n, t in loaded.delta.items()}
    wrong = sum(float(((pruned[n] - t).double() ** 2).sum()) for n, t in loaded.delta.items())
    energy = sum(float((t.double() ** 2).sum()) for t in loaded.delta.values())
    expected = (wrong / energy, *of_layers(loaded, pruned, TEXTS))
    assert under(damage, loaded, Edit(pruner, scope), seed=3) == pytest.approx(expected, rel=1e-4)


def test_layers_outside_the_scope_are_whole(loaded: EditablePair, damage: Evaluation) -> None:
    # Of a layer's seven matrices four are attention's, so that they make the median.
    energies = {name: float((tensor.double() ** 2).sum()) for name, tensor in loaded.delta.items()}
    for scope, layers in (("attention", GONE[1:]), ("mlp", WHOLE[1:]), ("norms", WHOLE[1:])):
        lost = in_scope(scope, {name: tensor.dim() for name, tensor in loaded.delta.items()})
        share = sum(energies[name] for name in lost) / sum(energies.values())
        found = under(damage, loaded, Edit(Dare(1.0), scope))
        assert found == pytest.approx((share, *layers))


def test_without_a_base_the_weights_are_what_is_damaged(loaded: EditablePair) -> None:
    damage = WeightDamage(None, TEXTS).prepared(loaded.model, loaded.tokenizer)
    assert measured(damage, loaded.model) == WHOLE
    model = copy.deepcopy(loaded.model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.5)
    assert measured(damage, model) == pytest.approx((0.25, 0.25, 0.5))
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert measured(damage, model) == GONE


def tiny(**sizes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {"vocab_size": 97, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, **sizes}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, tie_word_embeddings=True, **settings)).eval()


def test_tokens_that_the_base_lacks_are_left_out(tmp_path: Path) -> None:
    base = tiny()
    base.save_pretrained(tmp_path / "base")
    tuned = tiny(vocab_size=101)
    damage = WeightDamage(str(tmp_path / "base"), TEXTS).prepared(tuned, character_tokenizer())
    embeddings = parameters_of(tuned)[EMBED].detach().clone()
    embeddings[97:] += 1
    with patched(copy.deepcopy(tuned), {EMBED: embeddings}) as model:
        assert measured(damage, model) == WHOLE
    weights = {name: weight.detach() for name, weight in base.named_parameters()}
    weights[EMBED] = torch.cat([weights[EMBED], embeddings[97:]])
    with patched(copy.deepcopy(tuned), weights) as model:
        assert measured(damage, model) == GONE


def test_a_layer_that_was_not_tuned_loses_nothing(tmp_path: Path) -> None:
    base, tuned = tiny(), tiny()
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        tuned.model.layers[0].self_attn.q_proj.weight.add_(0.01)
    damage = WeightDamage(str(tmp_path / "base"), TEXTS).prepared(tuned, character_tokenizer())
    # All of the delta is gone with one layer of seven: the median does not see it.
    assert measured(damage, base) == (1.0, 0.0, 1.0)


def test_an_encoder_is_measured_too() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=98, **sizes)).eval()
    damage = WeightDamage(None, TEXTS).prepared(model, masking_tokenizer())
    assert measured(damage, model) == WHOLE


@pytest.mark.parametrize(
    ("lengths", "stride"), [([3, 40, 5], 1), ([200, 256, 55], 1), ([200, 256, 200], 2), ([256] * 8, 8)]
)
def test_positions_are_spread_over_the_texts(loaded: EditablePair, lengths: list[int], stride: int) -> None:
    assert sum(lengths) // N_POSITIONS in (0, stride)
    texts = tuple(("abcdefg" * 40)[:n] for n in lengths)
    pruned = {name: Dare(0.5)(tensor, name=name, seed=0) for name, tensor in loaded.delta.items()}
    found = under(WeightDamage(BASE, texts).prepared(loaded.model, loaded.tokenizer), loaded, Edit(Dare(0.5)))
    assert found[1:] == pytest.approx(of_layers(loaded, pruned, texts, stride), rel=1e-4)


def test_what_follows_256_tokens_and_empty_texts_changes_nothing(loaded: EditablePair) -> None:
    long = "abc " * 64
    edit = Edit(Dare(0.5))
    expected = under(WeightDamage(BASE, (long,)).prepared(loaded.model, loaded.tokenizer), loaded, edit)
    for texts in ((long + "and more",), ("", long, "")):
        found = under(WeightDamage(BASE, texts).prepared(loaded.model, loaded.tokenizer), loaded, edit)
        assert found == expected


def test_no_hook_is_left_and_the_model_is_as_it_was(loaded: EditablePair) -> None:
    before = {name: weight.clone() for name, weight in parameters_of(loaded.model).items()}
    WeightDamage(BASE, TEXTS).prepared(loaded.model, loaded.tokenizer)
    assert not any(module._forward_pre_hooks for module in loaded.model.modules())
    assert all(torch.equal(weight, before[name]) for name, weight in parameters_of(loaded.model).items())


def test_threads_share_what_is_prepared(loaded: EditablePair, damage: Evaluation) -> None:
    edits = [Edit(Dare(rate)) for rate in (0.3, 0.5, 0.9)] * 3
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda edit: under(damage, loaded, edit), edits))
    assert found == [under(damage, loaded, edit) for edit in edits]


def test_it_says_what_it_is(loaded: EditablePair, damage: Evaluation) -> None:
    plan = WeightDamage(BASE, TEXTS, name="weights")
    assert "of 3 texts" in plan.protocol
    ready = plan.prepared(loaded.model, loaded.tokenizer)
    assert (ready.name, ready.protocol, ready.texts) == ("weights", plan.protocol, TEXTS)
    again = damage.prepared(loaded.model, loaded.tokenizer)
    edit = Edit(Dare(0.5))
    assert under(again, loaded, edit) == under(damage, loaded, edit)


@pytest.mark.parametrize("texts", [(), ("",)], ids=["no text", "an empty one"])
def test_without_texts_there_is_nothing_to_measure(loaded: EditablePair, texts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="there is nothing to measure"):
        WeightDamage(BASE, texts).prepared(loaded.model, loaded.tokenizer)


def test_it_has_to_be_prepared(loaded: EditablePair) -> None:
    with pytest.raises(ValueError, match=r"call \.prepared\(untouched, tokenizer\) first"):
        WeightDamage(BASE, TEXTS)(loaded.model, loaded.tokenizer)
