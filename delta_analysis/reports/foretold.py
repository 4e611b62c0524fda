"""Foretell beside what is measured: `python -m delta_analysis.reports.foretold`.

Every whole delta of the embedded family, each measured with 8 masks and 500 items as by `calibration`, whose
cells it shares. It takes about an hour on two cores, and goes on where it was when interrupted.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import pandas as pd

from delta_analysis.checkpoints import find_root
from delta_analysis.deltas import load_delta
from delta_analysis.prediction import tolerated_drop_rate
from delta_analysis.reports.calibration import WHOLE, groups, tolerance
from delta_analysis.reports.family import Relation
from delta_analysis.reports.parameter_checks import choose_evaluation
from delta_analysis.sweeps import Pair

MEASURED = ["untouched", "floor", "tolerated", "low", "high", "reading"]
FORETOLD = ["tolerated", "low", "high", "reading", "expansion", "masks", "agreed"]


def foretold_file() -> Path:
    return find_root() / "data" / "reference" / "foretold.csv"


def beside(relation: Relation, group: str, out_dir: Path) -> dict[str, object]:
    """One row: a pair as measured, as foretold (`foretold_…`), and the seconds of a processor that this took."""
    pair = Pair(f"{relation.base} → {relation.finetuned}", relation.base, relation.finetuned)
    measured = tolerance(pair, relation.task, "all", out_dir).iloc[0]
    delta = load_delta(base=relation.base, finetuned=relation.finetuned)
    started = time.process_time()
    found = tolerated_drop_rate(delta, choose_evaluation(relation.task, WHOLE.items))
    return {
        "base": relation.base,
        "finetuned": relation.finetuned,
        "group": group,
        "scope": "all",
        **measured[MEASURED],
        **{f"foretold_{name}": getattr(found, name) for name in FORETOLD},
        "cpu_seconds": time.process_time() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m delta_analysis.reports.foretold", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=find_root() / "runs" / "calibration", help="folder of the cells")
    out = parser.parse_args().out.resolve()
    with warnings.catch_warnings():
        # Small weights of the encoder are stored in coarse steps; the report on value ranges tells.
        warnings.simplefilter("ignore", UserWarning)
        rows = [beside(relation, group, out) for group, relations, _ in groups() for relation in relations]
    pd.DataFrame(rows).to_csv(foretold_file(), index=False, float_format="%.6g", lineterminator="\n")
    print(foretold_file())


if __name__ == "__main__":
    main()
