"""What every pruner and every transform promises, whatever it does with the entries."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from delta_analysis.pruning import Dare, Lawful, Magnitude, MagPrune, Proportional, Pruner
from delta_analysis.pruning.transforms import Change, Clipped, Permuted, Scaled, SignsRedrawn, Topless
from tests.pruning.reference import RATE, RESCALES, normal, tensors, words

Make = Callable[[float], Pruner]


def half_window(p: float) -> MagPrune:
    return MagPrune(p, window=min(p, 1 - p))


MAKERS: dict[str, Make] = {
    **{f"Dare {rescale}": lambda p, rescale=rescale: Dare(p, rescale) for rescale in RESCALES},  # type: ignore[misc]
    "Magnitude": Magnitude,
    "Magnitude l2": lambda p: Magnitude(p, rescale="l2"),
    "Magnitude row": lambda p: Magnitude(p, "row"),
    "Magnitude row inverse_keep": lambda p: Magnitude(p, "row", "inverse_keep"),
    "MagPrune": MagPrune,
    "MagPrune half window": half_window,
    "MagPrune tensor": lambda p: MagPrune(p, within="tensor"),
    "MagPrune l1": lambda p: MagPrune(p, rescale="l1"),
    "MagPrune tensor 2.5": lambda p: MagPrune(p, within="tensor", rescale=2.5),
    "Proportional": Proportional,
}
TRANSFORMS: dict[str, Change] = {
    "Scaled": Scaled(2.0),
    "Clipped": Clipped(0.2),
    "Topless": Topless(0.2),
    "Permuted": Permuted(),
    "SignsRedrawn": SignsRedrawn(),
}
OPERATORS: dict[str, Pruner | Change] = {**{name: make(0.7) for name, make in MAKERS.items()}, **TRANSFORMS}
DEVICES = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
CASES = [
    ((), torch.float32),
    ((1,), torch.bfloat16),
    ((7,), torch.float16),
    ((3, 5), torch.float64),
    ((4, 3, 5), torch.bfloat16),
    ((2, 3, 2, 4), torch.float32),
    ((0,), torch.float64),
    ((3, 0), torch.float16),
    ((0, 4), torch.float32),
    ((9, 1), torch.float16),
    ((60, 50), torch.bfloat16),
    ((40, 30), torch.float64),
]
by_name = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
@by_name
def test_shape_and_dtype_stay_and_the_input_is_left_alone(
    operator: Pruner | Change, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """The result is that of the float32 copy, rounded once."""
    tensor = (2 * normal(*shape)).to(dtype)
    before = words(tensor.clone())
    found = operator(tensor, name="w", seed=1)
    assert (found.shape, found.dtype, found.device) == (tensor.shape, dtype, tensor.device)
    assert torch.equal(words(found), words(operator(tensor.float(), name="w", seed=1).to(dtype)))
    found.fill_(7)
    assert torch.equal(words(tensor), before)


@pytest.mark.parametrize(("shape", "dtype"), CASES[:6] + CASES[-2:], ids=str)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_nothing_falls_at_0_and_all_at_1(make: Make, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = normal(*shape).to(dtype)
    assert not make(1)(tensor, name="w", seed=0).any()
    untouched = make(0)
    kept = untouched(tensor, name="w", seed=0)
    expected = (2.5 * tensor.float()).to(dtype) if untouched.rescale == 2.5 else tensor
    assert torch.equal(words(kept), words(expected))
    assert [make(p).random for p in (0, 1)] == [False, False]


@by_name
def test_seed_and_name_alone_decide_what_is_drawn(operator: Pruner | Change) -> None:
    tensor = normal(20, 30)
    keys = [(name, seed) for name in ("v", "w") for seed in (0, 1)]
    found = {key: operator(tensor, name=key[0], seed=key[1]) for key in keys}
    for name, seed in reversed(keys):
        assert torch.equal(operator(tensor, name=name, seed=seed), found[name, seed])
    drawn = isinstance(operator, Permuted | SignsRedrawn) or getattr(operator, "random", False)
    assert len({tuple(each.flatten().tolist()) for each in found.values()}) == (4 if drawn else 1)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("kind", ["plain", "ties", "half"])
@by_name
def test_neither_threads_nor_blocks_nor_strides_change_a_bit(operator: Pruner | Change, kind: str) -> None:
    plain = normal(300, 2000)
    tensor = {"plain": plain, "ties": (plain * 4).round(), "half": plain.bfloat16()}[kind]
    strided = tensor.T.contiguous().T
    assert not strided.is_contiguous()
    torch.set_num_threads(1)
    expected = words(operator(tensor, name="w", seed=0))
    for count, same in ((2, tensor), (3, tensor), (2, strided)):
        torch.set_num_threads(count)
        assert torch.equal(words(operator(same, name="w", seed=0)), expected)


@by_name
def test_every_device_gives_the_bits_of_the_cpu(operator: Pruner | Change) -> None:
    tensor = normal(100, 2000)
    for device in DEVICES:
        found = operator(tensor.to(device), name="w", seed=0)
        assert found.device == torch.device(device)
        assert torch.equal(words(found.cpu()), words(operator(tensor, name="w", seed=0)))
        if isinstance(operator, Lawful):
            laws = [operator.law(each, name="w") for each in (tensor, tensor.to(device))]
            assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*laws, strict=True))


@given(
    make=st.sampled_from(
        [MAKERS[name] for name in ("Dare 2.5", "Magnitude", "Magnitude row", "MagPrune", "Proportional")]
    ),
    rates=st.lists(RATE, min_size=2, max_size=5),
    tensor=tensors(),
    seed=st.integers(0, 99),
)
def test_masks_are_nested_over_drop_rates(make: Make, rates: list[float], tensor: torch.Tensor, seed: int) -> None:
    marked = torch.where(tensor == 0, 1.0, tensor)
    kept = [make(rate)(marked, name="w", seed=seed) != 0 for rate in sorted(rates)]
    for gentle, harsh in itertools.pairwise(kept):
        assert not (harsh & ~gentle).any()


@pytest.mark.parametrize("make", [Dare, Magnitude, MagPrune, Proportional])
def test_a_pruner_is_a_frozen_value_of_a_checked_drop_rate(make: Make) -> None:
    for bad in (-0.1, -1e-12, 1.0000001, 90, math.nan, math.inf, "0.5", None, [0.5], True):
        with pytest.raises(ValueError, match=r"drop_rate must be a number in \[0, 1\]") as raised:
            make(bad)  # type: ignore[arg-type]
        assert repr(bad) in str(raised.value)
    given = make(np.float32(0.3))
    assert type(given.drop_rate) is float
    assert given == make(float(np.float32(0.3)))
    assert len({make(0.5), make(0.5), make(1)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        given.drop_rate = 0.6  # type: ignore[misc]


@pytest.mark.parametrize("make", [Dare, Magnitude, MagPrune])
def test_an_unknown_rescale_lists_the_known_ones(make: Callable[..., Pruner]) -> None:
    for bad in ("inverse", "l3", "", "2.0", "None", None, [2.0], {}, True):
        with pytest.raises(ValueError, match="'inverse_keep', 'none', 'l1', 'l2'") as raised:
            make(0.5, rescale=bad)
        assert repr(bad) in str(raised.value)
    for factor, inverse in ((0.5, "2"), (0.1, "10"), (0.999, "1.001")):
        with pytest.raises(ValueError, match=rf"must be at least 1; not {factor}.*1/q = {inverse}(\D|$)"):
            make(0.5, rescale=factor)
    for factor in (0, 0.0, -1, -0.5, math.nan, math.inf, -math.inf, 1e39):
        with pytest.raises(ValueError, match="must be at least 1") as raised:
            make(0.5, rescale=factor)
        assert "1/q" not in str(raised.value)


@pytest.mark.parametrize(
    ("make", "known"),
    [(Magnitude, "'tensor', 'row', 'model'"), (MagPrune, "'row', 'tensor'"), (Proportional, "'tensor', 'model'")],
)
def test_an_unknown_within_lists_the_known_ones(make: Callable[..., Pruner], known: str) -> None:
    for bad in ("global", "", None, 1, "Row", "value"):
        with pytest.raises(ValueError, match=rf"^within must be one of {known}; not {bad!r}$"):
            make(0.5, within=bad)


@pytest.mark.parametrize("pruner", [Magnitude(0.5, "model"), Proportional(0.5, "model")], ids=repr)
def test_one_tensor_is_no_model(pruner: Pruner) -> None:
    with pytest.raises(ValueError, match=r"'x\.w' is one; use delta\.pruned\(pruner, seed=…\)"):
        pruner(torch.ones(3), name="x.w", seed=0)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_whole_numbers_are_no_deltas_and_a_seed_is_one(make: Make) -> None:
    with pytest.raises(ValueError, match="floating dtype"):
        make(0.5)(torch.arange(8).view(2, 4), name="w", seed=0)
    assert torch.equal(
        make(0.5)(torch.ones(99), name="w", seed=np.int64(3)), make(0.5)(torch.ones(99), name="w", seed=3)
    )
    with pytest.raises(TypeError):
        make(0.5)(torch.ones(99), name="w", seed=3.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pruner", "method"),
    [
        (Dare(0.5), "DARE"),
        (Dare(0.5, "none"), "drop only"),
        (Dare(0.5, "l1"), "drop + L1"),
        (Dare(0.5, "l2"), "drop + L2"),
        (Dare(0.5, 2.0), "drop × 2.0"),
        (Magnitude(0.5), "MP"),
        (Magnitude(0.5, "row"), "MP by row"),
        (Magnitude(0.5, "model"), "MP by model"),
        (Magnitude(0.5, rescale="inverse_keep"), "MP + rescale"),
        (Magnitude(0.5, "row", "l1"), "MP by row + L1"),
        (Magnitude(0.5, rescale=2.5), "MP × 2.5"),
        (MagPrune(0.5), "MAGPRUNE"),
        (MagPrune(0.5, 0.2), "MAGPRUNE, window 0.2"),
        (MagPrune(0.5, within="tensor", rescale="none"), "MAGPRUNE by tensor drop only"),
        (MagPrune(0.5, rescale="l2"), "MAGPRUNE + L2"),
        (Proportional(0.5), "proportional"),
        (Proportional(0.5, "model"), "proportional by model"),
    ],
)
def test_method_name(pruner: Pruner, method: str) -> None:
    assert pruner.method == method
    assert dataclasses.replace(pruner, drop_rate=0.4).method == method  # type: ignore[type-var]
