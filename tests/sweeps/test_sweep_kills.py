"""Sweeps that are killed, that share a folder, and that lose workers: real processes and SIGKILL."""

from __future__ import annotations

import itertools
import os
import pickle
import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from delta_analysis.pruning import Dare, Magnitude
from delta_analysis.sweeps import cells
from delta_analysis.sweeps.engine import SweepError, sweep
from delta_analysis.sweeps.pairs import Edit, Pair
from tests.tiny_family import (
    UP,
    Fails,
    Family,
    KillsItsProcess,
    Logs,
    Reads,
    calls,
    cells_of,
    make_family,
    without_seconds,
)

WORKERS = 2
N_CELLS = 42
WRITE_TABLE = pq.write_table


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


def run(pair: Pair, evaluation: Logs, out_dir: Path, executor: Executor | None = None) -> pd.DataFrame:
    rates = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    edits = [*map(Dare, rates), *(Edit(Dare(rate, "none"), "mlp") for rate in rates), Dare(0), Magnitude(0.9)]
    return sweep([pair], edits, [evaluation], [0, 1], out_dir, executor)


def run_in_threads(pair: Pair, evaluation: Logs, out_dir: Path) -> None:
    with ThreadPoolExecutor(WORKERS) as pool:
        table = run(pair, evaluation, out_dir, pool)
    Path(f"{evaluation.log}-{os.getpid()}.pickle").write_bytes(pickle.dumps(table))


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_half_and_die(table: object, path: Path) -> None:
    WRITE_TABLE(table, path)
    os.truncate(path, path.stat().st_size // 2)
    die()


def run_until(point: str, count: int, pair: Pair, evaluation: Logs, out_dir: Path) -> None:
    """Kill the own process at the `count`-th cell: before, in or after its file is written, or once it has its name."""
    write, started = cells.CellStore.write, itertools.count(1)

    def counted(store: cells.CellStore, key: str, rows: list[cells.Row]) -> None:
        last = next(started) == count
        if last and point == "before":
            die()
        elif last and point == "in":
            pq.write_table = write_half_and_die
        elif last and point == "after":
            Path.replace = die  # type: ignore[method-assign,assignment]
        write(store, key, rows)
        if last:
            die()

    cells.CellStore.write = counted  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        run(pair, evaluation, out_dir, pool)


def wait_for(holds: Callable[[], object], child: Any) -> None:
    while not holds() and child.is_alive():
        time.sleep(0.001)


def logged(evaluation: Logs) -> list[str]:
    log = Path(evaluation.log)
    # The last line may be half written.
    return log.read_text().split("\n")[:-1] if log.exists() else []


def finished(out_dir: Path) -> set[str]:
    return {repr(pq.read_table(path)["value"][0].as_py()) for path in cells_of(out_dir)}


@pytest.fixture
def evaluation(tmp_path: Path) -> Logs:
    return Logs(str(tmp_path / "log"), seconds=0.008)


@pytest.fixture
def whole(family: Family, evaluation: Logs, tmp_path: Path) -> Iterator[pd.DataFrame]:
    """The table of a sweep that nobody kills."""
    table = run(family.pair(), evaluation, tmp_path / "whole")
    assert calls(evaluation) == N_CELLS == len(set(table["value"]))
    return table


def test_a_sweep_that_is_killed_at_any_moment_goes_on(
    family: Family, evaluation: Logs, whole: pd.DataFrame, tmp_path: Path, processes: ForkServerContext
) -> None:
    out_dir, moments = tmp_path / "out", random.Random(0)
    done: set[str] = set()
    kills = 0
    for _ in range(8):
        before = len(logged(evaluation))
        child = processes.Process(target=run_in_threads, args=(family.pair(), evaluation, out_dir))
        child.start()
        wanted = before + moments.randrange(4)
        wait_for(lambda wanted=wanted: len(logged(evaluation)) >= wanted, child)
        time.sleep(moments.uniform(0, 0.015))
        child.kill()
        child.join()
        kills += child.exitcode == -signal.SIGKILL
        # Nothing that was there was lost, and nothing of it ran again.
        assert done <= finished(out_dir)
        assert done.isdisjoint(logged(evaluation)[before:])
        done = finished(out_dir)
    assert kills >= 5
    assert done
    table = run(family.pair(), evaluation, out_dir)
    assert calls(evaluation) <= N_CELLS + WORKERS * kills
    pd.testing.assert_frame_equal(without_seconds(table), without_seconds(whole))
    assert len(cells_of(out_dir)) == N_CELLS


def test_a_sweep_that_is_killed_while_it_writes_goes_on(
    family: Family, evaluation: Logs, whole: pd.DataFrame, tmp_path: Path, processes: ForkServerContext
) -> None:
    out_dir, there = tmp_path / "out", 0
    for point, count in (("before", 3), ("in", 3), ("after", 3), ("named", 3), ("in", 1)):
        child = processes.Process(target=run_until, args=(point, count, family.pair(), evaluation, out_dir))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        there += count if point == "named" else count - 1
        assert len(cells_of(out_dir)) == there, point
    # What was half written is there, and no cell.
    assert len(list(out_dir.rglob("*.partial"))) == 3
    calls(evaluation)
    table = run(family.pair(), evaluation, out_dir)
    assert calls(evaluation) == N_CELLS - there
    pd.testing.assert_frame_equal(without_seconds(table), without_seconds(whole))


def test_two_processes_share_a_folder(
    family: Family, evaluation: Logs, whole: pd.DataFrame, tmp_path: Path, processes: ForkServerContext
) -> None:
    children = [
        processes.Process(target=run_in_threads, args=(family.pair(), evaluation, tmp_path / "out")) for _ in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    tables = [pickle.loads(path.read_bytes()) for path in tmp_path.glob("*.pickle")]
    assert [child.exitcode for child in children] == [0, 0]
    assert len(tables) == 2
    for table in (*tables, run(family.pair(), evaluation, tmp_path / "out")):
        pd.testing.assert_frame_equal(without_seconds(table), without_seconds(whole))
    assert len(list((tmp_path / "out" / "cells").iterdir())) == N_CELLS


def test_a_pool_of_processes_gives_the_same_table(family: Family, tmp_path: Path, processes: ForkServerContext) -> None:
    asked = ([family.pair()], [Dare(0), Dare(0.5), Edit(Magnitude(0.5), "mlp")], [Reads((UP,))], [0, 1])
    with ProcessPoolExecutor(2, processes) as pool:
        table = sweep(*asked, tmp_path / "pool", pool)
    pd.testing.assert_frame_equal(without_seconds(table), without_seconds(sweep(*asked, tmp_path / "threads")))


def test_a_worker_that_dies_fails_its_cells_and_the_next_sweep_makes_them(
    family: Family, evaluation: Logs, tmp_path: Path, processes: ForkServerContext
) -> None:
    healed = tmp_path / "healed"
    asked = ([family.pair()], [Dare(0.5)], [evaluation, KillsItsProcess(str(healed))], [0], tmp_path / "out")
    with ProcessPoolExecutor(2, processes) as pool:
        for _ in range(2):
            # The second time the pool is broken from the start.
            message = "base → tuned, DARE at drop rate 0.5, seed 0, kills: BrokenProcessPool"
            with pytest.raises(SweepError, match=message) as caught:
                sweep(*asked, pool)
            # What the worker had finished before it died is kept.
            assert caught.value.table["error"].isna().tolist() == [True, False]
    healed.touch()
    with ProcessPoolExecutor(2, processes) as pool:
        table = sweep(*asked, pool)
    assert table["error"].isna().all()
    assert table["value"].notna().all()
    assert calls(evaluation) == 1


def test_a_cell_that_fails_here_and_was_finished_elsewhere_is_kept(family: Family, tmp_path: Path) -> None:
    cause = tmp_path / "cause"
    asked = ([family.pair()], [Dare(0.5)], [Fails(str(cause))], [0], tmp_path / "out")
    cause.touch()

    class MeanwhileElsewhere(ThreadPoolExecutor):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            future = super().submit(fn, *args, **kwargs)
            future.exception()
            cause.unlink()
            sweep(*asked)
            cause.touch()
            return future

    with MeanwhileElsewhere(1) as pool:
        assert sweep(*asked, pool)["error"].isna().all()
    assert sweep(*asked)["error"].isna().all()
