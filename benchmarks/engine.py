"""A large sweep of the embedded family: how long it takes, and what the time goes into."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from transformers import LlamaForCausalLM

import delta_analysis as da
from delta_analysis.reports.family import questions_file, task_pairs
from delta_analysis.sweeps import engine as jobs
from delta_analysis.sweeps.cells import CellStore
from delta_analysis.sweeps.pairs import EditablePair

RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1.0)
SEEDS = range(5)
TARGET_MINUTES, TARGET_SHARE = 8, 0.15


def methods(p: float) -> list[Any]:
    """Six methods at one drop rate."""
    return [
        da.Dare(p),
        da.Dare(p, "none"),
        da.Dare(p, "l1"),
        da.MagPrune(p),
        da.Magnitude(p),
        da.Magnitude(p, rescale="inverse_keep"),
    ]


def report(*, quick: bool) -> tuple[str, ...]:
    """Title, sentence and table, as markdown."""
    count, rates, seeds = (20, RATES[::5], SEEDS[:1]) if quick else (500, RATES, SEEDS)
    relations = task_pairs("small")
    evaluations = {
        r.name: (da.evaluation.ExactMatch(tuple(da.evaluation.load_questions(questions_file(r.task), count))),)
        for r in relations
    }
    edits = [method for p in rates for method in methods(p)]
    spent: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for owner, name, label in (
            # The package's own name `sweep` is the function.
            (import_module("delta_analysis.sweeps.engine"), "run_job", "all of the work"),
            (LlamaForCausalLM, "forward", "the model's forward pass"),
            (EditablePair, "prepared", "preparing questions and loading"),
            (jobs, "held_pair", "preparing questions and loading"),
            (jobs, "metric_interval", "intervals"),
        ):
            stack.enter_context(timed(owner, name, label, spent))
        stack.enter_context(timed(CellStore, "write", "writing cells", spent))
        started = time.perf_counter()
        table = da.sweep([r.pair for r in relations], edits, evaluations, seeds, folder)
        elapsed = time.perf_counter() - started
        cells = len(list(Path(folder, "cells").glob("*.parquet")))
        started = time.perf_counter()
        da.sweep([r.pair for r in relations], edits, evaluations, seeds, folder)
        again = time.perf_counter() - started
    work = spent.pop("all of the work")
    other = work - sum(spent.values())
    shares = {**spent, "pruning, editing, restoring; tokens and answers": other}
    rest = 1 - shares["the model's forward pass"] / work
    asked = len(edits) * len(seeds) * len(relations)
    lines = [f"| {label} | {seconds:.1f} | {100 * seconds / work:.1f}% |" for label, seconds in shares.items()]
    verdict = "met" if elapsed < 60 * TARGET_MINUTES and rest <= TARGET_SHARE else "missed"
    return (
        "## A sweep of the embedded family",
        f"6 methods × {len(rates)} drop rates × {len(seeds)} seeds × {len(relations)} pairs × {count} questions: "
        f"{asked} combinations, of which {len(table)} are left where seeds make no difference, for which {cells} cells "
        f"had to run. **{elapsed / 60:.1f} minutes** on {torch.get_num_threads()} cores, {100 * rest:.1f}% of the work "
        f"outside the model's forward pass (targets: {TARGET_MINUTES} minutes, {100 * TARGET_SHARE:.0f}%: {verdict}). "
        f"The same call again, with every cell on disk: {again:.1f} s.",
        "| part of the work | seconds, all threads | share |\n|---|---|---|\n" + "\n".join(lines),
    )


@contextmanager
def timed(owner: Any, name: str, label: str, spent: dict[str, float]) -> Iterator[None]:
    """While it lasts, wall time within a function is added to `spent[label]`, in whatever thread."""
    original: Callable[..., Any] = getattr(owner, name)
    lock = Lock()

    def wrapper(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*arguments, **options)
        finally:
            with lock:
                spent[label] = spent.get(label, 0.0) + time.perf_counter() - started

    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        setattr(owner, name, original)
