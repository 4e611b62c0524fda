"""Keys of cells, and their files: whole, damaged, half written, in error."""

from __future__ import annotations

import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from delta_analysis.evaluation import Classification, ExactMatch, Labelled, LmEval, Question, harness
from delta_analysis.pruning import Dare, MagPrune
from delta_analysis.sweeps import cells
from delta_analysis.sweeps.cells import SCHEMA, CellStore, Row, content, digest
from delta_analysis.sweeps.pairs import Edit

ROW: Row = dict.fromkeys(SCHEMA.names) | {
    "metric": "accuracy",
    "value": 0.5,
    "outcomes": [0.0, 1.0],
    "seconds": 0.25,
    "base_hash": "ab",
    "cell": '{"pair": "Basis → ä"}',
}


@dataclass(frozen=True)
class Nested:
    parts: tuple[object, ...] = ()
    name: str = "nested"


@dataclass
class Loose:
    number: int = 1


class Opaque:
    pass


def test_content_is_classes_and_fields() -> None:
    assert content(Edit(MagPrune(0.5, 0.25), "attention")) == {
        "class": "Edit",
        "pruner": {
            "class": "MagPrune",
            "drop_rate": 0.5,
            "window": 0.25,
            "within": "row",
            "rescale": "inverse_keep",
        },
        "scope": "attention",
        "change": None,
    }
    assert content((None, True, 1, 0.5, "a", (Nested(),))) == [None, True, 1, 0.5, "a", [content(Nested())]]


QUESTIONS = (Question("2+2=", "4"),)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ExactMatch(QUESTIONS), ExactMatch(QUESTIONS, batch_size=3)),
        (Classification((Labelled("a", 1),)), Classification((Labelled("a", 1),), batch_size=3)),
        (LmEval(("gsm8k",)), LmEval(("gsm8k",), batch_size=3, allow_code=True)),
    ],
    ids=["exact match", "classification", "harness"],
)
def test_what_changes_speed_alone_is_no_part_of_the_content(one: Any, other: Any) -> None:
    assert one != other
    assert content(one) == content(other)
    # All else is.
    assert content(one) != content(replace(one, name="another"))
    assert content(Edit(Dare(0.5), "mlp")) != content(Edit(Dare(0.5)))


def test_another_version_of_the_harness_is_another_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(LmEval(("gsm8k",)))
    monkeypatch.setattr(harness, "_version", lambda: "0.0.1")
    assert content(LmEval(("gsm8k",))) == before | {"version": "0.0.1"} != before  # type: ignore[operator]


@pytest.mark.parametrize(
    "part",
    [Opaque(), Loose(), [1, 2], {"a": 1}, {1, 2}, np.zeros(2), Path("a"), Nested, lambda: 1, b"bytes"],
    ids=lambda part: type(part).__name__,
)
def test_what_cannot_be_told_apart_by_content_is_refused(part: object) -> None:
    for value in (part, Nested((1, part)), Nested((Nested((part,)),))):
        with pytest.raises(TypeError, match=r"cannot be part of a cell's key; make .* frozen dataclasses"):
            content(value)


PLAIN: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.lists(inner, max_size=3).map(lambda x: Nested(tuple(x))),
    max_leaves=6,
)


@given(PLAIN, PLAIN)
def test_a_digest_is_the_same_for_the_same_content_alone(one: object, other: object) -> None:
    # repr tells 1, 1.0 and True apart, which == does not.
    assert (digest(content(one)) == digest(content(other))) == (repr(one) == repr(other))


def test_a_digest_is_of_text_and_so_the_same_in_every_process() -> None:
    text = r'{"a": true, "b": [1, 2.5, null, "\u00e4"]}'
    assert digest({"b": [1, 2.5, None, "ä"], "a": True}) == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "metric": st.text(),
                "value": st.floats(),
                "low": st.none() | st.floats(),
                "outcomes": st.none() | st.lists(st.floats(), max_size=5),
                "cell": st.text(),
            }
        ),
        min_size=1,
        max_size=3,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_rows_come_back_as_they_were(tmp_path: Path, rows: list[Row]) -> None:
    store = CellStore(tmp_path / "a" / "cells")
    store.write("key", rows)
    missing = dict.fromkeys(SCHEMA.names)
    # repr, since NaN is not equal to itself.
    assert repr(store.read("key")) == repr([missing | row for row in rows])
    assert [path.name for path in store.folder.iterdir()] == ["key.parquet"]


def test_a_cell_that_is_missing_or_of_another_key_is_not_there(tmp_path: Path) -> None:
    store = CellStore(tmp_path / "never made")
    assert store.read("key") is None
    assert not store.folder.exists()
    store.write("key", [ROW])
    assert store.read("other") is None
    assert store.read("ke") is None


