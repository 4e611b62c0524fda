"""Which entries of a delta are dropped, and what the rest is multiplied by."""

from delta_analysis.pruning.dare import Dare
from delta_analysis.pruning.magnitude import Magnitude
from delta_analysis.pruning.magprune import MagPrune
from delta_analysis.pruning.moments import Law, Lawful, Number
from delta_analysis.pruning.proportional import Proportional
from delta_analysis.pruning.pruner import Prune, Pruner, bind, checked_drop_rate
from delta_analysis.pruning.rescaling import Rescale
from delta_analysis.pruning.threshold import find_threshold
from delta_analysis.pruning.transforms import Change, Clipped, Permuted, Scaled, SignsRedrawn, Topless

__all__ = [
    "Change",
    "Clipped",
    "Dare",
    "Law",
    "Lawful",
    "MagPrune",
    "Magnitude",
    "Number",
    "Permuted",
    "Proportional",
    "Prune",
    "Pruner",
    "Rescale",
    "Scaled",
    "SignsRedrawn",
    "Topless",
    "bind",
    "checked_drop_rate",
    "find_threshold",
]
