from __future__ import annotations

import math
import re
import tomllib

import pytest

from delta_analysis._errors import CheckpointError
from delta_analysis.checkpoints.hub import parse_hub_id
from delta_analysis.checkpoints.paths import find_root
from delta_analysis.checkpoints.published import COLUMNS, known_pairs, pair_sources

ALLOWED = {
    "kind": {"SFT", "continual pre-training", "continual pre-training + SFT"},
    "licence_or_gate": {"base gated", "base and fine-tuned gated", "not checked"},
    "verified": {"card read", "mapping read in code", "recalled"},
}
PAPERS = {"DARE", "DELLA", "DAREx", "WIDEN", "Tao et al.", "Delta-CoMe", "Unified view"}


def test_the_file_of_pairs_holds_what_its_columns_say() -> None:
    content = tomllib.loads((find_root() / "data" / "pairs.toml").read_text(encoding="utf-8"))
    assert list(content) == ["pair"]
    for pair in content["pair"]:
        name = pair["name"]
        assert pair.keys() == set(COLUMNS), name
        assert re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", name)
        assert all(pair[column] in allowed for column, allowed in ALLOWED.items()), name
        assert isinstance(pair["note"], str), name
        assert isinstance(pair["used_by"], list) and set(pair["used_by"]) <= PAPERS, name
        assert isinstance(pair["parameters"], float) and 0 < pair["parameters"] < math.inf, name
        assert parse_hub_id(pair["base"]) and parse_hub_id(pair["finetuned"]), name
        # What was recalled and not read says so.
        assert pair["verified"] != "card read" or "hub path recalled" not in pair["note"], name


def test_the_table_of_pairs_is_sorted_and_has_no_pair_twice() -> None:
    pairs = known_pairs()
    assert list(pairs.columns) == COLUMNS
    assert pairs["name"].is_unique
    assert not pairs.duplicated(["base", "finetuned"]).any()
    assert pairs["parameters"].is_monotonic_increasing
    assert (pairs["base"] != pairs["finetuned"]).all()


def test_the_papers_pairs_are_there() -> None:
    pairs = known_pairs().set_index("name")
    assert set(pairs["kind"]) == ALLOWED["kind"]
    assert set(pairs["verified"]) == ALLOWED["verified"]
    for paper in ("DARE", "DELLA", "DAREx", "WIDEN", "Tao et al.", "Unified view"):
        assert pairs["used_by"].str.split(", ").apply(lambda papers, paper=paper: paper in papers).any(), paper
    assert pairs.loc["wizardmath-70b", "parameters"] == 70
    # The same fine-tune beside its own base and beside the base before continual pre-training.
    right, wrong = pairs.loc["wizardcoder-python-13b"], pairs.loc["wizardcoder-python-13b-on-llama-2"]
    assert right["finetuned"] == wrong["finetuned"]
    assert wrong["base"] == pairs.loc["wizardmath-13b", "base"] == pairs.loc["codellama-python-13b", "base"]


def test_gates_are_those_of_meta() -> None:
    for pair in known_pairs().itertuples():
        gated = [str(source).startswith("meta-llama/") for source in (pair.base, pair.finetuned)]
        assert (pair.licence_or_gate == "not checked") == (not any(gated)), pair.name
        assert (pair.licence_or_gate == "base and fine-tuned gated") == all(gated), pair.name


def test_every_pair_is_found_by_its_name() -> None:
    for pair in known_pairs().itertuples():
        assert pair_sources(f"pair:{pair.name}") == (pair.base, pair.finetuned)


@pytest.mark.parametrize(
    ("source", "near"),
    [
        ("pair:WizardMath-13B", "pair:wizardmath-13b"),
        ("pair:wizzardmath-70b", "pair:wizardmath-70b"),
        ("pair:sailor-0.5", "pair:sailor-0.5b"),
    ],
)
def test_an_unknown_pair_is_told_its_neighbours(source: str, near: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        pair_sources(source)
    assert str(caught.value).startswith(f"{source}: no such known pair; close are {near}")
    assert str(caught.value).endswith("known_pairs() lists them all")


@pytest.mark.parametrize("source", ["pair:", "pair:@@@@"])
def test_a_pair_like_no_other_has_no_neighbours(source: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{source}: no such known pair; known_pairs"):
        pair_sources(source)
