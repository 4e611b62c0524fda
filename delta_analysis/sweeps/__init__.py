"""Every pair under every edit, seed and evaluation, as a table with intervals."""

from delta_analysis.sweeps.cells import content, digest
from delta_analysis.sweeps.comparison import best_methods, lead, paired_difference
from delta_analysis.sweeps.curves import drop_curve, first_metric, outcome_matrix
from delta_analysis.sweeps.engine import Evaluations, SweepError, evaluations_of, sweep
from delta_analysis.sweeps.intervals import (
    CONFIDENCE,
    MEAN,
    PERPLEXITY,
    RESAMPLES,
    Interval,
    inverse_logit,
    kept_interval,
    logit,
    metric_interval,
    metric_named,
    percentile_interval,
    resampled_means,
    two_way_resamples,
)
from delta_analysis.sweeps.merges import MergeSource, Merging
from delta_analysis.sweeps.pairs import Edit, Pair
from delta_analysis.sweeps.ray import RayExecutor
from delta_analysis.sweeps.tolerance import (
    END,
    HIGHEST,
    LOWEST,
    kept_shares,
    measure_tolerance,
    tolerance_difference,
    tolerated_interval,
)

__all__ = [
    "CONFIDENCE",
    "END",
    "HIGHEST",
    "LOWEST",
    "MEAN",
    "PERPLEXITY",
    "RESAMPLES",
    "Edit",
    "Evaluations",
    "Interval",
    "MergeSource",
    "Merging",
    "Pair",
    "RayExecutor",
    "SweepError",
    "best_methods",
    "content",
    "digest",
    "drop_curve",
    "evaluations_of",
    "first_metric",
    "inverse_logit",
    "kept_interval",
    "kept_shares",
    "lead",
    "logit",
    "measure_tolerance",
    "metric_interval",
    "metric_named",
    "outcome_matrix",
    "paired_difference",
    "percentile_interval",
    "resampled_means",
    "sweep",
    "tolerance_difference",
    "tolerated_interval",
    "two_way_resamples",
]
