"""Magnitude and MagPrune: against slow references in exact arithmetic, closed forms, and other packages."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.merge_utils import magnitude_based_pruning, prune
from scipy.stats import binom, norm

from delta_analysis._kernels import rank_sums
from delta_analysis._kernels.philox import random_bits
from delta_analysis.pruning import Dare, Magnitude, MagPrune, Pruner
from delta_analysis.pruning.magprune import WIDEST, checked_window

DEVICES = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(), (1,), (7,), (40,), (3, 5), (1, 9), (9, 1), (4, 3, 5), (2, 3, 2, 4), (0,), (3, 0), (0, 4)]
RESCALES = ["inverse_keep", "none", "l1", "l2", 2.5]
NEAR = [0.0, 1e-300, 1e-12, 2.0**-33, 1e-6, 0.1, 0.5, 0.9, 1 - 1e-6, 1 - 2.0**-33, 1 - 2.0**-53, 1.0]
SIGMAS = 6
"""Width of the statistical bounds: a right operator fails one with probability 2e-9."""
FALSE_ALARM = 1e-6

SHAPE = st.lists(st.integers(0, 5), max_size=4).filter(lambda shape: math.prod(shape) <= 100).map(tuple)
RATE = st.one_of(st.sampled_from(NEAR), st.floats(0, 1))
DTYPE = st.sampled_from(DTYPES)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Of any shape and dtype, with many ties or none."""
    shape, dtype, seed = draw(SHAPE), draw(DTYPE), draw(st.integers(0, 1000))
    tensor = normal(*shape, seed=seed)
    coarse = draw(st.sampled_from([None, 1.0, 3.0, 0.0]))
    return (tensor if coarse is None else (tensor * coarse).round()).to(dtype)


def every_pruner(drop_rate: float) -> list[Pruner]:
    return [
        *(Dare(drop_rate, rescale) for rescale in RESCALES),
        *(Magnitude(drop_rate, scope, rescale) for scope in ("tensor", "row") for rescale in RESCALES),
        *(MagPrune(drop_rate, "widest", rank, rescale) for rank in ("row", "tensor") for rescale in RESCALES),
        MagPrune(drop_rate, window=0.6 * min(drop_rate, 1 - drop_rate)),
    ]


PRUNERS = every_pruner(0.7)


def in_rows(tensor: torch.Tensor, scope: str) -> list[list[float]]:
    """The entries as float32 numbers, in lists that are compared with each other."""
    flat = tensor.float()
    whole = scope == "tensor" or tensor.dim() < 2
    return flat.reshape(1, -1).tolist() if whole else [row.reshape(-1).tolist() for row in flat]


def slow_magnitude(tensor: torch.Tensor, drop_rate: float, scope: str, *, name: str, seed: int) -> list[float]:
    """The least round(p · n) of each list become zero, in the order of (|δ|, number, position)."""
    numbers, result = random_bits(tensor.numel(), name=name, seed=seed).tolist(), []
    for row in in_rows(tensor, scope):
        start = len(result)
        order = sorted(range(len(row)), key=lambda i: (abs(row[i]), numbers[start + i], i))
        dropped = set(order[: round(drop_rate * len(row))])
        result += [0.0 if i in dropped else value for i, value in enumerate(row)]
    return result


def rank_shares(row: list[float]) -> list[Fraction]:
    """(r - 1)/(n - 1) with the mean rank of equal magnitudes, by counting; 1/2 in a row of one."""
    sizes = [abs(value) for value in row]
    ranks = [sum(b < a for b in sizes) + Fraction(sum(b == a for b in sizes) + 1, 2) for a in sizes]
    return [(rank - 1) / (len(row) - 1) if len(row) > 1 else Fraction(1, 2) for rank in ranks]


def slow_probabilities(tensor: torch.Tensor, drop_rate: float, window: float, rank: str) -> list[Fraction]:
    p, width = Fraction(drop_rate), Fraction(window if 0 < drop_rate < 1 else 0)
    found = [share for row in in_rows(tensor, rank) for share in rank_shares(row)]
    return [p + width * (Fraction(1, 2) - share) for share in found]


def slow_kept(tensor: torch.Tensor, probabilities: list[Fraction], *, name: str, seed: int) -> list[bool]:
    numbers = random_bits(tensor.numel(), name=name, seed=seed).tolist()
    return [u >= round(p * 2**32) for u, p in zip(numbers, probabilities, strict=True)]


