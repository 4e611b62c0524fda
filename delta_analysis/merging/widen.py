"""WIDEN: a score for each column of a weight, by how far it moved in magnitude and in direction."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.stats import rankdata

from delta_analysis._errors import checked_number
from delta_analysis._kernels import map_blocks, row_length
from delta_analysis.checkpoints import parse_name
from delta_analysis.merging.methods import MergeMethod, Parts


@dataclass(frozen=True)
class Widen(MergeMethod):
    """The sum of the deltas, each column times a score of how much its magnitude and its direction changed.

    With w and δ one column of the base and of delta k, `m = |‖w + δ‖ - ‖w‖|` and `d = 1 - cos(w + δ, w)`.
    Within each delta its n columns are ranked by m, from 0, and the significance is `s = rank / n`. A
    column's score is the softmax of its significances over the deltas, but `calibration` where
    `s > threshold · mean s` of the delta; likewise for d. The result is `scaling · Σ w_k · ½(score of m +
    score of d) · δ_k`, with weights w_k, which change no score.

    A column is all that one input feeds; in an embedding it is the row of a token. Dimensions after the
    second belong to the input. In vectors each entry has one score, with |δ| itself, not ranked, as s.
    Equal changes share their mean rank (the released code ranks them by position). Between a column of
    zeros and another one the cosine is 0, between two of zeros 1. A matrix with NaN becomes NaN.

    Parameters
    ----------
    scaling : a finite number, 1 in the paper.
    threshold : t, at least 0; at infinity every score is a softmax.
    calibration : the score of what is above, a finite number.

    Raises
    ------
    ValueError
        A parameter out of its range.

    Source: Yu et al., WIDEN, arXiv 2408.03092, and its released code.

    Examples
    --------
    >>> one, two = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    >>> Widen(calibration=2.0)(Parts("w", (one, two), (1.0, 1.0), torch.ones(1, 2)))
    tensor([[5., 5.]])
    """

    scaling: float = 1.0
    threshold: float = 1.0
    calibration: float = 1.0
    label = "WIDEN"
    reads_base = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "threshold", checked_number("threshold", self.threshold, 0, math.inf))
        object.__setattr__(self, "calibration", checked_number("calibration", self.calibration))

    def __call__(self, parts: Parts) -> torch.Tensor:
        base = parts.base
        assert base is not None
        if base.dim() < 2:
            sizes = torch.stack([delta.reshape(-1).abs().to(torch.float64) for delta in parts.deltas])
            scores = self._scores(sizes, sizes.mean(dim=1, keepdim=True)).view(len(sizes), *base.shape)
        else:
            tokens = parse_name(parts.name, base.dim()).kind == "embedding"
            changes = torch.stack([_changes(base, delta, tokens=tokens) for delta in parts.deltas])
            n = max(changes.shape[2], 1)
            significances = torch.from_numpy(rankdata(changes.numpy(), axis=2) - 1) / n
            columns = (-1, *[1] * (base.dim() - 1)) if tokens else base.shape[1:]
            scores = self._scores(significances, (n - 1) / (2 * n)).mean(dim=1).view(len(changes), *columns)
        merged = torch.zeros_like(base)
        for delta, weight, score in zip(parts.deltas, parts.weights, scores, strict=True):
            merged.addcmul_(delta, (score * weight * self.scaling).to(torch.float32))
        return merged

    def _scores(self, significances: torch.Tensor, mean: torch.Tensor | float) -> torch.Tensor:
        """Scores of significances, the deltas along the first dimension."""
        softmax = significances.softmax(dim=0)
        return softmax.masked_fill(significances > self.threshold * mean, self.calibration)


def _changes(base: torch.Tensor, delta: torch.Tensor, *, tokens: bool) -> torch.Tensor:
    """The change of each column's magnitude, and of its direction: float64 (2, columns)."""
    start, cross, moved = (_dots(*pair, rows=tokens) for pair in ((base, base), (base, delta), (delta, delta)))
    before, after = start.sqrt(), (start + 2 * cross + moved).clamp(min=0).sqrt()
    # Differences of norms, and of a cosine from 1, would cancel where the delta is small.
    magnitude = _ratio((2 * cross + moved).abs(), before + after)
    product, inner = before * after, start + cross
    sine = (start * moved - cross * cross).clamp(min=0)
    direction = torch.where(inner > 0, _ratio(sine, product * (product + inner)), 1 - _ratio(inner, product))
    return torch.stack([magnitude, direction.masked_fill(before + after == 0, 0.0)])


def _dots(one: torch.Tensor, other: torch.Tensor, *, rows: bool) -> torch.Tensor:
    """The float64 inner product of each row, or of each column, of two matrices."""
    row, beside = max(row_length(one), 1), other.reshape(-1)

    def work(values: torch.Tensor, start: int) -> torch.Tensor:
        products = values.to(torch.float64) * beside[start : start + values.numel()]
        return products.view(-1, row).sum(dim=1 if rows else 0)

    found = map_blocks(one, work, multiple=row)
    if not found:
        return torch.zeros(one.shape[:1] if rows else one.shape[1:], dtype=torch.float64).flatten()
    return torch.cat(found) if rows else torch.stack(found).sum(dim=0)


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    return part / whole.masked_fill(whole == 0, 1.0)
