"""Fine-tuned minus base: what is compared, how large it is, how it is saved."""

from delta_analysis.deltas.alignment import COMPARED, VOCABULARIES, Match, Vocabulary, align
from delta_analysis.deltas.delta import Delta, edited_weight, load_delta
from delta_analysis.deltas.placements import edited_checkpoint, judged_class, placements
from delta_analysis.deltas.ranges import GROUPS, LABELS, Grouping, magnitude_histogram, value_ranges
from delta_analysis.deltas.saving import save_checkpoint
from delta_analysis.deltas.selection import CLASSIFIER, in_scope, parts_and_layers
from delta_analysis.deltas.streaming import tally_delta
from delta_analysis.deltas.tally import MAGNITUDE_QUANTILES, THRESHOLDS

__all__ = [
    "CLASSIFIER",
    "COMPARED",
    "GROUPS",
    "LABELS",
    "MAGNITUDE_QUANTILES",
    "THRESHOLDS",
    "VOCABULARIES",
    "Delta",
    "Grouping",
    "Match",
    "Vocabulary",
    "align",
    "edited_checkpoint",
    "edited_weight",
    "in_scope",
    "judged_class",
    "load_delta",
    "magnitude_histogram",
    "parts_and_layers",
    "placements",
    "save_checkpoint",
    "tally_delta",
    "value_ranges",
]
