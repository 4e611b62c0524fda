"""The operators on a CUDA device, beside a copy there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.ours import OPERATORS, YARDSTICKS, Work, make_tensor
from benchmarks.timing import Setting, medians, warm_up


def device_times(setting: Setting, device: str, budget: float) -> dict[str, float]:
    """Nanoseconds an entry of a copy and of each operator."""
    works = {**YARDSTICKS, **OPERATORS}
    warm_up(works, setting.dtype, device)
    tensor = make_tensor(setting.shape, setting.dtype).to(device)
    times = medians({name: _finished(work, tensor) for name, work in works.items()}, budget)
    return {name: taken / setting.numel * 1e9 for name, taken in times.items()}


def _finished(work: Work, tensor: torch.Tensor) -> Callable[[], object]:
    """The work, and the wait until the device has done it."""
    if tensor.device.type != "cuda":
        return partial(work, tensor)

    def call() -> None:
        work(tensor)
        torch.cuda.synchronize()

    return call
