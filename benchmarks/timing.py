"""Timing that treats all contestants alike: they take turns, so that the machine's noise hits all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from benchmarks.ours import OPERATORS, READY_COPY, STATISTICS, YARDSTICKS, Work, make_tensor

Name = TypeVar("Name")
THREADS = 2
"""Of every table but the one that shows what a single one does."""
MOST_SAMPLES = 25
SHORTEST_SAMPLE = 0.002
"""Seconds; a contestant that takes less is called several times for one sample."""
WARM_UP = (1024, 2048)
"""Large enough that every compiled loop is reached, the one for long rows included."""


@dataclass(frozen=True)
class Setting:
    """What all contestants of one race are given."""

    shape: tuple[int, int]
    dtype: torch.dtype
    threads: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def warm_up(works: Mapping[str, Work], dtype: torch.dtype) -> None:
    """Compile, or load, all that a call needs."""
    tensor = make_tensor(WARM_UP, dtype)
    for work in works.values():
        work(tensor)


def race(setting: Setting, peers: Mapping[str, Work], budget: float) -> dict[str, float]:
    """Nanoseconds an entry of the yardsticks, the package and its peers."""
    torch.set_num_threads(setting.threads)
    tensor = make_tensor(setting.shape, setting.dtype)
    works: dict[str, Callable[[], object]] = {
        name: partial(work, tensor) for name, work in {**YARDSTICKS, **OPERATORS, **STATISTICS, **peers}.items()
    }
    works[READY_COPY] = partial(torch.empty_like(tensor).copy_, tensor)
    return {name: taken / setting.numel * 1e9 for name, taken in medians(works, budget).items()}


def medians(works: Mapping[Name, Callable[[], object]], budget: float) -> dict[Name, float]:
    """Median seconds of a call of each, in rounds over all that have not used up `budget` seconds yet.

    The first sample warms up and is left out, except for works so slow that it is the only one.
    """
    samples: dict[Name, list[float]] = {name: [] for name in works}
    calls, spent = dict.fromkeys(works, 1), dict.fromkeys(works, 0.0)
    while left := [name for name in works if spent[name] < budget and len(samples[name]) < MOST_SAMPLES]:
        for name in left:
            taken = seconds(works[name], calls[name])
            samples[name].append(taken / calls[name])
            spent[name] += taken
            calls[name] = math.ceil(SHORTEST_SAMPLE / min(samples[name]))
    return {name: statistics.median(taken[1:] or taken) for name, taken in samples.items()}


def seconds(work: Callable[[], object], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        work()
    return time.perf_counter() - started