def test_an_error_has_to_run_again_and_replaces_no_finished_cell(tmp_path: Path) -> None:
    store, wrong = CellStore(tmp_path), dict.fromkeys(SCHEMA.names) | {"error": "RuntimeError: no"}
    store.write("key", [wrong])
    assert store.read("key") is None
    assert pq.read_table(store.path("key")).to_pylist() == [wrong]
    store.write("key", [ROW])
    store.write("key", [wrong])
    store.write("key", [ROW, wrong])
    assert store.read("key") == [ROW]


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    CellStore(tmp_path).write("key", [ROW, ROW | {"metric": "kl"}])
    return (tmp_path / "key.parquet").read_bytes()


def test_a_file_cut_short_anywhere_is_no_cell(tmp_path: Path, whole: bytes) -> None:
    store = CellStore(tmp_path)
    for length in [*range(0, len(whole), 17), 4, 8, *range(len(whole) - 12, len(whole))]:
        store.path("key").write_bytes(whole[:length])
        assert store.read("key") is None, length
    store.path("key").write_bytes(whole)
    assert store.read("key") == [ROW, ROW | {"metric": "kl"}]


def test_a_changed_byte_changes_no_result(tmp_path: Path, whole: bytes) -> None:
    store, rng = CellStore(tmp_path), np.random.default_rng(0)
    damaged = 0
    for place in rng.choice(len(whole), size=400, replace=False):
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.integers(8)
        store.path("key").write_bytes(changed)
        found = store.read("key")
        damaged += found is None
        assert found in (None, [ROW, ROW | {"metric": "kl"}]), place
    assert damaged > 100


@pytest.mark.parametrize(
    "rubbish",
    [b"", b"PAR1", b"PAR1PAR1", b"\0" * 5000, b"metric,value\naccuracy,1\n", bytes(range(256)) * 20],
    ids=range(6),
)
def test_rubbish_is_no_cell_and_is_replaced(tmp_path: Path, rubbish: bytes) -> None:
    store = CellStore(tmp_path)
    store.path("key").write_bytes(rubbish)
    assert store.read("key") is None
    store.write("key", [ROW])
    assert store.read("key") == [ROW]


def test_another_parquet_file_is_no_cell(tmp_path: Path) -> None:
    store = CellStore(tmp_path)
    for table in (pa.table({"value": [1.0]}), pa.Table.from_pylist([ROW], schema=SCHEMA), SCHEMA.empty_table()):
        pq.write_table(table, store.path("key"))
        assert store.read("key") is None


def test_what_a_write_that_was_killed_leaves_is_no_cell(tmp_path: Path, whole: bytes) -> None:
    (tmp_path / "key.parquet").rename(tmp_path / ".key.1-abcdef.partial")
    store = CellStore(tmp_path)
    assert store.read("key") is None
    assert list(tmp_path.glob("*.parquet")) == []
    store.write("key", [ROW])
    assert store.read("key") == [ROW]


def test_a_write_that_fails_leaves_the_cell_and_nothing_beside_it(tmp_path: Path) -> None:
    store = CellStore(tmp_path)
    store.write("key", [ROW])
    with pytest.raises(pa.ArrowInvalid):
        store.write("key", [ROW | {"value": "no number"}])
    assert store.read("key") == [ROW]
    assert [path.name for path in tmp_path.iterdir()] == ["key.parquet"]


def test_many_may_write_and_read_a_cell_at_the_same_time(tmp_path: Path) -> None:
    store = CellStore(tmp_path)
    rows = [[ROW | {"seconds": float(i), "outcomes": [float(i)] * 1000}] for i in range(16)]
    store.write("key", rows[0])

    def write_and_read(own: list[Row]) -> list[Row] | None:
        store.write("key", own)
        return store.read("key")

    with ThreadPoolExecutor(8) as pool:
        assert all(found in rows for found in pool.map(write_and_read, rows))
    assert [path.name for path in tmp_path.iterdir()] == ["key.parquet"]


@pytest.mark.parametrize("room", ["_kernels", "pruning", "merging", "evaluation", "sweeps"])
def test_every_source_that_computes_a_cell_counts(room: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = shutil.copytree(Path(cells.__file__).parents[1], tmp_path / "delta_analysis")
    monkeypatch.setattr(cells, "__file__", str(package / "sweeps" / "cells.py"))
    before = cells.code_digest.__wrapped__()
    assert before == cells.code_digest()
    with sorted((package / room).glob("*.py"))[-1].open("a") as file:
        file.write("# one more line\n")
    assert cells.code_digest.__wrapped__() != before


def test_pages_and_figures_change_no_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = shutil.copytree(Path(cells.__file__).parents[1], tmp_path / "delta_analysis")
    monkeypatch.setattr(cells, "__file__", str(package / "sweeps" / "cells.py"))
    for room in ("plots", "reports", "studies"):
        shutil.rmtree(package / room)
    assert cells.code_digest.__wrapped__() == cells.code_digest()


def test_a_cell_under_another_name_is_not_believed(tmp_path: Path) -> None:
    store = CellStore(tmp_path)
    store.write("one", [ROW])
    store.path("one").rename(store.path("other"))
    assert store.read("other") is None
