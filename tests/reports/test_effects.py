"""Effects of claims, from small results whose answers are known, and the overview that judges by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from delta_analysis.checkpoints.paths import find_root
from delta_analysis.reports.claims.claim import UNITS, Claim, claims_file, read_claims
from delta_analysis.reports.claims.effects import EFFECTS
from delta_analysis.reports.claims.measures import (
    NotMeasuredError,
    average,
    average_over_rates,
    difference,
    greatest,
    least,
)
from delta_analysis.reports.family import BOTH, CPT, SFT
from delta_analysis.reports.overview import (
    SHOWN,
    OverviewParameters,
    effect_text,
    interval_ends_text,
    judge,
    read_results,
    threshold_text,
)
from delta_analysis.reports.parameter_checks import ParameterError
from delta_analysis.sweeps.intervals import Interval, logit
from delta_analysis.sweeps.tolerance import HIGHEST

ITEMS, SEEDS = 100, 3
FAMILY = {"base → instruct": ("instruct", SFT), "code-cpt → code": ("code", SFT), "base → code": ("code", BOTH)}
ENCODERS = {
    "encoder base → strings": ("strings-right", SFT),
    "encoder code-cpt → code": ("code-right", SFT),
    "encoder base → code": ("code-right", BOTH),
}


def curve(pair: str, task: str, kind: str, shares: dict[float, float], method: str = "DARE") -> pd.DataFrame:
    """Cells of one pair and method, each seed with the same share of right answers."""
    rows = [
        {
            "pair": pair,
            "method": method,
            "drop_rate": p,
            "seed": seed,
            "evaluation": task,
            "metric": "accuracy",
            "outcomes": (np.arange(ITEMS) < round(share * ITEMS)).astype(float),
            "made_by": kind,
        }
        for p, share in shares.items()
        for seed in range(1 if p in (0.0, 1.0) else SEEDS)
    ]
    return pd.DataFrame(rows)


def ablation(**shares: dict[float, float]) -> pd.DataFrame:
    """Results of 02: the family's decoders and encoders, by their place."""
    places = {
        "instruct": ("base → instruct", *FAMILY["base → instruct"]),
        "code": ("code-cpt → code", *FAMILY["code-cpt → code"]),
        "older": ("base → code", *FAMILY["base → code"]),
        "strings": ("encoder base → strings", *ENCODERS["encoder base → strings"]),
        "code_encoder": ("encoder code-cpt → code", *ENCODERS["encoder code-cpt → code"]),
        "older_encoder": ("encoder base → code", *ENCODERS["encoder base → code"]),
    }
    return pd.concat([curve(*places[name], of) for name, of in shares.items()], ignore_index=True)


def breaks_at(p: float) -> dict[float, float]:
    """All is right up to a drop rate, nothing from just beyond."""
    return {0.0: 1.0, p: 1.0, p + 1e-6: 0.0, 1.0: 0.0}


def exact(effect: Interval, value: float, tolerance: float = 1e-3) -> None:
    np.testing.assert_allclose(effect, [value] * 3, atol=tolerance)


def test_several_intervals_as_one() -> None:
    one, other = Interval(1.0, 0.0, 4.0), Interval(3.0, -1.0, 3.5)
    assert least([one, other]) == Interval(1.0, -1.0, 3.5)
    assert greatest([one, other]) == Interval(3.0, 0.0, 4.0)
    assert average_over_rates([one, other]) == Interval(2.0, -0.5, 3.75)
    np.testing.assert_allclose(average([one, other]), [2, 2 - np.hypot(1, 4) / 2, 2 + np.hypot(3, 0.5) / 2])
    np.testing.assert_allclose(difference(one, other), [-2, -2 - np.hypot(1, 0.5), -2 + np.hypot(3, 4)])
    assert average([one]) == one


def ranges(table: str, pair: str, kind: str, **shares: float) -> dict[str, object]:
    return {"table": table, "pair": pair, "made_by": kind, **{f"share_below_0.{k[1:]}": v for k, v in shares.items()}}


