"""Merges of deltas: what they consist of, that they are lazy, that models come of them, and what is refused before."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import delta_analysis as da
from delta_analysis.checkpoints.checkpoint import open_checkpoint
from delta_analysis.checkpoints.names import reading_order
from delta_analysis.checkpoints.paths import zoo_model
from delta_analysis.checkpoints.tensors import InFile
from delta_analysis.deltas.delta import Delta, load_delta
from delta_analysis.deltas.ranges import value_ranges
from delta_analysis.deltas.saving import save_checkpoint as save_model
from delta_analysis.evaluation.models import finetuned_model, load_model
from delta_analysis.merging.merger import TRIMMING, merge, source_seed
from delta_analysis.merging.methods import MergeMethod, Parts
from delta_analysis.merging.statistics import gather
from delta_analysis.pruning import Dare, Magnitude, MagPrune, Pruner, bind

BASE, SOURCES = "zoo:tiny/base", ("zoo:tiny/instruct", "zoo:tiny/math", "zoo:tiny/code-cpt")
UP, NORM, EMBED = "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"
METHODS: tuple[MergeMethod, ...] = (
    da.merging.Average(),
    da.merging.TaskArithmetic(0.5),
    da.merging.Ties(0.8),
    da.merging.Ties(0.8, "model"),
    da.merging.Ties(0.0, fuse="sum", slack=da.merging.Slack(1, 1.0)),
    da.merging.Della(0.5),
    da.merging.Widen(),
)
PRUNES = (None, Dare(0.5), MagPrune(0.5))
CASES = [(method, PRUNES[(i + k) % 3]) for i, method in enumerate(METHODS) for k in (0, 1)]
Tensors = dict[str, torch.Tensor]

# peft asks transformers for this by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def deltas() -> list[Delta]:
    return [load_delta(base=BASE, finetuned=source) for source in SOURCES]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of each tensor that is read of a file, as often as it is."""
    found: list[str] = []
    read_into = InFile.read_into

    def counted(self: InFile, *arguments: Any) -> None:
        found.append(self.name)
        read_into(self, *arguments)

    monkeypatch.setattr(InFile, "read_into", counted)
    return found


def by_hand(
    deltas: Sequence[Delta], method: MergeMethod, prune: Pruner | None, weights: Sequence[float], seed: int
) -> Tensors:
    """The merge of deltas that all have the same tensors, in memory."""
    ready = []
    for k, delta in enumerate(deltas):
        tensors, own = dict(delta), source_seed(seed, k)
        # What is trimmed after a pruner is drawn under another seed.
        for pruner, number in ((prune, own), (method.trim, source_seed(own, TRIMMING) if prune else own)):
            if pruner is not None:
                cut = bind(pruner, tensors, number)
                tensors = {name: cut(tensor, name=name, seed=number) for name, tensor in tensors.items()}
        ready.append(tensors)
    base = open_checkpoint(BASE)
    return {
        name: method(Parts(name, tuple(each[name] for each in ready), tuple(weights), base[name].float()))
        for name in ready[0]
    }


def assert_same(one: Delta | Tensors, other: Delta | Tensors) -> None:
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize(("method", "prune"), CASES, ids=str)
def test_a_merge_is_the_method_applied_to_every_tensor(
    deltas: list[Delta], method: MergeMethod, prune: Pruner | None
) -> None:
    weights = (1.0, 0.5, 2.0)
    merged = merge(BASE, deltas, method, prune, weights=weights, seed=7)
    expected = by_hand(deltas, method, prune, weights, seed=7)
    assert_same(merged, expected)
    # Whatever is read first, and by however many threads.
    again = merge(BASE, deltas, method, prune, weights=weights, seed=7)
    names = [*reversed(list(again)), *list(again)]
    with ThreadPoolExecutor(3) as pool:
        for name, tensor in zip(names, pool.map(again.__getitem__, names), strict=True):
            assert torch.equal(tensor, expected[name])


def test_weights_are_1_unless_they_are_given(deltas: list[Delta]) -> None:
    assert_same(
        merge(BASE, deltas, da.merging.TaskArithmetic()),
        merge(BASE, deltas, da.merging.TaskArithmetic(), weights=[1, 1.0, True + 0]),
    )
    name = list(deltas[0])[3]
    difference = merge(BASE, deltas[:2], da.merging.TaskArithmetic(), weights=[1, -1])
    assert torch.equal(difference[name], deltas[0][name] - deltas[1][name])


def test_the_first_delta_is_pruned_as_it_would_be_alone(deltas: list[Delta]) -> None:
    for pruner in (Dare(0.9), MagPrune(0.7), Magnitude(0.6, "model")):
        alone = merge(BASE, deltas[:1], da.merging.TaskArithmetic(), pruner, seed=3)
        assert_same(alone, deltas[0].pruned(pruner, seed=3))


