"""Sweeps with evaluations that read the weights they are given, on two tiny checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from delta_analysis.checkpoint import open_checkpoint
from delta_analysis.evaluate import ExactMatch, load_model, load_questions, load_tokenizer
from delta_analysis.family import questions_file
from delta_analysis.intervals import METRICS, metric_interval
from delta_analysis.pruning import Dare, Magnitude, MagPrune, Pruner, prepared
from delta_analysis.sweep import EditableModel, Pair, drop_curve, options, outcome_matrix, sweep
from delta_analysis.zoo.tokenizer import character_tokenizer

NORM, EMBED, UP = "model.norm.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
COLUMNS = [
    "pair",
    "method",
    "drop_rate",
    "rescale",
    "scope",
    "seed",
    "metric",
    "value",
    "low",
    "high",
    "achieved_drop_rate",
    "seconds",
    "outcomes",
]


@dataclass(frozen=True)
class Reads:
    """Gives the entries of some parameters as outcomes."""

    names: tuple[str, ...]
    metric: str = "accuracy"

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        assert tokenizer.padding_side == "left"
        assert not model.training
        return flat({name: model.get_parameter(name) for name in self.names}, self.names)


@dataclass(frozen=True)
class Logits:
    """Gives the logits of a few tokens as outcomes."""

    metric: str = "accuracy"

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        return logits(model)


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.arange(10).reshape(2, 5)).logits.double().flatten().numpy()


@dataclass(frozen=True)
class Fails:
    metric: str = "accuracy"

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        raise RuntimeError("evaluation failed")


class Family(NamedTuple):
    """Weights on disk and in memory; all on the grid of bfloat16, so that differences and sums are exact."""

    base: Path
    finetuned: Path
    base_weights: dict[str, torch.Tensor]
    finetuned_weights: dict[str, torch.Tensor]

    def pair(self, *names: str, name: str = "base → tuned", metric: str = "accuracy") -> Pair:
        return Pair(name, str(self.base), str(self.finetuned), Reads(names or tuple(self.base_weights), metric))


def flat(weights: dict[str, torch.Tensor], names: tuple[str, ...]) -> np.ndarray:
    return torch.cat([weights[name].detach().double().flatten() for name in names]).numpy()


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=True,
        )
    ).to(torch.bfloat16)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            # The first half of each tensor is fine-tuned.
            parameter.view(-1)[: parameter.numel() // 2] += 2.0**-7
    folder = tmp_path_factory.mktemp("family")
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(folder / name)
        character_tokenizer().save_pretrained(folder / name)
    weights = ({name: weight.detach().float() for name, weight in each.named_parameters()} for each in (base, tuned))
    return Family(folder / "base", folder / "tuned", *weights)


def without_seconds(cells: pd.DataFrame) -> pd.DataFrame:
    return cells.drop(columns="seconds")


def test_one_row_a_cell_in_the_columns_of_the_contract(family: Family) -> None:
    pruners = [Dare(0), Dare(0.5), Dare(0.9), Dare(0.5, "none"), Dare(0.5, 2.5), Dare(1)]
    pairs = [family.pair(NORM, name="one"), family.pair(NORM, name="two", metric="perplexity")]
    cells = sweep(pairs, pruners, [4, 2, 7])
    expected = [
        (pair, method, rate, rescale, "all", seed, metric)
        for pair, metric in (("one", "accuracy"), ("two", "perplexity"))
        for method, rate, rescale, seeds in (
            ("DARE", 0.0, "inverse_keep", [4]),
            ("DARE", 0.5, "inverse_keep", [4, 2, 7]),
            ("DARE", 0.9, "inverse_keep", [4, 2, 7]),
            ("drop only", 0.5, "none", [4, 2, 7]),
            ("drop × 2.5", 0.5, "2.5", [4, 2, 7]),
            ("DARE", 1.0, "inverse_keep", [4]),
        )
        for seed in seeds
    ]
    assert list(cells.columns) == COLUMNS
    assert list(cells[COLUMNS[:7]].itertuples(index=False, name=None)) == expected
    assert cells.index.tolist() == list(range(len(expected)))
    assert cells["drop_rate"].dtype == np.float64
    assert (cells["seconds"] > 0).all()


def test_value_and_interval_follow_from_the_outcomes(family: Family) -> None:
    pairs = [family.pair(NORM, name=metric, metric=metric) for metric in METRICS]
    for cell in sweep(pairs, [Dare(0), Dare(0.5)], [0, 1]).itertuples():
        outcomes = np.array(cell.outcomes)
        assert len(outcomes) == 8
        assert (cell.value, cell.low, cell.high) == metric_interval(METRICS[cell.metric], outcomes[None])
        assert cell.value == pytest.approx(np.exp(outcomes.mean()) if cell.metric == "perplexity" else outcomes.mean())


@pytest.mark.parametrize("rescale", ["inverse_keep", "none"])
def test_drop_rate_zero_is_the_finetuned_and_one_the_base_model(family: Family, rescale: str) -> None:
    names = tuple(family.base_weights)
    assert not any(torch.equal(family.base_weights[name], family.finetuned_weights[name]) for name in names)
    tuned, base = (flat(weights, names) for weights in (family.finetuned_weights, family.base_weights))
    # The base first: each cell has to start from the restored model.
    before, untouched, after = sweep([family.pair()], [Dare(p, rescale) for p in (1, 0, 1)], [0])["outcomes"]
    assert np.array_equal(before, base)
    assert np.array_equal(untouched, tuned)
    assert np.array_equal(after, base)


@pytest.mark.parametrize("rescale", ["inverse_keep", "none", 3.0])
def test_cells_in_between_are_base_plus_pruned_delta(family: Family, rescale: str | float) -> None:
    names = tuple(family.base_weights)
    assert {NORM, EMBED, UP} < set(names)
    cells = sweep([family.pair()], [Dare(0.5, rescale), Dare(0.9, rescale)], [0, 3])
    for cell in cells.itertuples():
        pruner = Dare(cell.drop_rate, rescale)
        expected = {
            name: family.base_weights[name]
            + pruner(family.finetuned_weights[name] - family.base_weights[name], name=name, seed=cell.seed)
            for name in names
        }
        assert np.array_equal(cell.outcomes, flat(expected, names))


def test_achieved_drop_rate_counts_entries_that_were_not_zero(family: Family) -> None:
    pruners = [Dare(0), Dare(0.3), Dare(0.9), Dare(0.9, "none"), Dare(1)]
    cells = sweep([family.pair()], pruners, [0])
    for cell in cells.itertuples():
        before = after = 0
        for name, base in family.base_weights.items():
            delta = family.finetuned_weights[name] - base
            before += int((delta != 0).sum())
            after += int((Dare(cell.drop_rate)(delta, name=name, seed=0) != 0).sum())
        assert cell.achieved_drop_rate == pytest.approx(1 - after / before, abs=1e-12)
    # Half of all entries are zero to begin with; counting them would give other shares.
    assert cells["achieved_drop_rate"].tolist() == pytest.approx([0, 0.3, 0.9, 0.9, 1], abs=0.05)


def test_finetune_equal_to_its_base_drops_nothing(family: Family) -> None:
    pair = Pair("same", str(family.base), str(family.base), Reads((NORM,)))
    cells = sweep([pair], [Dare(0), Dare(0.5), Dare(1)], [0])
    assert cells["achieved_drop_rate"].tolist() == [0.0, 0.0, 0.0]
    assert cells["outcomes"].tolist() == [flat(family.base_weights, (NORM,)).tolist()] * 3


def test_without_a_base_the_finetuned_weights_themselves_are_dropped(family: Family) -> None:
    pair = Pair("nothing → tuned", None, str(family.finetuned), Reads((UP,)))  # type: ignore[arg-type]
    tuned = family.finetuned_weights[UP]
    kept, dropped, gone = sweep([pair], [Dare(0), Dare(0.5), Dare(1)], [2])["outcomes"]
    assert np.array_equal(kept, flat({UP: tuned}, (UP,)))
    assert np.array_equal(dropped, flat({UP: Dare(0.5)(tuned, name=UP, seed=2)}, (UP,)))
    assert not np.any(gone)


def test_tensor_that_the_base_lacks_stays_finetuned(family: Family, save_checkpoint: Callable[..., Path]) -> None:
    base = save_checkpoint("part", {name: family.base_weights[name] for name in (UP, EMBED)})
    pair = Pair("part → tuned", str(base), str(family.finetuned), Reads((UP, NORM)))
    (outcomes,) = sweep([pair], [Dare(1)], [0])["outcomes"]
    assert np.array_equal(
        outcomes, flat({UP: family.base_weights[UP], NORM: family.finetuned_weights[NORM]}, (UP, NORM))
    )


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing:FutureWarning",
    "ignore:Model has .tie_word_embeddings=True.:UserWarning",
    "ignore:Setting .save_embedding_layers.:UserWarning",
    r"ignore:.*'lm_head\.base_layer\.weight':UserWarning",
)
def test_a_change_of_a_tied_head_leaves_the_embeddings(family: Family, tmp_path: Path) -> None:
    wrapped = get_peft_model(load_model(open_checkpoint(family.base)), LoraConfig(r=2, target_modules=["lm_head"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    wrapped.save_pretrained(tmp_path)
    model = load_model(open_checkpoint(family.base))
    base, peft = logits(model), logits(PeftModel.from_pretrained(model, tmp_path))
    pair = Pair("base → adapter", str(family.base), str(tmp_path), Logits())
    whole, none = sweep([pair], [Dare(0), Dare(1)], [0])["outcomes"]
    np.testing.assert_allclose(whole, peft, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(none, base)
    assert np.abs(peft - base).max() > 0.1
    editable = EditableModel.load(pair)
    editable.judge(Dare(0), 0)
    assert torch.equal(editable.model.get_parameter("lm_head.weight"), family.base_weights[EMBED])


def test_a_grown_vocabulary_is_judged_with_its_own_rows(family: Family, tmp_path: Path) -> None:
    torch.manual_seed(1)
    tuned = load_model(open_checkpoint(family.finetuned))
    tuned.resize_token_embeddings(99, mean_resizing=False)
    tuned.save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    grown = tuned.get_input_embeddings().weight.detach()
    pair = Pair("base → grown", str(family.base), str(tmp_path), Reads((EMBED,)))
    kept, dropped = sweep([pair], [Dare(0), Dare(1)], [0])["outcomes"]
    np.testing.assert_array_equal(kept, flat({EMBED: grown}, (EMBED,)))
    np.testing.assert_array_equal(dropped, flat({EMBED: torch.cat([family.base_weights[EMBED], grown[97:]])}, (EMBED,)))


def test_a_name_that_the_model_lacks_is_refused(family: Family) -> None:
    editable = EditableModel.load(family.pair(NORM))
    before, strange = model_state(editable), {"model.layers.0.extra.weight": torch.ones(2)}
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.extra\.weight' has no place in the model"):
        replace(editable, base=editable.base | strange, delta=editable.delta | strange).judge(Dare(0.5), 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in editable.model.state_dict().items())


def test_a_sweep_repeats_itself_and_does_not_depend_on_its_order(family: Family) -> None:
    pruners = [Dare(0.5), Dare(0.9), Dare(0.5, "none")]
    one = without_seconds(sweep([family.pair(UP)], pruners, [0, 1]))
    pd.testing.assert_frame_equal(one, without_seconds(sweep([family.pair(UP)], pruners, [0, 1])))
    backwards = without_seconds(sweep([family.pair(UP)], pruners[::-1], [1, 0]))
    order = ["method", "drop_rate", "seed"]
    pd.testing.assert_frame_equal(
        one.sort_values(order, ignore_index=True), backwards.sort_values(order, ignore_index=True)
    )


def test_other_seeds_give_other_outcomes_and_rescale_variants_the_same_masks(family: Family) -> None:
    cells = sweep([family.pair(UP)], [Dare(0.5), Dare(0.5, "none")], [0, 1])
    base = flat(family.base_weights, (UP,))
    changed = [tuple(np.array(outcomes) != base) for outcomes in cells["outcomes"]]
    assert changed[0] == changed[2] != changed[1] == changed[3]


def model_state(editable: EditableModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in editable.model.state_dict().items()}


@pytest.mark.parametrize("drop_rate", [0, 0.5, 1])
def test_judging_restores_the_model(family: Family, drop_rate: float) -> None:
    editable = EditableModel.load(family.pair(NORM))
    before = model_state(editable)
    for name, weight in family.finetuned_weights.items():
        assert torch.equal(before[name], weight)
    editable.judge(Dare(drop_rate), 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in editable.model.state_dict().items())


def test_failed_evaluation_restores_the_model(family: Family) -> None:
    editable = EditableModel.load(Pair("fails", str(family.base), str(family.finetuned), Fails()))
    before = model_state(editable)
    with pytest.raises(RuntimeError, match="evaluation failed"):
        editable.judge(Dare(0.5), 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in editable.model.state_dict().items())


def test_weights_in_memory_are_those_on_disk(family: Family) -> None:
    editable = EditableModel.load(family.pair(NORM))
    assert set(editable.delta) == set(editable.base) == set(family.base_weights)
    for name, base in family.base_weights.items():
        assert editable.base[name].dtype == editable.delta[name].dtype == torch.float32
        assert torch.equal(editable.base[name], base)
        assert torch.equal(editable.delta[name], family.finetuned_weights[name] - base)


def test_a_sweep_writes_nothing_to_disk(family: Family) -> None:
    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in family.base.parent.rglob("*")}

    before = files()
    sweep([family.pair(NORM)], [Dare(0.5)], [0])
    assert files() == before


def cell(
    method: str, rate: float, seed: int, outcomes: list[float], *, pair: str = "a", metric: str = "accuracy"
) -> dict:
    return {
        "pair": pair,
        "method": method,
        "metric": metric,
        "drop_rate": rate,
        "seed": seed,
        "outcomes": outcomes,
    }


def test_outcomes_stand_in_order_of_seeds() -> None:
    cells = pd.DataFrame([cell("DARE", 0.5, 9, [1, 1]), cell("DARE", 0.5, 2, [0, 1]), cell("DARE", 0.5, 4, [0, 0])])
    matrix = outcome_matrix(cells)
    assert matrix.dtype == np.float64
    assert matrix.tolist() == [[0, 1], [0, 0], [1, 1]]


def test_drop_curve_averages_seeds_and_keeps_the_order_of_names() -> None:
    cells = pd.DataFrame(
        [
            cell("drop only", 0.9, 0, [0, 0, 0, 1], pair="z"),
            cell("DARE", 0.9, 1, [0, 1, 1, 1], pair="z"),
            cell("DARE", 0.9, 0, [0, 0, 1, 1], pair="z"),
            cell("DARE", 0.0, 0, [1, 1, 1, 1], pair="z"),
            cell("drop only", 0.5, 0, [0, 0, 1, 1], pair="z"),
            cell("DARE", 0.99, 0, [2, 4, 2, 4], pair="a", metric="perplexity"),
            cell("DARE", 0.99, 1, [1, 1, 1, 1], pair="a", metric="perplexity"),
            cell("DARE", 0.05, 0, [1, 0, 1, 0], pair="a", metric="perplexity"),
        ]
    )
    curve = drop_curve(cells)
    assert list(curve.columns) == ["pair", "method", "metric", "drop_rate", "seeds", "value", "low", "high"]
    assert curve[["pair", "method", "drop_rate", "seeds"]].to_numpy().tolist() == [
        ["z", "drop only", 0.5, 1],
        ["z", "drop only", 0.9, 1],
        ["z", "DARE", 0.0, 1],
        ["z", "DARE", 0.9, 2],
        ["a", "DARE", 0.05, 1],
        ["a", "DARE", 0.99, 2],
    ]
    assert curve["value"].tolist() == pytest.approx([0.5, 0.25, 1.0, 0.625, np.exp(0.5), np.exp(2)])
    assert curve.index.tolist() == list(range(6))


def test_drop_curve_interval_resamples_seeds_and_items() -> None:
    rng = np.random.default_rng(0)
    outcomes = (rng.random((5, 40)) < rng.random((5, 1))).astype(float)
    cells = pd.DataFrame([cell("DARE", 0.5, seed, row.tolist()) for seed, row in enumerate(outcomes)])
    (row,) = drop_curve(cells.sample(frac=1, random_state=0)).itertuples()
    assert (row.value, row.low, row.high) == pytest.approx(tuple(metric_interval(METRICS["accuracy"], outcomes)))
    alone = metric_interval(METRICS["accuracy"], outcomes[:1])
    assert row.high - row.low > alone.high - alone.low


def test_drop_curve_of_a_sweep(family: Family) -> None:
    cells = sweep([family.pair(UP)], [Dare(0.9), Dare(0), Dare(0.5, "none"), Dare(0.5)], [0, 1, 2])
    curve = drop_curve(cells)
    assert list(zip(curve["method"], curve["drop_rate"], curve["seeds"], strict=True)) == [
        ("DARE", 0.0, 1),
        ("DARE", 0.5, 3),
        ("DARE", 0.9, 3),
        ("drop only", 0.5, 3),
    ]
    for row in curve.itertuples():
        group = cells[(cells["method"] == row.method) & (cells["drop_rate"] == row.drop_rate)]
        assert row.value == pytest.approx(group["value"].mean())


@pytest.mark.parametrize(
    "pruner",
    [Magnitude(0.6), Magnitude(0.6, "row", "l1"), Magnitude(0.6, "model"), MagPrune(0.6), MagPrune(0.6, 0.1, "value")],
    ids=lambda pruner: pruner.method,
)
def test_cells_of_every_pruner_are_base_plus_pruned_delta(family: Family, pruner: Pruner) -> None:
    names = tuple(family.base_weights)
    delta = {name: family.finetuned_weights[name] - family.base_weights[name] for name in names}
    (cell,) = sweep([family.pair()], [pruner], [3]).itertuples()
    prune = prepared(pruner, delta, 3)
    pruned = {name: prune(delta[name], name=name, seed=3) for name in names}
    assert np.array_equal(
        cell.outcomes, flat({name: family.base_weights[name] + pruned[name] for name in names}, names)
    )
    assert (cell.method, cell.drop_rate, cell.rescale) == (pruner.method, 0.6, pruner.rescale)
    nonzero, left = (sum(int((each != 0).sum()) for each in tensors.values()) for tensors in (delta, pruned))
    assert cell.achieved_drop_rate == pytest.approx(1 - left / nonzero)


def test_magnitude_over_the_whole_model_drops_its_least_entries(family: Family) -> None:
    total = sum(weight.numel() for weight in family.base_weights.values())
    delta = {name: family.finetuned_weights[name] - family.base_weights[name] for name in family.base_weights}
    zero = sum(int((tensor == 0).sum()) for tensor in delta.values())
    cells = sweep([family.pair(NORM)], [Magnitude(p, "model") for p in (0.3, 0.8)], [0])
    # About half of the entries are zero to begin with and fall first.
    expected = [max((round(p * total) - zero) / (total - zero), 0) for p in (0.3, 0.8)]
    assert cells["achieved_drop_rate"].tolist() == pytest.approx(expected)


def test_options_of_pruners_are_columns_of_their_own(family: Family) -> None:
    pruners = [Dare(0.5), Magnitude(0.5, "row"), MagPrune(0.5), MagPrune(0.5, 0.25, "tensor")]
    cells = sweep([family.pair(NORM)], pruners, [0])
    assert list(cells.columns) == [*COLUMNS, "option_scope", "option_window", "option_rank"]
    own = cells[["option_scope", "option_window", "option_rank"]].astype(object)
    assert own.where(own.notna(), None).to_numpy().tolist() == [
        [None, None, None],
        ["row", None, None],
        [None, "widest", "row"],
        [None, "0.25", "tensor"],
    ]


def test_options_by_hand() -> None:
    assert options(Dare(0.5)) == {}
    assert options(Magnitude(0.5)) == {"option_scope": "tensor"}
    assert options(MagPrune(0.5, 0)) == {"option_window": "0.0", "option_rank": "row"}


def test_dropping_the_weights_of_an_embedded_model() -> None:
    questions = ExactMatch(tuple(load_questions(questions_file("instruct"), 12)))
    checkpoint = open_checkpoint("zoo:small/instruct")
    untouched = questions(load_model(checkpoint), load_tokenizer(checkpoint))
    assert untouched.any()
    pair = Pair("nothing → instruct", None, "zoo:small/instruct", questions)
    pruners = [Dare(0), Magnitude(0, "model"), MagPrune(0), Magnitude(0.9), MagPrune(1)]
    cells = sweep([pair], pruners, [0])
    for outcomes in cells["outcomes"][:3]:
        assert np.array_equal(outcomes, untouched)
    assert cells["value"].tolist()[3:] == [0, 0]
    assert cells["achieved_drop_rate"].tolist() == pytest.approx([0, 0, 0, 0.9, 1], abs=0.01)
