"""What report 02 says of tables of drop rates, metrics and tolerated drop rates."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import pandas as pd

from delta_analysis.reports.family import Relation
from delta_analysis.reports.session import drop_rate_text, percent, tolerance_text
from delta_analysis.studies import dare_ablation as study


def coverage_text(coverage: pd.DataFrame) -> str:
    """Which tensors are not compared, and so stay as fine-tuned."""
    kept = coverage[coverage["status"] != "compared"]
    if kept.empty:
        return "Every tensor stands on both sides, so with all of the delta dropped the model is the base."
    share = percent(kept["numel"].sum() / coverage["numel"].sum(), 1)
    named = ", ".join(f"`{row.tensor}` ({row.status} {row.reason})" for row in kept.head(5).itertuples())
    return (
        f"{len(kept)} of {len(coverage)} tensors ({share} of the entries) are not compared and stay as fine-tuned, so "
        f"with all of the delta dropped the model is not quite the base: {named}"
    )


def levels_list(curve: pd.DataFrame, metric: str, drop_rates: Sequence[float]) -> str:
    """The metric of each pair untouched, at the largest rate up to .9, and with all of the delta dropped."""
    reported = max((p for p in drop_rates if 0 < p <= 0.9), default=drop_rates[1])
    lines = []
    for pair, rows in curve.groupby("pair", sort=False):
        untouched, some, everything = (
            _level_text(rows[rows["drop_rate"] == p].iloc[0], metric) for p in (0, reported, 1)
        )
        lines.append(
            f"- **{pair}**: {metric} {untouched} untouched, {some} at p = {reported:g}, "
            f"{everything} with all of the delta dropped."
        )
    return "\n".join(lines)


def _level_text(row: pd.Series, metric: str) -> str:
    text = percent if metric == "accuracy" else "{:.2f}".format
    return f"{text(row['value'])} [{text(row['low'])}, {text(row['high'])}]"


def headline_of(tolerances: pd.DataFrame) -> str:
    """What each pair tolerates, most first, and whether the last one breaks before all others."""
    ranked = tolerances.sort_values("tolerated", ascending=False)
    told = "; ".join(_tolerates(row) for _, row in ranked.iterrows())
    last = ranked["pair"].iloc[-1]
    if len(ranked) > 1 and ranked["high"].iloc[-1] < ranked["low"].iloc[:-1].min():
        return f"DARE: {told}. {last} breaks before every other pair: its interval lies below all the others."
    return f"DARE: {told}."


def _tolerates(row: pd.Series) -> str:
    return f"**{row['pair']}** tolerates {tolerance_text(row)}"


def without_ability(tolerances: pd.DataFrame) -> list[str]:
    """The pairs whose delta brought nothing that dropping could cost, as a sentence, if there are some."""
    pairs = tolerances.loc[tolerances["reading"] == "none", "pair"]
    sentence = (
        f"{', '.join(pairs)}: not clearly above what is left with the whole delta dropped, so there is no ability "
        "that the delta brought and dropping could cost."
    )
    return [sentence] if len(pairs) else []


def two_bases(relations: Sequence[Relation], tolerances: pd.DataFrame) -> list[str]:
    """What the same fine-tune tolerates on two bases, a sentence for each such two."""
    rows = tolerances.set_index("pair")
    shared = [two for two in combinations(relations, 2) if two[0].finetuned == two[1].finetuned]
    sentences = []
    for two in shared:
        near, far = sorted(two, key=lambda relation: -rows.loc[relation.name, "tolerated"])
        apart = rows.loc[near.name, "low"] > rows.loc[far.name, "high"]
        sentences.append(
            f"The same model tolerates a drop rate of {drop_rate_text(rows.loc[near.name, 'tolerated'])} as "
            f"{near.name} and of {drop_rate_text(rows.loc[far.name, 'tolerated'])} as {far.name} "
            f"({far.kind}); the intervals {'do not overlap' if apart else 'overlap'}."
        )
    return sentences or ["No fine-tune appears twice in this report."]


def encoders_list(tolerances: pd.DataFrame) -> str:
    """What each encoder tolerates, and what it answers with and without its delta."""
    return "\n".join(
        f"- {_tolerates(row)}: {percent(row['untouched'], 1)} untouched, "
        f"{percent(row['floor'], 1)} with all of the delta dropped or by guessing."
        for _, row in tolerances.iterrows()
    )


def spread_text(cells: pd.DataFrame) -> str:
    """How far masks differ at most, and how near the achieved drop rates come to the nominal ones."""
    inner, widest = study.between(cells), study.widest_spread(cells)
    worst = widest.loc[(widest["max"] - widest["min"]).idxmax()]
    error = (inner["achieved_drop_rate"] - inner["drop_rate"]).abs().max()
    return (
        f"The widest spread over {inner['seed'].nunique()} masks is {worst['min']:.2f} to {worst['max']:.2f} "
        f"({worst['pair']} at p = {worst['drop_rate']:g}): a single mask could have shown any value between. "
        f"The achieved drop rates are within {error:.4f} of the nominal ones."
    )