def test_shares_of_entries_are_the_least_of_their_pairs() -> None:
    results = pd.DataFrame(
        [
            ranges("model", "a", SFT, _005=0.9, _002=0.7, _01=1.0, _03=1.0),
            ranges("model", "b", SFT, _005=0.8, _002=0.75, _01=1.0, _03=1.0),
            ranges("model", "c", CPT, _005=0.1, _002=0.1, _01=0.2, _03=0.4),
            ranges("encoder", "d", SFT, _005=0.6, _002=0.5, _01=1.0, _03=1.0),
            ranges("encoder", "e", BOTH, _005=0.1, _002=0.1, _01=0.3, _03=0.3),
            ranges("tensor", "a", SFT, _005=0.0, _002=0.0, _01=0.0, _03=0.0),
        ]
    )
    for name, value in {
        "sft-range-0005": 0.8,
        "sft-range-0002": 0.7,
        "sft-range-0005-encoders": 0.6,
        "cpt-range-001": 0.7,
        "cpt-range-003": 0.6,
    }.items():
        exact(EFFECTS[name](results), value, 1e-12)
    own = results[results["pair"] == "a"].assign(made_by="given")
    exact(EFFECTS["sft-range-0005"](own[own["table"] == "model"]), 0.9)
    with pytest.raises(NotMeasuredError, match="no pair made by continual pre-training"):
        EFFECTS["cpt-range-001"](own)


def test_tolerated_drop_rates_are_least_mean_and_greatest() -> None:
    results = ablation(
        instruct=breaks_at(0.9),
        code=breaks_at(0.5),
        older=breaks_at(0.2),
        strings=breaks_at(0.8),
        code_encoder=breaks_at(0.6),
        older_encoder=breaks_at(0.3),
    )
    exact(EFFECTS["dare-90-decoders"](results), 0.5)
    exact(EFFECTS["dare-90-encoders"](results), 0.6)
    # The mean of log(9) and 0, on log(p/(1-p)), is log(3).
    exact(EFFECTS["dare-99"](results), 0.75)
    exact(EFFECTS["cpt-breaks-dare"](results), 0.3)
    # The decoder: .5 beside .2; the encoder: .6 beside .3, which is less apart.
    exact(EFFECTS["true-base"](results), logit(0.6) - logit(0.3))


def test_shares_kept_are_those_of_the_rate() -> None:
    results = ablation(
        instruct={0.0: 0.8, 0.1: 0.8, 0.9: 0.4},
        code={0.0: 1.0, 0.1: 1.0, 0.9: 1.0},
        older={0.0: 0.8, 0.1: 0.2, 0.9: 0.0},
    )
    gained = EFFECTS["pruned-below-untouched"](results)
    assert gained.value == pytest.approx((0.5 + 1.0) / 2 - 1)
    assert gained.low < gained.value < gained.high < 0
    assert EFFECTS["cpt-breaks-at-10"](results).value == pytest.approx(0.25)
    with pytest.raises(NotMeasuredError, match="no model at drop rate 0.9"):
        EFFECTS["pruned-below-untouched"](results[results["drop_rate"] != 0.9])


def test_leads_are_means_over_fine_tunes_and_rates() -> None:
    at = {
        "DARE": {0.5: 0.8, 0.9: 0.8},
        "drop only": {0.5: 0.8, 0.9: 0.2},
        "MP": {0.5: 0.8, 0.9: 0.4},
        "MP + rescale": {0.5: 0.6, 0.9: 0.0},
        "MAGPRUNE": {0.5: 0.8, 0.9: 1.0},
    }
    untouched = [curve(pair, *FAMILY[pair], {0.0: 1.0}) for pair in FAMILY]
    cells = [curve(pair, *FAMILY[pair], shares, method) for pair in FAMILY for method, shares in at.items()]
    # What is not a fine-tune on its true base does not count.
    cells = [each.assign(outcomes=0.0) if each["made_by"].iloc[0] == BOTH else each for each in cells]
    results = pd.concat([*untouched, *cells], ignore_index=True).assign(table="cells")
    for name, value in {
        "mp-worse": 0.4,
        "mp-gap-widens": 0.4,
        "mp-rescale-destroys": -0.4,
        "magprune-over-dare": 0.1,
        "magprune-over-mp": 0.3,
    }.items():
        effect = EFFECTS[name](results)
        assert effect.value == pytest.approx(value), name
        assert effect.low < value < effect.high, name
    assert EFFECTS["rescale-matters"](results.assign(table="ladder")).value == pytest.approx(0.3)
    with pytest.raises(NotMeasuredError, match=r"no model at a drop rate below 0\.9"):
        EFFECTS["mp-gap-widens"](results[results["drop_rate"] != 0.5])


