"""Entries as compiled loops see them, against torch's own conversions."""

from __future__ import annotations

import numba
import numpy as np
import pytest
import torch

from delta_analysis._kernels.floats import NATIVE, READABLE, entries, magnitude, narrow, widen

PATTERNS = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
"""Every bfloat16 there is, as the bits of a 16-bit word."""
LOWER_HALVES = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
"""What follows the bits of a bfloat16 in a float32: nothing, just below the middle, the middle, just above."""


@numba.njit
def widen_all(stored, out):  # type: ignore[no-untyped-def]
    for i in range(stored.size):
        out[i] = widen(stored[i])


@numba.njit
def narrow_all(values, out):  # type: ignore[no-untyped-def]
    for i in range(values.size):
        out[i] = narrow(values[i], out[i])


@numba.njit
def magnitude_all(stored, out):  # type: ignore[no-untyped-def]
    for i in range(stored.size):
        out[i] = magnitude(stored[i])


def all_bfloat16() -> torch.Tensor:
    return PATTERNS.clone().view(torch.bfloat16)


def between_bfloat16(lower: int) -> torch.Tensor:
    """Float32 values whose upper halves are all patterns and whose lower half is this."""
    words = (torch.arange(2**16, dtype=torch.int64) << 16) | lower
    return words.to(torch.int32).view(torch.float32)


def test_widening_is_torchs_conversion_for_every_bfloat16() -> None:
    stored = all_bfloat16()
    out = np.empty(2**16, dtype=np.float32)
    widen_all(entries(stored), out)
    assert np.array_equal(out.view(np.int32), stored.to(torch.float32).view(torch.int32).numpy())


def test_widening_is_torchs_conversion_for_every_float16() -> None:
    stored = PATTERNS.clone().view(torch.float16)
    out = np.empty(2**16, dtype=np.float32)
    widen_all(entries(stored), out)
    expected, nan = stored.to(torch.float32), stored.isnan().numpy()
    # Subnormal numbers and both zeros among them; of a NaN only the place is compared.
    assert np.array_equal(out.view(np.int32)[~nan], expected.view(torch.int32).numpy()[~nan])
    assert np.array_equal(np.isnan(out), nan)


@pytest.mark.parametrize("lower", LOWER_HALVES, ids=hex)
def test_narrowing_is_torchs_conversion_around_every_bfloat16(lower: int) -> None:
    values = between_bfloat16(lower)
    out = torch.empty(2**16, dtype=torch.bfloat16)
    narrow_all(values.numpy(), entries(out))
    expected, nan = values.to(torch.bfloat16), values.isnan()
    # Devices differ in the bits of a NaN, so that only its place is compared.
    assert torch.equal(out.isnan(), nan)
    assert torch.equal(out.view(torch.int16)[~nan], expected.view(torch.int16)[~nan])


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (1 + 2**-8, 1.0),  # the middle between 1 and 1 + 2⁻⁷: to even, downwards
        (1 + 3 * 2**-8, 1 + 2**-6),  # to even, upwards
        (1 + 2**-8 + 2**-23, 1 + 2**-7),
        (3.3961775e38, float("inf")),  # beyond the largest bfloat16 by half a step
        (2.0**-133, 2.0**-133),
        (2.0**-134, 0.0),
        (-(2.0**-134), -0.0),
    ],
)
def test_narrowing_by_hand(value: float, rounded: float) -> None:
    out = torch.empty(1, dtype=torch.bfloat16)
    narrow_all(np.array([value], dtype=np.float32), entries(out))
    assert out.item() == rounded
    assert bool(out.signbit()) == (np.signbit(rounded))


def test_a_nan_stays_one_whatever_its_bits() -> None:
    words = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, 0x7F80FFFF, -0x7FFFFF, -1], dtype=torch.int32)
    out = torch.empty(len(words), dtype=torch.bfloat16)
    narrow_all(words.view(torch.float32).numpy(), entries(out))
    assert out.isnan().all()


@pytest.mark.parametrize("dtype", NATIVE, ids=str)
def test_magnitude_is_the_float32_bits_without_the_sign(dtype: torch.dtype) -> None:
    stored = torch.cat([between_bfloat16(lower) for lower in LOWER_HALVES])
    stored = stored if dtype == torch.float32 else all_bfloat16()
    out = np.empty(stored.numel(), dtype=np.int64)
    magnitude_all(entries(stored), out)
    assert np.array_equal(out, stored.float().view(torch.int32).numpy() & 0x7FFFFFFF)
    finite = stored.isfinite().numpy()
    order = np.argsort(out[finite], kind="stable")
    assert (np.diff(stored.float().abs().numpy()[finite][order]) >= 0).all()


@pytest.mark.parametrize("dtype", READABLE, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)], ids=str)
def test_entries_share_the_tensors_memory(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape, dtype=dtype)
    flat = entries(tensor)
    assert flat.shape == (tensor.numel(),)
    # The compiled loops know a dtype by the type of its words.
    assert flat.dtype == {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.int16}[dtype]
    flat[:] = 1
    assert torch.count_nonzero(tensor) == tensor.numel()
