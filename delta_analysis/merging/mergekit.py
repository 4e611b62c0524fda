"""A merge as a configuration for mergekit, where that has the method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from delta_analysis.checkpoints import find_root
from delta_analysis.deltas import Delta
from delta_analysis.merging.average import Average
from delta_analysis.merging.della import Della
from delta_analysis.merging.methods import MergeMethod
from delta_analysis.merging.task_arithmetic import TaskArithmetic
from delta_analysis.merging.ties import Ties
from delta_analysis.pruning import Dare, Magnitude, MagPrune, Pruner

FILE = "mergekit.yaml"
NAMES = {
    "": ("task_arithmetic", "ties"),
    "magnitude": ("breadcrumbs", "ties"),
    "random": ("dare_linear", "dare_ties"),
    "magprune": ("della_linear", "della"),
}
"""What mergekit calls a merge without, and with, an election, by how entries are dropped before it."""
SAME = "Its definition is the same; results differ by the rounding of float32."
KEPT = "Of n entries it keeps int(density * n), with density = 1 - drop rate; of equal entries the first or the last."
DRAWN = "Its random numbers are those of torch's global generator (--random-seed): other entries are dropped."
REMARKS = {
    "": (SAME,),
    "magnitude": (KEPT,),
    "random": ("density is 1 - drop rate.", DRAWN),
    "magprune": (
        "density is 1 - drop rate, epsilon half of the window.",
        DRAWN,
        "It ranks in the dtype of the arithmetic, equal entries in some order; bfloat16 would round ranks to 8 bits.",
    ),
}
GAMMA = "gamma 0 keeps the largest entries; before version 0.1.5 it drops everything."
L1 = "rescale gives each tensor its L1 norm back by one factor, where here an entry's is 1 / (1 - its drop rate)"
LEAN = f"{L1}; there small entries become too small on average, and large ones too large."


class Drops(NamedTuple):
    """How mergekit drops entries of one model: the way, its parameters, and whether the rest is rescaled."""

    way: str
    parameters: dict[str, float]
    rescale: bool


def mergekit_recipe(
    base: str, deltas: Sequence[Delta], method: MergeMethod, pruners: Sequence[Pruner | None], weights: Sequence[float]
) -> str | None:
    """The configuration, YAML text, with which mergekit does the same merge; None where it cannot.

    It has `Average`, `TaskArithmetic`, `Ties` within `"tensor"` and without slack, and `Della` within `"row"`
    and with its election, each after at most one way of dropping entries: `Dare`, `Magnitude`
    in a tensor, or `MagPrune` by row, at a rate for each model; with an elected mean, for weights of
    at least 0. Comments say where its arithmetic is another. All models have to be folders, which are
    given by their full paths, or hub ids.
    """
    rule = _rule(method)
    if rule is None or not _are_models(base, deltas) or (method.trim and any(pruners)):
        return None
    elects, mean = rule
    # A negative weight makes the divisor of the mean smaller there, and here larger.
    if elects and mean and min(weights) < 0:
        return None
    taken = [method.trim or pruner for pruner in pruners]
    drops = [_drops(pruner) for pruner in taken]
    dropping = {(each.way, each.rescale) for each in drops if each is not None and each.way}
    if None in drops or len(dropping) > 1:
        return None
    way, rescale = dropping.pop() if dropping else ("", False)
    name = NAMES[way][elects]
    lines = [
        "# The merge beside it by mergekit: mergekit-yaml mergekit.yaml OUTPUT",
        *(f"# - {remark}" for remark in _remarks(name, way, taken)),
        "# - All is computed in float32, and saved so; with out_dtype: bfloat16 it is saved in that.",
        f"merge_method: {name}",
        f"base_model: {_place(base)}",
        "models:",
    ]
    for delta, each, weight in zip(deltas, drops, weights, strict=True):
        assert each is not None
        own = {
            "weight": weight,
            **(each.parameters if way else {}),
            **({"gamma": 0.0} if name == "breadcrumbs" else {}),
        }
        lines += [f"  - model: {_place(delta.finetuned.source)}", f"    parameters: {_flow(own)}"]
    whole = {"normalize": mean, "rescale": rescale, "lambda": method.scaling}
    return "\n".join([*lines, f"parameters: {_flow(whole)}", "dtype: float32", ""])


def _rule(method: MergeMethod) -> tuple[bool, bool] | None:
    """Whether signs are elected, and whether the mean is taken; None for what mergekit does not have."""
    match method:
        case Average():
            return False, True
        case TaskArithmetic():
            return False, False
        case Ties(slack=None):
            return True, method.fuse == "mean"
        case Della(elect=True):
            return True, True
    return None


def _are_models(base: str, deltas: Sequence[Delta]) -> bool:
    """Whether mergekit can load them: folders of whole models, not pruned before, no two of one name."""
    for delta in deltas:
        paths = [side.path for side in (delta.base, delta.finetuned) if side is not None and side.path is not None]
        if delta.edits or delta.finetuned.is_delta or len(paths) < 2 or not all(path.is_dir() for path in paths):
            return False
    return len({base, *(delta.finetuned.source for delta in deltas)}) == 1 + len(deltas)


def _drops(pruner: Pruner | None) -> Drops | None:
    """None for what mergekit does not have."""
    if pruner is None:
        return Drops("", {"density": 1.0}, rescale=False)
    # Else 1 - 0.9 is a little less than 0.1, and int(density * n) one less.
    density = round(1 - pruner.drop_rate, 12)
    rescale = pruner.rescale != "none"
    match pruner:
        case Magnitude(within="tensor", rescale="none" | "l1"):
            return Drops("magnitude", {"density": density}, rescale)
        case Dare(rescale="inverse_keep" | "none" | "l1"):
            return Drops("random", {"density": density}, rescale)
        case MagPrune(within="row", rescale="inverse_keep" | "none" | "l1"):
            epsilon = round(pruner.width / 2, 12)
            # It refuses a probability of 1 of keeping an entry.
            if density + epsilon < 1 or not epsilon:
                return Drops("magprune", {"density": density, "epsilon": epsilon}, rescale)
    return None


def _remarks(name: str, way: str, pruners: Sequence[Pruner | None]) -> list[str]:
    """What is different there."""
    remarks = [*REMARKS[way], *([GAMMA] if name == "breadcrumbs" else [])]
    if way != "magnitude" and any(pruner and pruner.rescale == "inverse_keep" for pruner in pruners):
        remarks.append(LEAN if way == "magprune" else f"{L1}.")
    return remarks


def _place(source: str) -> str:
    """The full path of a folder, wherever mergekit runs, or a hub id as it is; in quotes."""
    embedded = source.startswith("zoo:")
    path = find_root() / "data/zoo" / source.removeprefix("zoo:") if embedded else Path(source).expanduser()
    return json.dumps(str(path.absolute()) if path.exists() else source)


def _flow(parameters: dict[str, float]) -> str:
    """A mapping on one line; numbers without exponents, since YAML takes 1e-05 for text."""
    texts = {
        name: str(value).lower() if isinstance(value, bool) else np.format_float_positional(value, trim="0")
        for name, value in parameters.items()
    }
    return "{" + ", ".join(f"{name}: {text}" for name, text in texts.items()) + "}"
