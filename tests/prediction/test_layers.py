"""Closed forms of the error in a layer's output, against drawn masks and against the layers themselves."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import delta_analysis as da
from delta_analysis.checkpoints.checkpoint import open_checkpoint
from delta_analysis.deltas.delta import load_delta
from delta_analysis.evaluation import tokens as texts_module
from delta_analysis.evaluation.models import finetuned_model, load_model
from delta_analysis.prediction.layer_inputs import Matrix
from delta_analysis.prediction.layers import ReadyPruners, _measured, delta_noise, layer_noise
from delta_analysis.pruning import Pruner
from delta_analysis.pruning.transforms import Scaled
from delta_analysis.zoo.tokenizer import character_tokenizer
from tests.tiny_family import EMBED, NORM, UP, Family, make_family

TEXTS = ["reverse abc\n", "a", "what is 23 plus 45?\n", "spell the word alphabet backwards"]
PAIR = ("zoo:tiny/base", "zoo:tiny/instruct")
ENCODER = ("zoo:encoder/base", "zoo:encoder/strings")
SEEDS = 200
SIGMAS = 5
"""Width of the statistical bounds, in standard errors of the mean over masks."""
EXACT = (da.Magnitude(1.0), da.Magnitude(0.5), da.Magnitude(0.7, "row"), da.Magnitude(0.6, "model", "inverse_keep"))
RANDOM = (
    da.Dare(0.5),
    da.Dare(0.9),
    da.Dare(0.9, "none"),
    da.Dare(0.9, 4.0),
    da.Dare(0.8, "l1"),
    da.Dare(0.8, "l2"),
    da.MagPrune(0.8),
    da.MagPrune(0.5, window=0.4, within="tensor"),
    da.MagPrune(0.8, rescale="none"),
    da.MagPrune(0.8, rescale=3.0),
    da.MagPrune(0.8, rescale="l2"),
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Calls(NamedTuple):
    """A model in float64, and the arguments of each call of its modules, the texts read one by one."""

    model: PreTrainedModel
    arguments: dict[str, list[tuple[torch.Tensor, ...]]]


def recorded(base: str | Path | None, finetuned: str | Path, texts: list[str] = TEXTS) -> Calls:
    model, tokenizer = finetuned_model(load_delta(base=base, finetuned=finetuned))
    model = model.double()
    found: dict[str, list[tuple[torch.Tensor, ...]]] = {}

    def record(path: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            found.setdefault(path, []).append(arguments)

        return hook

    hooks = [module.register_forward_pre_hook(record(path)) for path, module in model.named_modules()]
    with torch.no_grad():
        for text in texts:
            special = not model.can_generate()
            model(input_ids=torch.tensor([tokenizer(text, add_special_tokens=special)["input_ids"]]))
    for hook in hooks:
        hook.remove()
    return Calls(model, found)


def made(calls: Calls, path: str) -> torch.Tensor:
    module = calls.model.get_submodule(path)
    with torch.no_grad():
        outputs = [module.forward(*arguments) for arguments in calls.arguments[path]]
    return torch.cat([each.flatten(0, -2) for each in outputs])


def patched_energies(
    base: str | Path | None, finetuned: str | Path, pruners: tuple[Pruner, ...] = EXACT, texts: list[str] = TEXTS
) -> pd.DataFrame:
    """Mean squares of what changes in each module's output when its weight is given a pruned delta."""
    delta, calls = load_delta(base=base, finetuned=finetuned), recorded(base, finetuned, texts)
    named = {id(weight): n for n, weight in calls.model.named_parameters(remove_duplicate=False) if n in delta}
    deltas = [delta.pruned(pruner, seed=0) for pruner in pruners]
    rows = []
    for path, module in calls.model.named_modules():
        for parameter, weight in module.named_parameters(recurse=False):
            if any(module.children()) or id(weight) not in named:
                continue
            name, kept = named[id(weight)], weight.detach().clone()
            whole = made(calls, path)

            def changed(
                entries: torch.Tensor,
                weight: torch.nn.Parameter = weight,
                kept: torch.Tensor = kept,
                path: str = path,
                whole: torch.Tensor = whole,
            ) -> float:
                with torch.no_grad():
                    weight[: len(entries)] += entries
                    energy = (made(calls, path) - whole).square().sum(dim=-1).mean()
                    weight.copy_(kept)
                return float(energy)

            matrix = parameter == "weight" and isinstance(module, torch.nn.Linear | Conv1D)
            energy = changed(-kept) if matrix else float(whole.square().sum(dim=-1).mean())
            for pruned in deltas:
                error = changed(pruned[name] - delta[name])
                rows.append({"tensor": name, "positions": len(whole), "output": energy, "error": error})
    return pd.DataFrame(rows)


