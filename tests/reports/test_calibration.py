"""What foresight is fitted on: which pairs and scopes are measured, and how the file of them is made."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import pytest

import delta_analysis as da
from delta_analysis.checkpoints.paths import find_root
from delta_analysis.checkpoints.provenance import content_hash
from delta_analysis.prediction.predict import calibration_file, calibration_table
from delta_analysis.reports import calibration, foretold
from delta_analysis.reports.calibration import PARTS, TOLERANCE, groups, main, measure, tolerance
from delta_analysis.reports.family import SIZES, Relation, task_pairs, trail
from delta_analysis.reports.parameter_checks import choose_evaluation
from delta_analysis.studies.foresight import NOISE, NORMS, PREDICTORS, VALUES, delta_predictors
from delta_analysis.sweeps import Edit, logit

ORIGIN = ["base", "finetuned", "kind", "task", "numel", "base_hash", "finetuned_hash"]
COLUMNS = [*ORIGIN, "scope", *TOLERANCE, *NOISE, *NORMS, *VALUES]


def test_all_sizes_the_trail_and_the_encoder_are_measured() -> None:
    found = {name: (relations, scopes) for name, relations, scopes in groups()}
    assert list(found) == [*SIZES, "trail", "encoder"]
    for size in SIZES:
        assert found[size][0] == task_pairs(size)
    # The last of the trail is the true base, which is measured among the pairs of its size.
    assert [relation.base for relation in found["trail"][0]] == [source for _, source in trail()][:-1]
    assert {relation.finetuned for relation in found["trail"][0]} == {"zoo:small/code"}
    assert found["small"][0][2].base == trail()[-1][1]
    encoder = {(relation.base, relation.finetuned) for relation in found["encoder"][0]}
    assert len(encoder) == 3
    assert all(source.startswith("zoo:encoder/") for pair in encoder for source in pair)


def test_every_relation_has_a_task_and_every_scope_selects_something() -> None:
    for name, relations, scopes in groups():
        assert scopes[: len(PARTS)] == PARTS
        assert len(set(scopes)) == len(scopes)
        for relation in relations:
            assert relation.task, name
            delta = da.load_delta(base=relation.base, finetuned=relation.finetuned)
            chosen = {tuple(delta.select(scope)) for scope in scopes}
            assert len(chosen) == len(scopes)


def test_the_size_small_is_measured_in_every_layer() -> None:
    delta = da.load_delta(base="zoo:small/base", finetuned="zoo:small/code")
    scopes = {name: scopes for name, _, scopes in groups()}["small"]
    found = [tensor for scope in scopes if "layers" in scope for tensor in delta.select(scope)]
    assert sorted(found) == sorted(tensor for tensor in delta if ".layers." in tensor)


def test_the_committed_table_is_what_is_measured() -> None:
    table = calibration_table()
    assert set(table.columns) <= {*COLUMNS, "group"}
    wanted = [
        (relation.base, relation.finetuned, relation.kind, relation.task, scope, name)
        for name, relations, scopes in groups()
        for relation in relations
        for scope in scopes
    ]
    columns = ["base", "finetuned", "kind", "task", "scope", "group"]
    assert list(table[columns].itertuples(index=False, name=None)) == wanted


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few questions and seeds, and a search of a few steps."""
    few = calibration.Effort(2, 16, (1, 8), 2.0)
    for constant, value in {"WHOLE": few, "PART": few, "TEXTS": 4}.items():
        monkeypatch.setattr(calibration, constant, value)


