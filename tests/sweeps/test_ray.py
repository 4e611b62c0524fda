"""The executor on a real Ray cluster of two cores, also under a sweep, and with workers that are killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import ray
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from delta_analysis.pruning import Dare, Magnitude
from delta_analysis.sweeps.engine import sweep
from delta_analysis.sweeps.pairs import Edit
from delta_analysis.sweeps.ray import RayExecutor
from tests.tiny_family import UP, Judge, Reads, flat, make_family, without_seconds


@pytest.fixture
def executor(cluster: None) -> Iterator[RayExecutor]:
    with RayExecutor() as executor:
        yield executor


LIMIT = 3600
"""Seconds after which a wait has hung: no measure of how fast a machine should be."""


def wait_for(path: Path, call: Future[Any] | None = None) -> None:
    """Until a file is there; a call that was to write it and has ended instead gives its error at once."""
    # A worker imports the package first, and workers start one after the other.
    started = time.monotonic()
    while not path.exists():
        if call is not None and call.done() and not path.exists():
            raise AssertionError(f"the call ended without {path}") from call.exception()
        if time.monotonic() - started > LIMIT:
            raise TimeoutError(path)
        time.sleep(0.01)


def double(number: int) -> int:
    return 2 * number


def announce(path: Path) -> None:
    whole = path.with_suffix(".tmp")
    whole.write_text(str(os.getpid()))
    whole.rename(path)


def meet(own: Path, other: Path) -> int:
    announce(own)
    wait_for(other)
    return os.getpid()


def killed_the_first_time(path: Path, number: int) -> int:
    if not path.exists():
        announce(path)
        time.sleep(600)
    return 2 * number


def wait_and_double(path: Path, number: int, begun: Path | None = None) -> int:
    if begun is not None:
        announce(begun)
    wait_for(path)
    return 2 * number


class UnreadableError(ValueError):
    """An error of ours, with a field."""

    def __init__(self, file: str) -> None:
        super().__init__(file)
        self.file = file


def read(file: str) -> None:
    raise UnreadableError(file)


@dataclass(frozen=True)
class TellsItsProcess(Judge):
    """Gives entries of a weight, slowly, and appends the number of its process to a file."""

    log: str
    seconds: float = 0.15
    name: str = "tells"

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, np.ndarray]:
        with Path(self.log).open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(self.seconds)
        return {"accuracy": flat(dict(model.named_parameters()), UP)}


def workers_of(log: Path) -> list[int]:
    # The last line may be half written.
    return [int(line) for line in log.read_text().split("\n")[:-1]] if log.exists() else []


def test_calls_run_in_two_workers_at_once(executor: RayExecutor, tmp_path: Path) -> None:
    left, right = tmp_path / "left", tmp_path / "right"
    workers = [executor.submit(meet, left, right), executor.submit(meet, right, other=left)]
    pids = {each.result() for each in workers}
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_as_completed_gives_the_first_that_is_ready(executor: RayExecutor, tmp_path: Path) -> None:
    last = executor.submit(wait_and_double, tmp_path / "go", 1)
    first = executor.submit(double, 2)
    ready = as_completed([last, first])
    assert next(ready) is first
    (tmp_path / "go").touch()
    assert next(ready).result() == 2


def test_errors_come_back_as_themselves(executor: RayExecutor) -> None:
    with pytest.raises(UnreadableError) as caught:
        executor.submit(read, "model.safetensors").result()
    assert type(caught.value) is UnreadableError
    assert caught.value.file == "model.safetensors"
    assert "in read" in caught.value.__notes__[0]


def test_a_callback_is_called_with_the_future(executor: RayExecutor, tmp_path: Path) -> None:
    results: list[int] = []
    future = executor.submit(wait_and_double, tmp_path / "go", 3)
    future.add_done_callback(lambda done: results.append(done.result()))
    (tmp_path / "go").touch()
    executor.shutdown()
    assert results == [6]


def test_a_call_that_waits_can_be_cancelled(executor: RayExecutor, tmp_path: Path) -> None:
    running = [executor.submit(wait_and_double, tmp_path / "go", number) for number in range(2)]
    waiting = executor.submit(announce, tmp_path / "never")
    assert waiting.cancel()
    (tmp_path / "go").touch()
    assert [each.result() for each in running] == [0, 2]
    with pytest.raises(CancelledError):
        waiting.result()
    executor.shutdown()
    assert list(as_completed([waiting])) == [waiting]
    assert not (tmp_path / "never").exists()


def test_shutdown_cancels_its_own_calls_only(cluster: None, tmp_path: Path) -> None:
    mine, other = RayExecutor(), RayExecutor()
    begun = tmp_path / "begun"
    kept = other.submit(wait_and_double, tmp_path / "go", 4)
    stopped = mine.submit(wait_and_double, tmp_path / "never", 5, begun)
    wait_for(begun, stopped)
    mine.shutdown(cancel_futures=True)
    assert stopped.cancelled()
    with pytest.raises(RuntimeError, match="after shutdown"):
        mine.submit(double, 1)
    (tmp_path / "go").touch()
    assert kept.result() == 8
    # Its worker is free again, and so is the cluster.
    assert [each.result() for each in (other.submit(double, 1), other.submit(double, 2))] == [2, 4]
    other.shutdown()
    assert ray.is_initialized()


@pytest.mark.parametrize("cores", [1, 2])
def test_torch_uses_the_cores_that_were_reserved(cluster: None, cores: int) -> None:
    with RayExecutor(num_cpus=cores) as executor:
        assert executor.submit(torch.get_num_threads).result() == cores


def test_without_a_cluster_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match=r"call ray\.init\(address="):
        RayExecutor()


def test_without_ray_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"delta_analysis\[scale\]"):
        RayExecutor()


# Kills are last, since a worker takes seconds to start.
def test_a_sweep_loses_a_worker_and_nothing_else(executor: RayExecutor, tmp_path: Path) -> None:
    family, log = make_family(tmp_path), tmp_path / "log"
    edits = [*(Dare(p / 10) for p in range(11)), Edit(Magnitude(0.5), "mlp")]
    judges = [TellsItsProcess(str(log)), Reads()]

    def run(folder: str, executor: RayExecutor | None) -> pd.DataFrame:
        return sweep([family.pair()], edits, judges, [0, 1], tmp_path / folder, executor)

    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(run, "on ray", executor)
        while len(set(workers_of(log))) < 2 or len(workers_of(log)) < 6:
            assert not running.done()
            time.sleep(0.01)
        killed, before = workers_of(log)[-1], len(workers_of(log))
        os.kill(killed, signal.SIGKILL)
        table = running.result()
    assert len(set(workers_of(log)[before + 2 :])) >= 1
    assert killed not in workers_of(log)[before + 2 :]
    expected = run("here", None)
    pd.testing.assert_frame_equal(without_seconds(table), without_seconds(expected))
    assert table["error"].isna().all()


def test_a_worker_that_dies_too_often_is_an_error(cluster: None, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    with RayExecutor(max_retries=0) as executor:
        hurt = executor.submit(killed_the_first_time, begun, 1)
        wait_for(begun)
        os.kill(int(begun.read_text()), signal.SIGKILL)
        assert isinstance(hurt.exception(), ray.exceptions.WorkerCrashedError)
