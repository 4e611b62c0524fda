"""Judge many edits of many pairs: cells that are run once, kept on disk, and joined into a tidy table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from operator import index
from pathlib import Path
from typing import TextIO

import pandas as pd
import torch
from tqdm import tqdm

from delta_analysis._kernels import single_threaded_pool
from delta_analysis.checkpoints import content_hash, open_checkpoint
from delta_analysis.evaluation import Evaluation, check_device
from delta_analysis.pruning import Dare, Pruner
from delta_analysis.sweeps.cells import SCHEMA, CellStore, Row, code_digest, content, digest
from delta_analysis.sweeps.jobs import Job, failed, run_job
from delta_analysis.sweeps.merges import Merging, release_statistics
from delta_analysis.sweeps.pairs import Edit, Pair, edited_source, release_pairs

LARGE = 2**28
"""Bytes of a fine-tuned model whose matrices fill several cores; smaller ones are judged one a core."""


Evaluations = Sequence[Evaluation] | Mapping[str, Sequence[Evaluation]]
"""What all pairs are judged by, or name of a pair -> what it is judged by."""


Hashes = Mapping[Pair, tuple[str, str]]
"""Hashes of a pair's base and fine-tune."""


class SweepError(ValueError):
    """Some cells failed. All others are in `table`, and on disk: the same call again runs only those that failed."""

    def __init__(self, message: str, table: pd.DataFrame) -> None:
        super().__init__(message)
        self.table = table

    def __reduce__(self) -> tuple[type[SweepError], tuple[str, pd.DataFrame]]:
        return type(self), (str(self), self.table)


@dataclass(frozen=True)
class Cell:
    """One evaluation of one pair under one edit and seed."""

    pair: Pair
    edit: Edit
    seed: int
    evaluation: Evaluation


def sweep(
    pairs: Sequence[Pair],
    edits: Sequence[Edit | Pruner],
    evaluations: Evaluations,
    seeds: Sequence[int],
    out_dir: str | Path,
    executor: Executor | None = None,
    *,
    device: str = "cpu",
    progress: TextIO | None = None,
) -> pd.DataFrame:
    """Judge every pair under every edit and seed by every evaluation.

    Each cell is written to disk when it is done, under a name made of what it consists of: hashes of the
    checkpoints' files, the edit, the seed, the evaluation and a hash of the code that computes it.
    A sweep that was killed goes on where it was; one that asks for more runs only what is new.
    At drop rates 0 (the untouched model) and 1 (the base in the edit's scope) no random number and
    no method matters, and magnitude pruning is random only where magnitudes tie: such cells run once,
    under the first seed.

    Parameters
    ----------
    pairs : what is compared.
    edits : pruners such as `Dare(0.5)`, or `Edit(Dare(0.5), scope="attention")`. By default all
        tensors that the delta has are edited: embeddings, norms and biases too, as in DARE's scripts
        for language models; of a classifier all but its head, as in those for GLUE.
    evaluations : such as `[ExactMatch(questions)]`, for all pairs; or for each pair its own.
    seeds : one mask for each; masks are nested across drop rates and shared by rescale variants.
    out_dir : the cells lie in its folder `cells`, or in the one that the environment variable
        `DELTA_ANALYSIS_CELLS` names; sweeps may share it, also at the same time. Workers write into it what
        they finish, if they see it, else what comes back is written here.
    executor : where cells run: any `concurrent.futures.Executor`, such as `RayExecutor()` or processes
        that are not forked. By default
        threads of this process: one a core for small models, which share the base and the delta and
        each edit a model of their own; a single one, with all cores, for large models.
    device : where the models run.
    progress : a stream for a bar of cells done, rate and time left; by default standard error if it
        is a terminal.

    Returns
    -------
    DataFrame, one row a cell and metric: `pair, method, drop_rate, rescale, scope, seed, evaluation,
    metric`; its `kind` (`score`, `perplexity` or `error`, as the evaluation says); `value` with its 95%
    interval `low, high` over items; `achieved_drop_rate` of the entries in scope that were not zero;
    `seconds` of pruning and evaluating; `outcomes`, one for each item; a column `option_<name>` for each
    option of a pruner beyond drop rate and rescale, missing where it has none; `device`, `versions`,
    `base_hash`, `finetuned_hash`; `error`, missing where there was none.

    Raises
    ------
    SweepError
        At the end, if cells failed: it names them and has the table, where they stand with their error.
    CheckpointError
        Before any work, a source that cannot be read.
    ValueError
        Before any work, an evaluation, device or executor that cannot serve.
    """
    asked = [
        Cell(pair, edit, seed, evaluation)
        for pair in pairs
        for edit in map(as_edit, edits)
        for seed in useful_seeds(edit.pruner, seeds)
        for evaluation in evaluations_of(pair, evaluations)
    ]
    try:
        return judge(asked, out_dir, executor, device=device, progress=progress)
    finally:
        release()


