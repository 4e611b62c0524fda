"""What report 07 says of a table of tolerated drop rates by size."""

from __future__ import annotations

import pandas as pd

from delta_analysis.reports.session import interval_text, percent, tolerance_text
from delta_analysis.studies import model_size as study
from delta_analysis.sweeps import logit

SHOWN = {"abs_p50": "median |δ|", "relative_rms": "rms δ / rms base"}


def shown_table(tolerances: pd.DataFrame) -> pd.DataFrame:
    """The tolerated drop rates for reading, sizes of a relation one below the other."""
    columns = ["relation", "size", "parameters", "untouched", "abs_p50", "relative_rms", "tolerated", "low", "high"]
    ordered = tolerances[columns].rename(columns=SHOWN).sort_values(["relation", "parameters"], kind="stable")
    return ordered.set_index(["relation", "size"])


def headline_of(tolerances: pd.DataFrame) -> str:
    """In how many relations the tolerated drop rate rises or falls with size."""
    found = study.gains(tolerances)
    if not found:
        told = "; ".join(f"{row['pair']} tolerates {tolerance_text(row)}" for _, row in tolerances.iterrows())
        return f"A single size is given, so nothing can be said of size: {told}."
    more = [relation for relation, gain in found.items() if gain.difference.low > 0]
    less = [relation for relation, gain in found.items() if gain.difference.high < 0]
    named = [f" ({', '.join(names)})" if names else "" for names in (more, less)]
    return (
        f"From the smallest to the largest of {tolerances['parameters'].nunique()} sizes, the tolerated drop rate "
        f"rises clearly in {len(more)} of {len(found)} relations{named[0]}, falls clearly in {len(less)}{named[1]}, "
        f"and is undecided in {len(found) - len(more) - len(less)}."
    )


def gains_list(tolerances: pd.DataFrame) -> str:
    """What the largest size of each relation tolerates beside the smallest."""
    return "\n".join(f"- **{relation}**: {_gain_text(gain)}" for relation, gain in study.gains(tolerances).items())


def _gain_text(gain: study.Gain) -> str:
    low, high = gain.difference.low, gain.difference.high
    verdict = "more" if low > 0 else "less" if high < 0 else "neither clearly more nor clearly less"
    small, large = (f"{tolerance_text(row)} at {row['parameters'] / 1e6:.2g}M" for row in (gain.smallest, gain.largest))
    return (
        f"{small} parameters, {large}; the largest tolerates {verdict} "
        f"(a difference of {interval_text(gain.difference, 1)} on the scale log(p/(1 − p)))."
    )


def steps_text(tolerances: pd.DataFrame) -> str:
    """How often the next size tolerates more or less."""
    found = study.steps(tolerances)
    rising, falling = sum(step.low > 0 for step in found), sum(step.high < 0 for step in found)
    return (
        f"From one size to the next the tolerated drop rate rises clearly in {rising} of {len(found)} steps and falls "
        f"clearly in {falling}."
    )


def limits_text(tolerances: pd.DataFrame, metric: str) -> str:
    """How far so few sizes can speak; `metric` is what the models are judged by."""
    parameters, loss = tolerances["parameters"], metric == "perplexity"
    weakest = tolerances.groupby("size", sort=False)["untouched"].agg("max" if loss else "min")
    shown = "perplexity {:.1f}".format if loss else percent
    odds = tolerances["tolerated"].map(logit)
    parts = [
        f"{parameters.nunique()} sizes over a factor of {parameters.max() / parameters.min():.0f} in parameters, one "
        "model of each size and relation, so a difference between two sizes may as well be one between two trainings"
    ]
    if moves := study.delta_moves(tolerances):
        told = "told apart" if min(moves) > 0.9 and max(moves) < 1.1 else "not told apart"
        parts.append(
            "from the smallest to the largest, the delta of a fine-tune changes by a factor of "
            f"{min(moves):.2f} to {max(moves):.2f} relative to its base, so size of model and size of delta are {told}"
        )
    parts += [
        "the least able models of each size: " + ", ".join(f"{shown(v)} ({k})" for k, v in weakest.items()),
        f"between the pairs, the tolerated drop rate differs by {odds.max() - odds.min():.1f} "
        "on the scale log(p/(1 − p))",
    ]
    if parameters.max() < 7e9:
        largest = f"{parameters.max() / 1e6:.2g}M"
        parts.append(f"the largest model here has {largest} parameters, those of the paper 7 to 70 billion")
    return f"How far this can speak: {'; '.join(parts)}."
