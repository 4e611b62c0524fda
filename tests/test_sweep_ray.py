"""A sweep on a real Ray cluster, one of whose workers is killed in the middle."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from delta_analysis.editable import Edit
from delta_analysis.pruning import Dare, Magnitude
from delta_analysis.ray_executor import RayExecutor
from delta_analysis.sweep import sweep
from tests.tiny_family import UP, Judge, Reads, flat, make_family, without_seconds

pytestmark = pytest.mark.usefixtures("cluster")


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


def test_a_sweep_loses_a_worker_and_nothing_else(tmp_path: Path) -> None:
    family, log = make_family(tmp_path), tmp_path / "log"
    edits = [*(Dare(p / 10) for p in range(11)), Edit(Magnitude(0.5), "mlp")]
    judges = [TellsItsProcess(str(log)), Reads()]

    def run(folder: str, executor: RayExecutor | None) -> pd.DataFrame:
        return sweep([family.pair()], edits, judges, [0, 1], tmp_path / folder, executor)

    with ThreadPoolExecutor(1) as thread, RayExecutor() as executor:
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
