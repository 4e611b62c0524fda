"""Sweeps with evaluations that read the weights they are given: the table, which cells run, which are kept."""

from __future__ import annotations

import importlib
import io
import multiprocessing
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model

from delta_analysis._errors import CheckpointError
from delta_analysis.checkpoints.checkpoint import open_checkpoint
from delta_analysis.checkpoints.provenance import content_hash, versions
from delta_analysis.evaluation import ExactMatch, Question, load_questions
from delta_analysis.evaluation.models import load_model, load_tokenizer
from delta_analysis.pruning import Dare, Magnitude, MagPrune
from delta_analysis.reports.family import questions_file
from delta_analysis.sweeps import pairs as editable
from delta_analysis.sweeps.cells import CellStore
from delta_analysis.sweeps.engine import Evaluations, SweepError, options, sweep
from delta_analysis.sweeps.intervals import KINDS, metric_interval
from delta_analysis.sweeps.jobs import Job
from delta_analysis.sweeps.pairs import Edit, EditablePair, Pair
from tests.tiny_family import (
    NORM,
    UP,
    Fails,
    Family,
    Inline,
    Judge,
    Logs,
    Reads,
    calls,
    cells_of,
    flat,
    make_family,
    without_seconds,
)

# Its name in the package is that of the function.
sweep_module = importlib.import_module("delta_analysis.sweeps.engine")
LABELS = ["pair", "method", "drop_rate", "rescale", "scope", "seed", "evaluation", "metric"]
MEASURES = ["kind", "value", "low", "high", "achieved_drop_rate", "seconds", "outcomes"]
ORIGIN = ["device", "versions", "base_hash", "finetuned_hash", "error"]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def logs(tmp_path: Path) -> Logs:
    return Logs(str(tmp_path / "log"))


def test_one_row_a_cell_and_metric_in_the_columns_of_the_contract(family: Family, tmp_path: Path) -> None:
    edits = [Dare(0), Edit(Dare(0.5), "mlp"), Dare(0.5, "none"), Dare(0.5, 2.5), Magnitude(0.5), Dare(1)]
    evaluations = [Reads(name="one"), Reads((NORM, UP), "perplexity", name="two")]
    table = sweep([family.pair("a"), family.pair("b")], edits, evaluations, range(4, 1, -2), tmp_path)
    expected = [
        (pair, method, rate, rescale, scope, seed, evaluation, metric)
        for pair in ("a", "b")
        for method, rate, rescale, scope, seeds in (
            ("DARE", 0.0, "inverse_keep", "all", [4]),
            ("DARE", 0.5, "inverse_keep", "mlp", [4, 2]),
            ("drop only", 0.5, "none", "all", [4, 2]),
            ("drop × 2.5", 0.5, "2.5", "all", [4, 2]),
            ("MP", 0.5, "none", "all", [4]),
            ("DARE", 1.0, "inverse_keep", "all", [4]),
        )
        for seed in seeds
        for evaluation, metric in (("one", "accuracy"), ("two", "perplexity"))
    ]
    assert list(table.columns) == [*LABELS, *MEASURES, "option_within", *ORIGIN]
    assert list(table[LABELS].itertuples(index=False, name=None)) == expected
    assert table.index.tolist() == list(range(len(expected)))
    assert table["drop_rate"].dtype == np.float64
    assert (table["seconds"] > 0).all()
    assert table["error"].isna().all()
    assert table["option_within"].dropna().tolist() == ["tensor"] * 4
    assert set(table["device"]) == {"cpu"}
    assert set(table["base_hash"]) == {content_hash(str(family.base))}
    assert set(table["finetuned_hash"]) == {content_hash(str(family.finetuned))}
    assert set(table["versions"]) == {", ".join(f"{name} {version}" for name, version in versions().items())}
    for row in table.itertuples():
        assert (row.value, row.low, row.high) == metric_interval(KINDS[row.kind], np.array([row.outcomes]))