def release() -> None:
    """Let go of what is too large to be held for the next sweep."""
    release_pairs()
    release_statistics()


def as_edit(edit: Edit | Pruner) -> Edit:
    """A pruner alone edits all tensors."""
    return edit if isinstance(edit, Edit) else Edit(edit)


def useful_seeds(pruner: Pruner, seeds: Sequence[int]) -> list[int]:
    """The seeds that make a difference: all of them, or the first for a pruner that is not random."""
    return [index(seed) for seed in (seeds if pruner.random else seeds[:1])]


def evaluations_of(pair: Pair, evaluations: Evaluations) -> Sequence[Evaluation]:
    """What a pair is judged by."""
    own = evaluations.get(pair.name) if isinstance(evaluations, Mapping) else evaluations
    if not own:
        raise ValueError(f"evaluations: none is given for pair {pair.name!r}")
    if len({each.name for each in own}) < len(own):
        raise ValueError(f"evaluations: two of pair {pair.name!r} bear the same name; give each a name of its own")
    return own


def judge(
    asked: Sequence[Cell],
    out_dir: str | Path,
    executor: Executor | None = None,
    *,
    device: str = "cpu",
    progress: TextIO | None = None,
) -> pd.DataFrame:
    """The table of `sweep` for any list of cells."""
    pairs = dict.fromkeys(cell.pair for cell in asked)
    if not pairs:
        raise ValueError("no cell is asked for; give at least one pair, edit, evaluation and seed")
    if len({pair.name for pair in pairs}) < len(pairs):
        raise ValueError("pairs: two that differ bear the same name, so no table could tell them apart; rename one")
    check_device(device)
    _refuse_fork(executor)
    hashes = {pair: (content_hash(pair.base) if pair.base else "", content_hash(pair.finetuned)) for pair in pairs}
    _check_merges(asked, hashes)
    store = CellStore.of(out_dir)
    keys, jobs = _plan(asked, hashes, device, store)
    done = {key: rows for key in set(keys) if (rows := store.read(key))}
    missing = [job for each in jobs if (job := _without(each, done)).evaluations]
    shown = None if progress is None else False
    with tqdm(total=len(set(keys)), initial=len(done), unit="cell", disable=shown, file=progress) as bar:
        for results in _run(missing, executor):
            for key, rows in results.items():
                # Finished by its worker, even one that died later, or by another sweep; else it failed here, or
                # the worker does not see this folder.
                if (finished := store.read(key)) is None:
                    store.write(key, rows)
                done[key] = finished or rows
                bar.update()
    table = _table(asked, hashes, [done[key] for key in keys])
    if table["error"].notna().any():
        raise SweepError(_failures(table), table)
    return table


def _check_merges(asked: Sequence[Cell], hashes: Hashes) -> None:
    for cell in asked:
        pruner, pair = cell.edit.pruner, cell.pair
        if isinstance(pruner, Merging) and pruner.sources[0].hashes != hashes[pair]:
            own = pruner.sources[0].finetuned
            raise ValueError(f"a merge of {own} is an edit of its own pair, and {pair.name!r} is another")


def _refuse_fork(executor: Executor | None) -> None:
    """A forked child inherits locks of torch's threads that no thread of its own will ever open."""
    context = getattr(executor, "_mp_context", None)
    if context is not None and context.get_start_method() == "fork":
        raise ValueError(
            "executor: its processes are forked, in which torch hangs; give "
            'ProcessPoolExecutor(n, mp_context=multiprocessing.get_context("spawn"))'
        )


def _plan(asked: Sequence[Cell], hashes: Hashes, device: str, store: CellStore) -> tuple[list[str], list[Job]]:
    """The key of each cell, and the jobs that give all of them, each cell once."""
    judged = {cell.evaluation: _without_name(cell.evaluation) for cell in asked}
    code = code_digest()
    keys: list[str] = []
    planned: set[str] = set()
    groups: dict[tuple[Pair, Edit | None, int], dict[str, Evaluation]] = {}
    is_delta: dict[Pair, bool] = {}
    for cell in asked:
        edit, seed = _canonical(cell.edit, cell.seed)
        base, finetuned = hashes[cell.pair]
        # An untouched fine-tune is the same whatever its base; an adapter is nothing without it.
        if edit is None and cell.pair not in is_delta:
            is_delta[cell.pair] = open_checkpoint(cell.pair.finetuned).is_delta
        matters = edit is not None or is_delta[cell.pair]
        described = [base if matters else "", finetuned, content(edit), seed, judged[cell.evaluation], code]
        keys.append(digest(described))
        if keys[-1] not in planned:
            planned.add(keys[-1])
            groups.setdefault((cell.pair, edit, seed), {})[keys[-1]] = cell.evaluation
    return keys, [
        Job(pair, edit, seed, hashes[pair], device, store, tuple(wanted.items()))
        for (pair, edit, seed), wanted in groups.items()
    ]


