"""What the reports' results say about each claim: one small function a claim, from results to an effect.

A function takes the results of one report, with the column `made_by` of `overview.read_results`, and
returns an `Interval`. Accuracies are means over masks and items, and their intervals are over these:
the pairs are the ones that were measured, none is taken for a sample of others. Deltas are read
whole, so that a share of entries has an interval of no width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import pandas as pd

from delta_analysis.reports.claims.leads import (
    lead_at_all_rates,
    lead_at_high_rate,
    lead_grows,
    least_similarity,
    similarity_gain,
)
from delta_analysis.reports.claims.measures import (
    CONTINUED,
    FINE_TUNED,
    GIVEN,
    RATE,
    NotMeasuredError,
    at_rate,
    average,
    average_rate,
    decoders,
    encoders,
    greatest,
    kept,
    least,
    made_by,
    tolerances,
    tolerates_more,
)
from delta_analysis.reports.claims.merges import (
    DARE_MERGE,
    dare_helps,
    dare_helps_ties_most,
    della_over,
    merge_brings,
    merge_gains,
    merge_over_tuning,
    merge_retains,
    merge_saturates,
    merge_surpasses,
    slack_helps,
)
from delta_analysis.reports.family import BOTH, SFT
from delta_analysis.studies import share_of
from delta_analysis.sweeps import Interval, tolerance_difference

# 01: value ranges.


def share_within(results: pd.DataFrame, limit: float, table: str = "model") -> Interval:
    """The least share of a fine-tuning delta's entries within a limit."""
    rows = made_by(results[results["table"] == table], FINE_TUNED)
    return least(Interval(x, x, x) for x in rows[f"share_below_{limit:g}"])


def share_beyond(results: pd.DataFrame, limit: float) -> Interval:
    """The least share of entries beyond a limit, of deltas with continual pre-training in between."""
    rows = made_by(results[results["table"].isin(["model", "encoder"])], CONTINUED)
    return least(Interval(x, x, x) for x in 1 - rows[f"share_below_{limit:g}"])


# 02: DARE, more and more of it.


def tolerated_by_decoders(results: pd.DataFrame) -> Interval:
    return least(tolerances(decoders(made_by(results, FINE_TUNED))).values())


def tolerated_by_encoders(results: pd.DataFrame) -> Interval:
    return least(tolerances(encoders(made_by(results, FINE_TUNED))).values())


def tolerated_on_average(results: pd.DataFrame) -> Interval:
    return average_rate(tolerances(decoders(made_by(results, FINE_TUNED))).values())


def gained_by_pruning(results: pd.DataFrame) -> Interval:
    """What pruning at the high rate adds to the untouched metric, as a share of it, over the fine-tunes."""
    share = average(map(kept, at_rate(decoders(made_by(results, FINE_TUNED)), RATE).values()))
    return Interval(*(x - 1 for x in share))


def kept_on_older_base(results: pd.DataFrame) -> Interval:
    """The share kept with a tenth dropped, on the base before continual pre-training."""
    return average(map(kept, at_rate(decoders(made_by(results, [BOTH])), 0.1).values()))


def tolerated_on_older_base(results: pd.DataFrame) -> Interval:
    rows = made_by(results, [BOTH])
    return greatest([*tolerances(decoders(rows)).values(), *tolerances(encoders(rows)).values()])


def true_base_over_older(results: pd.DataFrame) -> Interval:
    """How much more a fine-tune tolerates on its true base than on the one before continual pre-training."""
    rows = made_by(results, [BOTH])
    older_pairs = {str(pair).rpartition(" → ")[2]: str(pair) for pair in rows["pair"].unique()}
    gaps = []
    for architecture in (decoders, encoders):
        true, older = (
            tolerances(architecture(made_by(results, [SFT]))),
            tolerances(architecture(rows)),
        )
        for pair, rate in true.items():
            other = older_pairs.get(pair.rpartition(" → ")[2])
            if other in older:
                gaps.append(tolerates_more(rate, older[other]))
    return least(gaps)


# 05: what makes DARE impractical.


def range_rule(results: pd.DataFrame) -> Interval:
    """Rank correlation of the share of entries beyond 0.002 with the tolerated drop rate, over the family's deltas."""
    if (results["made_by"] == GIVEN).any():
        raise NotMeasuredError("no predictors but those of the embedded family")
    row = results[(results["table"] == "predictors") & (results["predictor"] == "share_above_0.002")].iloc[0]
    return Interval(row["rank"], row["rank_low"], row["rank_high"])


def size_over_gap(results: pd.DataFrame) -> Interval:
    """The share of the gap between two bases that the sizes of the deltas foretell: noise grows with their square."""
    rows = results[results["table"] == "tolerances"].rename(columns={"value": "tolerated"})
    near, far = (made_by(rows, [kind]).iloc[0] for kind in (SFT, BOTH))
    foretold = 2 * math.log(far["rms"] / near["rms"])
    return share_of(Interval(foretold, foretold, foretold), tolerance_difference(near, far))


