"""Public pairs of checkpoints: those that the papers measured, and others worth measuring."""

from __future__ import annotations

import difflib
import tomllib

import pandas as pd

from delta_analysis._errors import CheckpointError
from delta_analysis.checkpoints.paths import find_root

PREFIX = "pair:"
COLUMNS = ["name", "base", "finetuned", "kind", "parameters", "licence_or_gate", "used_by", "verified", "note"]


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
    content = tomllib.loads((find_root() / "data" / "pairs.toml").read_text(encoding="utf-8"))
    pairs = pd.DataFrame(content["pair"], columns=COLUMNS).sort_values(["parameters", "name"], ignore_index=True)
    return pairs.assign(used_by=pairs["used_by"].str.join(", "))


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