@given(tensor=tensors(), drop_rate=RATE, scope=st.sampled_from(["tensor", "row"]), seed=st.integers(0, 99))
def test_magnitude_against_sorting(tensor: torch.Tensor, drop_rate: float, scope: str, seed: int) -> None:
    pruned = Magnitude(drop_rate, scope)(tensor, name="w", seed=seed)
    assert (pruned.dtype, pruned.shape) == (tensor.dtype, tensor.shape)
    assert pruned.reshape(-1).tolist() == slow_magnitude(tensor, drop_rate, scope, name="w", seed=seed)


@given(
    tensor=tensors(),
    drop_rate=RATE,
    share=st.one_of(st.sampled_from([None, 0.0, 1.0]), st.floats(0, 1)),
    rank=st.sampled_from(["row", "tensor"]),
    seed=st.integers(0, 99),
)
def test_magprune_against_the_formula(
    tensor: torch.Tensor, drop_rate: float, share: float | None, rank: str, seed: int
) -> None:
    room = 2 * min(drop_rate, 1 - drop_rate)
    width = (WIDEST if share is None else share) * room
    if drop_rate + width / 2 >= 1:
        share, width = 0.0, 0.0
    pruned = MagPrune(drop_rate, "widest" if share is None else width, rank)(tensor, name="w", seed=seed)
    assert (pruned.dtype, pruned.shape) == (tensor.dtype, tensor.shape)
    probabilities = slow_probabilities(tensor, drop_rate, width, rank)
    kept = slow_kept(tensor, probabilities, name="w", seed=seed)
    factors = [float(1 / (1 - p)) if keep else 0.0 for p, keep in zip(probabilities, kept, strict=True)]
    expected = (tensor.float() * torch.tensor(factors).view(tensor.shape)).to(tensor.dtype)
    assert torch.equal(pruned != 0, expected != 0)
    torch.testing.assert_close(pruned, expected, rtol=max(1e-6, torch.finfo(tensor.dtype).eps), atol=1e-7)


@pytest.mark.parametrize("drop_rate", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pruner_takes_every_shape_and_dtype(dtype: torch.dtype, shape: tuple[int, ...], drop_rate: float) -> None:
    """The result is that of the float32 copy, rounded once; the input is left alone."""
    tensor = (2 * normal(*shape)).to(dtype)
    before = words(tensor.clone())
    for pruner in every_pruner(drop_rate):
        pruned = pruner(tensor, name="w", seed=1)
        assert (pruned.shape, pruned.dtype) == (tensor.shape, dtype)
        assert torch.equal(words(pruned), words(pruner(tensor.float(), name="w", seed=1).to(dtype)))
        if drop_rate == 1:
            assert not pruned.any()
        if drop_rate == 0 and pruner.rescale != 2.5:
            assert torch.equal(words(pruned), before)
        pruned.fill_(7)
    assert torch.equal(words(tensor), before)


@pytest.fixture(scope="module")
def large() -> dict[str, torch.Tensor]:
    """Of several blocks: without ties, with many, and of half width."""
    plain = normal(300, 2000)
    return {"plain": plain, "ties": (plain * 4).round(), "half": plain.bfloat16()}


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda pruner: pruner.method)
def test_threads_change_no_bit(large: dict[str, torch.Tensor], pruner: Pruner) -> None:
    for tensor in large.values():
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(words(pruner(tensor, name="w", seed=0)))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda pruner: pruner.method)
def test_every_device_gives_the_bits_of_the_cpu(large: dict[str, torch.Tensor], pruner: Pruner, device: str) -> None:
    for tensor in large.values():
        pruned = pruner(tensor[:100].to(device), name="w", seed=0)
        assert pruned.device == torch.device(device)
        assert torch.equal(words(pruned.cpu()), words(pruner(tensor[:100], name="w", seed=0)))


@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda pruner: pruner.method)
def test_strides_do_not_matter(pruner: Pruner) -> None:
    tensor = normal(40, 30)
    expected = pruner(tensor, name="w", seed=1)
    assert torch.equal(pruner(tensor.T.contiguous().T, name="w", seed=1), expected)


