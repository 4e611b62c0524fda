"""DELLA: drop by MAGPRUNE, elect signs, and fuse the entries that agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from delta_analysis.merging.election import elected
from delta_analysis.merging.methods import MergeMethod, Parts
from delta_analysis.pruning import MagPrune, Pruner


@dataclass(frozen=True)
class Della(MergeMethod):
    """Drop by MAGPRUNE, elect signs, and fuse the entries that agree into their mean.

    Parameters
    ----------
    drop_rate : p of `MagPrune`, in [0, 1].
    window, within : as in `MagPrune`; `within="tensor"` is the variant that ranks a whole layer.
    elect : False is the ablation without the election: the mean is over all entries that are not
        zero, whatever their sign.
    scaling : λ, a finite number.

    Raises
    ------
    ValueError
        A parameter out of its range.

    Source: Deep et al., DELLA, arXiv 2406.11617, and its released code, in which the ablation without
    the election is the method itself; here it is what its name says.

    Examples
    --------
    >>> one, two = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0])
    >>> Della(0.0, elect=False)(Parts("w", (one, two), (1.0, 1.0), torch.zeros(2)))
    tensor([2., 1.])
    """

    drop_rate: float = 0.5
    window: Literal["widest"] | float = "widest"
    within: Literal["row", "tensor"] = "row"
    elect: bool = True
    scaling: float = 1.0

    def __post_init__(self) -> None:
        MagPrune(self.drop_rate, self.window, self.within)
        if not isinstance(self.elect, bool):
            raise ValueError(f"elect must be True or False; not {self.elect!r}")
        super().__post_init__()

    @property
    def label(self) -> str:
        within = "" if self.within == "row" else f", ranked by {self.within}"
        window = "" if self.window == "widest" else f", window {self.window:g}"
        return f"DELLA{within}{'' if self.elect else ', no election'}{window}"

    @property
    def trim(self) -> Pruner | None:
        return MagPrune(self.drop_rate, self.window, self.within) if self.drop_rate else None

    def __call__(self, parts: Parts) -> torch.Tensor:
        return elected(parts.deltas, parts.weights, scaling=self.scaling, elect=self.elect)
