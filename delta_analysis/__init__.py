"""What is inside the delta between a base language model and its fine-tune, and how much can be dropped."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delta_analysis import evaluation, merging, plots
    from delta_analysis.checkpoints import open_checkpoint
    from delta_analysis.deltas import load_delta, save_checkpoint, value_ranges
    from delta_analysis.merging import merge
    from delta_analysis.prediction import layer_noise, tolerated_drop_rate
    from delta_analysis.pruning import Dare, Magnitude, MagPrune, Proportional
    from delta_analysis.sweeps import Pair, drop_curve, measure_tolerance, sweep

__all__ = [
    "Dare",
    "MagPrune",
    "Magnitude",
    "Pair",
    "Proportional",
    "drop_curve",
    "evaluation",
    "layer_noise",
    "load_delta",
    "measure_tolerance",
    "merge",
    "merging",
    "open_checkpoint",
    "plots",
    "save_checkpoint",
    "sweep",
    "tolerated_drop_rate",
    "value_ranges",
]

_ROOMS = {
    "checkpoints": ["open_checkpoint"],
    "deltas": ["load_delta", "save_checkpoint", "value_ranges"],
    "pruning": ["Dare", "MagPrune", "Magnitude", "Proportional"],
    "merging": ["merge"],
    "sweeps": ["Pair", "drop_curve", "measure_tolerance", "sweep"],
    "prediction": ["layer_noise", "tolerated_drop_rate"],
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import delta_analysis` loads no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = (
        getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
        if name in _ROOM_OF
        else import_module(f"{__name__}.{name}")
    )
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