@pytest.mark.parametrize("drop_rate", [0.3, 0.5, 0.7, 0.9])
def test_ties_of_half_width_weights_inflate_no_drop_rate(drop_rate: float) -> None:
    """A pair of bfloat16 checkpoints whose delta has few values: the formula of others drops .845 at .7."""
    n = 200_000
    base = (0.02 * normal(n)).bfloat16()
    tuned = (base.float() + 2e-4 * normal(n, seed=1)).bfloat16()
    delta = tuned.float() - base.float()
    assert (delta == 0).float().mean() == pytest.approx(0.175, abs=0.01)
    size = delta.abs()
    theirs = int((size <= size.kthvalue(int(n * drop_rate)).values).sum()) / n
    assert theirs == pytest.approx({0.3: 0.307, 0.5: 0.552, 0.7: 0.845, 0.9: 0.902}[drop_rate], abs=0.01)
    pruned = Magnitude(drop_rate)(delta + 0.0, name="w", seed=0)
    # Entries that were zero are dropped first, so that they count.
    assert int((pruned == 0).sum()) == round(drop_rate * n)
    dropped = pruned == 0
    assert size[dropped].max() <= size[~dropped].min()


@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitude_drops_exactly_the_rounded_share_of_equal_entries(dtype: torch.dtype, scope: str) -> None:
    for n, p in itertools.product((1, 2, 3, 10, 999), (0, 0.001, 0.25, 0.5, 0.7, 0.999, 1)):
        pruned = Magnitude(p, scope)(torch.full((4, n), -3.0, dtype=dtype), name="w", seed=0)
        zeros = (pruned == 0).sum(dim=1).tolist()
        assert zeros == [round(p * n)] * 4 if scope == "row" else sum(zeros) == round(p * 4 * n)


def test_which_ties_fall_depends_on_seed_and_name() -> None:
    masks = {
        tuple((Magnitude(0.5)(torch.ones(64), name=name, seed=seed) != 0).tolist()) for name in "vw" for seed in (0, 1)
    }
    assert len(masks) == 4
    plain = normal(64)
    assert torch.equal(Magnitude(0.5)(plain, name="w", seed=0), Magnitude(0.5)(plain, name="v", seed=9))


@pytest.mark.parametrize("scope", ["tensor", "row"])
@given(rates=st.lists(st.floats(0, 1), min_size=2, max_size=5), tensor=tensors())
def test_magnitude_masks_are_nested_over_drop_rates(scope: str, rates: list[float], tensor: torch.Tensor) -> None:
    marked = torch.where(tensor == 0, 1e-3, tensor)
    kept = [Magnitude(rate, scope)(marked, name="w", seed=0) != 0 for rate in sorted(rates)]
    for gentle, harsh in itertools.pairwise(kept):
        assert not (harsh & ~gentle).any()


@given(
    rates=st.lists(st.floats(0, 1), min_size=2, max_size=5),
    rank=st.sampled_from(["row", "tensor"]),
    fixed=st.booleans(),
)
def test_magprune_masks_of_one_window_are_nested_over_drop_rates(rates: list[float], rank: str, fixed: bool) -> None:
    """Also of the widest one, under which every probability grows with the drop rate."""
    room = min((2 * min(rate, 1 - rate) for rate in rates if 0 < rate < 1 - 1e-9), default=0.0)
    window = 0.9 * room if fixed else "widest"
    # At 0 and 1 there is no window, so that a fixed one only compares the rates between.
    between = sorted(rate for rate in rates if not fixed or 0 < rate < 1 - 1e-9)
    kept = [MagPrune(rate, window, rank)(normal(4, 60), name="w", seed=0) != 0 for rate in between]
    for gentle, harsh in itertools.pairwise(kept):
        assert not (harsh & ~gentle).any()


def test_nan_counts_as_the_greatest_and_stays() -> None:
    tensor = torch.tensor([[3.0, math.nan, 1.0, math.inf, -2.0, -math.nan]])
    for scope in ("tensor", "row"):
        kept = Magnitude(0.5, scope)(tensor.repeat(2, 1) if scope == "row" else tensor, name="w", seed=0)
        assert kept[0].isnan().tolist() == [False, True, False, False, False, True]
        assert kept[0, 3] == math.inf
        assert not kept[0, [0, 2, 4]].any()
    pruned = MagPrune(0.5)(tensor.repeat(50, 1), name="w", seed=0)
    assert not pruned[:, [0, 2, 4]].isnan().any()
    for pruner in (Dare(0.5, "l1"), Magnitude(0.5, rescale="l2")):
        with pytest.raises(ValueError, match=r"tensor 'model\.w' has NaN or infinite entries"):
            pruner(tensor, name="model.w", seed=0)


