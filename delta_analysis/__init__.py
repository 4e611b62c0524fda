"""What is inside the delta between a base language model and its fine-tune, and how much can be dropped."""

from delta_analysis import plots
from delta_analysis._errors import CheckpointError, NotHomologousError
from delta_analysis.checkpoint import Checkpoint, open_checkpoint
from delta_analysis.comparison import best_methods, lead
from delta_analysis.damage import damage_summary, pruning_damage
from delta_analysis.delta import Delta, load_delta
from delta_analysis.evaluate import ExactMatch, Question, TextPerplexity, load_questions, patched
from delta_analysis.known_pairs import known_pairs
from delta_analysis.pruning import Dare, Magnitude, MagPrune
from delta_analysis.ranges import magnitude_histogram, value_ranges
from delta_analysis.saving import save_checkpoint
from delta_analysis.streaming import tally_delta
from delta_analysis.sweep import Pair, drop_curve, sweep
from delta_analysis.tolerance import measure_tolerance

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Dare",
    "Delta",
    "ExactMatch",
    "MagPrune",
    "Magnitude",
    "NotHomologousError",
    "Pair",
    "Question",
    "TextPerplexity",
    "best_methods",
    "damage_summary",
    "drop_curve",
    "known_pairs",
    "lead",
    "load_delta",
    "load_questions",
    "magnitude_histogram",
    "measure_tolerance",
    "open_checkpoint",
    "patched",
    "plots",
    "pruning_damage",
    "save_checkpoint",
    "sweep",
    "tally_delta",
    "value_ranges",
]
