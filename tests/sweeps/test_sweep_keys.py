"""Which cells a sweep runs, and which it takes from those on disk; every call of an evaluation is counted."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from delta_analysis.checkpoints.checkpoint import open_checkpoint
from delta_analysis.checkpoints.provenance import content_hash
from delta_analysis.evaluation.models import load_model
from delta_analysis.pruning import Dare, Magnitude, MagPrune
from delta_analysis.sweeps.engine import sweep
from delta_analysis.sweeps.pairs import Edit, Pair
from tests.tiny_family import (
    NORM,
    UP,
    Family,
    Inline,
    Logs,
    Reads,
    calls,
    cells_of,
    flat,
    make_family,
    without_seconds,
)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def logs(tmp_path: Path) -> Logs:
    return Logs(str(tmp_path / "log"))


def test_a_second_sweep_runs_only_what_is_new(family: Family, logs: Logs, tmp_path: Path) -> None:
    first = sweep([family.pair()], [Dare(0.5), Dare(0.9)], [logs], [0, 1], tmp_path)
    assert calls(logs) == 4
    again = sweep([family.pair()], [Dare(0.9), Dare(0.5)], [logs], [1, 0], tmp_path)
    assert calls(logs) == 0
    # With the time that they took then.
    by = ["drop_rate", "seed"]
    pd.testing.assert_frame_equal(again.sort_values(by, ignore_index=True), first.sort_values(by, ignore_index=True))
    more = sweep([family.pair()], [Dare(0.5), Dare(0.7), Dare(0.9)], [logs], [0, 1, 2], tmp_path)
    assert calls(logs) == 5
    assert (len(more), len(cells_of(tmp_path))) == (9, 9)


def test_names_are_no_part_of_a_cell(family: Family, logs: Logs, tmp_path: Path) -> None:
    first = sweep([family.pair()], [Dare(0.5)], [logs], [0], tmp_path)
    assert calls(logs) == 1
    renamed = sweep([family.pair("new")], [Dare(0.5)], [replace(logs, name="other")], [0], tmp_path)
    assert calls(logs) == 0
    assert renamed[["pair", "evaluation"]].to_numpy().tolist() == [["new", "other"]]
    pd.testing.assert_frame_equal(
        renamed.drop(columns=["pair", "evaluation"]), first.drop(columns=["pair", "evaluation"])
    )


def test_nor_is_the_place_of_a_checkpoint(family: Family, logs: Logs, tmp_path: Path) -> None:
    sweep([family.pair()], [Dare(0.5)], [logs], [0], tmp_path / "out")
    moved = [shutil.copytree(each, tmp_path / "moved" / each.name) for each in (family.base, family.finetuned)]
    sweep([Pair("moved", *map(str, moved))], [Dare(0.5)], [logs], [0], tmp_path / "out")
    assert calls(logs) == 1
    # One byte of a weight file, or of what stands beside it, makes another cell.
    weights = bytearray((moved[1] / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (moved[1] / "model.safetensors").write_bytes(weights)
    sweep([Pair("moved", *map(str, moved))], [Dare(0.5)], [logs], [0], tmp_path / "out")
    assert calls(logs) == 1
    (moved[0] / "chat_template.jinja").write_text("{{ messages }}")
    sweep([Pair("moved", *map(str, moved))], [Dare(0.5)], [logs], [0], tmp_path / "out")
    assert calls(logs) == 1


def test_what_a_training_left_beside_the_weights_is_no_part_of_a_cell(
    family: Family, logs: Logs, tmp_path: Path
) -> None:
    tuned = shutil.copytree(family.finetuned, tmp_path / "tuned")
    pair = Pair("base → tuned", str(family.base), str(tuned))
    sweep([pair], [Dare(0.5)], [logs], [0], tmp_path / "out")
    (tuned / "trainer_state.json").write_text('{"global_step": 500}')
    sweep([pair], [Dare(0.5)], [logs], [0], tmp_path / "out")
    assert calls(logs) == 1
    tokenizer = json.loads((tuned / "tokenizer.json").read_text())
    (tuned / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))
    sweep([pair], [Dare(0.5)], [logs], [0], tmp_path / "out")
    assert calls(logs) == 1


@pytest.mark.parametrize(
    ("edit", "evaluation", "seed"),
    [
        (Dare(0.51), Reads(), 0),
        (Dare(0.5, "none"), Reads(), 0),
        (Edit(Dare(0.5), "mlp"), Reads(), 0),
        (Dare(0.5), Reads((UP,)), 0),
        (Dare(0.5), Reads(metric="kl"), 0),
        (Dare(0.5), Reads(), 1),
        (MagPrune(0.5, 0.2), Reads(), 0),
        (MagPrune(0.5, 0.3), Reads(), 0),
    ],
)
def test_what_a_cell_consists_of_makes_another(
    family: Family, edit: Any, evaluation: Reads, seed: int, tmp_path: Path
) -> None:
    sweep([family.pair()], [Dare(0.5), MagPrune(0.5)], [Reads()], [0], tmp_path)
    sweep([family.pair()], [edit], [evaluation], [seed], tmp_path)
    assert len(cells_of(tmp_path)) == 3


def test_changed_code_returns_no_old_number(
    family: Family, logs: Logs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep([family.pair()], [Dare(0.5)], [logs], [0], tmp_path)
    monkeypatch.setattr("delta_analysis.sweeps.engine.code_digest", lambda: "of other sources")
    sweep([family.pair()], [Dare(0.5)], [logs], [0], tmp_path)
    assert calls(logs) == 2


def test_all_sweeps_may_share_the_cells_of_one_folder(
    family: Family, logs: Logs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTA_ANALYSIS_CELLS", str(tmp_path / "store"))
    for out_dir in ("one", "two"):
        sweep([family.pair()], [Dare(0.5)], [logs], [0], tmp_path / out_dir)
    assert calls(logs) == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["store"]


def test_a_relative_folder_is_one_below_the_working_directory(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep([family.pair()], [Dare(0.5)], [Reads()], [0], "out")
    assert [path.parent for path in cells_of(tmp_path)] == [tmp_path / "out" / "cells"]


def test_what_no_method_and_no_seed_changes_runs_once(family: Family, logs: Logs, tmp_path: Path) -> None:
    def runs(edits: list[Any], seeds: list[int]) -> int:
        table = sweep([family.pair()], edits, [logs], seeds, tmp_path)
        assert set(table["seed"]) <= set(seeds)
        return calls(logs)

    assert runs([Dare(0), Dare(0, "none"), Dare(0, "l2"), Magnitude(0, "model"), MagPrune(0)], [5, 6]) == 1
    assert runs([Edit(Dare(0), "mlp"), Edit(Magnitude(0), "norms")], [7]) == 0
    # A factor changes the model though nothing is dropped.
    assert runs([Dare(0, 2.0)], [5, 6]) == 1
    assert runs([Dare(1), Dare(1, "none"), Dare(1, 3.0), Magnitude(1, "row"), MagPrune(1)], [5, 6]) == 1
    assert runs([Edit(Dare(1), "mlp"), Edit(MagPrune(1), "mlp")], [8, 9]) == 1
    assert runs([Magnitude(0.5), Magnitude(0.5, "model")], [5, 6, 7]) == 2
    assert runs([Dare(0.5), MagPrune(0.5)], [5, 6, 7]) == 6


def test_an_untouched_model_is_the_same_whatever_its_base(family: Family, logs: Logs, tmp_path: Path) -> None:
    other = shutil.copytree(family.base, tmp_path / "other")
    (other / "vocab.json").write_text("{}")
    tuned = str(family.finetuned)
    pairs = [family.pair(), Pair("other → tuned", str(other), tuned), Pair("tuned", None, tuned)]
    table = sweep(pairs, [Dare(0)], [logs], [0], tmp_path / "out")
    assert calls(logs) == 1
    assert len(set(table["value"])) == 1
    # Each row says its own base all the same.
    assert table["base_hash"].tolist() == [content_hash(str(family.base)), content_hash(str(other)), ""]
    sweep(pairs, [Dare(0.5)], [logs], [0], tmp_path / "out")
    assert calls(logs) == 3


def test_equal_pairs_under_two_names_run_once(family: Family, logs: Logs, tmp_path: Path) -> None:
    table = sweep([family.pair("a"), family.pair("b")], [Dare(0.5), Dare(0)], [logs], [0, 1], tmp_path)
    assert calls(logs) == 3
    a, b = (table[table["pair"] == name].drop(columns="pair").reset_index(drop=True) for name in "ab")
    pd.testing.assert_frame_equal(a, b)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_untouched_adapter_is_another_on_another_base(family: Family, logs: Logs, tmp_path: Path) -> None:
    adapter = get_peft_model(load_model(open_checkpoint(family.base)), LoraConfig(r=2, target_modules=["up_proj"]))
    adapter.save_pretrained(tmp_path / "adapter")
    pairs = [Pair(base.name, str(base), str(tmp_path / "adapter")) for base in (family.base, family.finetuned)]
    table = sweep(pairs, [Dare(0)], [logs], [0], tmp_path / "out")
    assert calls(logs) == 2
    assert len(set(table["value"])) == 2


def test_damaged_cells_run_again_and_are_replaced(family: Family, logs: Logs, tmp_path: Path) -> None:
    asked = ([family.pair()], [Dare(0.5), Dare(0.9)], [logs], [0, 1, 2], tmp_path)
    whole = sweep(*asked)
    calls(logs)
    files = cells_of(tmp_path)
    sizes = [path.stat().st_size for path in files]
    damage = [b"", files[1].read_bytes()[:-1], files[2].read_bytes()[: sizes[2] // 2], b"rubbish" * 1000]
    for path, data in zip(files, damage, strict=False):
        path.write_bytes(data)
    (files[0].parent / f".{files[4].stem}.1-abc.partial").write_bytes(b"half")
    again = sweep(*asked)
    assert calls(logs) == len(damage)
    pd.testing.assert_frame_equal(without_seconds(again), without_seconds(whole))
    assert sweep(*asked).equals(again)
    assert calls(logs) == 0


@given(st.lists(st.sampled_from([(p, s) for p in (0.0, 0.25, 0.5, 1.0) for s in (0, 1)]), min_size=1, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12, deadline=None)
def test_the_table_does_not_depend_on_what_was_there_before(
    family: Family, tmp_path_factory: pytest.TempPathFactory, before: list[tuple[float, int]]
) -> None:
    out_dir = tmp_path_factory.mktemp("out")
    for rate, seed in before:
        sweep([family.pair("earlier")], [Dare(rate)], [Reads(name="earlier")], [seed], out_dir)
    table = sweep([family.pair()], [Dare(p) for p in (0, 0.25, 0.5, 1)], [Reads()], [0, 1], out_dir, Inline())
    expected = {0.0: family.finetuned_weights, 1.0: family.base_weights}
    for row in table.itertuples():
        pruned = Dare(row.drop_rate)(family.delta[NORM], name=NORM, seed=row.seed)
        weights = expected.get(row.drop_rate, {NORM: family.base_weights[NORM] + pruned})
        assert np.array_equal(row.outcomes, flat(weights, NORM))
    assert len(cells_of(out_dir)) == len({(p, s if 0 < p < 1 else 0) for p in (0, 0.25, 0.5, 1) for s in (0, 1)})
