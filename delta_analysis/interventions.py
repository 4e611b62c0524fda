"""DARE's noise added to a delta without dropping, and noise that differs from it in a single respect."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from delta_analysis._errors import one_of
from delta_analysis.changes import Change
from delta_analysis.philox import stream_key
from delta_analysis.pruning import Dare, checked_drop_rate

KINDS = ("dropping", "gaussian")


@dataclass(frozen=True)
class Noise:
    """The whole delta plus noise like that of DARE, `δ + ε`: nothing is dropped, the signal stays.

    DARE's result is δ plus noise of mean 0 and variance `p/(1-p) · δ²` an entry. Here noise is drawn
    from a law of another kind, or as if the delta were another one, d; so that it alone differs.

    Parameters
    ----------
    drop_rate : p, in [0, 1); the noise is that of DARE at this rate.
    kind : `dropping`, `ε = DARE(d) - d`, which with d = δ is DARE itself, to the last bit of float32;
        `gaussian`, `ε = d · √(p/(1-p)) · z` with z standard normal.
    source : makes d out of δ; None for d = δ.

    Raises
    ------
    ValueError
        A parameter out of its range.

    Examples
    --------
    >>> delta = torch.tensor([1.0, -2.0, 3.0, -4.0])
    >>> Noise(0.5)(delta, name="w", seed=0)
    tensor([ 0., -4.,  0., -8.])
    """

    drop_rate: float
    kind: Literal["dropping", "gaussian"] = "dropping"
    source: Change | None = None
    rescale: Literal["inverse_keep"] = "inverse_keep"

    def __post_init__(self) -> None:
        object.__setattr__(self, "drop_rate", checked_drop_rate(self.drop_rate))
        if self.kind not in KINDS:
            raise ValueError(one_of("kind", self.kind, KINDS))
        if self.drop_rate == 1:
            raise ValueError("drop_rate: at 1 the variance of DARE's noise is infinite; give one below 1")

    @property
    def method(self) -> str:
        """What tables and figures call it."""
        label = "" if self.source is None else f", {self.source.label}"
        return ("gaussian noise" if self.kind == "gaussian" else "noise of dropping") + label

    @property
    def random(self) -> bool:
        """Whether seeds make a difference."""
        return self.drop_rate > 0

    def __call__(self, tensor: torch.Tensor, *, name: str, seed: int) -> torch.Tensor:
        """The delta's tensor with noise, of its shape, dtype and device."""
        delta = tensor.detach().to(torch.float32)
        d = delta if self.source is None else self.source(delta, name=name, seed=seed)
        if self.kind == "gaussian":
            drawn = np.random.default_rng(stream_key(seed, f"{name}/normal")).standard_normal(
                delta.numel(), dtype=np.float32
            )
            z = torch.from_numpy(drawn).to(delta.device).view(delta.shape)
            noise = d * math.sqrt(self.drop_rate / (1 - self.drop_rate)) * z
        else:
            noise = Dare(self.drop_rate)(d, name=name, seed=seed) - d
        return (delta + noise).to(tensor.dtype)
