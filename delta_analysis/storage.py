"""Float32 and bfloat16 entries inside compiled loops, where bfloat16 comes as 16-bit words."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import overload

NATIVE = (torch.float32, torch.bfloat16)
"""The dtypes that compiled loops read and write as they are stored."""

HIGH, LOW = 2**15, 2**16
"""A magnitude's 31 bits in two digits: how many values the upper and the lower one have."""
compiled = numba.njit(cache=True, nogil=True, error_model="numpy")


def entries(tensor: torch.Tensor) -> np.ndarray:
    """A CPU tensor of a native dtype as the flat array that compiled loops take: float32, or 16-bit words."""
    flat = tensor.view(-1)
    return flat.numpy() if flat.dtype == torch.float32 else flat.view(torch.uint16).numpy()


def widen(entry: Any) -> Any:
    """The float32 value of an entry; for compiled loops only."""
    raise NotImplementedError


def narrow(value: Any, entry: Any) -> Any:
    """A float32 value rounded to the nearest of the dtype of `entry`, to even in the middle; likewise."""
    raise NotImplementedError


def magnitude(entry: Any) -> Any:
    """The float32 bits of |entry| as an integer, which grows with it; likewise."""
    raise NotImplementedError


@overload(widen)
def _widen(entry):  # type: ignore[no-untyped-def]
    if entry == types.uint16:
        return lambda entry: np.uint32(np.uint32(entry) << np.uint32(16)).view(np.float32)
    return lambda entry: entry


@overload(narrow)
def _narrow(value, entry):  # type: ignore[no-untyped-def]
    return _to_bfloat16 if entry == types.uint16 else lambda value, entry: value


def _to_bfloat16(value, entry):  # type: ignore[no-untyped-def]
    bits = np.float32(value).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    finite = (bits & np.uint32(0x7FFFFFFF)) <= np.uint32(0x7F800000)
    return np.uint16(rounded) if finite else np.uint16(0x7FC0)


@overload(magnitude)
def _magnitude(entry):  # type: ignore[no-untyped-def]
    if entry == types.uint16:
        return lambda entry: np.uint32(entry & np.uint16(0x7FFF)) << np.uint32(16)
    return lambda entry: np.float32(entry).view(np.uint32) & np.uint32(0x7FFFFFFF)