def causes(near: float = 0.002, far: float = 0.006) -> pd.DataFrame:
    """Results of 05: a gap of log(81) without error between two bases, and the rms of the deltas from both."""
    tolerances = [
        {"made_by": kind, "rms": rms, **dict.fromkeys(("value", "low", "high"), p)}
        for kind, p, rms in ((SFT, 0.9, near), (BOTH, 0.1, far))
    ]
    # What else there is of both pairs does not count.
    shifts = [
        {"made_by": kind, "intervention": "size × 9", "measured": 9.0, "low": 8.0, "high": 10.0, "rms": 9.0}
        for kind in (SFT, BOTH)
    ]
    ranks = [
        {"predictor": "abs_max", "rank": 0.5, "rank_low": 0.4, "rank_high": 0.6},
        {"predictor": "share_above_0.002", "rank": -0.8, "rank_low": -0.9, "rank_high": -0.6},
    ]
    tables = {"shifts": shifts, "tolerances": tolerances, "predictors": ranks}
    return pd.concat([pd.DataFrame(rows).assign(table=name) for name, rows in tables.items()], ignore_index=True)


def test_the_sizes_of_the_deltas_foretell_a_share_of_the_gap() -> None:
    """Noise that is r² times as large shifts the tolerated log-odds by 2 log r: 9 times of 81 are half."""
    exact(EFFECTS["range-breaks"](causes()), 0.5, 1e-12)
    exact(EFFECTS["range-breaks"](causes(far=0.018)), 1, 1e-12)
    # A smaller delta foretells a gap to the other side.
    exact(EFFECTS["range-breaks"](causes(far=0.002 / 3)), -0.5, 1e-12)
    # A gap that is known less well: of log(81), from half to twice as large.
    wide = causes()
    older = (wide["table"] == "tolerances") & (wide["made_by"] == BOTH)
    wide.loc[older, ["low", "high"]] = [0.01, 0.5]
    found = EFFECTS["range-breaks"](wide)
    gap = [logit(0.9) - logit(p) for p in (0.01, 0.1, 0.5)]
    np.testing.assert_allclose(found, [0.5, np.log(9) / gap[0], np.log(9) / gap[2]])
    with pytest.raises(NotMeasuredError, match=r"no pair made by continual pre-training \+ SFT"):
        EFFECTS["range-breaks"](wide[wide["made_by"] != BOTH])


def test_the_papers_range_rule_is_a_rank_correlation_over_the_family() -> None:
    results = causes()
    assert EFFECTS["range-rule"](results) == Interval(-0.8, -0.9, -0.6)
    with pytest.raises(NotMeasuredError, match="no predictors but those of the embedded family"):
        EFFECTS["range-rule"](results.assign(made_by="given"))


def similar(pair: str, layer: int, method: str, cosine: float, p: float = 0.9) -> pd.DataFrame:
    cells = curve(pair, "hidden similarity", FAMILY[pair][1], {p: 1.0}, method)
    return cells.assign(metric=f"similarity/{layer}", outcomes=[np.full(ITEMS, cosine)] * len(cells), table="ladder")


def test_similarities_are_the_least_of_layers_and_their_mean_gain() -> None:
    cosines = {"base → instruct": ((0.9, 0.5), (0.8, 0.6)), "code-cpt → code": ((1.0, 1.0), (0.7, 0.5))}
    cells = [curve(pair, *FAMILY[pair], {0.0: 1.0, 0.9: 1.0}).assign(table="ladder") for pair in cosines]
    for pair, layers in cosines.items():
        for layer, both in enumerate(layers):
            cells += [similar(pair, layer, m, c) for m, c in zip(("DARE", "drop only"), both, strict=True)]
            cells.append(similar(pair, layer, "DARE", 1.0, p=0.0).head(1))
    results = pd.concat(cells, ignore_index=True)
    exact(EFFECTS["similarity-095"](results), 0.7)
    exact(EFFECTS["similarity-gain"](results), (0.3 + 0.1) / 2)


