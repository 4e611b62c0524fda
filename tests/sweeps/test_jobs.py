"""What a worker does with a job: all evaluations of one edit, those that fail with their error."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from delta_analysis.checkpoints.provenance import versions
from delta_analysis.pruning import Dare
from delta_analysis.sweeps.cells import SCHEMA, CellStore
from delta_analysis.sweeps.jobs import Job, run_job
from delta_analysis.sweeps.pairs import Edit
from tests.tiny_family import NORM, UP, Fails, Family, Judge, Reads, flat, make_family


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


@dataclass(frozen=True)
class Gives(Judge):
    """The same outcomes for every model."""

    outcomes: tuple[object, ...]
    name: str = "gives"

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, np.ndarray]:
        return {"accuracy": np.array(self.outcomes)}


@dataclass(frozen=True)
class CannotBePrepared(Judge):
    name: str = "cannot"

    def prepared(self, untouched: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> CannotBePrepared:
        raise ValueError("cannot be prepared")


@pytest.fixture
def job_of(family: Family, tmp_path: Path) -> Callable[..., Job]:
    def job(*evaluations: Judge, edit: Edit | None = None, seed: int = 3) -> Job:
        named = tuple((f"key {i}", evaluation) for i, evaluation in enumerate(evaluations))
        hashes, cells = ("base hash", "tuned hash"), CellStore(tmp_path / "cells")
        return Job(family.pair(), edit, seed, hashes, "cpu", cells, named)  # type: ignore[arg-type]

    return job


def test_a_row_says_where_it_comes_from(job_of: Callable[..., Job], family: Family) -> None:
    (row,) = run_job(job_of(Reads(), edit=Edit(Dare(0.5))))["key 0"]
    assert set(row) == set(SCHEMA.names) - {"error"}
    assert (row["base_hash"], row["finetuned_hash"], row["device"]) == ("base hash", "tuned hash", "cpu")
    assert row["versions"] == ", ".join(f"{name} {version}" for name, version in versions().items())
    described = json.loads(row["cell"])
    assert described["pair"] == {"name": "base → tuned", "base": str(family.base), "finetuned": str(family.finetuned)}
    assert described["seed"] == 3
    assert described["edit"]["pruner"]["drop_rate"] == 0.5


def test_each_cell_is_on_disk_before_the_next_one_runs(job_of: Callable[..., Job], tmp_path: Path) -> None:
    seen: list[list[str]] = []

    class Looks(Judge):
        def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, np.ndarray]:
            seen.append(sorted(path.stem for path in (tmp_path / "cells").glob("*.parquet")))
            return {"accuracy": np.ones(2)}

    job = job_of(Reads(), Looks(), CannotBePrepared(), Looks())
    found = run_job(job)
    # What failed is not kept.
    assert seen == [["key 0"], ["key 0", "key 1"]]
    for key in ("key 0", "key 1", "key 3"):
        assert job.cells.read(key) == [{**row, "error": None} for row in found[key]]


def test_a_cell_that_cannot_be_written_fails_alone(job_of: Callable[..., Job]) -> None:
    @dataclass(frozen=True)
    class BadName(Judge):
        def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, np.ndarray]:
            return {"\udc80": np.ones(2)}

    bad, good = run_job(job_of(BadName(), Reads())).values()
    assert bad[0]["error"].startswith("UnicodeEncodeError")
    assert "error" not in good[0]


@pytest.mark.parametrize("outcomes", [(True, False), (1, 0), (1.0, 0.0)])
def test_outcomes_are_floats(job_of: Callable[..., Job], family: Family, outcomes: tuple[object, ...]) -> None:
    (row,) = run_job(job_of(Gives(outcomes)))["key 0"]
    assert [type(each) for each in row["outcomes"]] == [float, float]
    assert row["outcomes"] == [1, 0]
    assert row["value"] == 0.5


def test_one_that_fails_leaves_the_others(job_of: Callable[..., Job], family: Family, tmp_path: Path) -> None:
    (tmp_path / "cause").touch()
    evaluations = (Fails(str(tmp_path / "cause")), Reads(), CannotBePrepared(), Gives(()), Reads((UP,)))
    job = job_of(*evaluations, edit=Edit(Dare(1)))
    first, reads, third, fourth, again = run_job(job).values()
    assert [row.get("error") for rows in (first, third) for row in rows] == [
        "RuntimeError: the cause is there",
        "ValueError: cannot be prepared",
    ]
    assert fourth[0]["error"].startswith("ZeroDivisionError")
    assert reads[0]["outcomes"] == flat(family.base_weights, NORM).tolist()
    assert again[0]["outcomes"] == flat(family.base_weights, UP).tolist()
    assert "error" not in reads[0]
    # What failed says where it comes from, too.
    assert first[0]["cell"] == reads[0]["cell"]
    (untouched,) = run_job(job_of(Reads((UP,))))["key 0"]
    assert untouched["outcomes"] == flat(family.finetuned_weights, UP).tolist()
