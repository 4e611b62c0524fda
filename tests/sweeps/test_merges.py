"""Merges in a sweep: what `merge` gives, saved and judged as a plain pair; which cells run; threads."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import delta_analysis as da
from delta_analysis.checkpoints.checkpoint import open_checkpoint
from delta_analysis.deltas.delta import load_delta
from delta_analysis.deltas.saving import save_checkpoint
from delta_analysis.deltas.selection import in_scope
from delta_analysis.evaluation import ExactMatch
from delta_analysis.evaluation.models import finetuned_model, load_model
from delta_analysis.evaluation.tokens import token_batches
from delta_analysis.merging.merger import merge
from delta_analysis.merging.methods import MergeMethod, Parts
from delta_analysis.pruning import Dare, Magnitude, MagPrune, Pruner
from delta_analysis.reports.family import questions_file
from delta_analysis.sweeps import merges as merge_edit
from delta_analysis.sweeps.engine import SweepError, sweep
from delta_analysis.sweeps.merges import MergeSource, Merging, merge_source
from delta_analysis.sweeps.pairs import Edit, Pair
from tests.tiny_family import EMBED, NORM, QUERY, UP, Logs, Reads, calls, cells_of, flat, make_family, without_seconds

TEXTS = ("reverse abc", "1+2=")
READS = Reads((EMBED, NORM, UP, QUERY))


class Sources(NamedTuple):
    """A base and three fine-tunes of it on disk, as pairs."""

    base: Path
    pairs: tuple[Pair, ...]

    def parts(self, *texts: str) -> tuple[MergeSource, ...]:
        return tuple(merge_source(pair, texts) for pair in self.pairs)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    folder = tmp_path_factory.mktemp("family")
    family = make_family(folder)
    names = ["tuned"]
    for k, name in enumerate(("other", "third")):
        shutil.copytree(family.finetuned, folder / name)
        weights = load_file(family.finetuned / "model.safetensors")
        generator = torch.Generator().manual_seed(k)
        changed = {
            each: weight + (0.02 * torch.randn(weight.shape, generator=generator)).bfloat16()
            for each, weight in weights.items()
        }
        save_file(changed, folder / name / "model.safetensors", metadata={"format": "pt"})
        names.append(name)
    return Sources(family.base, tuple(Pair(f"base → {each}", str(family.base), str(folder / each)) for each in names))


@pytest.fixture
def logs(tmp_path: Path) -> Logs:
    return Logs(str(tmp_path / "log"))


@pytest.fixture(autouse=True)
def _nothing_held() -> Iterator[None]:
    yield
    merge_edit._gathered.clear()


def merged_weights(sources: Sources, method: MergeMethod, prune: Pruner | None, seed: int, **how: Any) -> np.ndarray:
    """What the merge adds up to, of `merge` itself."""
    deltas = [load_delta(base=pair.base, finetuned=pair.finetuned) for pair in sources.pairs]
    merged, base = merge(str(sources.base), deltas, method, prune, seed=seed, **how), open_checkpoint(sources.base)
    return flat({name: base[name].float() + merged[name] for name in READS.names}, *READS.names)


MERGES: list[tuple[MergeMethod, Pruner | None, tuple[float, ...]]] = [
    (da.merging.TaskArithmetic(0.5), None, ()),
    (da.merging.Average(), Dare(0.5), (1.0, 2.0, 0.5)),
    (da.merging.Ties(0.6), None, ()),
    (da.merging.Ties(0.6, "model"), Dare(0.3), ()),
    (da.merging.Ties(0.0, fuse="sum", slack=da.merging.Slack(2, 1.0)), Magnitude(0.5, "model"), (1.0, -1.0, 1.0)),
    (da.merging.Della(0.5), None, ()),
    (da.merging.Widen(), MagPrune(0.5), ()),
]


@pytest.mark.parametrize(("method", "prune", "weights"), MERGES)
def test_in_a_sweep_it_is_what_merge_gives(
    sources: Sources, method: MergeMethod, prune: Pruner | None, weights: tuple[float, ...], tmp_path: Path
) -> None:
    merging = Merging(sources.parts(), method, prune, weights)
    table = sweep(sources.pairs[:1], [merging], [READS], [0, 3], tmp_path)
    assert table["seed"].tolist() == ([0, 3] if merging.random else [0])
    for row in table.itertuples():
        expected = merged_weights(sources, method, prune, row.seed, weights=weights or None)
        np.testing.assert_array_equal(row.outcomes, expected)
    assert table["method"].eq(merging.method).all()


def test_it_answers_as_the_saved_model_does(tmp_path: Path) -> None:
    pairs = [Pair(f"base → {each}", "zoo:tiny/base", f"zoo:tiny/{each}") for each in ("instruct", "math")]
    judges = [
        ExactMatch(tuple(da.evaluation.load_questions(questions_file(task), 24)), name=task)
        for task in ("instruct", "math")
    ]
    method, prune = da.merging.Ties(0.2, fuse="sum"), Dare(0.2)
    merging = Merging(tuple(map(merge_source, pairs)), method, prune)
    swept = sweep(pairs[:1], [merging], judges, [0, 1], tmp_path / "swept")
    base = open_checkpoint("zoo:tiny/base")
    deltas = [load_delta(base=base.path, finetuned=pair.finetuned) for pair in pairs]
    for seed in (0, 1):
        out = tmp_path / f"merged {seed}"
        save_checkpoint(base, merge(base, deltas, method, prune, seed=seed), out, dtype="float32")
        saved = sweep([Pair("saved", "zoo:tiny/base", str(out))], [Dare(0)], judges, [0], tmp_path / "saved")
        own = swept[swept["seed"] == seed]
        assert own["evaluation"].tolist() == saved["evaluation"].tolist() == ["instruct", "math"]
        assert own["outcomes"].tolist() == saved["outcomes"].tolist()
        assert 0 < own["value"].mean() < 1


def test_of_a_scope_that_alone_is_merged(sources: Sources, tmp_path: Path) -> None:
    """Also where a trim compares all tensors that are merged."""
    for method in (da.merging.TaskArithmetic(), da.merging.Ties(0.5, "model")):
        merging = Merging(sources.parts(), method)
        table = sweep(
            sources.pairs[:1], [Edit(merging, "mlp"), merging], [READS, Reads((UP,), name="up")], [0], tmp_path
        )
        of_mlp, up_of_mlp, _, up_of_all = (np.array(outcomes) for outcomes in table["outcomes"])
        tuned, base = (open_checkpoint(source) for source in (sources.pairs[0].finetuned, sources.base))
        deltas = [dict(load_delta(base=sources.base, finetuned=pair.finetuned)) for pair in sources.pairs]
        names = in_scope("mlp", {name: tensor.dim() for name, tensor in deltas[0].items()})
        scoped = [{name: delta[name] for name in names} for delta in deltas]
        if method.trim is not None:
            cuts = [method.trim.over(delta, 0) for delta in scoped]  # type: ignore[attr-defined]
            scoped = [
                {name: cut(tensor, name=name, seed=0) for name, tensor in delta.items()}
                for cut, delta in zip(cuts, scoped, strict=True)
            ]
        parts = Parts(UP, tuple(delta[UP] for delta in scoped), (1.0,) * 3, base[UP].float())
        weights = {name: tuned[name].float() for name in READS.names} | {UP: base[UP].float() + method(parts)}
        np.testing.assert_array_equal(of_mlp, flat(weights, *READS.names))
        # The cut over all tensors is another than that over the scope.
        assert np.array_equal(up_of_mlp, up_of_all) == (method.trim is None)


@pytest.mark.parametrize("method", [da.merging.Fisher(), da.merging.RegMean()], ids=lambda each: each.label)
def test_methods_that_need_data_read_the_texts_of_each_source(
    sources: Sources, method: MergeMethod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered = []
    gather = merge_edit.gather

    def counted(statistic: Any, delta: Any, *arguments: Any, seed: int) -> Any:
        gathered.append((delta.finetuned.source, seed))
        return gather(statistic, delta, *arguments, seed=seed)

    monkeypatch.setattr(merge_edit, "gather", counted)
    merging = Merging(sources.parts(*TEXTS), method, Dare(0.5))
    with ThreadPoolExecutor(3) as pool:
        table = sweep(sources.pairs[:1], [merging], [READS], [0, 1, 2], tmp_path, pool)
    # Once of each, whatever the number of threads; the labels of Fisher information are drawn under each seed.
    drawn = (0, 1, 2) if method.statistic == "fisher" else (0,)
    assert sorted(gathered) == sorted((pair.finetuned, seed) for pair in sources.pairs for seed in drawn)
    delta = load_delta(base=str(sources.base), finetuned=sources.pairs[0].finetuned)
    batches = [
        {"input_ids": batch.ids, "attention_mask": batch.mask}
        for batch in token_batches(TEXTS, *finetuned_model(delta))
    ]
    for row in table.itertuples():
        expected = merged_weights(sources, method, Dare(0.5), row.seed, data=[batches] * 3)
        np.testing.assert_array_equal(row.outcomes, expected)
    assert Merging(merging.sources, method).random == (method.statistic == "fisher")


def test_threads_change_nothing(sources: Sources, tmp_path: Path) -> None:
    parts = sources.parts()
    edits: list[Pruner] = [
        Merging(parts, da.merging.Ties(0.5, "model"), Dare(0.5)),
        Merging(parts, da.merging.Della(0.5)),
        Dare(0.5),
        Dare(0),
    ]
    tables = []
    for threads in (1, 4):
        with ThreadPoolExecutor(threads) as pool:
            tables.append(sweep(sources.pairs[:1], edits, [READS], [0, 1, 2], tmp_path / str(threads), pool))
    pd.testing.assert_frame_equal(*map(without_seconds, tables))


def test_a_merge_is_a_row_of_the_table(sources: Sources, tmp_path: Path) -> None:
    parts = sources.parts("a text")
    merges = [
        Merging(parts, da.merging.TaskArithmetic(0.5)),
        Merging(parts, da.merging.TaskArithmetic(2), Dare(0.9), (1.0, 2.0, 1.0)),
        Merging(parts, da.merging.Ties(0.8)),
        Merging(parts, da.merging.Ties(0.8), Dare(0.25)),
    ]
    table = sweep(sources.pairs[:1], merges, [READS], [0], tmp_path)
    assert table["method"].tolist() == ["task arithmetic", "DARE + task arithmetic", "TIES", "DARE + TIES"]
    assert table["drop_rate"].tolist() == [0, 0.9, 0.8, 0.25]
    assert table["rescale"].tolist() == ["0.5", "2.0", "1.0", "1.0"]
    assert table["option_weights"].tolist() == ["()", "(1.0, 2.0, 1.0)", "()", "()"]
    assert [each.random for each in merges] == [False, True, False, True]
    assert [Merging(parts, da.merging.Della(rate)).random for rate in (0.0, 0.5)] == [False, True]
    assert pickle.loads(pickle.dumps(merges[1])) == merges[1]


def test_where_all_is_dropped_it_is_the_base(sources: Sources, logs: Logs, tmp_path: Path) -> None:
    parts = sources.parts()
    edits: list[Pruner] = [
        Dare(1),
        Merging(parts, da.merging.TaskArithmetic(2), Dare(1)),
        Merging(parts, da.merging.Ties(1.0)),
        Merging(parts, da.merging.Della(1.0)),
    ]
    table = sweep(sources.pairs[:1], edits, [logs], [0, 1], tmp_path)
    assert calls(logs) == 1
    assert len(set(table["value"])) == 1
    # Where nothing is dropped it is a merge all the same, and not the fine-tune.
    sweep(sources.pairs[:1], [Dare(0), Merging(parts, da.merging.Ties(0.0))], [logs], [0], tmp_path)
    assert calls(logs) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"by": da.merging.Ties(0.6)},
        {"by": da.merging.Ties(0.5, scaling=0.9)},
        {"by": da.merging.Ties(0.5, fuse="sum")},
        {"by": da.merging.Ties(0.5, slack=da.merging.Slack(0))},
        {"by": da.merging.Ties(0.5, slack=da.merging.Slack(1, 2.0))},
        {"by": da.merging.Della(0.5)},
        {"prune": Magnitude(0.1)},
        {"weights": (1.0, 1.0, 1.5)},
    ],
    ids=str,
)
def test_what_a_merge_consists_of_makes_another_cell(
    sources: Sources, logs: Logs, tmp_path: Path, change: dict[str, Any]
) -> None:
    merging = Merging(sources.parts(), da.merging.Ties(0.5))
    for each in (merging, replace(merging), replace(merging, **change)):
        sweep(sources.pairs[:1], [each], [logs], [0], tmp_path)
    assert calls(logs) == 2


def test_so_does_what_is_merged_and_not_where_it_lies(sources: Sources, logs: Logs, tmp_path: Path) -> None:
    def run(pairs: tuple[Pair, ...], *texts: str) -> int:
        parts = tuple(merge_source(pair, texts) for pair in pairs)
        sweep(pairs[:1], [Merging(parts, da.merging.Ties(0.5))], [logs], [0], tmp_path / "out")
        return calls(logs)

    assert run(sources.pairs) == 1
    base = shutil.copytree(sources.base, tmp_path / "moved" / "base")
    pairs = tuple(
        Pair(each.name, str(base), str(shutil.copytree(each.finetuned, tmp_path / "moved" / Path(each.finetuned).name)))
        for each in sources.pairs
    )
    assert run(pairs) == 0
    # One weight of one of the others.
    file = Path(pairs[2].finetuned) / "model.safetensors"
    weights = load_file(file)
    weights[NORM][0] += 0.5
    save_file(weights, file, metadata={"format": "pt"})
    assert run(pairs) == 1
    assert run(pairs[:2]) == 1
    # Which one is which tells their random numbers.
    assert run((sources.pairs[0], sources.pairs[2], sources.pairs[1])) == 1
    assert run(sources.pairs, "a text") == 1
    assert len(cells_of(tmp_path / "out")) == 5


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_the_first_has_every_tensor_that_is_merged(sources: Sources, tmp_path: Path) -> None:
    adapter = get_peft_model(load_model(open_checkpoint(sources.base)), LoraConfig(r=2, target_modules=["up_proj"]))
    torch.manual_seed(0)
    for name, parameter in adapter.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapter.save_pretrained(str(tmp_path / "adapter"))
    small = Pair("base → adapter", str(sources.base), str(tmp_path / "adapter"))
    pairs = (sources.pairs[1], small)
    parts = tuple(map(merge_source, pairs))
    table = sweep(pairs[:1], [Merging(parts, da.merging.TaskArithmetic())], [READS], [0], tmp_path / "out")
    expected = merged_weights(Sources(sources.base, pairs), da.merging.TaskArithmetic(), None, 0)
    np.testing.assert_array_equal(table["outcomes"].iloc[0], expected)
    with pytest.raises(SweepError, match="changes '.*', which .*adapter leaves alone; take a pair that changes all"):
        sweep([small], [Merging(parts[::-1], da.merging.TaskArithmetic())], [READS], [0], tmp_path / "out")


def test_a_merge_is_no_pruner_of_one_tensor(sources: Sources) -> None:
    merging = Merging(sources.parts(), da.merging.Average())
    with pytest.raises(ValueError, match="a merge reads all deltas, and 'w' is a tensor of one; use it in a sweep"):
        merging(torch.ones(3), name="w", seed=0)


def test_a_pair_without_a_base_is_no_part_of_a_merge(sources: Sources) -> None:
    with pytest.raises(ValueError, match="pair 'alone' has none; give Pair its base"):
        merge_source(Pair("alone", None, "anywhere"))


def test_weights_are_as_many_as_sources(sources: Sources) -> None:
    with pytest.raises(ValueError, match="weights: 2 are given for 3 deltas; give one for each"):
        Merging(sources.parts(), da.merging.Average(), weights=(1.0, 1.0))


def test_a_merge_is_an_edit_of_its_own_pair(sources: Sources, logs: Logs, tmp_path: Path) -> None:
    merging = Merging(sources.parts(), da.merging.TaskArithmetic())
    # Another that differs in one tensor only.
    shutil.copytree(sources.pairs[0].finetuned, tmp_path / "like")
    weights = load_file(tmp_path / "like" / "model.safetensors")
    weights[EMBED][0, 0] += 0.5
    save_file(weights, tmp_path / "like" / "model.safetensors", metadata={"format": "pt"})
    like = Pair("base → like", str(sources.base), str(tmp_path / "like"))
    for pair in (sources.pairs[1], like):
        with pytest.raises(ValueError, match="tuned is an edit of its own pair, and 'base → .*' is another"):
            sweep([pair], [Dare(0.5), merging], [logs], [0], tmp_path)
    assert calls(logs) == 0


def test_weights_are_those_of_the_method(sources: Sources) -> None:
    with pytest.raises(ValueError, match="sum to 0, so that there is no mean"):
        Merging(sources.parts()[:2], da.merging.Average(), weights=(1.0, -1.0))


def test_large_statistics_are_let_go_after_a_sweep(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merging = Merging(sources.parts(*TEXTS), da.merging.RegMean())
    for limit, held in ((2**30, 3), (0, 0)):
        monkeypatch.setattr("delta_analysis.sweeps.pairs.HELD_BYTES", limit)
        sweep(sources.pairs[:1], [merging], [READS], [0], tmp_path / str(limit))
        assert len(merge_edit._gathered) == held
