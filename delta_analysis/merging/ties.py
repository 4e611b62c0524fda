"""TIES: trim, elect signs, and fuse the entries that agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from delta_analysis._errors import one_of
from delta_analysis.merging.election import FUSIONS, Slack, elected
from delta_analysis.merging.methods import MergeMethod, Parts
from delta_analysis.pruning import Magnitude, Pruner


@dataclass(frozen=True)
class Ties(MergeMethod):
    """Trim, elect signs, and take the mean of the entries that agree.

    Of each delta the entries of least magnitude are dropped; an entry's sign is that of `Σ w_k δ_k`
    (positive where this is 0); of the entries with this sign the weighted mean is taken, and what is
    zero or was outvoted counts for nothing. Where one delta is far larger than the others, the mean
    makes it smaller wherever they agree with it, and `fuse="sum"` does not.

    Parameters
    ----------
    drop_rate : share of each delta that is trimmed, in [0, 1]; 0 leaves it to a pruner before.
    within : among which entries the least are sought, as in `Magnitude`: `"tensor"`, `"row"`, or
        `"model"`, all of a delta together, as the paper has it.
    fuse : `"mean"`, the disjoint mean of the paper; or `"sum"`, `Σ w_k δ_k` over the same entries.
    scaling : λ, a finite number.
    slack : how far one delta is kept from being outvoted, None for the plain election.

    Raises
    ------
    ValueError
        A drop rate outside [0, 1], an unknown `within` or fuse, a scaling that is no finite number. When called:
        a slack for a delta that is not there.

    Source: Yadav et al., "TIES-Merging", arXiv 2306.01708, section 3.

    Examples
    --------
    >>> one, two = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0])
    >>> Ties(0.0)(Parts("w", (one, two), (1.0, 1.0), torch.zeros(2)))
    tensor([2., 4.])
    """

    drop_rate: float = 0.8
    within: Literal["tensor", "row", "model"] = "tensor"
    fuse: Literal["mean", "sum"] = "mean"
    scaling: float = 1.0
    slack: Slack | None = None

    def __post_init__(self) -> None:
        Magnitude(self.drop_rate, self.within)
        if self.fuse not in FUSIONS:
            raise ValueError(one_of("fuse", self.fuse, FUSIONS))
        super().__post_init__()

    @property
    def label(self) -> str:
        where = "" if self.within == "tensor" else f" by {self.within}"
        fuse = "" if self.fuse == "mean" else ", sum"
        return f"TIES{where}{fuse}" + ("" if self.slack is None else f", {self.slack.label}")

    @property
    def trim(self) -> Pruner | None:
        return Magnitude(self.drop_rate, self.within) if self.drop_rate else None

    def check(self, weights: tuple[float, ...]) -> None:
        if self.slack is not None:
            self.slack.check(len(weights))

    def __call__(self, parts: Parts) -> torch.Tensor:
        return elected(parts.deltas, parts.weights, scaling=self.scaling, slack=self.slack, fuse=self.fuse)
