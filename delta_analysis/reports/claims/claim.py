"""The papers' claims, and the one rule that turns a measured effect into a status."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

from delta_analysis.checkpoints import find_root
from delta_analysis.sweeps import Interval

REPRODUCED, NOT_REPRODUCED, REVERSED, CANNOT_TELL = STATUSES = (
    "reproduced",
    "not reproduced",
    "reversed",
    "cannot tell",
)
UNITS = ("share", "drop rate", "similarity", "points", "log-odds", "rank correlation", "share of a gap")
"""`points` are differences between shares or similarities; `log-odds` are differences on log(p/(1-p)), and a
`share of a gap` is one of these over another, which may leave 0 to 1."""


@dataclass(frozen=True)
class Claim:
    """A checkable claim of a paper, and what an effect has to be for it to hold.

    Attributes
    ----------
    id : its name in this project, small letters and digits joined by `-`.
    topic : the heading it stands under.
    claim : what is claimed, in one sentence.
    figure : the paper's own figure; empty where it gives none, or none that was seen.
    source : where claim and figure were read, and whether at second hand.
    notebook : the report whose results decide, as `02_dare_ablation`.
    measured : what the effect is, and over which pairs, seeds and items.
    unit : of the effect, one of `UNITS`.
    reversed_beyond : at which value, away from the claimed side, the opposite of the claim begins.
    claimed_at_least, claimed_at_most : where the claimed side begins; one of the two is given.
    """

    id: str
    topic: str
    claim: str
    figure: str
    source: str
    notebook: str
    measured: str
    unit: str
    reversed_beyond: float
    claimed_at_least: float | None = None
    claimed_at_most: float | None = None

    @property
    def direction(self) -> int:
        """1 if larger effects speak for the claim, -1 if smaller ones do."""
        return 1 if self.claimed_at_most is None else -1

    @property
    def threshold(self) -> float:
        """Where the claimed side begins."""
        return next(x for x in (self.claimed_at_least, self.claimed_at_most) if x is not None)


def status(claim: Claim, effect: Interval) -> str:
    """What an effect says about a claim: the only place where a status is decided.

    With the interval of the effect

    - wholly on the claimed side of the threshold: `reproduced`;
    - wholly beyond `reversed_beyond`, on the other side: `reversed`;
    - wholly off the claimed side, but not wholly beyond: `not reproduced`;
    - on both sides of the threshold: `cannot tell`.

    A value that is the threshold itself is not on the claimed side: no difference is not a gain.

    Examples
    --------
    >>> gain = Claim("x", "", "", "", "", "", "", "points", reversed_beyond=0, claimed_at_least=0)
    >>> [status(gain, Interval(0, *ends)) for ends in ((0.1, 0.2), (0, 0), (-0.2, -0.1), (-0.1, 0.2))]
    ['reproduced', 'not reproduced', 'reversed', 'cannot tell']
    """
    if math.isnan(sum(map(abs, effect))):
        raise ValueError(f"claim {claim.id!r}: the effect {tuple(effect)} is not a number")
    low, high = sorted((claim.direction * effect.low, claim.direction * effect.high))
    threshold, opposite = claim.direction * claim.threshold, claim.direction * claim.reversed_beyond
    if low > threshold:
        return REPRODUCED
    if high < opposite:
        return REVERSED
    return NOT_REPRODUCED if high <= threshold else CANNOT_TELL


def claims_file() -> Path:
    """The file of the claims."""
    return find_root() / "data" / "reference" / "claims.toml"


def read_claims(file: Path) -> tuple[Claim, ...]:
    """The claims of a TOML file, one `[[claim]]` each, with the fields of `Claim` as keys."""
    return tuple(Claim(**{"figure": "", **entry}) for entry in tomllib.loads(file.read_text(encoding="utf-8"))["claim"])
