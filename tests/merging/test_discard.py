"""How much of a fine-tune is outvoted: the rule against the election itself, rates against loops and closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_analysis._errors import NotHomologousError
from delta_analysis.deltas.delta import load_delta
from delta_analysis.deltas.ranges import GROUPS, LABELS, Grouping, value_ranges
from delta_analysis.merging.discard import discard_rate
from delta_analysis.merging.election import Slack, elected, outvoted
from delta_analysis.merging.merger import source_seed
from delta_analysis.pruning import Dare, Magnitude

COLUMNS = [
    *("tensor", "layer", "module", "kind", "shape", "tensors", "numel", "kept", "discard_rate", "conflict"),
    *("lost_given_conflict", "gaussian_null", "independent_null", "size_ratio"),
]
MEASURES = COLUMNS[COLUMNS.index("kept") :]
SIGMAS = 6
# Few values, so that many are equal or cancel, and zeros.
ENTRIES = st.integers(-4, 4).map(lambda value: value / 2)
PAIRS = st.lists(st.tuples(ENTRIES, ENTRIES), min_size=1, max_size=30)
LIMITS = st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0, math.inf])
SLACKS = st.none() | st.builds(Slack, protected=st.integers(0, 1), relative=LIMITS, absolute=LIMITS)
WEIGHTS = st.tuples(*[st.sampled_from([-1.0, 0.5, 1.0, 2.0])] * 2)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def only(table: pd.DataFrame) -> dict[str, Any]:
    (row,) = table.to_dict("records")
    return row


@settings(deadline=None)
@given(pairs=PAIRS, slack=SLACKS, weights=WEIGHTS)
def test_the_rule_is_that_of_the_election(
    pairs: list[tuple[float, float]], slack: Slack | None, weights: tuple[float, float]
) -> None:
    own, other = torch.tensor(pairs).unbind(dim=1)
    fused = elected([own, other], weights, slack=slack, fuse="sum")
    *_, lost = outvoted(own, other, weights, slack)
    # Only entries of the elected sign are in the sum.
    assert lost == int(((own != 0) & (fused.sign() != (own * weights[0]).sign())).sum())


@settings(deadline=None)
@given(pairs=PAIRS, slack=SLACKS)
def test_rates_are_counted(pairs: list[tuple[float, float]], slack: Slack | None) -> None:
    sft, cpt = torch.tensor(pairs).unbind(dim=1)
    found = only(discard_rate({"w": sft}, {"w": cpt}, slack=slack, by="tensor"))
    kept = conflicts = lost = 0
    for s, c in pairs:
        if s == 0:
            continue
        kept += 1
        if s * c < 0:
            conflicts += 1
            if slack is None:
                lost += abs(c) > abs(s) or (abs(c) == abs(s) and s < 0)
            elif slack.protected == 0:
                lost += abs(c) > (1 + slack.relative) * abs(s) + slack.absolute
            else:
                lost += not abs(s) > (1 + slack.relative) * abs(c) + slack.absolute
    assert found["kept"] == kept
    nan = math.nan
    expected = [lost / kept if kept else nan, conflicts / kept if kept else nan, lost / conflicts if conflicts else nan]
    assert [found[each] for each in MEASURES[1:4]] == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(("ratio", "expected"), [(1.0, 0.25), (3.0, 0.39758), (10.0, 0.46827)])
def test_normal_deltas_lose_as_the_closed_form_says(ratio: float, expected: float) -> None:
    sft, cpt = normal(400, 500), ratio * normal(400, 500, seed=1)
    found = only(discard_rate({"w": sft}, {"w": cpt}))
    sigma = math.sqrt(expected * (1 - expected) / sft.numel())
    assert found["gaussian_null"] == pytest.approx(expected, abs=2e-3)
    assert found["size_ratio"] == pytest.approx(ratio, rel=2e-2)
    assert abs(found["discard_rate"] - expected) < SIGMAS * sigma
    assert abs(found["independent_null"] - expected) < SIGMAS * sigma
    assert abs(found["conflict"] - 0.5) < SIGMAS * math.sqrt(0.25 / sft.numel())
    assert found["lost_given_conflict"] == pytest.approx(found["discard_rate"] / found["conflict"])
    # Weights act as sizes do.
    weighted = only(discard_rate({"w": sft / 2}, {"w": cpt / ratio}, weights=(2.0, ratio)))
    assert {each: weighted[each] for each in MEASURES} == pytest.approx({each: found[each] for each in MEASURES})


def test_of_related_deltas_less_is_discarded_than_of_independent_ones() -> None:
    shared, size = normal(300, 300), 3.0
    sft, cpt = shared + normal(300, 300, seed=1), size * (shared + normal(300, 300, seed=2))
    found = only(discard_rate({"w": sft}, {"w": cpt}))
    # The sum is normal too; s loses where the two have opposite signs.
    correlation = (1 + size / 2) / math.sqrt(1 + size**2 + size)
    expected = 0.5 - math.asin(correlation) / math.pi
    assert abs(found["discard_rate"] - expected) < SIGMAS * 0.5 / 300
    assert expected < 0.3 < found["independent_null"]
    assert found["independent_null"] == pytest.approx(found["gaussian_null"], abs=SIGMAS * 0.5 / 300)


def test_the_independent_null_is_the_mean_over_all_ways_to_pair_entries() -> None:
    sft, cpt = normal(3000).pow(3), normal(3000, seed=1).exp() - 1
    cpt[:1000] = 0.0
    slack = Slack(0, 0.5, 0.1)
    found = only(discard_rate({"w": sft}, {"w": cpt}, slack=slack))
    *_, lost = outvoted(sft[:, None].expand(-1, 3000), cpt.expand(3000, -1), (1.0, 1.0), slack)
    assert abs(found["independent_null"] - lost / 3000**2) < SIGMAS * 0.5 / math.sqrt(3000)
    other_seed = only(discard_rate({"w": sft}, {"w": cpt}, slack=slack, seed=1))
    assert other_seed["independent_null"] != found["independent_null"]
    assert other_seed["discard_rate"] == found["discard_rate"]


def test_limits_of_the_slack() -> None:
    sft, cpt = {"w": normal(100, 100)}, {"w": 5 * normal(100, 100, seed=1)}
    plain = only(discard_rate(sft, cpt))
    none = only(discard_rate(sft, cpt, slack=Slack(0)))
    assert {each: none[each] for each in MEASURES if each != "gaussian_null"} == {
        each: plain[each] for each in MEASURES if each != "gaussian_null"
    }
    assert math.isnan(none["gaussian_null"])
    rates = [only(discard_rate(sft, cpt, slack=Slack(0, relative)))["discard_rate"] for relative in (0.5, 2.0, 10.0)]
    assert plain["discard_rate"] > rates[0] > rates[1] > rates[2] > 0
    for slack in (Slack(0, math.inf), Slack(0, 0.0, math.inf)):
        found = only(discard_rate(sft, cpt, slack=slack))
        assert found["discard_rate"] == found["independent_null"] == found["lost_given_conflict"] == 0
        assert found["conflict"] == plain["conflict"]
    # Protected without limit, the other delta wins every conflict.
    assert only(discard_rate(sft, cpt, slack=Slack(1, math.inf)))["lost_given_conflict"] == 1


def test_equal_and_opposite_deltas() -> None:
    delta = normal(50, 60)
    assert only(discard_rate({"w": delta}, {"w": delta}))["discard_rate"] == 0
    # Where the sum is 0, positive wins.
    negative = float((delta < 0).double().mean())
    for other, weights in ((-delta, (1.0, 1.0)), (delta, (1.0, -1.0))):
        found = only(discard_rate({"w": delta}, {"w": other}, weights=weights))
        assert (found["conflict"], found["size_ratio"]) == (1.0, 1.0)
        assert found["discard_rate"] == found["lost_given_conflict"] == pytest.approx(negative)


@pytest.mark.parametrize("trim", [Magnitude(0.8), Magnitude(0.8, within="model"), Dare(0.5)], ids=str)
def test_trimming_comes_first_as_in_a_merge(trim: Any) -> None:
    deltas = [load_delta(base="zoo:tiny/base", finetuned=f"zoo:tiny/{name}") for name in ("instruct", "code-cpt")]
    found = discard_rate(deltas[0], deltas[1], trim=trim, by="model", seed=3)
    pruned = [delta.pruned(trim, seed=source_seed(3, k)) for k, delta in enumerate(deltas)]
    already = discard_rate(pruned[0], pruned[1], by="model", seed=3)
    same = [each for each in MEASURES if each not in ("gaussian_null", "size_ratio")]
    pd.testing.assert_frame_equal(found[same], already[same])
    untrimmed = discard_rate(deltas[0], deltas[1], by="model")
    assert only(found)["size_ratio"] == only(untrimmed)["size_ratio"]
    assert only(found)["kept"] == sum(int(torch.count_nonzero(tensor)) for tensor in pruned[0].values())
    assert math.isnan(only(found)["gaussian_null"])


@pytest.mark.parametrize("by", GROUPS)
def test_groups_are_those_of_value_ranges(by: Grouping) -> None:
    sft, cpt = (load_delta(base="zoo:tiny/base", finetuned=f"zoo:tiny/{name}") for name in ("instruct", "code-cpt"))
    found = discard_rate(sft, cpt, by=by)
    assert found.columns.tolist() == COLUMNS
    shared = [*LABELS, "tensors", "numel"]
    pd.testing.assert_frame_equal(
        found[shared].sort_values(shared, ignore_index=True),
        value_ranges(sft, by=by)[shared].sort_values(shared, ignore_index=True),
    )
    tensors = discard_rate(sft, cpt, by="tensor")
    for rate in ("discard_rate", "conflict", "gaussian_null", "independent_null"):
        assert np.average(found[rate], weights=found["kept"]) == pytest.approx(
            np.average(tensors[rate].fillna(0), weights=tensors["kept"])
        )
    assert found["discard_rate"].between(0, found["conflict"]).all()
    assert (found["kept"] <= found["numel"]).all()


def test_layers_of_a_pair_of_the_zoo() -> None:
    sft, cpt = (load_delta(base="zoo:tiny/base", finetuned=f"zoo:tiny/{name}") for name in ("instruct", "code-cpt"))
    found = discard_rate(sft, cpt).set_index("layer")
    assert sorted(found.index) == [-1, 0, 1, 2, 3]
    names = [name for name in sft if ".layers.2." in name]
    own, other = (torch.cat([delta[name].flatten() for name in names]).double() for delta in (sft, cpt))
    lost = (own * other < 0) & ((other.abs() > own.abs()) | ((other.abs() == own.abs()) & (own < 0)))
    assert found.loc[2, "discard_rate"] == pytest.approx(float(lost.sum() / (own != 0).sum()))
    assert found.loc[2, "size_ratio"] == pytest.approx(float(other.norm() / own.norm()))


def test_a_delta_of_zeros() -> None:
    found = only(discard_rate({"w": torch.zeros(4)}, {"w": torch.ones(4)}))
    assert found["kept"] == 0
    assert found["size_ratio"] == math.inf
    assert all(math.isnan(found[each]) for each in MEASURES[1:-1])
    found = only(discard_rate({"w": torch.ones(4)}, {"w": torch.zeros(4)}))
    assert [found[each] for each in ("discard_rate", "conflict", "gaussian_null", "size_ratio")] == [0, 0, 0, 0]


def test_what_cannot_be_counted_is_told() -> None:
    sft, cpt = {"w": normal(4), "v": normal(3)}, {"w": normal(4)}
    assert discard_rate(sft, cpt, by="tensor")["tensor"].tolist() == ["w"]
    with pytest.raises(NotHomologousError, match="deltas 'sft' and 'cpt' have no tensor in common"):
        discard_rate({"v": normal(3)}, cpt)
    with pytest.raises(NotHomologousError, match=r"tensor 'w': has shapes \(5,\) in 'sft', \(4,\) in 'cpt'"):
        discard_rate({"w": normal(5)}, cpt)
    with pytest.raises(ValueError, match="tensor 'w': has NaN or infinite entries in 'cpt'"):
        discard_rate(sft, {"w": normal(4) / 0})
    with pytest.raises(ValueError, match="by must be one of"):
        discard_rate(sft, cpt, by="block")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="slack protects delta 2"):
        discard_rate(sft, cpt, slack=Slack(2))
    for weights in ((1.0,), (1.0, math.nan), (1.0, "1"), (1.0, math.inf)):
        with pytest.raises(ValueError, match=r"weights.* must be"):
            discard_rate(sft, cpt, weights=weights)  # type: ignore[arg-type]