def dropped_from(what: str, pair: str, shares: dict[float, float], task: str = "") -> pd.DataFrame:
    cells = curve(pair, task or FAMILY[pair][0], SFT, shares)
    name = pair if what == "delta" else f"{pair}: weights"
    return cells.assign(pair=name, **{"dropped from": what, "model": pair})


def test_weights_are_compared_with_deltas() -> None:
    weights = {0.0: 0.8, 0.1: 0.8, 0.100001: 0.0}
    results = pd.concat(
        [
            dropped_from("delta", "base → instruct", breaks_at(0.9)),
            dropped_from("weights", "base → instruct", weights),
            dropped_from("delta", "code-cpt → code", breaks_at(0.8)),
            dropped_from("weights", "code-cpt → code", {0.0: 1.0, 0.1: 0.5, 0.05: 1.0, 0.050001: 0.5}),
            dropped_from("weights", "code-cpt → code", breaks_at(0.5)).assign(method="MP"),
        ],
        ignore_index=True,
    )
    assert EFFECTS["weights-10"](results).value == pytest.approx((1 + 0.5) / 2)
    # .9 beside .1 in the one model, and less far apart in the other: .8 beside .05.
    exact(EFFECTS["sft-stimulates"](results), logit(0.8) - logit(0.05))
    with pytest.raises(NotMeasuredError, match="no encoder"):
        EFFECTS["decoders-suffer-more"](results)
    encoder = dropped_from("weights", "encoder base → strings", breaks_at(0.2), "strings-right")
    exact(EFFECTS["decoders-suffer-more"](pd.concat([results, encoder])), logit(0.2) - logit(0.1))


def test_sizes_are_compared_from_the_smallest_to_the_largest() -> None:
    rows = [
        ("a", SFT, 1, 0.5),
        ("a", SFT, 3, 0.9),
        ("a", SFT, 2, 0.1),
        ("b", SFT, 1, 0.5),
        ("b", SFT, 3, 0.8),
        ("c", BOTH, 1, 0.5),
        ("c", BOTH, 3, 0.1),
    ]
    results = pd.DataFrame(rows, columns=["relation", "made_by", "parameters", "tolerated"]).assign(table="tolerances")
    results = results.assign(low=results["tolerated"], high=results["tolerated"])
    exact(EFFECTS["larger-tolerate-more"](results), logit(0.8))
    exact(EFFECTS["largest-99"](results), 6 / 7)
    with pytest.raises(NotMeasuredError, match="a single size"):
        EFFECTS["larger-tolerate-more"](results[results["parameters"] == 3])


@pytest.fixture
def claims() -> dict[str, Claim]:
    return {each.id: each for each in read_claims(claims_file())}


def save(folder: Path, name: str, results: pd.DataFrame, **parameters: Any) -> None:
    (folder / name).mkdir()
    results.to_parquet(folder / name / "results.parquet")
    (folder / name / "run.json").write_text(json.dumps({"parameters": parameters}))


def test_results_of_the_family_know_how_a_pair_was_made(tmp_path: Path, claims: dict[str, Claim]) -> None:
    results = ablation(instruct=breaks_at(0.99), older=breaks_at(0.2), strings=breaks_at(0.5))
    save(tmp_path, "02_dare_ablation", results.drop(columns="made_by"), finetuned="")
    save(tmp_path, "00_overview", results)
    found = read_results(tmp_path)
    assert list(found) == ["02_dare_ablation"]
    pd.testing.assert_series_equal(found["02_dare_ablation"]["made_by"], results["made_by"], check_dtype=False)
    judged = judge(claims.values(), found).set_index("id")
    assert judged.index.tolist() == list(claims)
    assert judged.loc["dare-90-decoders", "status"] == "reproduced"
    assert judged.loc["dare-90-encoders", "status"] == "not reproduced"
    assert judged.loc["mp-worse", "reason"] == "no results of 04_pruning_methods"
    assert judged.loc["merge-gains", "reason"] == "no results of 08_merging"
    assert judged["status"].eq("cannot tell")[judged["value"].isna()].all()
    assert (judged["reason"] == "").eq(judged["value"].notna()).all()


