from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from IPython.display import Markdown

from delta_analysis import notebook
from delta_analysis.notebook import drop_rate_text, file_hashes, write_results
from delta_analysis.paths import find_root


@dataclass(frozen=True)
class _Parameters:
    out_dir: str
    n_seeds: int = 3


def test_results_figure_and_provenance_are_written(tmp_path: Path) -> None:
    figure, _ = plt.subplots()
    table = pd.DataFrame({"a": [1, 2]})
    folder = tmp_path / "new" / "folder"
    read = tmp_path / "questions.jsonl"
    read.write_text("questions")
    write_results(
        _Parameters(str(folder)), table, sources=["zoo:small/base"], files=[read], headline="Found.", figure=figure
    )
    assert sorted(path.name for path in folder.iterdir()) == ["headline.png", "results.parquet", "run.json"]
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "results.parquet"), table)
    run = json.loads((folder / "run.json").read_text())
    assert run["headline"] == "Found."
    assert run["parameters"] == {"out_dir": str(folder), "n_seeds": 3}
    assert {"python", "torch", "delta_analysis"} <= set(run["versions"])
    weights = find_root() / "data/zoo/small/base/model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert run["checkpoints"] == {"zoo:small/base": {"model.safetensors": digest}}
    assert run["files"] == {"questions.jsonl": hashlib.sha256(b"questions").hexdigest()}
    assert (folder / "headline.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_write_leaves_the_former_results(tmp_path: Path) -> None:
    figure, _ = plt.subplots()
    parameters = _Parameters(str(tmp_path))
    write_results(parameters, pd.DataFrame({"a": [1]}), sources=[], headline="First.", figure=figure)
    broken = pd.DataFrame({"a": [1, "text", object()]})
    with pytest.raises((TypeError, ValueError)):
        write_results(parameters, broken, sources=[], headline="Second.", figure=figure)
    assert pd.read_parquet(tmp_path / "results.parquet")["a"].tolist() == [1]
    assert json.loads((tmp_path / "run.json").read_text())["headline"] == "First."


def test_hashes_name_each_weight_file() -> None:
    assert list(file_hashes("zoo:small/math")) == ["model.safetensors"]


def test_sentences_are_shown_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Markdown] = []
    monkeypatch.setattr(notebook, "display", shown.append)
    notebook.say("A **finding**.")
    assert [each.data for each in shown] == ["A **finding**."]


@pytest.mark.parametrize(("p", "text"), [(0.5, "0.50"), (0.96, "0.960"), (0.9981, "0.9981"), (0.001, "at most 0.001")])
def test_drop_rates_near_one_keep_their_digits(p: float, text: str) -> None:
    assert drop_rate_text(p) == text
