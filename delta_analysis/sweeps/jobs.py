"""What a worker does: one edit of a pair, judged and written down, cell by cell."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass

import numpy as np

from delta_analysis.checkpoints import versions
from delta_analysis.evaluation import Evaluation
from delta_analysis.sweeps.cells import CellStore, Row, content
from delta_analysis.sweeps.intervals import KINDS, metric_interval
from delta_analysis.sweeps.pairs import Edit, EditablePair, Edited, Pair, held_pair


@dataclass(frozen=True)
class Job:
    """What a worker is handed: one edit of a pair under one seed (None: the untouched model), and what judges it.

    `hashes` are those of base and fine-tune; `evaluations` have the key of their cell, `cells` is where it goes.
    """

    pair: Pair
    edit: Edit | None
    seed: int
    hashes: tuple[str, str]
    device: str
    cells: CellStore
    evaluations: tuple[tuple[str, Evaluation], ...]


def run_job(job: Job) -> dict[str, list[Row]]:
    """Key -> rows of each cell of a job; one that is finished is written at once, one that failed has its error."""
    results: dict[str, list[Row]] = {}
    try:
        held = held_pair(job.pair, job.hashes, job.device)
        started = time.perf_counter()
        with held.edited(job.edit, job.seed) as edited:
            spent = time.perf_counter() - started
            for key, evaluation in job.evaluations:
                try:
                    rows = _judged(job, held, edited, evaluation, spent)
                    job.cells.write(key, rows)
                except Exception as error:
                    rows = [failed(job, error)]
                results[key] = rows
    except Exception as error:
        return {key: [failed(job, error)] for key, _ in job.evaluations}
    return results


def _judged(job: Job, held: EditablePair, edited: Edited, evaluation: Evaluation, spent: float) -> list[Row]:
    started = time.perf_counter()
    outcomes = held.prepared(evaluation)(edited.model, held.tokenizer)
    seconds = spent + time.perf_counter() - started
    rows = []
    for name, given in outcomes.items():
        values = np.asarray(given, dtype=np.float64)
        value, low, high = metric_interval(KINDS[evaluation.kind], values[None])
        found = {"metric": name, "value": value, "low": low, "high": high, "outcomes": values.tolist()}
        rows.append({**_origin(job), **found, "achieved_drop_rate": edited.achieved_drop_rate, "seconds": seconds})
    return rows


def failed(job: Job, error: Exception) -> Row:
    return {**_origin(job), "error": f"{type(error).__name__}: {error}"}


def _origin(job: Job) -> Row:
    """What a cell's file says of itself, whatever came of it."""
    base, finetuned = job.hashes
    described = {"pair": asdict(job.pair), "edit": content(job.edit), "seed": job.seed}
    return {
        "device": job.device,
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "base_hash": base,
        "finetuned_hash": finetuned,
        "cell": json.dumps(described, ensure_ascii=False),
    }