def agree(table: pd.DataFrame, expected: pd.DataFrame, rtol: float = 1e-4) -> None:
    assert table["tensor"].tolist() == expected["tensor"].tolist()
    for column in ("positions", "output", "error"):
        np.testing.assert_allclose(table[column], expected[column], rtol=rtol, atol=1e-12, err_msg=column)


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def save_pair(model: PreTrainedModel, folder: Path) -> tuple[Path, Path]:
    """A model of random weights, biases and norms too, and one near it."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter += 0.3 * normal(*parameter.shape, seed=i)
        tuned = copy.deepcopy(model)
        for i, parameter in enumerate(tuned.parameters()):
            parameter += 0.05 * normal(*parameter.shape, seed=100 + i)
    return save(model, folder / "base"), save(tuned, folder / "tuned")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[tuple[PreTrainedModel, dict[str, torch.Tensor]]]:
    """The models that are loaded, each with its weights as they were then."""
    loaded = []

    def watched(*arguments: object) -> object:
        model, tokenizer = finetuned_model(*arguments)  # type: ignore[arg-type]
        loaded.append((model, {name: weight.clone() for name, weight in model.state_dict().items()}))
        return model, tokenizer

    monkeypatch.setattr(sys.modules["delta_analysis.prediction.layers"], "finetuned_model", watched)
    return loaded


def untouched(model: PreTrainedModel, before: dict[str, torch.Tensor]) -> bool:
    hooks = [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]
    after = model.state_dict()
    return not hooks and before.keys() == after.keys() and all(torch.equal(after[n], w) for n, w in before.items())


# Closed forms against masks that are drawn.


@pytest.mark.parametrize(
    ("pair", "tensors"),
    [
        (PAIR, ["model.layers.0.self_attn.v_proj.weight", "model.layers.3.mlp.down_proj.weight"]),
        (("zoo:tiny/base", "zoo:tiny/code"), ["model.layers.2.self_attn.o_proj.weight"]),
        (ENCODER, ["bert.encoder.layer.1.attention.self.key.weight"]),
    ],
    ids=["instruct", "code", "encoder"],
)
def test_expected_error_is_the_mean_over_masks(pair: tuple[str, str], tensors: list[str]) -> None:
    table = layer_noise(*pair, TEXTS, pruners=RANDOM).set_index("tensor")
    delta, calls = load_delta(base=pair[0], finetuned=pair[1]), recorded(*pair)
    for name in tensors:
        x = torch.cat([each.flatten(0, -2) for (each,) in calls.arguments[name.removesuffix(".weight")]])
        moment, tensor = x.T @ x / len(x), delta[name]
        signal = float(((tensor.double() @ moment) * tensor).sum())
        for pruner, expected, kept in zip(RANDOM, *table.loc[name, ["error", "signal_kept"]].to_numpy().T, strict=True):
            wrong = [(pruner(tensor, name=name, seed=seed) - tensor).double() for seed in range(SEEDS)]
            errors = np.array([float(((each @ moment) * each).sum()) for each in wrong])
            shares = np.array([1 + float(((each @ moment) * tensor).sum()) / signal for each in wrong])
            # Factors that restore a norm depend a little on the mask.
            slack = 0.01 if pruner.rescale in ("l1", "l2") else 0.0
            assert abs(errors.mean() - expected) <= SIGMAS * errors.std() / SEEDS**0.5 + slack * expected, (
                name,
                pruner,
            )
            assert errors.std() / SEEDS**0.5 < 0.05 * expected
            assert abs(shares.mean() - kept) <= SIGMAS * shares.std() / SEEDS**0.5 + slack * kept, (name, pruner)


@pytest.mark.parametrize("pair", [PAIR, ENCODER], ids=["decoder", "encoder"])
def test_expected_error_follows_from_signal_and_noise(pair: tuple[str, str]) -> None:
    p, factor = 0.8, 3.0
    pruners = (da.Dare(p), da.Dare(p, "none"), da.Dare(p, factor), da.Dare(p, "l1"), da.Dare(p, "l2"))
    table = layer_noise(*pair, TEXTS, pruners=pruners)
    signal, noise = table["signal"][::5].to_numpy(), table["noise"][::5].to_numpy()
    norm = (1 - p) ** -0.5
    expected = [
        p / (1 - p) * noise,
        p**2 * signal + p * (1 - p) * noise,
        ((1 - p) * factor - 1) ** 2 * signal + p * (1 - p) * factor**2 * noise,
        p / (1 - p) * noise,
        ((1 - p) * norm - 1) ** 2 * signal + p * noise,
    ]
    for i, each in enumerate(expected):
        np.testing.assert_allclose(table["error"][i::5], each, rtol=1e-5)
    kept = [1, 1 - p, (1 - p) * factor, 1, (1 - p) * norm]
    np.testing.assert_allclose(table["signal_kept"], kept * len(signal), rtol=1e-5)
    np.testing.assert_allclose(table["gain"], table["signal"] / table["noise"])
    np.testing.assert_allclose(table["noise_share"], table["noise"] / table["output"])
    np.testing.assert_allclose(table["error_share"], table["error"] / table["output"])
    assert table["method"].tolist()[:5] == [pruner.method for pruner in pruners]
    assert set(table["drop_rate"]) == {p}


def test_magprunes_error_is_a_sum_over_entries() -> None:
    name, pruner = "model.layers.1.mlp.gate_proj.weight", da.MagPrune(0.7, window=0.3)
    table = layer_noise(*PAIR, TEXTS, pruners=[pruner]).set_index("tensor")
    tensor = load_delta(base=PAIR[0], finetuned=PAIR[1])[name].double()
    x = torch.cat([each.flatten(0, -2) for (each,) in recorded(*PAIR).arguments[name.removesuffix(".weight")]])
    rank = tensor.abs().argsort(dim=1).argsort(dim=1).double()
    drop = 0.7 + 0.3 * (0.5 - rank / (tensor.shape[1] - 1))
    expected = float((tensor.square() * x.square().mean(dim=0) * drop / (1 - drop)).sum())
    assert table.loc[name, "error"] == pytest.approx(expected, rel=1e-4)


# What is not random against the modules themselves, with another delta put in.


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=8, n_layer=1, n_head=2, n_positions=64))


def bert() -> PreTrainedModel:
    size = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=97, max_position_embeddings=64, is_decoder=True, **size))


def opt() -> PreTrainedModel:
    size = {"hidden_size": 8, "ffn_dim": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=97, max_position_embeddings=64, word_embed_proj_dim=8, **size))


QWEN = {"vocab_size": 97, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}


def qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=1, tie_word_embeddings=False, **QWEN))


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(num_key_value_heads=1, head_dim=4, tie_word_embeddings=True, **QWEN))


@pytest.mark.parametrize("pair", [PAIR, ENCODER, (None, ENCODER[1])], ids=["decoder", "encoder", "without base"])
def test_every_row_is_what_its_module_makes(pair: tuple[str | None, str]) -> None:
    agree(layer_noise(*pair, TEXTS, pruners=EXACT), patched_energies(*pair))


def test_matrices_of_several_blocks_on_two_threads(tmp_path: Path) -> None:
    wide = QWEN | {"hidden_size": 544, "intermediate_size": 544}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, tie_word_embeddings=False, **wide))
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    pair = save(model, tmp_path / "base"), save(tuned, tmp_path / "tuned")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        table = layer_noise(*pair, TEXTS, pruners=EXACT)
    finally:
        torch.set_num_threads(before)
    agree(table, patched_energies(*pair), rtol=2e-3)


@pytest.mark.parametrize("make", [gpt2, bert, opt, qwen2, qwen3])
def test_every_row_is_what_its_module_makes_in_any_architecture(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    pair = save_pair(make(), tmp_path)
    table = layer_noise(*pair, TEXTS, pruners=EXACT)
    agree(table, patched_energies(*pair), rtol=2e-4)
    # All of the delta is in the table.
    assert set(table["tensor"]) == set(load_delta(base=pair[0], finetuned=pair[1]))


def test_with_all_dropped_the_error_is_the_signal_and_with_nothing_dropped_it_is_0() -> None:
    ends = (da.Dare, da.MagPrune, da.Magnitude, lambda p: da.Dare(p, "none"), lambda p: da.MagPrune(p, rescale="l2"))
    for pair, inputs in ((PAIR, TEXTS), (ENCODER, TEXTS), (PAIR, None)):
        table = layer_noise(*pair, inputs, pruners=[make(p) for p in (0.0, 1.0) for make in ends])
        whole = table["signal"] if inputs else table["noise"]
        np.testing.assert_allclose(table["error"], np.where(table["drop_rate"] == 1, whole, 0), rtol=1e-6)
        if inputs:
            np.testing.assert_allclose(table["signal_kept"], table["drop_rate"] == 0, atol=1e-6)


# What the columns mean.


def test_without_inputs_energies_are_squared_norms() -> None:
    pruners = (da.Dare(0.9), da.Dare(0.9, "none"), da.Magnitude(0.5))
    table = layer_noise(*PAIR, pruners=pruners)
    delta, tuned = load_delta(base=PAIR[0], finetuned=PAIR[1]), open_checkpoint(PAIR[1])
    assert table["tensor"].tolist() == [name for name in delta for _ in pruners]
    for name, rows in table.groupby("tensor"):
        norm = float(delta[name].double().norm()) ** 2
        dropped = pruners[2](delta[name], name=name, seed=0) - delta[name]
        np.testing.assert_allclose(rows["noise"], norm)
        np.testing.assert_allclose(rows["output"], float(tuned[name].double().norm()) ** 2, rtol=1e-5)
        np.testing.assert_allclose(
            rows["error"], [9 * norm, 0.9**2 * norm + 0.09 * norm, float(dropped.double().norm()) ** 2], rtol=1e-5
        )
    assert table["signal"].isna().all()
    assert table[["gain", "signal_kept"]].isna().all(axis=None)
    assert set(table["positions"]) == {1}


def test_a_delta_along_its_inputs_has_a_large_gain(tmp_path: Path, family: Family) -> None:
    # Of a text of one letter all positions of the first layer have one input: x.
    name = "model.layers.0.self_attn.q_proj.weight"
    x = recorded(family.base, family.base, ["a"]).arguments[name.removesuffix(".weight")][0][0].flatten()
    model = load_model(open_checkpoint(family.base))
    along = torch.outer(normal(len(x)).double(), x)
    with torch.no_grad():
        model.get_parameter(name).add_(0.1 * along)
    folder = save(model, tmp_path)
    (row,) = layer_noise(family.base, folder, ["a"]).query("tensor == @name").to_dict("records")
    expected = float(x.square().sum() ** 2 / x.pow(4).sum())
    assert expected > 2
    assert row["gain"] == pytest.approx(expected, rel=1e-3)
    # Across its inputs it makes nothing of them, and the noise is as it was.
    across = torch.outer(normal(len(x)).double(), x.flip(0) * torch.tensor([1, -1] * (len(x) // 2)))
    across -= torch.outer(across @ x, x) / x.square().sum()
    with torch.no_grad():
        model.get_parameter(name).add_(0.1 * (across - along))
    (row,) = layer_noise(family.base, save(model, tmp_path), ["a"]).query("tensor == @name").to_dict("records")
    assert row["gain"] < 1e-6


def test_what_feeds_an_output_alone_has_a_gain_of_one() -> None:
    for pair in (PAIR, ENCODER):
        table = layer_noise(*pair, TEXTS)
        np.testing.assert_allclose(table.loc[table["kind"] != "linear", "gain"], 1, rtol=1e-5)
        assert table.loc[table["kind"] == "linear", "gain"].between(1.2, 20).mean() > 0.5


def test_a_tied_embedding_has_a_second_row_as_the_head() -> None:
    table = layer_noise(*PAIR, TEXTS)
    first, second = table[table["tensor"] == EMBED].to_dict("records")
    columns = ["layer", "module", "kind"]
    assert [first[column] for column in columns] == [-1, "embed_tokens", "embedding"]
    assert [second[column] for column in columns] == [-1, "lm_head", "linear"]
    assert table["tensor"].iloc[[0, -1]].tolist() == [EMBED, EMBED]
    assert set(table["positions"]) == {sum(map(len, TEXTS))}
    # Without inputs nothing is used, and it has one.
    assert layer_noise(*PAIR)["tensor"].tolist().count(EMBED) == 1


def test_kinds_and_modules_of_an_encoder() -> None:
    table = layer_noise(*ENCODER, TEXTS).set_index("tensor")
    assert set(table["kind"]) == {"linear", "embedding", "norm", "bias"}
    row = table.loc["bert.encoder.layer.1.attention.output.LayerNorm.bias"]
    assert row[["layer", "module", "kind"]].tolist() == [1, "encoder.attention.output.LayerNorm.bias", "bias"]
    # The head, which the base has not, is not in the delta.
    assert not table.index.str.startswith("classifier").any()


# Invariants.

PRUNERS = st.sampled_from(
    [
        da.Dare,
        lambda p: da.Dare(p, "none"),
        lambda p: da.Dare(p, 2.5),
        lambda p: da.Dare(p, "l2"),
        da.MagPrune,
        lambda p: da.MagPrune(p, within="tensor", rescale="none"),
        da.Magnitude,
        lambda p: da.Magnitude(p, "row"),
    ]
)


def energies(x: torch.Tensor, delta: torch.Tensor, pruner: Pruner) -> tuple[float, ...]:
    """Signal, noise, error and kept signal."""
    found = _measured(Matrix(x), ReadyPruners.of({}, (pruner,), 0), "w", delta, 1.0, len(x))  # type: ignore[arg-type]
    return found.signal, found.noise, float(found.error[0]), float(found.kept[0])


@settings(deadline=None)
@given(PRUNERS, st.floats(0.01, 0.99), st.integers(0, 10**6), st.floats(0.01, 100))
def test_energies_grow_with_the_square_of_the_delta_and_of_its_inputs(
    make: Callable[[float], Pruner], p: float, seed: int, k: float
) -> None:
    x, delta = normal(6, 9, seed=seed), normal(5, 9, seed=seed + 1)
    before = energies(x, delta, make(p))
    expected = pytest.approx([k**2 * each for each in before], rel=1e-4)
    assert energies(x, k * delta, make(p)) == expected
    assert energies(k * x, delta, make(p)) == expected


@settings(deadline=None)
@given(
    st.sampled_from([da.Dare, lambda p: da.Dare(p, "l1"), da.MagPrune]),
    st.lists(st.floats(0, 0.999), min_size=2, max_size=5),
    st.integers(0, 10**6),
)
def test_the_error_of_what_is_unbiased_grows_with_the_drop_rate(
    make: Callable[[float], Pruner], rates: list[float], seed: int
) -> None:
    x, delta = normal(6, 9, seed=seed), normal(5, 9, seed=seed + 1)
    errors = [energies(x, delta, make(p))[2] for p in sorted(rates)]
    assert (np.diff(errors) >= -1e-5 * np.abs(errors[1:])).all()


@settings(deadline=None)
@given(PRUNERS, st.floats(0, 1), st.integers(0, 10**6))
def test_the_error_is_no_less_than_what_the_lost_signal_makes(
    make: Callable[[float], Pruner], p: float, seed: int
) -> None:
    # E‖D̂x - Dx‖² · ‖Dx‖² ≥ ⟨E D̂x - Dx, Dx⟩²
    signal, _, error, kept = energies(normal(6, 9, seed=seed), normal(5, 9, seed=seed + 1), make(p))
    assert error * signal >= (kept - signal) ** 2 * (1 - 1e-4) - 1e-6


def test_a_probability_that_is_rounded_below_0_has_no_error() -> None:
    p = 0.07276092294436226
    pruner, delta = da.MagPrune(p, window=2 * p), torch.arange(1.0, 8.0)[None]
    drop = pruner.law(delta, name="w").drop
    assert isinstance(drop, torch.Tensor)
    assert drop.min() == 0
    expected = float((delta.square() * drop / (1 - drop)).sum())
    assert energies(torch.ones(1, 7), delta, pruner)[2] == pytest.approx(expected)


# Texts, batches, models.


def test_texts_together_are_as_texts_one_by_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    texts = ["a", "x" * 40, *TEXTS]
    for pair in (PAIR, ENCODER, save_pair(gpt2(), tmp_path / "gpt2"), save_pair(opt(), tmp_path / "opt")):
        whole = layer_noise(*pair, texts, pruners=RANDOM[:3])
        alone = [layer_noise(*pair, [text], pruners=RANDOM[:3]) for text in texts]
        assert whole["positions"].tolist() == sum(each["positions"] for each in alone).tolist()
        for column in ("signal", "noise", "output", "error"):
            mean = sum(each[column] * each["positions"] for each in alone) / whole["positions"]
            np.testing.assert_allclose(whole[column], mean, rtol=1e-4, atol=1e-12)


def test_several_batches_are_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pruners = (*RANDOM[:4], *EXACT)
    whole = layer_noise(*PAIR, TEXTS, pruners=pruners)
    monkeypatch.setattr(texts_module, "TOKENS_A_BATCH", 20)
    pd.testing.assert_frame_equal(layer_noise(*PAIR, TEXTS, pruners=pruners), whole, rtol=1e-4)
    pd.testing.assert_frame_equal(layer_noise(*PAIR, TEXTS[::-1], pruners=pruners), whole, rtol=1e-4)


def test_only_the_first_tokens_of_a_text_are_read() -> None:
    whole = layer_noise(*PAIR, [text[:7] for text in TEXTS])
    pd.testing.assert_frame_equal(layer_noise(*PAIR, TEXTS, most_tokens=7), whole)
    assert set(whole["positions"]) == {7 * 3 + 1}


@pytest.mark.parametrize("pair", [PAIR, ENCODER], ids=["decoder", "encoder"])
def test_a_model_of_half_precision_is_near(
    pair: tuple[str, str], models: list[tuple[PreTrainedModel, dict[str, torch.Tensor]]]
) -> None:
    pruners = (*RANDOM, *EXACT)
    half, full = (layer_noise(*pair, TEXTS, pruners=pruners, dtype=dtype) for dtype in ("auto", "float32"))
    assert [model.dtype for model, _ in models] == [torch.float16, torch.float32]
    assert all(untouched(*each) for each in models)
    pd.testing.assert_frame_equal(half, full, rtol=0.02)


def test_bfloat16_with_biases_and_norms_of_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for make in (qwen2, qwen3, gpt2):
        pair = save_pair(make().bfloat16(), tmp_path / make.__name__)
        half, full = (layer_noise(*pair, TEXTS, pruners=RANDOM[:4], dtype=dtype) for dtype in ("auto", "float32"))
        pd.testing.assert_frame_equal(half, full, rtol=0.1)


def test_the_model_is_as_before_and_no_hook_is_left(
    models: list[tuple[PreTrainedModel, dict[str, torch.Tensor]]],
) -> None:
    for pair in (PAIR, ENCODER):
        layer_noise(*pair, TEXTS, pruners=(*RANDOM, *EXACT))
    assert len(models) == 2
    assert all(untouched(*each) for each in models)


def test_an_edited_delta_meets_the_inputs_of_the_finetune() -> None:
    delta = load_delta(base=PAIR[0], finetuned=PAIR[1])
    whole, half = delta_noise(delta, TEXTS), delta_noise(delta.pruned(da.Magnitude(0.5), seed=0), TEXTS)
    pd.testing.assert_frame_equal(whole, layer_noise(*PAIR, TEXTS))
    for column in ("output", "positions"):
        pd.testing.assert_series_equal(whole[column], half[column])
    assert (half["noise"] < whole["noise"]).all()
    kept = delta_noise(delta.pruned(da.Dare(0.9), seed=3), TEXTS, pruners=[da.Dare(1.0)])
    name = "model.layers.1.self_attn.q_proj.weight"
    x = torch.cat([each.flatten(0, -2) for (each,) in recorded(*PAIR).arguments[name.removesuffix(".weight")]])
    energy = (x @ da.Dare(0.9)(delta[name], name=name, seed=3).double().T).square().sum(dim=-1).mean()
    (row,) = kept[kept["tensor"] == name].to_dict("records")
    assert row["signal"] == pytest.approx(float(energy), rel=1e-4)
    assert row["error"] == pytest.approx(row["signal"])


def test_a_model_of_an_edited_delta_has_its_own_inputs(tmp_path: Path) -> None:
    delta = load_delta(base=PAIR[0], finetuned=PAIR[1]).pruned(Scaled(2.0), seed=0)
    da.save_checkpoint(open_checkpoint(PAIR[0]), delta, tmp_path / "edited", dtype="float32")
    expected = layer_noise(PAIR[0], tmp_path / "edited", TEXTS)
    pd.testing.assert_frame_equal(delta_noise(delta, TEXTS, of_finetuned=False), expected, rtol=1e-4)


def test_a_grown_vocabulary_counts_in_the_rows_that_both_have(family: Family, tmp_path: Path) -> None:
    torch.manual_seed(1)
    tuned = load_model(open_checkpoint(family.finetuned))
    tuned.resize_token_embeddings(99, mean_resizing=False)
    folder = save(tuned, tmp_path)
    # The model reads 32 tokens.
    texts = TEXTS[:3]
    table = layer_noise(family.base, folder, texts, pruners=EXACT)
    agree(table, patched_energies(family.base, folder, texts=texts))
    smaller = layer_noise(family.base, family.finetuned, texts, pruners=EXACT)
    pd.testing.assert_series_equal(table["signal"], smaller["signal"], rtol=1e-4)


def test_names_without_the_prefix_of_the_whole_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pair = save_pair(gpt2(), tmp_path)
    bare = []
    for folder in pair:
        model = GPT2LMHeadModel.from_pretrained(folder)
        bare.append(save(model.transformer, tmp_path / f"bare {folder.name}"))
    table, whole = layer_noise(*bare, TEXTS), layer_noise(*pair, TEXTS)
    assert "h.0.ln_1.weight" in set(table["tensor"])
    assert (whole["tensor"] == "transformer." + table["tensor"]).all()
    columns = ["layer", "module", "kind", "signal", "noise", "output", "error"]
    pd.testing.assert_frame_equal(table[columns], whole[columns])


def test_weights_of_other_modules_are_missing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 8, "state_size": 4, "num_hidden_layers": 1, "conv_kernel": 2, "time_step_rank": 2}
    pair = save_pair(MambaForCausalLM(MambaConfig(vocab_size=97, **size)), tmp_path)
    with pytest.warns(UserWarning, match=r"6 of 12 tensors are not in the table, such as .*A_log"):
        table = layer_noise(*pair, TEXTS)
    mixer = "backbone.layers.0.mixer."
    # The mixer multiplies by the last two itself.
    own = ("A_log", "D", "conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias")
    missing = {mixer + name for name in own}
    names = set(load_delta(base=tmp_path / "base", finetuned=tmp_path / "tuned"))
    assert missing < names
    assert set(table["tensor"]) == names - missing


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_is_the_same_as_its_merged_model(family: Family, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    wrapped = get_peft_model(load_model(open_checkpoint(family.base)), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * normal(*parameter.shape, seed=len(name)))
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = save(wrapped.merge_and_unload(), tmp_path / "merged")
    pruners = (*RANDOM[:4], da.Magnitude(0.5))
    table = layer_noise(family.base, tmp_path / "adapter", TEXTS, pruners=pruners)
    assert table["module"].unique().tolist() == ["self_attn.q_proj", "mlp.up_proj"]
    whole = layer_noise(family.base, merged, TEXTS, pruners=pruners)
    whole = whole[whole["tensor"].isin(table["tensor"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(table, whole, rtol=1e-3)


# What is refused.


@dataclass(frozen=True)
class Coin:
    """Keeps all or nothing: random, and without a law."""

    drop_rate: float = 0.5
    rescale: str = "none"
    method: str = "coin"
    random: bool = True

    def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
        return tensor * (seed % 2)


def test_pruners_are_asked_for() -> None:
    for bad in ([], (), da.Dare(0.5), None, "DARE", [0.9]):
        with pytest.raises(ValueError, match=r"pruners must be a list of at least one, such as \[Dare\(0.9\)\]; not "):
            layer_noise(*PAIR, TEXTS, pruners=bad)  # type: ignore[arg-type]
    for inputs in (TEXTS, None):
        with pytest.raises(ValueError, match=r"Coin\(.*is random and has no method law"):
            layer_noise(*PAIR, inputs, pruners=[da.Dare(0.5), Coin()])
    # One that is not random needs no law.
    table = layer_noise(*PAIR, TEXTS, pruners=[Coin(random=False)])
    np.testing.assert_allclose(table["error"], table["signal"], rtol=1e-6)


def test_texts_are_asked_for() -> None:
    with pytest.raises(ValueError, match="there is no text"):
        layer_noise(*PAIR, [])
    with pytest.raises(ValueError, match=r"inputs must be a list of texts, and this is a single one; give \[text\]"):
        layer_noise(*PAIR, TEXTS[0])
    with pytest.raises(ValueError, match="most_tokens must be a whole number of at least 1"):
        layer_noise(*PAIR, TEXTS, most_tokens=0)


@pytest.fixture
def broken(family: Family, tmp_path: Path) -> Iterator[Path]:
    model = load_model(open_checkpoint(family.finetuned))
    with torch.no_grad():
        model.get_parameter(UP)[2, 3] = math.nan
        model.get_parameter(NORM)[1] = math.inf
    yield save(model, tmp_path)


def test_nan_in_the_delta_is_named(
    family: Family, broken: Path, models: list[tuple[PreTrainedModel, dict[str, torch.Tensor]]]
) -> None:
    message = rf"tensor '{UP}' of the delta has 1 NaN or infinite entries of {family.delta[UP].numel()}"
    with pytest.raises(ValueError, match=message):
        layer_noise(family.base, broken, TEXTS)
    (model, _) = models[0]
    assert not [hook for module in model.modules() for hook in module._forward_hooks]
    with pytest.raises(ValueError, match=r"of the delta has 1 NaN or infinite entries"):
        layer_noise(family.base, broken)
