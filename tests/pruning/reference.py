"""Tensors to prune, and the rules of the operators written out entry by entry in exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from hypothesis import strategies as st

from delta_analysis._kernels.philox import random_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RESCALES = ["inverse_keep", "none", "l1", "l2", 2.5]
SIGMAS = 6
"""Width of the statistical bounds: a right operator fails one with probability 2e-9."""
RATE = st.one_of(
    st.sampled_from([0.0, 1e-300, 1e-12, 2.0**-33, 0.5, 0.9, 1 - 1e-6, 1 - 2.0**-33, 1 - 2.0**-53, 1.0]),
    st.floats(0, 1),
)
SHAPE = st.lists(st.integers(0, 5), max_size=4).filter(lambda shape: math.prod(shape) <= 100).map(tuple)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes, so that zeros of either sign and NaNs are told apart."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Of any shape and dtype, with many ties or none."""
    tensor = normal(*draw(SHAPE), seed=draw(st.integers(0, 1000)))
    coarse = draw(st.sampled_from([None, 1.0, 3.0, 0.0]))
    return (tensor if coarse is None else (tensor * coarse).round()).to(draw(st.sampled_from(DTYPES)))


def in_rows(tensor: torch.Tensor, within: str) -> list[list[float]]:
    """The entries as float32 numbers, in lists that are compared with each other."""
    flat = tensor.float()
    whole = within == "tensor" or tensor.dim() < 2
    return flat.reshape(1, -1).tolist() if whole else [row.reshape(-1).tolist() for row in flat]


def slow_magnitude(tensor: torch.Tensor, drop_rate: float, within: str, *, name: str, seed: int) -> list[float]:
    """The least round(p · n) of each list become zero, in the order of (|δ|, number, position)."""
    numbers, result = random_bits(tensor.numel(), name=name, seed=seed).tolist(), []
    for row in in_rows(tensor, within):
        start = len(result)
        order = sorted(range(len(row)), key=lambda i: (abs(row[i]), numbers[start + i], i))
        dropped = set(order[: round(drop_rate * len(row))])
        result += [0.0 if i in dropped else value for i, value in enumerate(row)]
    return result


def slow_probabilities(tensor: torch.Tensor, drop_rate: float, window: float, within: str) -> list[Fraction]:
    """p + window · (1/2 - (r - 1)/(n - 1)) with the mean rank of equal magnitudes, by counting; p in a row of one."""
    p, width, found = Fraction(drop_rate), Fraction(window if 0 < drop_rate < 1 else 0), []
    for row in in_rows(tensor, within):
        sizes = [abs(value) for value in row]
        for a in sizes:
            rank = sum(b < a for b in sizes) + Fraction(sum(b == a for b in sizes) + 1, 2)
            found.append(p + width * (Fraction(1, 2) - (rank - 1) / (len(row) - 1)) if len(row) > 1 else p)
    return found


def slow_kept(count: int, probabilities: float | list[Fraction], *, name: str, seed: int) -> list[bool]:
    """An entry stays when its number is not below round(p · 2³²)."""
    every = probabilities if isinstance(probabilities, list) else [Fraction(probabilities)] * count
    numbers = random_bits(count, name=name, seed=seed).tolist()
    return [u >= round(p * 2**32) for u, p in zip(numbers, every, strict=True)]
