"""Memory for new tensors, of all shapes and dtypes."""

from __future__ import annotations

import pytest
import torch

from delta_analysis._kernels.memory import to_float32, uninitialised
from delta_analysis.checkpoints.checkpoint import FLOAT_DTYPES


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4), (2**21,)])
def test_it_is_a_plain_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = uninitialised(shape, dtype)
    assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % dtype.itemsize == 0
    tensor.view(-1).view(torch.uint8).fill_(0)
    assert not tensor.any()
    assert uninitialised(shape, dtype, "meta").shape == tensor.shape


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_float32_has_the_values_of_a_cast(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0.1, -0.0, 1e38], [float("nan"), float("inf"), 3e-5]], dtype=torch.float64).to(dtype)
    found = to_float32(tensor)
    torch.testing.assert_close(found, tensor.to(torch.float32), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(found), torch.signbit(tensor.to(torch.float32)))
    assert (found is tensor) is (dtype == torch.float32)
