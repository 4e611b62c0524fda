"""The overview: every claim beside what the reports found."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from delta_analysis.checkpoints import find_input
from delta_analysis.reports.claims.claim import CANNOT_TELL, NOT_REPRODUCED, REVERSED, STATUSES, Claim, status
from delta_analysis.reports.claims.effects import EFFECTS
from delta_analysis.reports.claims.measures import GIVEN, NotMeasuredError
from delta_analysis.reports.family import ENCODER_PAIRS, TASK_PAIRS
from delta_analysis.reports.parameter_checks import ParameterError
from delta_analysis.reports.parameters import Parameters
from delta_analysis.reports.session import drop_rate_text, percent

SHOWN: Mapping[str, Callable[[float], str]] = {
    "share": partial(percent, digits=1),
    "drop rate": drop_rate_text,
    "similarity": "{:.3f}".format,
    "points": lambda x: f"{100 * x:.1f}",
    "log-odds": "{:.1f}".format,
    "rank correlation": "{:.2f}".format,
    "share of a gap": percent,
}
"""How a number of each unit is written."""


@dataclass(frozen=True, kw_only=True)
class OverviewParameters(Parameters):
    """Parameters of 00_overview: `results`, a folder with a subfolder of results for each report."""

    results: str

    def check(self) -> None:
        if not self.results or not result_files(self.folder):
            raise ParameterError(
                "results",
                f"{self.results or 'is empty'}: holds no <report>/results.parquet; run the other notebooks first",
            )

    @property
    def folder(self) -> Path:
        return find_input(self.results)


def result_files(folder: Path) -> dict[str, Path]:
    """Name of each report but the overview -> its table of results."""
    found = sorted(folder.glob("[0-9][0-9]_*/results.parquet"))
    return {file.parent.name: file for file in found if not file.parent.name.startswith("00_")}


def read_runs(folder: Path) -> dict[str, dict[str, object]]:
    """Name of each report -> what its `run.json` says of the parameters it ran with."""
    runs = {name: file.with_name("run.json").read_text(encoding="utf-8") for name, file in result_files(folder).items()}
    return {name: json.loads(text)["parameters"] for name, text in runs.items()}


def read_results(folder: Path) -> dict[str, pd.DataFrame]:
    """Name of each report -> its results, with the column `made_by`.

    It tells how each pair was made: as the embedded family has it (`SFT` and so on), `given` for a
    pair of the user's own, and missing where neither is known.
    """
    runs = read_runs(folder)
    results = {}
    for name, file in result_files(folder).items():
        table = pd.read_parquet(file)
        pairs = table["model" if "model" in table else "pair"]
        kinds = {relation.name: relation.kind for relation in (*TASK_PAIRS, *ENCODER_PAIRS)}
        made_by = pairs.map(lambda _: GIVEN) if runs[name].get("finetuned") else pairs.map(kinds)
        known = table["made_by"] if "made_by" in table else made_by
        results[name] = table.assign(made_by=known.fillna(made_by))
    return results


def judge(claims: Iterable[Claim], results: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The status of each claim from the results of its report.

    Returns
    -------
    DataFrame, one row a claim, with the fields of `Claim` and `value, low, high`, the effect with
    its 95% interval, NaN without one; `status`; `reason`, why there is no effect, else empty.
    """
    rows = []
    for claim in claims:
        try:
            if claim.notebook not in results:
                raise NotMeasuredError(f"no results of {claim.notebook}")
            if claim.id not in EFFECTS:
                raise NotMeasuredError(f"no effect is computed from {claim.notebook}")
            effect = EFFECTS[claim.id](results[claim.notebook])
            found = {**effect._asdict(), "status": status(claim, effect), "reason": ""}
        except NotMeasuredError as missing:
            where = "" if claim.notebook in str(missing) else f" in the results of {claim.notebook}"
            found = {"status": CANNOT_TELL, "reason": f"{missing}{where}"}
        rows.append({**asdict(claim), "value": float("nan"), "low": float("nan"), "high": float("nan"), **found})
    return pd.DataFrame(rows)


def number_text(value: float, unit: str) -> str:
    """A number in a claim's unit, without the unit's name.

    Examples
    --------
    >>> number_text(0.123, "points"), number_text(float("inf"), "log-odds"), number_text(0.9, "share")
    ('12.3', '∞', '90.0%')
    """
    return SHOWN[unit](value).replace("inf", "∞").replace("-", "−")


def effect_text(row: pd.Series) -> str:
    """The effect of a claim, a row of `judge`, with the name of its unit; empty without an effect.

    Examples
    --------
    >>> effect_text(pd.Series({"value": -0.25, "unit": "points"}))
    '−25.0 points'
    """
    name = row["unit"] if row["unit"] in ("points", "log-odds") else ""
    return "" if pd.isna(row["value"]) else f"{number_text(row['value'], row['unit'])} {name}".rstrip()


