"""The tolerated drop rate foretold: the expansion of the margins, checked by a few masks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from delta_analysis.deltas import Delta, placements
from delta_analysis.evaluation import Evaluation, Margins, TextPerplexity, finetuned_model, first_items, margins_of
from delta_analysis.prediction.layers import delta_noise
from delta_analysis.prediction.margins import (
    ENDS,
    PRECISION,
    Curve,
    Scale,
    Weights,
    crossing_down,
    expand,
    mask,
    powers_between,
    whole,
)
from delta_analysis.sweeps import (
    CONFIDENCE,
    MEAN,
    PERPLEXITY,
    Floor,
    chance_of,
    clearly_above,
    inverse_logit,
    logit,
    reading,
)

LOOKED, EXPANDED, JUDGED = 48, 100, 250
"""Items at most: for a first look, for the expansion, and for masks."""
FEW, NOISES = 2, 4
"""Noises of a first look, and of the expansion."""
ROUNDS, MASKS = 2, 3
"""How often masks are drawn, and how many each time."""
FIRST_ODDS, FIRST_PART = 0.01, 0.1
"""Odds at which is looked first, until they are about this part of those foretold."""
PARTS = (0.3, 1.0, 1.0, 1.0)
"""Odds that are tried, as parts of those foretold last, until two answers agree: at 1 nothing is extrapolated."""
REACH = 4.0
"""So far on either side of what the expansion foretells, masks can move the answer."""
LEAST_SLOPE = 1e-3
AGREEMENT = 0.25
"""An answer and the odds tried agree when they are no further apart on log(p/(1-p))."""
FIRST_MASK = 1_000_000
"""Masks have seeds from here on, not those that a sweep measures with."""


@dataclass(frozen=True)
class Foretold:
    """A foretold tolerated drop rate.

    Attributes
    ----------
    tolerated, low, high : the drop rate up to which DARE is expected to keep 95% of what the fine-tune has
        above the floor, with a 95% interval over noises, masks and items.
    reading : what `tolerated` is, as in `measure_tolerance`: `measured` stands for a value within the range
        that is searched; `at least`, `at most`; or `none` (missing values).
    expansion, masks : the drop rate by the expansion alone, and as real masks correct it.
    agreed : whether these two are as near to each other as their errors let expect.
    seconds : what it took.
    """

    tolerated: float
    low: float
    high: float
    reading: str
    expansion: float
    masks: float
    agreed: bool
    seconds: float


def tolerated_drop_rate(
    delta: Delta,
    evaluation_or_texts: Evaluation | Sequence[str] | None = None,
    *,
    scope: str = "all",
    device: str = "cpu",
    seed: int = 0,
) -> Foretold:
    """Foretell how much of a delta DARE can drop, from how far the answers of the model are from changing.

    Small noise of DARE's law is added to the weights and taken away again, which shows how the lead of every
    right token (or label) over its rivals responds; from that follows what is kept at any drop rate. Then real
    masks at the drop rate foretold are judged, without generation, and both are weighed by their variances.
    Nothing is fitted; it takes about a tenth of the time of `measure_tolerance`, and the memory of the model
    and the delta in scope.

    Parameters
    ----------
    delta : as from `load_delta`.
    evaluation_or_texts : `ExactMatch`, `Classification` or `TextPerplexity`, of which the first 250 items are
        used; or texts, for their perplexity.
    scope : which tensors are dropped from, as in `Edit`.
    device : where the model runs.
    seed : of noises and masks.

    Raises
    ------
    ValueError
        Nothing to judge by: then the error says what the noise of the layers is. An evaluation of another
        kind; a scope that selects nothing.

    Examples
    --------
    >>> from delta_analysis import load_delta
    >>> from delta_analysis.evaluation import Classification, load_labelled
    >>> from delta_analysis.checkpoints.paths import find_root
    >>> examples = load_labelled(find_root() / "data" / "zoo" / "tasks" / "strings-right.jsonl", 40)
    >>> delta = load_delta(base="zoo:encoder/base", finetuned="zoo:encoder/strings")
    >>> found = tolerated_drop_rate(delta, Classification(tuple(examples)))
    >>> found.reading, found.low < found.tolerated < found.high
    ('measured', True)
    """
    started = time.perf_counter()
    evaluation = _evaluation(delta, evaluation_or_texts, scope)
    part = delta.select(scope)
    model, tokenizer = finetuned_model(delta, device)
    if isinstance(evaluation, TextPerplexity) and not model.can_generate():
        raise ValueError(f"{type(model).__name__} writes no text, so it has no perplexity; give a Classification")
    answer = _answer(delta, part, evaluation, model, tokenizer, seed)
    tolerated = _rate(answer.x)
    return Foretold(
        tolerated=tolerated,
        low=_rate(answer.low),
        high=_rate(answer.high),
        reading=reading(tolerated),
        expansion=_rate(answer.expansion),
        masks=_rate(answer.masks),
        agreed=answer.agreed,
        seconds=time.perf_counter() - started,
    )


class _Answer(NamedTuple):
    """Log odds: the answer with its interval, those by the expansion and by the masks; and whether these agree."""

    x: float
    low: float
    high: float
    expansion: float
    masks: float
    agreed: bool


def _answer(
    delta: Delta,
    part: Delta,
    evaluation: Evaluation,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> _Answer:
    """What is foretold of some tensors, in log odds; missing values where there is nothing to lose."""
    judged = margins_of(first_items(evaluation, JUDGED), model, tokenizer)
    untouched, metric = judged.read(model)[1], PERPLEXITY if judged.metric == "perplexity" else MEAN
    placed = placements(delta)
    base = Weights(model, placed, delta.select()).outcomes(whole, judged, -1.0)
    floor = Floor(base[None], chance_of(evaluation))
    if not clearly_above(metric, {0.0: untouched[None]}, floor):
        return _Answer(math.nan, math.nan, math.nan, math.nan, math.nan, agreed=False)
    weights = Weights(model, placed, {name: part[name].to(model.device) for name in part})

    def curve(count: int, odds: float, noises: int) -> Curve:
        some = margins_of(first_items(evaluation, count), model, tokenizer)
        scale = Scale(metric, some.read(model)[1], floor)
        return Curve(expand(weights, some, odds, noises, 1000 * seed), some, scale)

    masks = _Masks(weights, judged, Scale(metric, untouched, floor), FIRST_MASK + 1000 * seed)
    return _weighed(_expanded(curve), masks)


def _rate(x: float) -> float:
    """The drop rate of log odds, within the range that `measure_tolerance` searches."""
    if math.isnan(x):
        return x
    return inverse_logit(min(max(x, ENDS[0]), ENDS[1]))


def _evaluation(delta: Delta, given: Evaluation | Sequence[str] | None, scope: str) -> Evaluation:
    """What is judged; an error without it says what is known."""
    if given is None or (isinstance(given, Sequence) and not given):
        noise = delta_noise(delta, scope=scope).dropna(subset=["noise_share"]).nlargest(1, "noise_share")
        shown = "".join(
            f"; of the layers is known that ‖D‖²/‖W‖² is at most {row.noise_share:.2g} ({row.tensor}; see layer_noise)"
            for row in noise.itertuples()
        )
        raise ValueError(
            "evaluation_or_texts: from weights alone nothing is foretold, since what breaks an answer is its lead over "
            f"the next one{shown}. Give ExactMatch(questions), Classification(examples) or a few texts"
        )
    return TextPerplexity("\n\n".join(given)) if isinstance(given, Sequence) else given


@dataclass(frozen=True, eq=False)
class _Expanded:
    """The last expansion as a curve, the log odds that it foretells, and their variance."""

    curve: Curve
    x: float
    variance: float


def _expanded(curve: Callable[[int, float, int], Curve]) -> _Expanded:
    """The expansion at odds that rise until the answer is where they are."""
    odds = FIRST_ODDS
    for _ in PARTS:
        x = curve(LOOKED, odds, FEW).tolerated()
        wanted = FIRST_PART * math.exp(x)
        if abs(math.log(wanted / odds)) < 1:
            break
        odds = wanted
    last: Curve | None = None
    for part in PARTS:
        found = curve(EXPANDED, part * math.exp(x), NOISES)
        if last is not None:
            found = Curve(found.found, found.judged, found.scale, powers_between(last.found, found.found))
        before, x, last = x, found.tolerated(), found
        if part == 1 and abs(x - before) < AGREEMENT:
            break
    others = [Curve(found.found.without(i), found.judged, found.scale, found.powers).tolerated() for i in range(NOISES)]
    jackknife = (NOISES - 1) / NOISES * float(np.square(np.array(others) - np.mean(others)).sum())
    return _Expanded(found, x, jackknife + (x - before) ** 2)


@dataclass(frozen=True, eq=False)
class _Masks:
    """What draws real masks, and how they are judged."""

    weights: Weights
    judged: Margins
    scale: Scale
    seed: int

    def outcomes(self, x: float, start: int) -> np.ndarray:
        """Outcomes (masks, items) of one round at log odds x."""
        changes = (mask(_rate(x), self.seed + start + i) for i in range(MASKS))
        return np.array([self.weights.outcomes(change, self.judged) for change in changes])


def _weighed(found: _Expanded, masks: _Masks) -> _Answer:
    """Masks are drawn where the expansion has its answer, then where both together have it.

    The curve of the expansion is moved along log odds until it keeps as much as the masks do, all in all. Where
    the two differ by more than their variances explain, the rest is counted as variance of the expansion.
    """
    curve, count, x = found.curve, len(masks.scale.untouched), found.x
    places = np.linspace(found.x - REACH, found.x + REACH, 33)
    table = np.array([curve.kept(place) for place in places])
    ahead, behind = np.interp(found.x + np.array([-0.5, 0.5]), places, table)
    slope = max(float(ahead - behind), LEAST_SLOPE)
    # The items of the expansion are some of those that the masks are judged on.
    others = max(1 - len(curve.scale.untouched) / count, 0.0)
    of_expansion = found.variance + others * curve.scale.item_variance(curve.outcomes(found.x)) / slope**2
    tried: list[float] = []
    means: list[float] = []
    variances: list[float] = []

    def surplus(shift: float) -> float:
        """What the masks keep beyond the curve, moved by so much to the right."""
        return float((np.array(means) - np.interp(np.array(tried) - shift, places, table)).mean())

    for i in range(ROUNDS):
        outcomes = masks.outcomes(x, MASKS * i)
        kept = np.array([masks.scale.kept(each[None]) for each in outcomes])
        tried.append(logit(_rate(x)))
        # Where all or nothing is kept, no curve could say where.
        means.append(min(max(float(kept.mean()), 0.5 / count), 1 - 0.5 / count))
        variances.append(float(kept.var(ddof=1)))
        shift = crossing_down(surplus, 0.0, -REACH, REACH)
        spread = max(curve.spread(found.x) ** 2, float(np.mean(variances)))
        of_masks = spread / (MASKS * len(means)) / slope**2
        by_masks = found.x + shift
        beyond = max((by_masks - found.x) ** 2 - of_expansion - of_masks, 0.0)
        weights = 1 / (np.array([of_expansion + beyond, of_masks]) + PRECISION**2)
        x = float(weights @ [found.x, by_masks] / weights.sum())
    wide = stats.t.ppf((1 + CONFIDENCE) / 2, ROUNDS * (MASKS - 1) + NOISES - 1)
    half = float(wide * math.sqrt(1 / weights.sum() + masks.scale.item_variance(outcomes) / slope**2))
    agreed = abs(by_masks - found.x) <= wide * math.sqrt(of_expansion + of_masks)
    return _Answer(x, x - half, x + half, found.x, by_masks, bool(agreed))