@pytest.mark.parametrize("rank", ["row", "tensor"])
@pytest.mark.parametrize("rescale", RESCALES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_window_zero_is_dare(dtype: torch.dtype, rescale: str | float, rank: str) -> None:
    tensor = normal(50, 60).to(dtype)
    for p in (0.0, 1e-9, 0.3, 0.5, 0.9, 0.999, 1.0):
        dare = Dare(p, rescale)(tensor, name="w", seed=0)
        assert torch.equal(words(MagPrune(p, 0, rank, rescale)(tensor, name="w", seed=0)), words(dare))


@pytest.mark.parametrize("drop_rate", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("rank", ["row", "tensor"])
def test_equal_entries_are_dropped_with_probability_p(drop_rate: float, rank: str) -> None:
    """Ranking ties by their own random numbers would drop .863 at .9."""
    n = 400_000
    pruned = MagPrune(drop_rate, within=rank)(torch.ones(100, n // 100), name="w", seed=0)
    assert torch.equal(words(pruned), words(MagPrune(drop_rate, 0)(torch.ones(100, n // 100), name="w", seed=0)))
    dropped = int((pruned == 0).sum())
    assert abs(dropped - n * drop_rate) < SIGMAS * math.sqrt(n * drop_rate * (1 - drop_rate))


@pytest.mark.parametrize(("drop_rate", "window"), [(0.5, "widest"), (0.9, "widest"), (0.3, 0.14), (0.3, 0.6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", ["row", "tensor"])
def test_keep_probability_at_each_decile_of_ranks(
    drop_rate: float, window: str | float, dtype: torch.dtype, rank: str
) -> None:
    """Exact bounds from the binomial of each decile's mean probability, 1e-6 for all ten and the total."""
    shape = (50, 10_000)
    pruner = MagPrune(drop_rate, window, rank)
    tensor = normal(*shape).to(dtype)
    kept = (pruner(tensor, name="w", seed=0) != 0).double()
    order = tensor.float().abs().reshape(1 if rank == "tensor" else 50, -1).argsort(dim=1)
    by_decile = kept.reshape(order.shape).gather(1, order).reshape(order.shape[0], 10, -1).sum(dim=(0, 2))
    n = tensor.numel() // 10
    for decile, count in enumerate(by_decile.tolist()):
        keep = 1 - drop_rate - pruner.width * (0.5 - (decile + 0.5) / 10)
        assert binom.ppf(FALSE_ALARM / 22, n, keep) <= count <= binom.isf(FALSE_ALARM / 22, n, keep)
    total = kept.sum().item()
    assert binom.ppf(FALSE_ALARM / 22, 10 * n, 1 - drop_rate) <= total
    assert total <= binom.isf(FALSE_ALARM / 22, 10 * n, 1 - drop_rate)


@given(tensor=tensors(), drop_rate=st.floats(0.01, 0.99), rank=st.sampled_from(["row", "tensor"]))
def test_mean_of_the_probabilities_is_the_drop_rate(tensor: torch.Tensor, drop_rate: float, rank: str) -> None:
    pruner = MagPrune(drop_rate, within=rank)
    found = slow_probabilities(tensor, drop_rate, pruner.width, rank)
    assert not found or sum(found) == Fraction(drop_rate) * len(found)
    row = tensor.reshape(1, -1) if rank == "tensor" or tensor.dim() < 2 else tensor.flatten(1)
    if tensor.numel():
        sums = rank_sums(row.float().contiguous())
        ours = pruner.probabilities(row.shape[1], sums)
        assert float(ours.mean()) == pytest.approx(drop_rate, abs=1e-12)
        assert ours.reshape(-1).tolist() == pytest.approx([float(p) for p in found], abs=1e-12)


@pytest.mark.parametrize("rank", ["row", "tensor"])
@pytest.mark.parametrize("drop_rate", [0.5, 0.9])
def test_magprune_is_unbiased_with_the_variance_of_the_formula(drop_rate: float, rank: str) -> None:
    """Each entry is δ/(1-p_i) when kept, in a binomial number of 4000 seeds; 1e-6 over all entries.

    So its mean is δ and its variance p_i/(1-p_i)·δ². The chi-square of all counts is within 6 sigma.
    """
    n_seeds = 4000
    delta = normal(4, 25, seed=1)
    pruner = MagPrune(drop_rate, within=rank)
    samples = torch.stack([pruner(delta, name="w", seed=seed) for seed in range(n_seeds)]).reshape(n_seeds, -1)
    keep = np.array([float(1 - p) for p in slow_probabilities(delta, drop_rate, pruner.width, rank)])
    scaled = torch.from_numpy(1 / keep) * delta.reshape(-1).double()
    kept = samples != 0
    torch.testing.assert_close(samples.double(), torch.where(kept, scaled, 0.0), rtol=1e-6, atol=0)
    counts = kept.sum(dim=0).numpy()
    assert (binom.ppf(FALSE_ALARM / 200, n_seeds, keep) <= counts).all()
    assert (counts <= binom.isf(FALSE_ALARM / 200, n_seeds, keep)).all()
    z = (counts - n_seeds * keep) / np.sqrt(n_seeds * keep * (1 - keep))
    assert abs((z**2).mean() - 1) < SIGMAS * math.sqrt(2.1 / len(keep))
    relative = (samples.double().numpy() / delta.reshape(-1).double().numpy()).mean(axis=0)
    assert abs((relative - 1).mean()) < SIGMAS * math.sqrt(((1 - keep) / keep).sum() / n_seeds) / len(keep)


@pytest.mark.parametrize(
    ("one", "other"),
    [((0, "w"), (1, "w")), ((0, "w"), (0, "v")), ((0, "l.0.w"), (0, "l.1.w")), ((1, "1.w"), (11, "w"))],
)
def test_masks_of_other_seeds_and_tensors_are_independent(one: tuple[int, str], other: tuple[int, str]) -> None:
    """Products of (kept - its probability) at equal and shifted positions: 5 sigma, 6e-7 a shift."""
    n, pruner = 100_000, MagPrune(0.5)
    tensor = normal(n)
    (ranks,) = rank_sums(tensor[None])
    keep = 1 - 0.5 - pruner.width * (0.5 - (ranks / 2 - 1) / (n - 1))
    first, second = ((pruner(tensor, name=name, seed=seed) != 0).double() - keep for seed, name in (one, other))
    for shift in range(5):
        a, b = first[: n - shift], second[shift:]
        spread = float(((keep * (1 - keep))[: n - shift] * (keep * (1 - keep))[shift:]).sum()) ** 0.5
        assert abs(float((a * b).sum())) < 5 * spread


def test_rows_and_tensor_are_ranked_apart() -> None:
    tensor = normal(2, 20_000)
    tensor[1] *= 100
    by_row, by_tensor = (
        (MagPrune(0.5, within=rank)(tensor, name="w", seed=0) != 0).double() for rank in ("row", "tensor")
    )
    # By row each keeps a half; in the whole tensor the small row is the less kept one: means .725 and .275.
    assert by_row.mean(dim=1).tolist() == pytest.approx([0.5, 0.5], abs=0.03)
    assert by_tensor.mean(dim=1).tolist() == pytest.approx([0.275, 0.725], abs=0.03)
    assert (Magnitude(0.5, "row")(tensor, name="w", seed=0) != 0).sum(dim=1).tolist() == [10_000, 10_000]
    assert (Magnitude(0.5)(tensor, name="w", seed=0) != 0).sum(dim=1).min() < 500


def closed_form(p: float) -> tuple[float, float]:
    """E[z²; |z| < q] and E[z²; |z| > q] for standard normal z, where q leaves the share p below."""
    q = norm.isf((1 - p) / 2)
    below = p - 2 * q * norm.pdf(q)
    return below, 1 - below


@pytest.mark.parametrize(
    ("p", "drop_only", "dare", "mp", "mp_rescaled"),
    [(0.5, 0.5, 1, 0.071, 1.0), (0.9, 0.9, 9, 0.56, 36), (0.99, 0.99, 99, 0.915, 829)],
)
def test_squared_errors_on_gaussian_deltas(
    p: float, drop_only: float, dare: float, mp: float, mp_rescaled: float
) -> None:
    """The closed forms within 2% on a million entries, which is more than 6 sigma; and the quoted table."""
    below, above = closed_form(p)
    forms = [p, p / (1 - p), below, below + (p / (1 - p)) ** 2 * above]
    # At .5 the last one is 1 whatever the distribution.
    assert forms == pytest.approx([drop_only, dare, mp, mp_rescaled], rel=0.01)
    delta = normal(1_000_000)
    total = delta.double().square().sum()
    pruners = [Dare(p, "none"), Dare(p), Magnitude(p), Magnitude(p, rescale="inverse_keep")]
    errors = [float((pruner(delta, name="w", seed=0) - delta).double().square().sum() / total) for pruner in pruners]
    # Kept shares of Σδ² have a relative spread of √(3p/(n(1-p))), 1.7% at .99 for the random ones.
    spread = 1e-3 * math.sqrt(3 / (1 - p) / p)
    tolerances = [SIGMAS * spread * max(1 - p, 0.01), SIGMAS * spread, 0.02, 0.02]
    for error, form, tolerance in zip(errors, forms, tolerances, strict=True):
        assert error == pytest.approx(form, rel=tolerance)


def test_magnitude_pruning_is_a_projection_and_needs_no_factor() -> None:
    delta = normal(10_000).double()
    kept = Magnitude(0.9)(delta, name="w", seed=0)
    assert float((kept * delta).sum() / kept.square().sum()) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("make", [Dare, Magnitude, MagPrune])
@pytest.mark.parametrize(("rescale", "power"), [("l1", 1), ("l2", 2)])
@pytest.mark.parametrize("drop_rate", [0.0, 0.3, 0.9, 0.999])
def test_norms_are_restored(make: type, rescale: str, power: int, drop_rate: float) -> None:
    delta = normal(300, 400)
    pruned = make(drop_rate, rescale=rescale)(delta, name="w", seed=0)
    before, after = (float((each.double().abs() ** power).sum()) for each in (delta, pruned))
    assert after == pytest.approx(before, rel=2e-7 * power)
    # The factor is one for all survivors, and the mask that of the variant without it.
    plain = make(drop_rate, rescale="none")(delta, name="w", seed=0)
    assert torch.equal(plain != 0, pruned != 0)
    theirs = (delta.double().abs() ** power).sum() / (plain.double().abs() ** power).sum()
    torch.testing.assert_close(pruned.double(), plain.double() * theirs ** (1 / power), rtol=2e-7, atol=0)


@pytest.mark.parametrize("make", [Dare, Magnitude, MagPrune])
@pytest.mark.parametrize("rescale", ["l1", "l2"])
def test_nothing_left_has_no_norm_to_match(make: type, rescale: str) -> None:
    for tensor in (torch.zeros(3, 4), torch.empty(0), torch.ones(3, 4)):
        assert not make(1.0, rescale=rescale)(tensor, name="w", seed=0).any()


@pytest.mark.parametrize(("n", "density"), [(1000, 0.25), (1024, 0.5), (4096, 0.125), (100, 0.01)])
def test_magnitude_is_pefts_where_nothing_is_tied(n: int, density: float) -> None:
    tensor = normal(n).view(4, -1)
    assert tensor.abs().unique().numel() == n
    theirs = magnitude_based_pruning(tensor, density)
    assert torch.equal(Magnitude(1 - density)(tensor, name="w", seed=0), theirs)


@pytest.mark.parametrize("density", [0.5, 0.3, 0.1])
def test_survivors_have_pefts_values(density: float) -> None:
    tensor = normal(10_000)
    torch.manual_seed(0)
    theirs = prune(tensor, density, method="random", rescale=True)
    ours = Dare(1 - density)(tensor, name="w", seed=0)
    both = (theirs != 0) & (ours != 0)
    assert both.sum() > 10_000 * density**2 / 2
    torch.testing.assert_close(ours[both], theirs[both], rtol=1e-6, atol=0)


def test_magnitude_has_no_wrong_turns_at_the_ends() -> None:
    # MergeLM's kthvalue(0) fails where k rounds to 0; mergekit once gave zeros for tensors below 100 entries.
    for n in (1, 2, 5, 99):
        assert torch.equal(Magnitude(0.001)(normal(n), name="w", seed=0), normal(n))
        assert torch.count_nonzero(Magnitude(0.5)(normal(n), name="w", seed=0)) == n - round(0.5 * n)


def test_ranks_are_integers_whatever_the_dtype() -> None:
    # In bfloat16 ranks of 4096 entries would collapse to some hundreds, and those of fp16 end at 65504.
    tensor = torch.arange(1, 2049.0).half().repeat(40)
    sums = rank_sums(tensor.float()[None])
    assert sums.unique().numel() == 2048
    pruned = MagPrune(0.5, within="tensor")(tensor, name="w", seed=0)
    assert pruned.isfinite().all()
    assert pruned.dtype == torch.float16


@pytest.mark.parametrize(
    ("drop_rate", "window", "limit"),
    [
        (0.3, 0.61, "at most 0.6"),
        (0.3, 0.7, "at most 0.6"),
        (0.9, 0.2, "below 0.2"),
        (0.9, 0.25, "below 0.2"),
        (0.5, 1.0, "below 1"),
        (0.5, 3, "below 1"),
        (0.25, 0.50001, "at most 0.5"),
        (0.999, 0.01, "below 0.002"),
    ],
)
def test_too_wide_a_window_names_the_largest(drop_rate: float, window: float, limit: str) -> None:
    with pytest.raises(ValueError, match=rf"{limit}$") as raised:
        MagPrune(drop_rate, window)
    assert repr(window) in str(raised.value)
    assert repr(drop_rate) in str(raised.value)


@pytest.mark.parametrize(("drop_rate", "window"), [(0.3, 0.6), (0.9, 0.199), (0.5, 0.999), (0.25, 0.5), (0.01, 0)])
def test_windows_up_to_the_limit_are_allowed(drop_rate: float, window: float) -> None:
    checked_window(window, drop_rate)
    assert MagPrune(drop_rate, window)(normal(100), name="w", seed=0).isfinite().all()


@pytest.mark.parametrize("window", [0, 0.5, 1, 7.0, 1e300, "widest"])
def test_drop_rates_without_room_accept_any_window(window: float | str) -> None:
    tensor = normal(50)
    assert torch.equal(MagPrune(0, window)(tensor, name="w", seed=0), tensor)
    assert not MagPrune(1, window)(tensor, name="w", seed=0).any()
    assert MagPrune(0, window).width == MagPrune(1.0, window).width == 0


@pytest.mark.parametrize("window", [-0.1, math.nan, math.inf, -math.inf, "wide", "0.1", None, [0.1], True], ids=str)
@pytest.mark.parametrize("drop_rate", [0, 0.5, 1])
def test_window_of_no_known_form(drop_rate: float, window: object) -> None:
    with pytest.raises(ValueError, match="window must be 'widest' or a width of at least 0") as raised:
        MagPrune(drop_rate, window)  # type: ignore[arg-type]
    assert repr(window) in str(raised.value)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99])
def test_widest_window_is_nine_tenths_of_the_room(p: float) -> None:
    assert MagPrune(p).width == pytest.approx(1.8 * min(p, 1 - p))
    same = MagPrune(p, MagPrune(p).width)
    assert torch.equal(same(normal(9, 9), name="w", seed=0), MagPrune(p)(normal(9, 9), name="w", seed=0))


@pytest.mark.parametrize("bad", ["global", "", None, 1, "Row"])
def test_scope_and_rank_list_the_known_ones(bad: object) -> None:
    with pytest.raises(ValueError, match="within must be one of 'tensor', 'row', 'model'") as scope:
        Magnitude(0.5, bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="within must be one of 'row', 'tensor'") as rank:
        MagPrune(0.5, within=bad)  # type: ignore[arg-type]
    assert repr(bad) in str(scope.value)
    assert repr(bad) in str(rank.value)


@pytest.mark.parametrize("make", [Magnitude, MagPrune])
def test_drop_rate_and_rescale_are_checked_as_in_dare(make: type) -> None:
    for rate in (-0.1, 1.1, math.nan, "0.5", None, True):
        with pytest.raises(ValueError, match=r"drop_rate must be a number in \[0, 1\]"):
            make(rate)
    for rescale in ("l3", None, 0.5, -1, math.nan, True):
        with pytest.raises(ValueError, match="rescale"):
            make(0.5, rescale=rescale)


def test_one_tensor_is_no_model() -> None:
    with pytest.raises(ValueError, match=r"'model\.w'.*delta\.pruned"):
        Magnitude(0.5, "model")(torch.ones(3), name="model.w", seed=0)


@pytest.mark.parametrize(
    ("pruner", "method"),
    [
        (Dare(0.5, "l1"), "drop + L1"),
        (Dare(0.5, "l2"), "drop + L2"),
        (Magnitude(0.5), "MP"),
        (Magnitude(0.5, "row"), "MP by row"),
        (Magnitude(0.5, "model"), "MP by model"),
        (Magnitude(0.5, rescale="inverse_keep"), "MP + rescale"),
        (Magnitude(0.5, "row", "l1"), "MP by row + L1"),
        (Magnitude(0.5, rescale=2.5), "MP × 2.5"),
        (MagPrune(0.5), "MAGPRUNE"),
        (MagPrune(0.5, 0.2), "MAGPRUNE, window 0.2"),
        (MagPrune(0.5, within="tensor"), "MAGPRUNE by tensor"),
        (MagPrune(0.5, within="tensor", rescale="none"), "MAGPRUNE by tensor drop only"),
        (MagPrune(0.5, rescale="l2"), "MAGPRUNE + L2"),
    ],
)
def test_method_name(pruner: Pruner, method: str) -> None:
    assert pruner.method == method
    assert dataclasses.replace(pruner, drop_rate=0.4).method == method  # type: ignore[type-var]


def test_pruners_are_frozen_values() -> None:
    assert len({Magnitude(0.5), Magnitude(0.5, "tensor", "none"), Magnitude(0.5, "row"), MagPrune(0.5)}) == 3
    assert len({MagPrune(0.5), MagPrune(0.5, "widest", "row", "inverse_keep"), MagPrune(0.5, 0.9)}) == 2
    for pruner in (Magnitude(0.5), MagPrune(0.5)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            pruner.drop_rate = 0.6  # type: ignore[misc]


@pytest.mark.parametrize("pruner", [Dare, Magnitude, MagPrune])
def test_the_drop_rate_is_a_float_whatever_number_is_given(pruner: type) -> None:
    given = pruner(np.float32(0.3))
    assert type(given.drop_rate) is float
    assert given == pruner(float(np.float32(0.3)))
    assert pruner(1).drop_rate == 1.0


@pytest.mark.parametrize("drop_rate", [1 / 3, 0.1, 0.123456789, 2 / 7])
def test_the_limit_that_an_error_names_is_allowed(drop_rate: float) -> None:
    with pytest.raises(ValueError, match="it must be at most") as raised:
        MagPrune(drop_rate, window=0.99)
    MagPrune(drop_rate, window=float(str(raised.value).rsplit(" ", 1)[1]))


@pytest.mark.parametrize("rescale", ["l1", "l2"])
def test_a_norm_out_of_reach_is_an_error(rescale: str) -> None:
    delta = torch.tensor([1e38, 1e38, 1e-45, 1e-45])
    tiny = next(
        seed
        for seed in range(999)
        if (survivors := Dare(0.5, "none")(delta, name="w", seed=seed))[2:].any() and not survivors[:2].any()
    )
    with pytest.raises(ValueError, match="'w'.*beyond float32"):
        Dare(0.5, rescale)(delta, name="w", seed=tiny)


def test_whole_numbers_and_truth_values_are_no_deltas() -> None:
    for pruner in (Dare(0.5), Magnitude(0.5), Magnitude(0.5, "row"), MagPrune(0.5)):
        with pytest.raises(ValueError, match="floating dtype"):
            pruner(torch.arange(8).view(2, 4), name="w", seed=0)


def test_a_seed_is_an_integer() -> None:
    assert torch.equal(
        Dare(0.5)(torch.ones(99), name="w", seed=np.int64(3)), Dare(0.5)(torch.ones(99), name="w", seed=3)
    )
    with pytest.raises(TypeError):
        Dare(0.5)(torch.ones(99), name="w", seed=3.0)  # type: ignore[arg-type]


def test_a_factor_beyond_float32_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond float32"):
        Dare(0.5, 1e39)
