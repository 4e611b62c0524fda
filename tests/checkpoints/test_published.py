from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from delta_analysis._errors import CheckpointError
from delta_analysis.checkpoints.hub import parse_hub_id
from delta_analysis.checkpoints.paths import find_root
from delta_analysis.checkpoints.published import ALLOWED, COLUMNS, known_pairs, pair_sources, read_pairs

PAIR = """
[[pair]]
name = "a-7b"
base = "org/base"
finetuned = "org/tuned"
kind = "SFT"
parameters = 7.0
licence_or_gate = "not checked"
used_by = ["DARE", "Tao et al."]
verified = "recalled"
note = ""
"""


def refusal(tmp_path: Path, text: str) -> str:
    file = tmp_path / "pairs.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match="pairs.toml") as caught:
        read_pairs(file)
    return str(caught.value)


def test_the_shipped_pairs_are_valid() -> None:
    pairs = known_pairs()
    assert list(pairs.columns) == COLUMNS
    assert pairs["name"].is_unique
    assert not pairs.duplicated(["base", "finetuned"]).any()
    assert pairs["parameters"].is_monotonic_increasing
    assert (pairs["base"] != pairs["finetuned"]).all()
    for side in ("base", "finetuned"):
        assert all(parse_hub_id(source) is not None for source in pairs[side])


def test_the_papers_pairs_are_there() -> None:
    pairs = known_pairs().set_index("name")
    assert set(pairs["kind"]) == set(ALLOWED["kind"])
    assert set(pairs["verified"]) == set(ALLOWED["verified"])
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


def test_what_was_only_recalled_says_so() -> None:
    for pair in tomllib.loads((find_root() / "data" / "pairs.toml").read_text(encoding="utf-8"))["pair"]:
        if "hub path recalled" in pair["note"]:
            assert pair["verified"] != "card read", pair["name"]


def test_a_file_is_read_into_sorted_columns(tmp_path: Path) -> None:
    file = tmp_path / "pairs.toml"
    file.write_text(PAIR + PAIR.replace("a-7b", "b-0.5b").replace("7.0", "0.5").replace('"DARE", "Tao et al."', ""))
    pairs = read_pairs(file)
    assert list(pairs.columns) == COLUMNS
    assert pairs["name"].tolist() == ["b-0.5b", "a-7b"]
    assert pairs["used_by"].tolist() == ["", "DARE, Tao et al."]
    assert pairs["parameters"].tolist() == [0.5, 7.0]


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ('note = ""', "", "missing or unknown: note"),
        ('note = ""', 'notes = ""', "missing or unknown: note, notes"),
        ('note = ""', 'note = ""\nsize = 7', "missing or unknown: size"),
        ('name = "a-7b"', "", "pair 1: the keys must be"),
        ('note = ""', "note = 3", "note must be text; not 3"),
        ('"SFT"', '"RLHF"', "kind must be one of 'SFT'"),
        ('"recalled"', '"certain"', "verified must be one of 'card read'"),
        ('"not checked"', '"free"', "licence_or_gate must be one of"),
        ('["DARE", "Tao et al."]', '"DARE"', "used_by must be a list of DARE, DELLA"),
        ('"DARE"', '"DARE v2"', "used_by must be a list of DARE, DELLA"),
        ("7.0", "7", "written with a point; not 7"),
        ("7.0", "-7.0", "parameters must be billions"),
        ("7.0", "nan", "parameters must be billions"),
        ("7.0", "inf", "parameters must be billions"),
        ("a-7b", "A 7b", "the name must be small letters and digits"),
        ("a-7b", "pair:a", "the name must be small letters and digits"),
        ("org/tuned", "tuned", "finetuned must be a hub id org/name; not 'tuned'"),
        ("org/base", "/data/base", "base must be a hub id org/name; not '/data/base'"),
    ],
)
def test_a_wrong_entry_is_an_error(tmp_path: Path, before: str, after: str, told: str) -> None:
    assert before in PAIR
    assert told in refusal(tmp_path, PAIR.replace(before, after))


def test_a_name_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    assert "pair 'a-7b': this name stands twice" in refusal(tmp_path, PAIR + PAIR.replace("org/tuned", "org/other"))


@pytest.mark.parametrize(
    ("text", "told"),
    [("[[pair", "not readable as TOML"), ("", "got nothing"), (PAIR + "\n[pairs]\n", "got pair, pairs")],
)
def test_another_file_is_an_error(tmp_path: Path, text: str, told: str) -> None:
    assert told in refusal(tmp_path, text)


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