def test_other_deltas_have_seeds_of_their_own(deltas: list[Delta]) -> None:
    merged = merge(BASE, deltas, da.merging.TaskArithmetic(), [None, Dare(0.5), None], weights=[0, 1, 0], seed=3)
    assert_same(merged, deltas[1].pruned(Dare(0.5), seed=source_seed(3, 1)))
    twice = merge(BASE, [deltas[0], deltas[0]], da.merging.TaskArithmetic(), Dare(0.5))[UP]
    doubled = (twice / deltas[0][UP]).nan_to_num(0.0)
    # Each entry is kept in neither, one or both copies.
    assert set(doubled.round().unique().tolist()) == {0, 2, 4}
    assert not torch.equal(merge(BASE, deltas, da.merging.TaskArithmetic(), Dare(0.5), seed=1)[UP], twice)


def test_deltas_that_were_pruned_before_are_merged_as_they_are(deltas: list[Delta]) -> None:
    pruned = [delta.pruned(Magnitude(0.5, "model"), seed=0) for delta in deltas]
    merged = merge(BASE, pruned, da.merging.Ties(0.0), Dare(0.3), seed=2)
    expected = by_hand(pruned, da.merging.Ties(0.0), Dare(0.3), (1, 1, 1), seed=2)
    assert_same(merged, expected)


def test_nothing_is_read_before_a_tensor_is_asked_for(deltas: list[Delta], reads: list[str]) -> None:
    merged = merge(BASE, deltas, da.merging.Ties(0.5), Dare(0.5))
    merged.coverage()
    assert (list(merged), len(merged), UP in merged) == (list(deltas[0]), len(deltas[0]), True)
    assert merged.finetuned.references[UP].shape == deltas[0].compared[UP].shape
    assert reads == []
    merged[UP]
    # Of each delta its two sides, and the base.
    assert set(reads) == {UP}
    assert len(reads) <= 2 * len(deltas) + 1
    # Nothing is kept.
    count = len(reads)
    merged[UP]
    assert len(reads) == 2 * count


def test_what_is_merged_is_a_delta(deltas: list[Delta]) -> None:
    merged = merge(BASE, deltas[:2], da.merging.TaskArithmetic(0.5), Dare(0.5), seed=1)
    assert merged.finetuned.is_delta
    assert merged.finetuned.source == "DARE + task arithmetic of zoo:tiny/instruct, zoo:tiny/math"
    assert merged.finetuned.files() == sorted({*deltas[0].finetuned.files(), *deltas[1].finetuned.files()})
    tensor, start = merged.read(UP)
    assert start is not None and tensor.dtype == start.dtype == torch.float32
    assert torch.equal(start, open_checkpoint(BASE)[UP].float())
    coverage = merged.coverage()
    assert set(coverage["status"]) == {"compared"}
    assert coverage["tensor"].tolist() == list(deltas[0])
    assert (coverage["numel"] == coverage["numel_compared"]).all()
    assert merged.config_differences().empty
    # It is analysed as any other.
    ranges = value_ranges(merged, by="tensor").set_index("tensor")
    for name, tensor in merged.items():
        assert ranges.loc[name, "abs_max"] == pytest.approx(float(tensor.abs().max()), rel=0.004)
        assert ranges.loc[name, "zero_share"] == pytest.approx(float((tensor == 0).double().mean()))
        assert ranges.loc[name, "rms"] == pytest.approx(float(tensor.double().square().mean().sqrt()))
    again = merged.pruned(Magnitude(0.5), seed=0)
    assert torch.equal(again[UP], Magnitude(0.5)(merged[UP], name=UP, seed=0))
    assert again.summary()["achieved_drop_rate"].between(0, 0.5).all()


