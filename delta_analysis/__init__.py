"""What is inside the delta between a base language model and its fine-tune, and how much can be dropped."""

from delta_analysis import plots
from delta_analysis._errors import CheckpointError, NotHomologousError
from delta_analysis.checkpoint import Checkpoint, open_checkpoint
from delta_analysis.comparison import best_methods, lead
from delta_analysis.curve import drop_curve
from delta_analysis.damage import damage_summary, pruning_damage
from delta_analysis.data_methods import Fisher, RegMean
from delta_analysis.delta import Delta, load_delta
from delta_analysis.editable import Edit, Pair
from delta_analysis.election import Slack
from delta_analysis.evaluate import (
    Classification,
    ExactMatch,
    HiddenSimilarity,
    Labelled,
    LmEval,
    OutputDrift,
    Question,
    TextPerplexity,
    load_labelled,
    load_questions,
)
from delta_analysis.foresight import ForetoldDropRate, tolerated_drop_rate
from delta_analysis.interference import interference
from delta_analysis.known_pairs import known_pairs
from delta_analysis.layer_noise import layer_noise
from delta_analysis.merge_methods import Average, Della, TaskArithmetic, Ties
from delta_analysis.merging import merge
from delta_analysis.outvoted import discard_rate
from delta_analysis.patching import patched
from delta_analysis.proportional import Proportional
from delta_analysis.pruning import Dare, Magnitude, MagPrune
from delta_analysis.ranges import magnitude_histogram, value_ranges
from delta_analysis.ray_executor import RayExecutor
from delta_analysis.saving import save_checkpoint
from delta_analysis.streaming import tally_delta
from delta_analysis.sweep import SweepError, sweep
from delta_analysis.tolerance import measure_tolerance
from delta_analysis.widen import Widen

__all__ = [
    "Average",
    "Checkpoint",
    "CheckpointError",
    "Classification",
    "Dare",
    "Della",
    "Delta",
    "Edit",
    "ExactMatch",
    "Fisher",
    "ForetoldDropRate",
    "HiddenSimilarity",
    "Labelled",
    "LmEval",
    "MagPrune",
    "Magnitude",
    "NotHomologousError",
    "OutputDrift",
    "Pair",
    "Proportional",
    "Question",
    "RayExecutor",
    "RegMean",
    "Slack",
    "SweepError",
    "TaskArithmetic",
    "TextPerplexity",
    "Ties",
    "Widen",
    "best_methods",
    "damage_summary",
    "discard_rate",
    "drop_curve",
    "interference",
    "known_pairs",
    "layer_noise",
    "lead",
    "load_delta",
    "load_labelled",
    "load_questions",
    "magnitude_histogram",
    "measure_tolerance",
    "merge",
    "open_checkpoint",
    "patched",
    "plots",
    "pruning_damage",
    "save_checkpoint",
    "sweep",
    "tally_delta",
    "tolerated_drop_rate",
    "value_ranges",
]
