"""Noise in the layers, and the drop rate foretold."""

from delta_analysis.prediction.layers import delta_noise, layer_noise
from delta_analysis.prediction.predict import (
    PREDICTORS,
    ForetoldDropRate,
    best_predictor,
    calibration_file,
    fit_line,
    left_out,
    root_mean_square,
    tolerated_drop_rate,
)
from delta_analysis.prediction.predictors import delta_predictors

__all__ = [
    "PREDICTORS",
    "ForetoldDropRate",
    "best_predictor",
    "calibration_file",
    "delta_noise",
    "delta_predictors",
    "fit_line",
    "layer_noise",
    "left_out",
    "root_mean_square",
    "tolerated_drop_rate",
]
