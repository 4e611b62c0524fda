"""Memory for new tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch


def uninitialised(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """A new tensor whose entries may be anything.

    Examples
    --------
    >>> uninitialised((2, 3), torch.bfloat16).shape
    torch.Size([2, 3])
    """
    numel = math.prod(shape)
    if torch.device(device).type != "cpu" or not numel:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    # numpy asks for huge pages, so that a large tensor costs few page faults.
    return torch.from_numpy(np.empty(numel * dtype.itemsize, dtype=np.uint8)).view(dtype).view(tuple(shape))


def to_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32: itself if it is that, else a new one.

    Examples
    --------
    >>> to_float32(torch.ones(2, dtype=torch.bfloat16))
    tensor([1., 1.])
    """
    if tensor.dtype == torch.float32:
        return tensor
    return uninitialised(tensor.shape, torch.float32, tensor.device).copy_(tensor)
