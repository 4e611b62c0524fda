"""The ledger: what a claim may look like, and the rule that gives a status."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delta_analysis.checkpoints.paths import find_root
from delta_analysis.reports.claims.claim import STATUSES, UNITS, Claim, claims_file, read_claims, status
from delta_analysis.reports.claims.effects import EFFECTS
from delta_analysis.sweeps.intervals import Interval

ENTRY = {
    "id": "a-claim",
    "topic": "Dropping",
    "claim": "Most can be dropped",
    "figure": "90%",
    "source": "a paper, abstract",
    "notebook": "02_dare_ablation",
    "measured": "tolerated drop rate",
    "unit": "drop rate",
    "claimed_at_least": 0.9,
    "reversed_beyond": 0.5,
}
numbers = st.floats(-10, 10)


def claim(**changes: Any) -> Claim:
    return Claim(**{**ENTRY, **changes})


def mirrored(one: Claim) -> Claim:
    """The claim on the negative of the effect."""
    least, most = one.claimed_at_least, one.claimed_at_most
    return claim(
        claimed_at_least=None if most is None else -most,
        claimed_at_most=None if least is None else -least,
        reversed_beyond=-one.reversed_beyond,
    )


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ((0.91, 0.95), "reproduced"),
        ((0.6, 0.89), "not reproduced"),
        ((0.4, 0.6), "not reproduced"),
        ((0.1, 0.4), "reversed"),
        ((0.8, 0.95), "cannot tell"),
        ((0.1, 0.95), "cannot tell"),
        ((0.9, 0.95), "cannot tell"),
        ((0.9, 0.9), "not reproduced"),
        ((0.95, math.inf), "reproduced"),
        ((-math.inf, 0.4), "reversed"),
        ((-math.inf, math.inf), "cannot tell"),
    ],
)
def test_the_interval_decides_the_status(ends: tuple[float, float], expected: str) -> None:
    least = claim()
    assert status(least, Interval(sum(ends) / 2 if math.isfinite(sum(ends)) else 0.0, *ends)) == expected
    assert status(mirrored(least), Interval(0.0, -ends[1], -ends[0])) == expected


@given(ends=st.tuples(numbers, numbers).map(sorted), threshold=numbers, room=st.floats(0, 5), wider=st.floats(0, 3))
def test_a_wider_interval_never_says_another_thing(
    ends: list[float], threshold: float, room: float, wider: float
) -> None:
    one = claim(claimed_at_least=threshold, reversed_beyond=threshold - room)
    narrow = status(one, Interval(ends[0], *ends))
    wide = status(one, Interval(ends[0], ends[0] - wider, ends[1] + wider))
    assert narrow in STATUSES
    if narrow == "cannot tell":
        assert wide == narrow
    else:
        assert wide in {narrow, "cannot tell", *(["not reproduced"] if narrow == "reversed" else [])}


def test_an_effect_that_is_not_a_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="claim 'a-claim': the effect"):
        status(claim(), Interval(math.nan, 0.0, 1.0))


def test_the_shipped_claims_are_valid() -> None:
    claims = read_claims(claims_file())
    assert len({each.id for each in claims}) == len(claims)
    assert len({each.claim for each in claims}) == len(claims)
    for each in claims:
        texts = (each.topic, each.claim, each.source, each.measured)
        assert all(isinstance(text, str) and text.strip() for text in texts), each.id
        assert isinstance(each.figure, str), each.id
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", each.id)
        assert re.fullmatch(r"[0-9]{2}(_[a-z0-9]+)+", each.notebook), each.id
        assert each.unit in UNITS, each.id
        # One side is claimed, and the opposite does not begin on it.
        assert (each.claimed_at_least is None) != (each.claimed_at_most is None), each.id
        assert each.direction * each.reversed_beyond <= each.direction * each.threshold, each.id
        assert re.match("DARE v[13]|DELLA|Tao et al[.]|an article", each.source), each.id
        # The table of the overview is written in Markdown.
        assert not re.search(r"[|*_`\n]", each.claim + each.figure), each.id
        assert not each.claim.endswith("."), each.id
    topics = [each.topic for each in claims]
    assert topics == [name for name in dict.fromkeys(topics) for _ in range(topics.count(name))]


def test_figures_at_second_hand_say_so() -> None:
    """Of the papers only abstracts were read, so that every figure of a section is from a summary."""
    for each in read_claims(claims_file()):
        assert ("section" not in each.source) or each.source.endswith("as reported by a secondary source"), each.id


def test_every_effect_has_a_claim_and_the_reverse() -> None:
    claims = {each.id: each for each in read_claims(claims_file())}
    assert set(EFFECTS) <= set(claims)
    reports = {path.stem for path in (find_root() / "notebooks").glob("[0-9]*.ipynb")}
    without = {claims[name].notebook for name in claims.keys() - EFFECTS.keys()}
    assert not without & reports
    assert {claims[name].notebook for name in EFFECTS} <= reports