def interval_ends_text(row: pd.Series) -> str:
    """The 95% interval of a claim's effect, a row of `judge`; without an effect the reason why.

    Examples
    --------
    >>> interval_ends_text(pd.Series({"value": 0.5, "low": 0.25, "high": 0.75, "unit": "share"}))
    '25.0% to 75.0%'
    """
    if pd.isna(row["value"]):
        return str(row["reason"])
    if row["low"] == row["high"]:
        return "exact"
    return " to ".join(number_text(row[end], row["unit"]) for end in ("low", "high"))


def threshold_text(row: pd.Series) -> str:
    """The claimed side of a claim, a row of `judge`.

    Examples
    --------
    >>> threshold_text(pd.Series({"claimed_at_least": None, "claimed_at_most": 0.5, "unit": "drop rate"}))
    'below 0.50'
    """
    above = pd.notna(row["claimed_at_least"])
    threshold = row["claimed_at_least" if above else "claimed_at_most"]
    return f"{'above' if above else 'below'} {number_text(threshold, row['unit']) if threshold else 0}"


def headline_of(judged: pd.DataFrame) -> str:
    """How many claims have each status."""
    counts = judged["status"].value_counts().reindex(STATUSES, fill_value=0)
    unmeasured = int(judged["value"].isna().sum())
    which = "all" if unmeasured == counts[CANNOT_TELL] else unmeasured
    return (
        f"Of {len(judged)} checkable claims of the papers, the status is "
        + ", ".join(f"{name} for {count}" for name, count in counts.items())
        + (f" ({which} for want of results)." if unmeasured else ".")
    )


def failures(judged: pd.DataFrame) -> list[str]:
    """The claims that were measured and not reproduced, a list for each of the statuses that some have."""
    measured = judged[judged["value"].notna()]
    found = []
    for name in (REVERSED, NOT_REPRODUCED, CANNOT_TELL):
        listed = [
            f"- {row['claim']}: **{effect_text(row)}** ({interval_ends_text(row)}), claimed {threshold_text(row)}."
            for _, row in measured[measured["status"] == name].iterrows()
        ]
        if listed:
            title = name.capitalize() + (" though measured" if name == CANNOT_TELL else "")
            found.append(f"{title}:\n\n" + "\n".join(listed))
    return found


def claims_tables(judged: pd.DataFrame) -> list[str]:
    """The claims of each topic as a table of Markdown."""
    head = "| claim | the paper's figure | claimed side | here | 95% interval | status |\n|---|---|---|---|---|---|\n"

    def line(row: pd.Series) -> str:
        here = [threshold_text(row), effect_text(row), interval_ends_text(row), f"**{row['status']}**"]
        return f"| {' | '.join([row['claim'], row['figure'] or 'none', *here])} |"

    return [
        f"### {topic}\n\n{head}" + "\n".join(line(row) for _, row in rows.iterrows())
        for topic, rows in judged.groupby("topic", sort=False)
    ]


def runs_table(runs: Mapping[str, Mapping[str, object]], results: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """What each report was run on, a row a report."""
    return pd.DataFrame(
        {
            name: {
                "models": f"{run['base']} → {run['finetuned']}" if run.get("finetuned") else "embedded family",
                "pairs": results[name]["pair"].nunique(),
                "masks": run.get("n_seeds", "none"),
                "questions at most": run.get("n_questions", "none"),
                "rows": len(results[name]),
            }
            for name, run in runs.items()
        }
    ).T


def extent(judged: pd.DataFrame, results: Mapping[str, pd.DataFrame]) -> str:
    """How many reports judge, which ones are lacking, and how large the models are."""
    known = [frame["parameters"].dropna() for frame in results.values() if "parameters" in frame]
    sized = pd.concat(known or [pd.Series()])
    lacking = [name for name in dict.fromkeys(judged["notebook"]) if name not in results]
    sizes = " to ".join(dict.fromkeys(f"{x / 1e6:.2g}" for x in (sized.min(), sized.max()))) if len(sized) else ""
    return (
        f"{len(judged)} claims are judged by {len(results)} reports"
        + (f"; of {', '.join(lacking)} there are no results" if lacking else "")
        + "."
        + (f" The models whose size is known have {sizes} million parameters." if sizes else "")
    )


def measurements(judged: pd.DataFrame) -> str:
    """How each claim was measured, and where it was read."""
    return "\n".join(
        f"- **{row['claim']}** ({row['notebook']}): {row['measured']}. Source: {row['source']}."
        for _, row in judged.iterrows()
    )
