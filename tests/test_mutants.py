"""The known faults that `make mutants` plants can be planted: each names a text that stands once in its file."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MUTANTS = tomllib.loads((ROOT / "tests/mutants.toml").read_text(encoding="utf-8"))["mutant"]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant["id"])
def test_the_text_of_each_fault_stands_once_in_its_file(mutant: dict[str, str]) -> None:
    assert (ROOT / mutant["file"]).read_text(encoding="utf-8").count(mutant["find"]) == 1
    assert mutant["put"] != mutant["find"]


def test_each_fault_has_a_name_of_its_own() -> None:
    assert len({mutant["id"] for mutant in MUTANTS}) == len(MUTANTS)