def test_results_of_a_pair_of_ones_own_leave_the_family_s_claims_open(tmp_path: Path, claims: dict[str, Claim]) -> None:
    # Folders of the family's names do not make it the family.
    results = ablation(older=breaks_at(0.95)).drop(columns="made_by").assign(evaluation="mine")
    save(tmp_path, "02_dare_ablation", results, finetuned="mine/code")
    judged = judge(claims.values(), read_results(tmp_path)).set_index("id")
    assert judged.loc["dare-90-decoders", "status"] == "reproduced"
    for name in ("cpt-breaks-dare", "true-base"):
        assert judged.loc[name, "status"] == "cannot tell"
        assert judged.loc[name, "reason"].startswith("no pair made by continual pre-training + SFT in the results of")
    assert judged.loc["dare-90-encoders", "reason"] == "no encoder in the results of 02_dare_ablation"
    assert judged.loc["merge-gains", "reason"] == "no results of 08_merging"


def test_the_overview_wants_a_folder_with_results(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="parameter results: .*holds no <report>/results.parquet"):
        OverviewParameters(results=str(tmp_path), out_dir=str(tmp_path / "out"))
    with pytest.raises(ParameterError, match="parameter results: is empty: holds no"):
        OverviewParameters(results="", out_dir=str(tmp_path / "out"))
    save(tmp_path, "02_dare_ablation", ablation(instruct=breaks_at(0.9)))
    with pytest.raises(ParameterError, match="parameter out_dir"):
        OverviewParameters(results=str(tmp_path), out_dir="")
    assert OverviewParameters(results=str(tmp_path), out_dir=str(tmp_path / "out")).folder == tmp_path.resolve()


@pytest.mark.parametrize(
    ("unit", "effect", "expected"),
    [
        ("share", Interval(0.5, 0.5, 0.5), ("50.0%", "exact")),
        ("drop rate", Interval(0.98, 0.9, HIGHEST), ("0.980", "0.90 to at least 0.99995")),
        ("similarity", Interval(0.5, 0.25, 0.75), ("0.500", "0.250 to 0.750")),
        ("points", Interval(-0.1, -0.25, 0.05), ("−10.0 points", "−25.0 to 5.0")),
        ("log-odds", Interval(2.0, -np.inf, np.inf), ("2.0 log-odds", "−∞ to ∞")),
        ("rank correlation", Interval(-0.9, -1.0, -0.8), ("−0.90", "−1.00 to −0.80")),
        ("share of a gap", Interval(1.1, 0.9, np.inf), ("110%", "90% to ∞%")),
    ],
)
def test_an_effect_is_written_in_its_unit(unit: str, effect: Interval, expected: tuple[str, str]) -> None:
    row = pd.Series({**effect._asdict(), "unit": unit, "reason": ""})
    assert (effect_text(row), interval_ends_text(row)) == expected
    without = pd.Series({"value": np.nan, "low": np.nan, "high": np.nan, "unit": unit, "reason": "no results"})
    assert (effect_text(without), interval_ends_text(without)) == ("", "no results")


def test_the_claimed_side_is_written_in_words() -> None:
    sides = pd.DataFrame({"claimed_at_least": [0.9, 0.0, None], "claimed_at_most": [None, None, 0.5]})
    written = [threshold_text(row) for _, row in sides.assign(unit=["share", "points", "drop rate"]).iterrows()]
    assert written == ["above 90.0%", "above 0", "below 0.50"]
    assert set(SHOWN) == set(UNITS)


def test_every_effect_is_found_in_the_committed_results(claims: dict[str, Claim]) -> None:
    judged = judge(claims.values(), read_results(find_root() / "notebooks" / "results"))
    # Encoders need not lose weights in 06.
    missing = judged.loc[judged["id"].isin(EFFECTS) & judged["value"].isna(), "id"].tolist()
    assert set(missing) <= {"decoders-suffer-more"}
    assert judged["low"].le(judged["value"])[judged["value"].notna()].all()
    assert judged["value"].le(judged["high"])[judged["value"].notna()].all()
