"""Measure the tolerated drop rates of the family: `python -m delta_analysis.reports.calibration`.

The tolerated drop rates of DARE in the embedded family: every pair of all sizes, the fine-tune `code`
against each checkpoint of the trail, and the encoder, dropped from in all tensors and in parts of
them. Whole deltas are measured with 8 masks and 500 items, parts with 4 and 200. It takes some two hours
on two cores, and goes on where it was when interrupted.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from delta_analysis.checkpoints import content_hash, find_root, written_whole
from delta_analysis.deltas import load_delta
from delta_analysis.prediction import calibration_file
from delta_analysis.pruning import Dare
from delta_analysis.reports.family import BOTH, ENCODER_PAIRS, SIZES, Relation, task_pairs, trail
from delta_analysis.reports.parameter_checks import choose_evaluation
from delta_analysis.studies import delta_predictors
from delta_analysis.sweeps import HIGHEST, LOWEST, Edit, Pair, inverse_logit, logit, measure_tolerance


class Effort(NamedTuple):
    """How many masks and items a tolerance is measured with, how many at a first look, and how finely."""

    masks: int
    items: int
    looked: tuple[int, int]
    resolution: float


WHOLE, PART = Effort(8, 500, (2, 100), 0.25), Effort(4, 200, (2, 50), 0.5)
"""For whole deltas, and for parts of them."""
TEXTS = 64
"""Questions, with their answers, that layers get their inputs from."""
PARTS = ("all", "attention", "mlp", "embeddings")


def groups() -> Iterator[tuple[str, tuple[Relation, ...], tuple[str, ...]]]:
    """What is measured: a name, the pairs, and the scopes."""
    layers = tuple(f"*.layers.{k}.*" for k in range(4))
    trailing = tuple(Relation(source, "zoo:small/code", BOTH, "code") for _, source in trail()[:-1])
    for size in SIZES:
        deep = (*PARTS, "norms", *layers) if size == "small" else (*PARTS, layers[0], layers[-1])
        yield size, task_pairs(size), deep
    yield "trail", trailing, PARTS
    encoders = tuple(relation for relation in ENCODER_PAIRS if relation.task)
    yield "encoder", encoders, (*PARTS, "*.layer.0.*", "*.layer.1.*")


TOLERANCE = ("untouched", "floor", "tolerated", "low", "high", "reading", "open_low", "open_high")


def tolerance(pair: Pair, task: str, scope: str, out_dir: str | Path) -> pd.DataFrame:
    """The row of `measure_tolerance`; the search begins half a unit on either side of what a first look finds."""
    edit, effort = Edit(Dare(0.5), scope), WHOLE if scope == "all" else PART
    masks, items = effort.looked
    rough, _ = measure_tolerance(
        [pair], edit, [choose_evaluation(task, items)], range(masks), out_dir, resolution=2 * effort.resolution
    )
    p = rough["tolerated"][0]
    around = [] if math.isnan(p) else [inverse_logit(logit(p) + x) for x in (-0.5, 0.5)]
    return measure_tolerance(
        [pair],
        edit,
        [choose_evaluation(task, effort.items)],
        range(effort.masks),
        out_dir,
        drop_rates=[rate for rate in around if LOWEST < rate < HIGHEST],
        resolution=effort.resolution,
    )[0]


def measure(relations: Sequence[Relation], scopes: Sequence[str], out_dir: str | Path) -> pd.DataFrame:
    """Tolerated drop rates and predictors, one row a pair and scope; the columns of `calibration_table`."""
    pairs = [Pair(f"{r.base} → {r.finetuned}", r.base, r.finetuned) for r in relations]
    measured = [
        tolerance(pair, relation.task, scope, out_dir)
        for scope in scopes
        for pair, relation in zip(pairs, relations, strict=True)
    ]
    tolerances = pd.concat(measured).drop(columns="method")
    described = []
    for pair, relation in zip(pairs, relations, strict=True):
        delta = load_delta(base=pair.base, finetuned=pair.finetuned)
        predictors = delta_predictors(delta, scopes, choose_evaluation(relation.task, TEXTS).texts)
        origin = {
            "base": relation.base,
            "finetuned": relation.finetuned,
            "kind": relation.kind,
            "task": relation.task,
            "numel": sum(tensor.numel() for tensor in delta.values()),
            "base_hash": content_hash(relation.base),
            "finetuned_hash": content_hash(relation.finetuned),
        }
        described.append(predictors.assign(pair=pair.name, **origin))
    joined = pd.concat(described).merge(tolerances, on=["pair", "scope"], validate="one_to_one")
    first = [*origin, "scope", *TOLERANCE]
    return joined[[*first, *(c for c in joined if c not in (*first, "pair"))]]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m delta_analysis.reports.calibration", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=find_root() / "runs" / "calibration", help="folder of the cells")
    out = parser.parse_args().out.resolve()
    tables = []
    for name, relations, scopes in groups():
        print(f"{name}: {len(relations)} pairs in {len(scopes)} scopes", flush=True)
        with warnings.catch_warnings():
            # Small weights of the encoder are stored in coarse steps; the report on value ranges tells.
            warnings.simplefilter("ignore", UserWarning)
            tables.append(measure(relations, scopes, out).assign(group=name))
    file = calibration_file()
    with written_whole(file) as partial:
        pd.concat(tables).to_csv(partial, index=False, float_format="%.6g", lineterminator="\n")
    print(file)


if __name__ == "__main__":
    main()
