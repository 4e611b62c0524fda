"""Noise in the layers, and the drop rate foretold."""

from delta_analysis.prediction.foresight import Foretold, tolerated_drop_rate
from delta_analysis.prediction.layers import delta_noise, layer_noise
from delta_analysis.prediction.predict import (
    ForetoldDropRate,
    calibration_file,
    calibration_table,
    fit_line,
    foretell,
    left_out,
)

__all__ = [
    "Foretold",
    "ForetoldDropRate",
    "calibration_file",
    "calibration_table",
    "delta_noise",
    "fit_line",
    "foretell",
    "layer_noise",
    "left_out",
    "tolerated_drop_rate",
]