def test_a_merge_may_be_merged_again(deltas: list[Delta]) -> None:
    first = merge(BASE, deltas[:2], da.merging.TaskArithmetic())
    both = merge(BASE, [first, deltas[2]], da.merging.TaskArithmetic())
    at_once = merge(BASE, deltas, da.merging.TaskArithmetic())
    assert list(both) == list(at_once)
    for name in both:
        torch.testing.assert_close(both[name], at_once[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", None])
def test_a_merged_model_is_base_plus_delta_and_loads_in_transformers(
    deltas: list[Delta], tmp_path: Path, dtype: str | None
) -> None:
    base = open_checkpoint(BASE)
    merged = merge(base, deltas[:2], da.merging.Ties(0.5), Dare(0.3), seed=4)
    table = save_model(base, merged, tmp_path / "out", dtype=dtype)
    assert set(table["tensor"]) == set(base)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == (torch.float32 if dtype else torch.float16)
    weights = dict(model.named_parameters())
    expected = by_hand(deltas[:2], da.merging.Ties(0.5), Dare(0.3), (1, 1), seed=4)
    assert set(weights) == set(expected)
    for name, weight in weights.items():
        assert torch.equal(weight, (base[name].float() + expected[name]).to(model.dtype))
    # So does the tokenizer, and the model answers.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model(**tokenizer("reverse abc\n", return_tensors="pt", return_token_type_ids=False)).logits.isfinite().all()
    in_memory, _ = finetuned_model(merged)
    for name, weight in in_memory.named_parameters():
        assert torch.equal(weight, base[name].float() + expected[name])
    # What was saved is a fine-tune of the base like any other.
    saved = load_delta(base=BASE, finetuned=str(tmp_path / "out"))
    for name in saved:
        torch.testing.assert_close(saved[name], expected[name], rtol=0, atol=1e-6 if dtype else 1e-2)


BATCH = {"input_ids": torch.tensor([[1, 2, 3]])}
IDS_OF_DATA = [torch.randint(1, 90, (2, 9), generator=torch.Generator().manual_seed(k)) for k in range(2)]


@pytest.mark.parametrize("method", [da.merging.Fisher(0.7), da.merging.RegMean(0.7)], ids=["Fisher", "RegMean"])
def test_methods_that_need_data_read_it_once_and_of_each_model(deltas: list[Delta], method: MergeMethod) -> None:
    asked = []

    def batches(k: int) -> Iterator[dict[str, torch.Tensor]]:
        asked.append(k)
        yield {"input_ids": IDS_OF_DATA[k]}

    merged = merge(BASE, deltas[:2], method, Dare(0.5), seed=3, data=[batches(0), batches(1)], weights=[1, 2])
    assert asked == [0, 1]
    known = [
        gather(method.statistic, delta, [{"input_ids": ids}], seed=3)  # type: ignore[arg-type]
        for delta, ids in zip(deltas, IDS_OF_DATA, strict=False)
    ]
    base = open_checkpoint(BASE)
    for name in merged:
        parts = tuple(Dare(0.5)(delta[name], name=name, seed=source_seed(3, k)) for k, delta in enumerate(deltas[:2]))
        statistics = tuple(each[name] for each in known) if name in known[0] else None
        expected = method(Parts(name, parts, (1.0, 2.0), base[name].float(), statistics))
        assert torch.equal(merged[name], expected), name
    assert (UP in known[0]) and asked == [0, 1]
    plain = merge(BASE, deltas[:2], da.merging.Average(0.7), Dare(0.5), seed=3, weights=[1, 2])
    assert not torch.equal(merged[UP], plain[UP])


def adapter(folder: Path, modules: list[str], seed: int = 0) -> str:
    """A LoRA adapter of the base on disk, whose factors are random."""
    torch.manual_seed(seed)
    wrapped = get_peft_model(load_model(open_checkpoint(BASE)), LoraConfig(r=2, target_modules=modules))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    wrapped.save_pretrained(str(folder))
    return str(folder)


def test_what_an_adapter_leaves_alone_is_zero_in_its_delta(deltas: list[Delta], tmp_path: Path) -> None:
    queries = load_delta(base=BASE, finetuned=adapter(tmp_path / "queries", ["q_proj"]))
    ups = load_delta(base=BASE, finetuned=adapter(tmp_path / "ups", ["up_proj", "q_proj"], seed=1))
    # Two adapters have what one of them has.
    both = merge(BASE, [queries, ups], da.merging.TaskArithmetic())
    assert set(both) == set(queries) | set(ups)
    assert list(both) == sorted(both, key=reading_order)
    assert list(merge(BASE, [ups, queries], da.merging.TaskArithmetic())) == list(both)
    for name in both:
        expected = ups[name] + queries[name] if name in queries else ups[name]
        assert torch.equal(both[name], expected)
    coverage = both.coverage()
    assert coverage["tensor"].tolist() == sorted(open_checkpoint(BASE), key=reading_order)
    assert set(coverage.loc[coverage["status"] == "compared", "tensor"]) == set(both)
    # A mean divides by both all the same, and TIES leaves alone what one of them does not have.
    only = UP if UP not in queries else ""
    assert torch.equal(merge(BASE, [queries, ups], da.merging.Average())[only], ups[only] / 2)
    assert torch.equal(merge(BASE, [queries, ups], da.merging.Ties(0.0))[only], ups[only])
    # Beside a fine-tune of all weights, in either order.
    for order in ([queries, deltas[0]], [deltas[0], queries]):
        mixed = merge(BASE, order, da.merging.TaskArithmetic())
        assert list(mixed) == list(deltas[0])
        for name in mixed:
            extra = queries[name] if name in queries else torch.zeros(())
            assert torch.equal(mixed[name], deltas[0][name] + extra)


def test_merged_adapters_are_saved_and_loaded(tmp_path: Path) -> None:
    base = open_checkpoint(BASE)
    given = [
        load_delta(base=source, finetuned=adapter(tmp_path / name, [name], seed=i))
        for i, (name, source) in enumerate({"q_proj": BASE, "up_proj": None}.items())
    ]
    # One that was loaded without its base is a difference all the same.
    assert given[1].base is None
    merged = merge(base, given, da.merging.TaskArithmetic(0.5))
    save_model(base, merged, tmp_path / "out", dtype="float32")
    saved, loaded = open_checkpoint(tmp_path / "out"), dict(finetuned_model(merged)[0].named_parameters())
    for name in base:
        change = 0.5 * sum(delta[name] for delta in given if name in delta)
        assert torch.equal(saved[name], base[name].float() + change)
        assert torch.equal(loaded[name], saved[name])
    assert any("q_proj" in name for name in merged) and any("up_proj" in name for name in merged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [1.0]}, r"weights must be 2 numbers, one for each delta; not \[1.0\]"),
        ({"weights": 1.0}, r"weights must be 2 numbers, one for each delta; not 1.0"),
        ({"weights": [1.0, math.nan]}, r"weights\[1\] must be a finite number; not nan"),
        ({"weights": [math.inf, 1]}, r"weights\[0\] must be a finite number; not inf"),
        ({"weights": ["1", 1]}, r"weights\[0\] must be a finite number; not '1'"),
        ({"weights": [True, 1]}, r"weights\[0\] must be"),
        ({"weights": [1, -1]}, r"weights \(1.0, -1.0\) sum to 0, so that there is no mean"),
        ({"method": da.merging.Ties(slack=da.merging.Slack(2))}, r"slack protects delta 2 \(from 0\), and there are 2"),
        (
            {"method": da.merging.Ties},
            "method must be a merge method such as Ties.0.8., a value and not a class; not <class",
        ),
        ({"method": "ties"}, "method must be a merge method .*; not 'ties'"),
        ({"prune": [Dare(0.5)]}, "prune: 1 pruners are given for 2 deltas; give one for all, or one each"),
        ({"prune": [None] * 3}, "prune: 3 pruners are given for 2 deltas"),
        ({"prune": 0.9}, "prune must be a pruner such as Dare.0.9., a list with one for each, or None; not 0.9"),
        ({"prune": [Dare(0.5), "MP"]}, "prune must be a pruner .*; not 'MP'"),
        ({"prune": Dare}, "prune must be a pruner .*; not <class"),
        ({"seed": -1}, "seed must be a whole number of at least 0; not -1"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"data": [[], []]}, "data: average needs none; leave it out"),
        ({"method": da.merging.Fisher(), "weights": [2, -1], "data": [[], []]}, "weights .* at least 0"),
        ({"method": da.merging.RegMean(), "weights": [0, 0], "data": [[], []]}, "weights .* not all of them 0"),
        ({"method": da.merging.Fisher()}, "data: Fisher needs some of each model; give for each delta an iterable"),
        (
            {"method": da.merging.RegMean(), "data": [[]]},
            "data: must be 2 iterables of batches, one for each delta; not 1",
        ),
        (
            {"method": da.merging.RegMean(), "data": 3},
            "data: must be 2 iterables of batches, one for each delta; not 3",
        ),
        ({"method": da.merging.Fisher(), "data": [[], 3]}, "data: number 0 holds no batch"),
        ({"method": da.merging.Fisher(), "data": [[BATCH], 3]}, "data: number 1 must be an iterable of batches; not 3"),
        (
            {"method": da.merging.Fisher(), "data": [[BATCH], iter(())]},
            "data: number 1 holds no batch .a generator can be",
        ),
        (
            {"method": da.merging.Fisher(), "data": [[BATCH], [BATCH["input_ids"]]]},
            "batch 0 .*; expected arguments of the model",
        ),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_read(
    reads: list[str], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    # Of a base in another place, whose weights would have to be compared.
    base = shutil.copytree(zoo_model(BASE), tmp_path / "base")
    deltas = [load_delta(base=base, finetuned=source) for source in SOURCES[:2]]
    reads.clear()
    given = {"method": da.merging.Average(), **change}
    with pytest.raises(ValueError, match=message):
        merge(BASE, deltas, **given)
    assert reads == []