def test_cells_are_base_plus_pruned_delta(family: Family, tmp_path: Path) -> None:
    pruners = [Dare(0.9), Magnitude(0.6), MagPrune(0.6), Dare(1), Dare(0)]
    table = sweep([family.pair()], pruners, [Reads((NORM, UP))], [3], tmp_path)
    for pruner, outcomes in zip(pruners, table["outcomes"], strict=True):
        pruned = {name: pruner(family.delta[name], name=name, seed=3) for name in (NORM, UP)}
        expected = {name: family.base_weights[name] + tensor for name, tensor in pruned.items()}
        assert np.array_equal(outcomes, flat(expected, NORM, UP))


def test_options_are_columns_of_their_own(family: Family, tmp_path: Path) -> None:
    edits = [Dare(0.5), Magnitude(0.5, "row"), MagPrune(0.5), MagPrune(0.5, 0.25, "tensor")]
    own = sweep([family.pair()], edits, [Reads()], [0], tmp_path).filter(like="option_").astype(object)
    assert list(own.columns) == ["option_window", "option_within"]
    assert own.where(own.notna(), None).to_numpy().tolist() == [
        [None, None],
        [None, "row"],
        ["widest", "row"],
        ["0.25", "tensor"],
    ]
    assert options(Dare(0.5)) == {}
    assert options(MagPrune(0.5, 0)) == {"option_window": "0.0", "option_within": "row"}


@pytest.mark.parametrize("workers", [1, 3])
def test_a_pair_is_loaded_once(family: Family, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = EditablePair.load

    def counted(pair: Pair, device: str = "cpu") -> EditablePair:
        loaded.append(pair.name)
        return load(pair, device)

    monkeypatch.setattr(editable, "_held", {})
    monkeypatch.setattr(EditablePair, "load", counted)
    pairs = [family.pair(), Pair("back", str(family.finetuned), str(family.base))]
    edits, evaluations = [Dare(0), Dare(0.5), Edit(Dare(0.5), "mlp")], [Reads(), Reads((UP,), name="up")]
    with ThreadPoolExecutor(workers) as pool:
        sweep(pairs, edits, evaluations, [0, 1], tmp_path, pool)
    assert sorted(loaded) == ["back", "base → tuned"]
    sweep(pairs, edits, evaluations, [2], tmp_path)
    assert len(loaded) == 2
    for held in editable._held.values():
        weights = family.base_weights if held.pair.name == "back" else family.finetuned_weights
        assert held._copies
        for model in (held.model, *held._copies):
            assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())


def test_any_executor_gives_the_same_table(family: Family, tmp_path: Path) -> None:
    asked = ([Dare(p) for p in (0, 0.3, 0.9, 1)], [Reads((UP, NORM)), Reads((UP,), "perplexity", "up")], [0, 1])
    default = sweep([family.pair()], *asked, tmp_path / "default")
    with ThreadPoolExecutor(2) as pool:
        threads = sweep([family.pair()], *asked, tmp_path / "threads", pool)
        # It is the caller's, and still open.
        assert pool.submit(len, "abc").result() == 3
    inline = sweep([family.pair()], *asked, tmp_path / "inline", Inline())
    for table in (threads, inline):
        pd.testing.assert_frame_equal(without_seconds(table), without_seconds(default))


