"""The ways to merge that report 08 compares: which merges each of them has to choose from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from delta_analysis.data_methods import Fisher, RegMean
from delta_analysis.election import Slack
from delta_analysis.merge_edit import MergeSource, Merging
from delta_analysis.merge_methods import Average, Della, MergeMethod, TaskArithmetic, Ties
from delta_analysis.pruning import Dare, Pruner
from delta_analysis.widen import Widen

SUM, ELECTED, PUBLISHED = "task arithmetic", "TIES, sum", "TIES"
"""Ways along continual pre-training: the sum of both deltas, that without what is outvoted, and TIES as published."""
BEFORE, AFTERWARDS = "before merging", "fine-tuned afterwards"
TRIMMED, DELLA = "TIES, trimmed", "DELLA"
AFTER_DARE = ("average", SUM, "Fisher", "RegMean", "TIES")
"""The methods that DARE's paper puts DARE before."""
PUBLISHED_TRIM = 0.8
"""TIES keeps a fifth of each delta."""
SLACKS = (1.0, 3.0, 10.0, math.inf)
WEIGHTS = (0.5, 0.75)
"""Weights of a fine-tune, beside 1, that are offered where it meets a far larger delta."""

Sources = tuple[MergeSource, ...]


def slack_way(relative: float) -> str:
    """What the election with slack is called.

    Examples
    --------
    >>> slack_way(1.0), slack_way(math.inf)
    ('slack 1', 'slack ∞')
    """
    return f"slack {relative:g}".replace("inf", "∞")


def ways(sources: Sources, rates: Sequence[float], scalings: Sequence[float]) -> dict[str, list[Merging]]:
    """Name of each way -> its merges, at every drop rate (0 among them) and scaling.

    DARE comes before a method, but for TIES that trims by itself and DELLA; in `average` nothing is scaled.
    """
    after_dare: dict[str, Callable[[float], MergeMethod]] = {
        "average": lambda s: Average(),
        SUM: TaskArithmetic,
        "Fisher": Fisher,
        "RegMean": RegMean,
        "WIDEN": Widen,
        "TIES": lambda s: Ties(0.0, scaling=s),
    }
    found = {
        way: [
            _merging(sources, make(s), Dare(p) if p else None)
            for p in rates
            for s in (scalings if way != "average" else [1.0])
        ]
        for way, make in after_dare.items()
    }
    found[TRIMMED] = [_merging(sources, Ties(p, scaling=s)) for p in rates for s in scalings]
    found[DELLA] = [_merging(sources, Della(p, scaling=s)) for p in rates for s in scalings]
    return found


def trail_ways(sources: Sources) -> dict[str, Merging]:
    """Merges of a continually pre-trained model with a fine-tune, as they are: weights and scaling are 1."""
    return {SUM: _merging(sources, TaskArithmetic()), PUBLISHED: _merging(sources, Ties(PUBLISHED_TRIM))}


def election_ways(sources: Sources) -> dict[str, Merging]:
    """The sum of what is not outvoted, without slack and with more and more of it for the second delta."""
    slacks = {slack_way(r): _merging(sources, Ties(0.0, fuse="sum", slack=Slack(1, relative=r))) for r in SLACKS}
    return {ELECTED: _merging(sources, Ties(0.0, fuse="sum")), **slacks}


def unequal_ways(sources: Sources, scalings: Sequence[float], drop_rate: float) -> dict[str, list[Merging]]:
    """Merges of two deltas the first of which is far larger, each with settings to choose from."""
    plain: dict[str, Callable[[float], MergeMethod]] = {
        "Fisher": Fisher,
        "RegMean": RegMean,
        "WIDEN": Widen,
        PUBLISHED: lambda s: Ties(PUBLISHED_TRIM, scaling=s),
        DELLA: lambda s: Della(drop_rate, scaling=s),
    }
    sums = [_merging(sources, TaskArithmetic(s)) for s in scalings]
    sums += [Merging(sources, TaskArithmetic(), weights=(1.0, weight)) for weight in WEIGHTS]
    return {
        "average": [_merging(sources, Average())],
        SUM: sums,
        f"DARE + {SUM}": [_merging(sources, TaskArithmetic(s), Dare(drop_rate)) for s in scalings],
        **{way: [_merging(sources, make(s)) for s in scalings] for way, make in plain.items()},
    }


def _merging(sources: Sources, by: MergeMethod, prune: Pruner | None = None) -> Merging:
    """The merge of sources, which have texts only where the method needs data: they are a part of a cell's key."""
    needed = sources if by.statistic else tuple(source.without_texts() for source in sources)
    return Merging(needed, by, prune)