@pytest.mark.usefixtures("small")
def test_a_pair_measured_in_two_scopes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    relation = task_pairs("tiny")[3]
    found = measure([relation], ["mlp", "norms"], tmp_path)
    assert list(found.columns) == COLUMNS
    assert found["scope"].tolist() == ["mlp", "norms"]
    assert (found[["base", "finetuned", "kind", "task"]] == list(relation)).all(axis=None)
    assert found["base_hash"].unique().tolist() == [content_hash(relation.base)]
    assert found["finetuned_hash"].unique().tolist() == [content_hash(relation.finetuned)]
    assert found["numel"].unique().tolist() == [219776]
    assert (found["low"] <= found["tolerated"]).all()
    assert (found["tolerated"] <= found["high"]).all()
    assert found["untouched"].between(0.9, 1).all()
    # More breaks with the matrices than with the norms.
    assert found["tolerated"].is_monotonic_increasing
    assert found[list(PREDICTORS)].gt(0).all(axis=None)
    delta = da.load_delta(base=relation.base, finetuned=relation.finetuned)
    evaluation = choose_evaluation(relation.task, 16)
    expected = delta_predictors(delta, ["mlp", "norms"], evaluation.texts[:4])
    pd.testing.assert_frame_equal(found[expected.columns].reset_index(drop=True), expected)
    # Measuring again runs no cell.
    cells = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.parquet")}
    pd.testing.assert_frame_equal(measure([relation], ["mlp", "norms"], tmp_path), found)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.parquet")} == cells
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("small")
def test_the_search_that_begins_near_the_answer_finds_what_one_from_the_ends_does(tmp_path: Path) -> None:
    pair, evaluation = task_pairs("tiny")[3].pair, choose_evaluation("code", 16)
    near = tolerance(pair, "code", "mlp", tmp_path)
    (far, _) = da.measure_tolerance(
        [pair], Edit(da.Dare(0.5), "mlp"), [evaluation], (0, 1), tmp_path / "far", resolution=0.25
    )
    assert logit(near["tolerated"][0]) == pytest.approx(logit(far["tolerated"][0]), abs=0.5)


@pytest.mark.usefixtures("small")
def test_a_pair_foretold_beside_its_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foretold, "WHOLE", calibration.WHOLE)
    relation = task_pairs("tiny")[1]
    row = foretold.beside(relation, "tiny", tmp_path)
    committed = pd.read_csv(foretold.foretold_file())
    assert list(row) == committed.columns.tolist()
    assert (row["base"], row["finetuned"]) == relation[:2]
    assert row["tolerated"] == tolerance(relation.pair, relation.task, "all", tmp_path)["tolerated"][0]
    pairs = [(base, tuned) for _, relations, _ in groups() for base, tuned, *_ in relations]
    assert list(committed[["base", "finetuned"]].itertuples(index=False, name=None)) == pairs


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the table goes, with two groups to be measured and a measurement that only tells what it was asked for."""

    def two_groups() -> Iterator[tuple[str, tuple[Relation, ...], tuple[str, ...]]]:
        yield "tiny", task_pairs("tiny"), ("all",)
        yield "trail", task_pairs("small")[:1], ("all", "norms")

    def told(relations: Sequence[Relation], scopes: Sequence[str], out_dir: Path) -> pd.DataFrame:
        warnings.warn("stored in coarse steps", stacklevel=2)
        rows = [(relation.finetuned, scope, str(out_dir), 1 / 3) for relation in relations for scope in scopes]
        return pd.DataFrame(rows, columns=["finetuned", "scope", "out", "tolerated"])

    path = tmp_path / "reference" / "tolerances.csv"
    path.parent.mkdir()
    monkeypatch.setattr(calibration, "groups", two_groups)
    monkeypatch.setattr(calibration, "measure", told)
    monkeypatch.setattr(calibration, "calibration_file", lambda: path)
    monkeypatch.setattr("sys.argv", ["calibration", "--out", str(tmp_path / "cells")])
    return path


def test_main_writes_the_table_and_says_so(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main()
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["tiny: 4 pairs in 1 scopes", "trail: 1 pairs in 2 scopes", str(file)]
    table = pd.read_csv(file)
    assert table["group"].tolist() == ["tiny"] * 4 + ["trail"] * 2
    assert table["scope"].tolist() == ["all"] * 5 + ["norms"]
    assert table["out"].unique().tolist() == [str(tmp_path / "cells")]
    assert table["tolerated"].unique().tolist() == [0.333333]
    assert b"\r" not in file.read_bytes()
    # Nothing lies beside it.
    assert list(file.parent.iterdir()) == [file]


def test_cells_lie_in_runs_unless_told_otherwise(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["calibration"])
    main()
    assert pd.read_csv(file)["out"].unique().tolist() == [str(find_root() / "runs" / "calibration")]


def test_a_table_that_is_cut_short_while_it_is_written_leaves_the_old_one(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("the old one\n")

    def cut_short(table: pd.DataFrame, path: Path, **options: object) -> None:
        path.write_text("finetuned,sc")
        raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(pd.DataFrame, "to_csv", cut_short)
        main()
    assert file.read_text() == "the old one\n"
    main()
    assert len(pd.read_csv(file)) == 6
    assert list(file.parent.iterdir()) == [file]


def test_the_file_is_in_the_repository() -> None:
    assert calibration_file() == find_root() / "data" / "reference" / "tolerances.csv"
    assert calibration_file().is_file()
