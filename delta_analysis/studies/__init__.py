"""What one report computes beyond the library."""

from delta_analysis.studies import dare_ablation, model_size
from delta_analysis.studies.causes import share_of
from delta_analysis.studies.foresight import delta_predictors
from delta_analysis.studies.merging import (
    AFTER_DARE,
    AFTERWARDS,
    BEFORE,
    DELLA,
    ELECTED,
    SETTING,
    SLACKS,
    SUM,
    joined,
    mean_of,
    saturation,
    slack_name,
    trail_outcomes,
)
from delta_analysis.studies.rescaling import validation_and_test

__all__ = [
    "AFTERWARDS",
    "AFTER_DARE",
    "BEFORE",
    "DELLA",
    "ELECTED",
    "SETTING",
    "SLACKS",
    "SUM",
    "dare_ablation",
    "delta_predictors",
    "joined",
    "mean_of",
    "model_size",
    "saturation",
    "share_of",
    "slack_name",
    "trail_outcomes",
    "validation_and_test",
]