def test_failures_are_named_at_the_end_and_only_they_run_again(family: Family, logs: Logs, tmp_path: Path) -> None:
    cause = tmp_path / "cause"
    cause.touch()
    asked = ([family.pair()], [Dare(0.5), Edit(Dare(0.9), "mlp")], [Fails(str(cause)), logs], [0, 1], tmp_path / "out")
    with pytest.raises(SweepError, match=r"4 of 8 rows .* the same call runs only these") as caught:
        sweep(*asked)
    assert "base → tuned, DARE at drop rate 0.9, seed 1, fails: RuntimeError: the cause is there" in str(caught.value)
    assert calls(logs) == 4
    table = caught.value.table
    assert table["error"].dropna().tolist() == ["RuntimeError: the cause is there"] * 4
    assert table[table["error"].notna()]["value"].isna().all()
    assert table[table["error"].isna()]["evaluation"].tolist() == ["logs"] * 4
    assert set(table["base_hash"]) == {content_hash(str(family.base))}
    # What failed is on disk, with its error.
    recorded = [pd.read_parquet(path)["error"][0] for path in cells_of(tmp_path)]
    assert sum(pd.notna(error) for error in recorded) == 4
    copied = pickle.loads(pickle.dumps(caught.value))
    assert str(copied) == str(caught.value)
    pd.testing.assert_frame_equal(copied.table, table)
    with pytest.raises(SweepError):
        sweep(*asked)
    cause.unlink()
    healed = sweep(*asked)
    assert calls(logs) == 0
    assert healed["error"].isna().all()
    good = healed["evaluation"] == "logs"
    pd.testing.assert_frame_equal(healed[good].drop(columns="error"), table[good].drop(columns="error"))


def test_a_pair_that_cannot_be_loaded_leaves_the_others(family: Family, tmp_path: Path) -> None:
    broken = shutil.copytree(family.finetuned, tmp_path / "broken")
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer_config.json").unlink()
    pairs = [Pair("broken", str(family.base), str(broken)), family.pair()]
    message = "2 of 4 rows .*\nbroken, DARE at drop rate 0.5, seed 0, reads: CheckpointError"
    with pytest.raises(SweepError, match=message) as caught:
        sweep(pairs, [Dare(0.5), Dare(0)], [Reads()], [0], tmp_path / "out")
    assert caught.value.table["error"].isna().tolist() == [False, False, True, True]


def test_many_failures_are_counted(family: Family, tmp_path: Path) -> None:
    (tmp_path / "cause").touch()
    with pytest.raises(SweepError, match="and 2 more$"):
        sweep([family.pair()], [Dare(0.5)], [Fails(str(tmp_path / "cause"))], range(7), tmp_path / "out")


class Opaque(Judge):
    name = "opaque"


@pytest.mark.parametrize(
    "evaluation",
    [Opaque(), replace(Reads(), names=[NORM]), Reads((torch.ones(1),)), Reads(metric=lambda: 1)],  # type: ignore[arg-type]
    ids=["opaque", "list", "tensor", "function"],
)
def test_an_evaluation_that_no_key_can_name_is_refused(family: Family, tmp_path: Path, evaluation: Any) -> None:
    with pytest.raises(TypeError, match="cannot be part of a cell's key"):
        sweep([family.pair()], [Dare(0.5)], [evaluation], [0], tmp_path)
    assert not cells_of(tmp_path)


def test_each_pair_may_have_evaluations_of_its_own(family: Family, tmp_path: Path) -> None:
    own: Evaluations = {"a": [Reads()], "b": [Reads((UP,)), Reads(metric="kl", name="second")], "unused": []}
    table = sweep([family.pair("a"), family.pair("b")], [Dare(0.5)], own, [0], tmp_path)
    assert table[["pair", "evaluation", "metric"]].to_numpy().tolist() == [
        ["a", "reads", "accuracy"],
        ["b", "reads", "accuracy"],
        ["b", "second", "kl"],
    ]
    assert [len(outcomes) for outcomes in table["outcomes"]] == [8, 128, 8]


