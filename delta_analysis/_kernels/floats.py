"""Float32, bfloat16 and float16 entries inside compiled loops; of 16-bit floats the loops get the words.

A bfloat16 is an unsigned word and a float16 a signed one, so that their types tell them apart.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import overload

NATIVE = (torch.float32, torch.bfloat16)
"""The dtypes that compiled loops read and write as they are stored."""
READABLE = (*NATIVE, torch.float16)
"""Those that they read as they are stored."""
WORDS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}

HIGH, LOW = 2**15, 2**16
"""A magnitude's 31 bits in two digits: how many values the upper and the lower one have."""
compiled = numba.njit(cache=True, nogil=True, error_model="numpy")


def entries(tensor: torch.Tensor) -> np.ndarray:
    """A CPU tensor of a readable dtype as the flat array that compiled loops take: float32, or 16-bit words."""
    flat = tensor.view(-1)
    return flat.view(WORDS.get(flat.dtype, flat.dtype)).numpy()


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
    if entry == types.int16:
        return _from_float16
    return lambda entry: entry


def _from_float16(entry):  # type: ignore[no-untyped-def]
    word = np.uint32(np.uint16(entry))
    # Exponent and mantissa in their places of a float32, which makes a value 2^112 times too small.
    small = np.uint32((word & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32) * np.float32(2.0**112)
    top = np.uint32(0x7F800000) if (word & np.uint32(0x7C00)) == np.uint32(0x7C00) else np.uint32(0)
    sign = np.uint32((word & np.uint32(0x8000)) << np.uint32(16))
    return np.uint32(np.float32(small).view(np.uint32) | top | sign).view(np.float32)


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