def _canonical(edit: Edit, seed: int) -> tuple[Edit | None, int]:
    """The same for all edits that do the same: nothing at drop rate 0, everything dropped at 1."""
    pruner = edit.pruner
    if pruner.drop_rate == 0 and isinstance(pruner.rescale, str):
        return (None if edit.change is None else replace(edit, pruner=Dare(0.0))), 0
    return (Edit(Dare(1.0), edit.scope), 0) if pruner.drop_rate == 1 else (edit, seed)


def _without_name(evaluation: Evaluation) -> str:
    described = content(evaluation)
    assert isinstance(described, dict)
    return digest({field: value for field, value in described.items() if field != "name"})


def _without(job: Job, done: Mapping[str, object]) -> Job:
    """The job without the cells that are done."""
    return replace(job, evaluations=tuple(each for each in job.evaluations if each[0] not in done))


def _run(jobs: Sequence[Job], executor: Executor | None) -> Iterator[dict[str, list[Row]]]:
    """The results of the jobs in the order in which they end."""
    with _pool(jobs) if executor is None else nullcontext(executor) as pool:
        futures: dict[Future[dict[str, list[Row]]], Job] = {}
        try:
            for job in jobs:
                futures[_submitted(pool, job)] = job
            for future in as_completed(futures):
                yield _results(future, futures[future])
        finally:
            for future in futures:
                future.cancel()


def _submitted(pool: Executor, job: Job) -> Future[dict[str, list[Row]]]:
    """The future of a job; one that has failed if a worker that died has broken the pool."""
    try:
        return pool.submit(run_job, job)
    except BrokenExecutor as error:
        lost: Future[dict[str, list[Row]]] = Future()
        lost.set_exception(error)
        return lost


@contextmanager
def _pool(jobs: Sequence[Job]) -> Iterator[Executor]:
    """Threads of this process: one a core for small models on the CPU, else a single one."""
    # A pair is opened once, not for every job: that may ask the hub.
    edited = {edited_source(pair) for pair in dict.fromkeys(job.pair for job in jobs)}
    largest = max((sum(f.stat().st_size for f in open_checkpoint(source).files()) for source in edited), default=0)
    small = all(job.device == "cpu" for job in jobs) and largest < LARGE
    workers = min(torch.get_num_threads(), len(jobs)) if small else 1
    pool = single_threaded_pool(workers) if workers > 1 else ThreadPoolExecutor(1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _results(future: Future[dict[str, list[Row]]], job: Job) -> dict[str, list[Row]]:
    """What a job gave; if its worker died, its cells with that error."""
    try:
        return future.result()
    except Exception as error:
        return {key: [failed(job, error)] for key, _ in job.evaluations}


def _table(asked: Sequence[Cell], hashes: Hashes, found: Sequence[list[Row]]) -> pd.DataFrame:
    """The rows of cells under the names that were asked for."""
    rows = []
    for cell, measured in zip(asked, found, strict=True):
        pruner = cell.edit.pruner
        labels = {
            "pair": cell.pair.name,
            "method": cell.edit.method,
            "drop_rate": float(pruner.drop_rate),
            "rescale": str(pruner.rescale),
            "scope": cell.edit.scope,
            "seed": cell.seed,
            "evaluation": cell.evaluation.name,
        }
        # A cell of two pairs says the base of the one that it ran for.
        own = {
            "kind": cell.evaluation.kind,
            **options(pruner),
            **dict(zip(("base_hash", "finetuned_hash"), hashes[cell.pair], strict=True)),
        }
        rows += [{**labels, **{c: row.get(c) for c in SCHEMA.names if c != "cell"}, **own} for row in measured]
    chosen = sorted({column for row in rows for column in row if column.startswith("option_")})
    table = pd.DataFrame(rows)
    measures = ["metric", "kind", "value", "low", "high", "achieved_drop_rate", "seconds", "outcomes"]
    origin = ["device", "versions", "base_hash", "finetuned_hash", "error"]
    return table[[*labels, *measures, *chosen, *origin]]


def _failures(table: pd.DataFrame) -> str:
    failed = table[table["error"].notna()]
    named = [
        f"{row.pair}, {row.method} at drop rate {row.drop_rate:g}, seed {row.seed}, {row.evaluation}: {row.error}"
        for row in failed.head(5).itertuples()
    ]
    more = [f"and {len(failed) - 5} more"] if len(failed) > 5 else []
    return (
        f"{len(failed)} of {len(table)} rows of the sweep failed; the others are kept, the same call runs only these "
        "again:\n" + "\n".join(named + more)
    )


def options(pruner: Pruner) -> dict[str, object]:
    """What a pruner has beyond drop rate and rescale, as columns such as `option_window`."""
    own = [each.name for each in fields(pruner) if each.name not in ("drop_rate", "rescale")]  # type: ignore[arg-type]
    return {f"option_{name}": str(getattr(pruner, name)) for name in own}
