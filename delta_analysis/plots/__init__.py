"""Figures: each function draws one table on one pair of axes and returns the axes."""

from delta_analysis.plots.curves import (
    drop_curves,
    factor_curves,
    mark_tolerated,
    reference_lines,
    similarity_by_layer,
    tolerance_by_size,
)
from delta_analysis.plots.merging import (
    MERGE_COLOURS,
    along_trail,
    conflicts_by_layer,
    discards_along_trail,
    merge_curves,
    merge_dots,
)
from delta_analysis.plots.methods import drift_scatter, method_dots, winner_map
from delta_analysis.plots.noise import (
    foretold_scatter,
    metric_by_noise,
    noise_by_layer,
    recovery_dots,
    shift_rows,
    trail_tolerance,
)
from delta_analysis.plots.ranges import (
    MOST_ANNOTATED,
    layer_heatmap,
    magnitude_histograms,
    magnitude_quantiles,
    short_module,
    trail_growth,
)
from delta_analysis.plots.style import GREY, METHOD_COLOURS, PALETTE, colours, method_colours, set_style

__all__ = [
    "GREY",
    "MERGE_COLOURS",
    "METHOD_COLOURS",
    "MOST_ANNOTATED",
    "PALETTE",
    "along_trail",
    "colours",
    "conflicts_by_layer",
    "discards_along_trail",
    "drift_scatter",
    "drop_curves",
    "factor_curves",
    "foretold_scatter",
    "layer_heatmap",
    "magnitude_histograms",
    "magnitude_quantiles",
    "mark_tolerated",
    "merge_curves",
    "merge_dots",
    "method_colours",
    "method_dots",
    "metric_by_noise",
    "noise_by_layer",
    "recovery_dots",
    "reference_lines",
    "set_style",
    "shift_rows",
    "short_module",
    "similarity_by_layer",
    "tolerance_by_size",
    "trail_growth",
    "trail_tolerance",
    "winner_map",
]