# 06: weights instead of the delta.


def weights_kept(results: pd.DataFrame) -> Interval:
    """The share kept with a tenth of the weights dropped at random."""
    return average(map(kept, at_rate(_at_random(results, "weights"), 0.1).values()))


def delta_over_weights(results: pd.DataFrame) -> Interval:
    """How much more of the delta than of the weights is tolerated."""
    delta, weights = (tolerances(_at_random(results, what)) for what in ("delta", "weights"))
    return least(tolerates_more(rate, weights[f"{pair}: weights"]) for pair, rate in delta.items())


def encoders_keep_more_weights(results: pd.DataFrame) -> Interval:
    """How much more of its weights the least tolerant encoder can lose than the most tolerant decoder."""
    rows = results[(results["dropped from"] == "weights") & (results["method"] == "DARE")]
    rows = made_by(rows, FINE_TUNED)
    return tolerates_more(least(tolerances(encoders(rows)).values()), greatest(tolerances(decoders(rows)).values()))


def _at_random(results: pd.DataFrame, what: str) -> pd.DataFrame:
    rows = results[(results["dropped from"] == what) & (results["method"] == "DARE")]
    return decoders(made_by(rows, FINE_TUNED))


# 07: sizes.


def larger_over_smaller(results: pd.DataFrame) -> Interval:
    """How much more the largest size of a fine-tune tolerates than the smallest."""
    return least(tolerance_difference(largest, smallest) for smallest, largest in _ends(results))


def tolerated_by_largest(results: pd.DataFrame) -> Interval:
    return average_rate(Interval(row["tolerated"], row["low"], row["high"]) for _, row in _ends(results))


def _ends(results: pd.DataFrame) -> list[tuple[pd.Series, pd.Series]]:
    """The smallest and the largest size of each fine-tune."""
    rows = made_by(results[results["table"] == "tolerances"], FINE_TUNED).sort_values("parameters")
    groups = [
        group
        for _, group in rows.groupby("relation", sort=False)
        if group["parameters"].min() < group["parameters"].max()
    ]
    if not groups:
        raise NotMeasuredError("a single size")
    return [(group.iloc[0], group.iloc[-1]) for group in groups]


EFFECTS: Mapping[str, Callable[[pd.DataFrame], Interval]] = {
    "sft-range-0005": partial(share_within, limit=0.005),
    "sft-range-0005-encoders": partial(share_within, limit=0.005, table="encoder"),
    "sft-range-0002": partial(share_within, limit=0.002),
    "cpt-range-001": partial(share_beyond, limit=0.01),
    "cpt-range-003": partial(share_beyond, limit=0.03),
    "dare-90-decoders": tolerated_by_decoders,
    "dare-90-encoders": tolerated_by_encoders,
    "dare-99": tolerated_on_average,
    "pruned-below-untouched": gained_by_pruning,
    "true-base": true_base_over_older,
    "cpt-breaks-dare": tolerated_on_older_base,
    "cpt-breaks-at-10": kept_on_older_base,
    "range-rule": range_rule,
    "range-breaks": size_over_gap,
    "rescale-matters": partial(lead_at_all_rates, method="DARE", other="drop only"),
    "similarity-095": least_similarity,
    "similarity-gain": similarity_gain,
    "mp-worse": partial(lead_at_high_rate, method="DARE", other="MP"),
    "mp-gap-widens": partial(lead_grows, method="DARE", other="MP"),
    "mp-rescale-destroys": partial(lead_at_high_rate, method="MP + rescale", other="MP"),
    "magprune-over-dare": partial(lead_at_all_rates, method="MAGPRUNE", other="DARE"),
    "magprune-over-mp": partial(lead_at_all_rates, method="MAGPRUNE", other="MP"),
    "weights-10": weights_kept,
    "sft-stimulates": delta_over_weights,
    "decoders-suffer-more": encoders_keep_more_weights,
    "larger-tolerate-more": larger_over_smaller,
    "largest-99": tolerated_by_largest,
    "merge-gains": merge_gains,
    "merge-retains": merge_retains,
    "merge-surpasses": merge_surpasses,
    "dare-helps-merging": dare_helps,
    "dare-helps-ties-most": dare_helps_ties_most,
    "della-over-dare": partial(della_over, way=DARE_MERGE),
    "della-over-ties": partial(della_over, way="TIES, trimmed"),
    "della-over-unpruned": partial(della_over, way=DARE_MERGE, dropped=False),
    "merge-brings-tasks": merge_brings,
    "merge-over-ct-then-sft": merge_over_tuning,
    "merge-saturates": merge_saturates,
    "slack-helps": slack_helps,
}
"""The effect of each claim, by its id."""
