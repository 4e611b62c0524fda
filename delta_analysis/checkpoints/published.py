"""Public pairs of checkpoints: those that the papers measured, and others worth measuring."""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any

import pandas as pd

from delta_analysis._errors import CheckpointError, one_of
from delta_analysis.checkpoints.hub import parse_hub_id
from delta_analysis.checkpoints.paths import find_root

PREFIX = "pair:"
TEXTS = ("name", "base", "finetuned", "kind", "licence_or_gate", "verified", "note")
COLUMNS = ["name", "base", "finetuned", "kind", "parameters", "licence_or_gate", "used_by", "verified", "note"]
ALLOWED = {
    "kind": ("SFT", "continual pre-training", "continual pre-training + SFT"),
    "licence_or_gate": ("base gated", "base and fine-tuned gated", "not checked"),
    "verified": ("card read", "mapping read in code", "recalled"),
}
PAPERS = ("DARE", "DELLA", "DAREx", "WIDEN", "Tao et al.", "Delta-CoMe", "Unified view")


def known_pairs() -> pd.DataFrame:
    """The known public pairs, small ones first; `load_delta` takes `pair:NAME` for both of its sources.

    Returns
    -------
    DataFrame with columns
        name : what stands after `pair:`.
        base, finetuned : hub ids.
        kind : `SFT`, `continual pre-training`, or `continual pre-training + SFT`.
        parameters : of one checkpoint, in billions, as its name says.
        licence_or_gate : which side is gated on the hub, or `not checked`.
        used_by : papers, separated by commas; empty if none is known.
        verified : where the pair was looked up: `card read` (on a model card), `mapping read in code`
            (in a paper's code or text, not on the hub), or `recalled` (nowhere: look before use).
        note : what to check before its numbers are read.

    Examples
    --------
    >>> pairs = known_pairs()
    >>> pairs.loc[pairs["used_by"].str.contains("DELLA"), "name"].tolist()
    ['code-alpaca-13b', 'wizardcoder-python-13b', 'wizardlm-13b', 'wizardmath-13b']
    """
    return read_pairs(find_root() / "data" / "pairs.toml")


def pair_sources(source: str) -> tuple[str, str]:
    """The base and the fine-tuned checkpoint that `pair:NAME` names.

    Raises
    ------
    CheckpointError
        No known pair has that name.

    Examples
    --------
    >>> pair_sources("pair:wizardmath-13b")
    ('meta-llama/Llama-2-13b-hf', 'WizardLMTeam/WizardMath-13B-V1.0')
    """
    name = source.removeprefix(PREFIX)
    pairs = known_pairs().set_index("name")
    if name not in pairs.index:
        close = difflib.get_close_matches(name.lower(), pairs.index, n=4)
        near = f"close are {', '.join(PREFIX + each for each in close)}; " if close else ""
        raise CheckpointError(f"{source}: no such known pair; {near}known_pairs() lists them all")
    return pairs.loc[name, "base"], pairs.loc[name, "finetuned"]


def read_pairs(file: Path) -> pd.DataFrame:
    """The pairs of a TOML file, one `[[pair]]` each, with the columns of `known_pairs`.

    Raises
    ------
    ValueError
        Not TOML, an unknown or missing key, a value outside its set, a name that stands twice.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file}: not readable as TOML ({error})") from error
    if list(content) != ["pair"]:
        raise ValueError(f"{file}: expected tables [[pair]] alone, got {', '.join(content) or 'nothing'}")
    names: set[str] = set()
    for number, pair in enumerate(content["pair"], start=1):
        if problem := _problem(pair) or ("this name stands twice" if pair["name"] in names else None):
            raise ValueError(f"{file}: pair {pair.get('name', number)!r}: {problem}")
        names.add(pair["name"])
    pairs = pd.DataFrame(content["pair"], columns=COLUMNS).sort_values(["parameters", "name"], ignore_index=True)
    return pairs.assign(used_by=pairs["used_by"].str.join(", "))


def _problem(pair: dict[str, Any]) -> str | None:
    """What is wrong with an entry, None if nothing is."""
    if strange := sorted(pair.keys() ^ set(COLUMNS)):
        return f"the keys must be {', '.join(COLUMNS)}; missing or unknown: {', '.join(strange)}"
    if wrong := [key for key in TEXTS if not isinstance(pair[key], str)]:
        return f"{wrong[0]} must be text; not {pair[wrong[0]]!r}"
    for key, allowed in ALLOWED.items():
        if pair[key] not in allowed:
            return one_of(key, pair[key], allowed)
    if not isinstance(pair["used_by"], list) or not set(pair["used_by"]) <= set(PAPERS):
        return f"used_by must be a list of {', '.join(PAPERS)}; not {pair['used_by']!r}"
    if not (isinstance(pair["parameters"], float) and 0 < pair["parameters"] < float("inf")):
        return f"parameters must be billions, written with a point; not {pair['parameters']!r}"
    if not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", pair["name"]):
        return "the name must be small letters and digits, joined by . or -"
    if wrong := [key for key in ("base", "finetuned") if parse_hub_id(pair[key]) is None]:
        return f"{wrong[0]} must be a hub id org/name; not {pair[wrong[0]]!r}"
    return None
