"""What all merge methods keep to: shapes, dtypes, scaling, what they leave alone, and what they refuse."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from delta_analysis._kernels.blocks import single_threaded_pool
from delta_analysis.merging.average import Average
from delta_analysis.merging.della import Della
from delta_analysis.merging.election import Slack
from delta_analysis.merging.fisher import Fisher
from delta_analysis.merging.methods import MergeMethod, Parts
from delta_analysis.merging.regmean import RegMean
from delta_analysis.merging.task_arithmetic import TaskArithmetic
from delta_analysis.merging.ties import Ties
from delta_analysis.merging.widen import Widen

METHODS: tuple[MergeMethod, ...] = (
    Average(),
    TaskArithmetic(),
    Ties(0.0),
    Ties(0.0, fuse="sum", slack=Slack(1, 1.0)),
    Della(0.0),
    Della(0.0, elect=False),
    Widen(),
    Fisher(),
    RegMean(),
)
# The last has several blocks.
SHAPES = [(), (5,), (0, 3), (2, 3, 4), (520, 513)]
WEIGHTS = (1.0, 0.25, 2.0)
CASES = [
    *((method, (12, 7)) for method in METHODS),
    *((method, SHAPES[(i + shift) % len(SHAPES)]) for i, method in enumerate(METHODS) for shift in (0, 2)),
]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parts(method: MergeMethod, shape: tuple[int, ...]) -> Parts:
    deltas = tuple(normal(*shape, seed=seed) for seed in (1, 2, 3))
    statistics = None
    if method.statistic == "fisher":
        statistics = tuple(delta.square() for delta in deltas)
    elif method.statistic == "moments" and len(shape) == 2 and min(shape):
        statistics = tuple((delta.T @ delta).double()[None] for delta in deltas)
    return Parts("w", deltas, WEIGHTS, normal(*shape, seed=9), statistics)


def turned(some: Parts) -> Parts:
    """The same, that lies in memory the other way round."""
    base = some.base
    assert base is not None
    return some._replace(deltas=tuple(each.T.contiguous().T for each in some.deltas), base=base.T.contiguous().T)


@pytest.mark.parametrize(("method", "shape"), CASES, ids=lambda each: each.label if hasattr(each, "label") else each)
def test_what_every_method_keeps_to(method: MergeMethod, shape: tuple[int, ...]) -> None:
    some, before = parts(method, shape), parts(method, shape)
    method.check(WEIGHTS)
    merged = method(some)
    assert (merged.shape, merged.dtype) == (shape, torch.float32)
    for scaling in (2, -0.5, 0.0):
        scaled = dataclasses.replace(method, scaling=scaling)  # type: ignore[type-var]
        assert isinstance(scaled.scaling, float)
        torch.testing.assert_close(scaled(some), scaling * merged)
    if len(shape) == 2:
        torch.testing.assert_close(method(turned(some)), merged, rtol=1e-5, atol=1e-6)
    with single_threaded_pool(2) as pool:
        assert all(torch.equal(each, merged) for each in pool.map(method, [some] * 2))
    # Neither is anything written into, nor is what comes out a part of it.
    merged.zero_()
    for one, other in zip((*some.deltas, some.base), (*before.deltas, before.base), strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def test_methods_are_values_with_labels_and_needs_of_their_own() -> None:
    for method in METHODS:
        assert hash(method) == hash(dataclasses.replace(method))  # type: ignore[type-var]
        assert method.trim is None
    needs = {method.label: (method.statistic, method.reads_base) for method in METHODS}
    assert needs == {label: ("", False) for label in needs} | {
        "WIDEN": ("", True),
        "Fisher": ("fisher", False),
        "RegMean": ("moments", False),
    }
    assert len(needs) == len(METHODS)


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        *((type(each), {"scaling": math.nan}, "scaling must be a finite number; not nan") for each in METHODS[::2]),
        (Average, {"scaling": True}, "scaling must be a finite number; not True"),
        (TaskArithmetic, {"scaling": "1"}, "scaling must be a finite number; not '1'"),
        (Ties, {"scaling": math.inf}, "scaling must be a finite number; not inf"),
        (Ties, {"drop_rate": 1.5}, r"drop_rate must be a number in \[0, 1\]"),
        (Ties, {"within": "layer"}, "within must be one of 'tensor', 'row', 'model'; not 'layer'"),
        (Ties, {"fuse": "max"}, "fuse must be one of 'mean', 'sum'; not 'max'"),
        (Della, {"drop_rate": -0.1}, "drop_rate must be"),
        (Della, {"window": 1.9}, "window"),
        (Della, {"within": "column"}, "within must be one of"),
        (Della, {"elect": 1}, "elect must be True or False; not 1"),
        (Fisher, {"floor": 0}, "floor must be a finite number above 0"),
        (RegMean, {"shrink": 1.1}, r"shrink must be a number in \[0, 1\]"),
        (RegMean, {"ridge": -1e-9}, "ridge must be a finite number of at least 0"),
        (Widen, {"threshold": -0.1}, "threshold must be a number of at least 0"),
        (Widen, {"calibration": math.inf}, "calibration must be a finite number"),
    ],
)
def test_parameters_out_of_range_are_refused(method: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**wrong)
