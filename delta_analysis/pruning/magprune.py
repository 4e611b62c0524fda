"""MAGPRUNE: drop at random, small entries more often than large ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from delta_analysis._errors import checked_number, one_of
from delta_analysis._kernels import rank_sums, row_length, stream_key
from delta_analysis.pruning.by_row import drop_by_rank
from delta_analysis.pruning.moments import Law, expected_factor
from delta_analysis.pruning.pruner import checked_drop_rate
from delta_analysis.pruning.rescaling import Rescale, check_rescale, match_norm, rescale_name, uniform_factor

WITHIN = ("row", "tensor")
WIDEST = 0.9
"""The widest window as a share of the one at which a probability would reach 0 or 1."""


@dataclass(frozen=True)
class MagPrune:
    """Drop entries at random, small ones more often than large ones (DELLA's MAGPRUNE).

    The probability falls linearly with the rank r = 1 … n of |δ|, over a window centred on p:
    `p_i = p + window · (1/2 - (r_i - 1)/(n - 1))`, so that its mean is p exactly; equal magnitudes
    share their mean rank. Ranks are integers whatever the dtype. The random numbers are those of
    `Dare`, and with a window of 0 so is the result.

    Parameters
    ----------
    drop_rate : p, in [0, 1]; 0 and 1 leave no room and accept any window.
    window : full width of the probabilities (the paper's ε; half of it is mergekit's), at least 0,
        at most 2p and below 2(1-p); `"widest"` is `1.8 · min(p, 1-p)`.
    within : among which entries magnitudes are ranked: of each `"row"` (all that feed one output; a
        vector is one row), or of the whole `"tensor"`.
    rescale : `"inverse_keep"`, for each entry its own 1/(1-p_i), which leaves the mean unchanged; or
        as for `Dare`, one factor for all.

    Raises
    ------
    ValueError
        A drop rate outside [0, 1]; a window that would take a probability out of [0, 1), with the
        largest one allowed; a `within` or rescale of no known form.

    Source: Deep et al., DELLA, arXiv 2406.11617, and its released code (functions rank_magnitude,
    rank_magnitude_layer, magnitude_sample).

    Examples
    --------
    >>> delta = torch.tensor([1.0, -2.0, 3.0, -4.0])
    >>> MagPrune(0.5, window=0.8)(delta, name="w", seed=0)
    tensor([ 0.0000, -5.4545,  0.0000, -4.4444])
    """

    drop_rate: float
    window: Literal["widest"] | float = "widest"
    within: Literal["row", "tensor"] = "row"
    rescale: Rescale = "inverse_keep"

    def __post_init__(self) -> None:
        object.__setattr__(self, "drop_rate", checked_drop_rate(self.drop_rate))
        object.__setattr__(self, "window", checked_window(self.window, self.drop_rate))
        if self.within not in WITHIN:
            raise ValueError(one_of("within", self.within, WITHIN))
        check_rescale(self.rescale)

    @property
    def method(self) -> str:
        """What tables and figures call it."""
        window = "" if self.window == "widest" else f", window {self.window:g}"
        within = "" if self.within == "row" else f" by {self.within}"
        return f"MAGPRUNE{within}{rescale_name(self.rescale, 'inverse_keep')}{window}"

    @property
    def random(self) -> bool:
        """Whether seeds make a difference."""
        return 0 < self.drop_rate < 1

    @property
    def width(self) -> float:
        """The window as a number; 0 where p leaves no room."""
        room = 2 * min(self.drop_rate, 1 - self.drop_rate)
        return WIDEST * room if self.window == "widest" else float(self.window) if room else 0.0

    def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
        """The pruned tensor, of the input's shape, dtype and device."""
        factor = None if self.rescale == "inverse_keep" else uniform_factor(self.rescale, self.drop_rate)
        row, key = self._row(tensor), stream_key(seed, name)
        pruned = drop_by_rank(tensor, row, partial(self.probabilities, row), factor, key)
        return match_norm(pruned, tensor, self.rescale, name)

    def law(self, tensor: torch.Tensor, *, name: str) -> Law:
        """Each entry's own probability and factor, float64 tensors of its shape."""
        row, values = self._row(tensor), tensor.detach().to("cpu", torch.float32)
        drop = self.probabilities(row, rank_sums(values.reshape(-1, row))).view(tensor.shape).clamp(0, 1)
        return Law(drop, expected_factor(self.rescale, tensor, drop, self.drop_rate))

    def _row(self, tensor: torch.Tensor) -> int:
        return tensor.numel() if self.within == "tensor" else row_length(tensor)

    def probabilities(self, count: int, sums: torch.Tensor) -> torch.Tensor:
        """Drop probabilities for sums of first and last rank among `count` entries, in place of them."""
        fall = self.width / (2 * max(count - 1, 1))
        return sums.mul_(-fall).add_(self.drop_rate + self.width / 2 * (count > 1) + 2 * fall)


def checked_window(window: str | float, drop_rate: float) -> str | float:
    """The window, a number as a float; raise unless it is "widest" or keeps every probability in [0, 1)."""
    if isinstance(window, str) and window == "widest":
        return window
    width = checked_number("window, where not 'widest',", window, 0)
    if 0 < drop_rate < 1 and not (0 <= drop_rate - width / 2 and drop_rate + width / 2 < 1):
        limit = f"at most {2 * drop_rate!r}" if drop_rate < 0.5 else f"below {2 * (1 - drop_rate):g}"
        raise ValueError(
            f"window {window!r} takes drop probabilities out of [0, 1) at drop rate {drop_rate!r}; it must be {limit}"
        )
    return width
