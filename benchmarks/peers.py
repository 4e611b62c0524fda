"""The peers' side: the same operators as peft, mergekit and MergeLM offer them.

MergeLM is no package; its formulas stand here in plain torch. All drop 0.9 of the entries.
"""

from __future__ import annotations

import torch
from mergekit.sparsify import RescaleNorm, SparsificationMethod, sparsify
from peft.utils.merge_utils import prune

import delta_analysis as da
from benchmarks.ours import DROP_RATE, Prune

DENSITY = 1 - DROP_RATE
HALF_WINDOW = da.MagPrune(DROP_RATE).width / 2
"""mergekit's epsilon is half of the window."""


def peft_random(tensor: torch.Tensor) -> torch.Tensor:
    return prune(tensor, DENSITY, "random", rescale=True)


def peft_magnitude(tensor: torch.Tensor) -> torch.Tensor:
    return prune(tensor, DENSITY, "magnitude")


def mergekit_random(tensor: torch.Tensor) -> torch.Tensor:
    """What its methods dare_linear and dare_ties do: the factor restores the L1 norm."""
    return sparsify(tensor, DENSITY, SparsificationMethod.random, rescale_norm=RescaleNorm.l1)


def mergekit_magnitude(tensor: torch.Tensor) -> torch.Tensor:
    return sparsify(tensor, DENSITY, SparsificationMethod.magnitude)


def mergekit_magprune(tensor: torch.Tensor) -> torch.Tensor:
    method = SparsificationMethod.della_magprune
    return sparsify(tensor, DENSITY, method, epsilon=HALF_WINDOW, rescale_norm=RescaleNorm.l1)


def mergelm_random(tensor: torch.Tensor) -> torch.Tensor:
    mask = torch.bernoulli(torch.full_like(tensor, DROP_RATE))
    return tensor * (1 - mask) / (1 - DROP_RATE)


def mergelm_magnitude(tensor: torch.Tensor) -> torch.Tensor:
    sizes = tensor.flatten().abs()
    threshold = sizes.kthvalue(int(tensor.numel() * DROP_RATE)).values
    return tensor * ~(sizes <= threshold).view_as(tensor)


PEERS: dict[str, Prune] = {
    "peft random": peft_random,
    "MergeLM random": mergelm_random,
    "mergekit random": mergekit_random,
    "peft magnitude": peft_magnitude,
    "MergeLM magnitude": mergelm_magnitude,
    "mergekit magnitude": mergekit_magnitude,
    "mergekit magprune": mergekit_magprune,
}
RIVALS: dict[str, tuple[str, ...]] = {
    "Dare(0.9)": ("peft random", "MergeLM random", "mergekit random"),
    'Dare(0.9, rescale="l1")': ("mergekit random",),
    "Magnitude(0.9)": ("peft magnitude", "MergeLM magnitude", "mergekit magnitude"),
    "MagPrune(0.9)": ("mergekit magprune",),
}
"""With whom each operator is compared; the others have no counterpart."""