@pytest.mark.parametrize(
    ("evaluations", "message"),
    [
        ([], "none is given for pair 'base → tuned'"),
        ({"another": [Reads()]}, "none is given for pair 'base → tuned'"),
        ({"base → tuned": []}, "none is given for pair 'base → tuned'"),
        ([Reads(), Reads((UP,))], "two of pair 'base → tuned' bear the same name"),
    ],
)
def test_evaluations_that_cannot_be_told_apart_or_are_missing(
    family: Family, tmp_path: Path, evaluations: Evaluations, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sweep([family.pair()], [Dare(0.5)], evaluations, [0], tmp_path)


def test_nothing_to_judge_is_refused(family: Family, tmp_path: Path) -> None:
    for pairs, edits, seeds in (([], [Dare(0.5)], [0]), ([family.pair()], [], [0]), ([family.pair()], [Dare(0.5)], [])):
        with pytest.raises(ValueError, match="no cell is asked for"):
            sweep(pairs, edits, [Reads()], seeds, tmp_path)


def test_two_pairs_of_one_name_are_refused(family: Family, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two that differ bear the same name"):
        sweep([family.pair("a"), Pair("a", None, str(family.finetuned))], [Dare(0.5)], [Reads()], [0], tmp_path)


def test_a_source_that_cannot_be_read_is_refused_before_any_work(family: Family, logs: Logs, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or directory"):
        sweep([family.pair(), Pair("lost", None, str(tmp_path / "a" / "b"))], [Dare(0)], [logs], [0], tmp_path / "out")
    assert calls(logs) == 0


@pytest.mark.parametrize("device", ["cud", "gpu", "cuda:99"])
def test_an_unknown_device_is_refused_before_any_work(family: Family, logs: Logs, tmp_path: Path, device: str) -> None:
    with pytest.raises(ValueError, match=f"device must be one of cpu.*; not '{device}'"):
        sweep([family.pair()], [Dare(0)], [logs], [0], tmp_path / "out", device=device)
    assert calls(logs) == 0
    assert not cells_of(tmp_path)


def test_forked_processes_are_refused_before_any_work(family: Family, logs: Logs, tmp_path: Path) -> None:
    with (
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool,
        pytest.raises(ValueError, match=r"processes are forked, in which torch hangs; give .*get_context\(\"spawn\"\)"),
    ):
        sweep([family.pair()], [Dare(0)], [logs], [0], tmp_path / "out", pool)
    assert calls(logs) == 0
    assert not cells_of(tmp_path)


def workers(jobs: list[Job]) -> int:
    with sweep_module._pool(jobs) as pool:
        assert isinstance(pool, ThreadPoolExecutor)
        return pool._max_workers


@pytest.fixture
def _three_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module.torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(sweep_module, "single_threaded_pool", ThreadPoolExecutor)


def jobs_of(pair: Pair, count: int, folder: Path, device: str = "cpu") -> list[Job]:
    return [Job(pair, None, seed, ("", ""), device, CellStore(folder), ()) for seed in range(count)]


@pytest.mark.usefixtures("_three_cores")
def test_small_models_are_judged_one_a_core(family: Family, tmp_path: Path) -> None:
    assert [workers(jobs_of(family.pair(), count, tmp_path)) for count in (1, 2, 3, 9)] == [1, 2, 3, 3]
    assert workers(jobs_of(family.pair(), 9, tmp_path, "cuda")) == 1


@pytest.mark.usefixtures("_three_cores")
def test_a_model_in_shards_counts_as_a_whole(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_model(open_checkpoint(family.finetuned)).save_pretrained(tmp_path / "shards", max_shard_size="3KB")
    jobs = jobs_of(Pair("shards", str(family.base), str(tmp_path / "shards")), 9, tmp_path)
    sizes = [path.stat().st_size for path in (tmp_path / "shards").glob("*.safetensors")]
    assert len(sizes) > 1
    for limit, expected in ((sum(sizes) + 1, 3), (sum(sizes), 1), (max(sizes) + 1, 1)):
        monkeypatch.setattr(sweep_module, "LARGE", limit)
        assert workers(jobs) == expected


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.usefixtures("_three_cores")
def test_an_adapter_counts_by_its_base(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = get_peft_model(load_model(open_checkpoint(family.base)), LoraConfig(r=1, target_modules=["up_proj"]))
    adapter.save_pretrained(tmp_path / "adapter")
    pair = Pair("adapter", str(family.base), str(tmp_path / "adapter"))
    size = (family.base / "model.safetensors").stat().st_size
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < size / 2
    for limit, expected in ((size + 1, 3), (size, 1)):
        monkeypatch.setattr(sweep_module, "LARGE", limit)
        assert workers(jobs_of(pair, 9, tmp_path)) == expected


def test_seeds_may_come_from_numpy_and_are_whole(family: Family, tmp_path: Path) -> None:
    table = sweep([family.pair()], [Dare(0.5)], [Reads()], np.arange(2), tmp_path)  # type: ignore[arg-type]
    assert sweep([family.pair()], [Dare(0.5)], [Reads()], [0, 1], tmp_path).equals(table)
    with pytest.raises(TypeError, match="integer"):
        sweep([family.pair()], [Dare(0.5)], [Reads()], [0.5], tmp_path)  # type: ignore[list-item]


def test_progress_counts_cells(family: Family, tmp_path: Path) -> None:
    first, second = io.StringIO(), io.StringIO()
    sweep([family.pair()], [Dare(0.5)], [Reads()], [0, 1], tmp_path, progress=first)
    evaluations = [Reads(), Reads((UP,), name="up")]
    sweep([family.pair()], [Dare(0.5), Dare(0.9)], evaluations, [0, 1], tmp_path, progress=second)
    assert "| 0/2 [" in first.getvalue()
    assert "| 2/2 [" in first.getvalue()
    # Those that are there already count as done.
    assert "| 2/8 [" in second.getvalue()
    assert "| 8/8 [" in second.getvalue()
    assert "cell/s]" in second.getvalue() or "s/cell]" in second.getvalue()


def test_nothing_is_written_but_cells(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in family.base.parent.rglob("*")}
    sweep([family.pair()], [Dare(0.5)], [Reads()], [0], tmp_path / "deep" / "out")
    assert {path: path.stat().st_mtime_ns for path in family.base.parent.rglob("*")} == before
    assert [path.parent for path in (tmp_path / "deep").rglob("*") if path.is_file()] == [tmp_path / "deep/out/cells"]
    assert capsys.readouterr() == ("", "")


def test_dropping_the_weights_of_an_embedded_model(tmp_path: Path) -> None:
    questions = ExactMatch(tuple(load_questions(questions_file("instruct"), 12)))
    checkpoint = open_checkpoint("zoo:small/instruct")
    untouched = questions(load_model(checkpoint), load_tokenizer(checkpoint))["accuracy"]
    assert untouched.any()
    pair = Pair("nothing → instruct", None, "zoo:small/instruct")
    edits = [Dare(0), MagPrune(0), Magnitude(0.9), MagPrune(1)]
    table = sweep([pair], edits, [questions], [0], tmp_path)
    assert np.array_equal(np.stack(table["outcomes"][:2]), [untouched, untouched])
    assert table["value"].tolist()[2:] == [0, 0]
    assert table["achieved_drop_rate"].tolist() == pytest.approx([0, 0, 0.9, 1], abs=0.01)
    # One question changed makes other cells.
    changed = replace(questions, questions=(Question("2+2=", "4"), *questions.questions[1:]))
    sweep([pair], [Dare(0)], [changed], [0], tmp_path)
    assert len(cells_of(tmp_path)) == 4


def test_a_pair_is_opened_once_whatever_the_number_of_cells(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    for name, function in (("open_checkpoint", open_checkpoint), ("edited_source", editable.edited_source)):

        def counted(source: Any, *, name: str = name, function: Any = function) -> Any:
            opened.append(name)
            return function(source)

        monkeypatch.setattr(sweep_module, name, counted)
    sweep([family.pair()], [Dare(0), Dare(0.5)], [Reads(name="one"), Reads(name="two")], [0, 1, 2], tmp_path)
    # Once for the untouched cells, once for the size of what is edited.
    assert sorted(opened) == ["edited_source", "open_checkpoint", "open_checkpoint"]
