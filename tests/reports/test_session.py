from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from IPython.display import Markdown

from delta_analysis import plots
from delta_analysis.checkpoints.paths import find_root
from delta_analysis.evaluation import ExactMatch, Question, TextPerplexity
from delta_analysis.reports import session as notebook
from delta_analysis.reports.session import (
    check_answers,
    drop_rate_text,
    notes,
    panels,
    protocols,
    scope_text,
    shared_legend,
    write_results,
)
from delta_analysis.sweeps.cells import STORE, CellStore
from delta_analysis.sweeps.pairs import Pair
from tests.conftest import SaveCheckpoint


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
    assert run["parameters"] == {"n_seeds": 3}
    assert {"python", "torch", "delta_analysis"} <= set(run["versions"])
    weights = find_root() / "data/zoo/small/base/model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert run["checkpoints"] == {"zoo:small/base": {"model.safetensors": digest}}
    assert run["files"] == {"questions.jsonl": hashlib.sha256(b"questions").hexdigest()}
    assert (folder / "headline.png").read_bytes().startswith(b"\x89PNG")


def test_reports_share_a_store_of_cells_unless_another_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "set_style", lambda: None)
    monkeypatch.setenv(STORE, "/elsewhere")
    notebook.begin()
    assert CellStore.of("runs/x").folder == Path("/elsewhere")
    monkeypatch.delenv(STORE)
    notebook.begin()
    assert CellStore.of("runs/x").folder == CellStore.of("runs/y").folder == find_root() / "runs" / "cells"
    monkeypatch.delenv(STORE)


def test_a_failed_write_leaves_the_former_results(tmp_path: Path) -> None:
    figure, _ = plt.subplots()
    parameters = _Parameters(str(tmp_path))
    write_results(parameters, pd.DataFrame({"a": [1]}), sources=[], headline="First.", figure=figure)
    broken = pd.DataFrame({"a": [1, "text", object()]})
    with pytest.raises((TypeError, ValueError)):
        write_results(parameters, broken, sources=[], headline="Second.", figure=figure)
    assert pd.read_parquet(tmp_path / "results.parquet")["a"].tolist() == [1]
    assert json.loads((tmp_path / "run.json").read_text())["headline"] == "First."


def test_sentences_are_shown_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Markdown] = []
    monkeypatch.setattr(notebook, "display", shown.append)
    notebook.say("A **finding**.")
    assert [each.data for each in shown] == ["A **finding**."]


@pytest.mark.parametrize(
    ("p", "text"), [(0.5, "0.50"), (0.96, "0.960"), (0.9981, "0.9981"), (0.99981, "0.99981"), (0.001, "at most 0.001")]
)
def test_drop_rates_near_one_keep_their_digits(p: float, text: str) -> None:
    assert drop_rate_text(p) == text


def test_warnings_become_notes_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Markdown] = []
    monkeypatch.setattr(notebook, "display", shown.append)
    with notes():
        warnings.warn("a vocabulary is larger", UserWarning, stacklevel=1)
    assert [each.data for each in shown] == ["**Note.** a vocabulary is larger"]


def test_pairs_that_are_judged_alike_share_a_line() -> None:
    questions = ExactMatch((Question("1+1=", "2"),), name="sums")
    text = TextPerplexity("some text", name="own.txt")
    lines = protocols({"a → b": (questions,), "c → d": (text, questions)}).splitlines()
    assert lines == [
        f"- *a → b; c → d*, sums: {questions.protocol}",
        f"- *c → d*, own.txt: {text.protocol}",
    ]


def test_alike_evaluations_of_other_names_do_not_share_a_line() -> None:
    one, other = (ExactMatch((Question("1+1=", "2"),), name=name) for name in ("sums", "totals"))
    assert protocols({"a": (one,), "b": (other,)}).count("\n") == 1


def test_the_scope_is_told_with_its_share_of_the_entries(save_checkpoint: SaveCheckpoint) -> None:
    weights = {
        "model.layers.0.self_attn.q_proj.weight": torch.ones(3, 4),
        "model.layers.0.mlp.up_proj.weight": torch.ones(6, 4),
        "model.norm.weight": torch.ones(4),
    }
    own = save_checkpoint("tuned", weights | {"lm_head.weight": torch.ones(5, 4)})
    pair = Pair("base → tuned", str(save_checkpoint("base", weights)), str(own))
    # The head has no counterpart: 12 + 24 + 4 entries are compared.
    assert (
        scope_text("attention", [pair]) == "Edited: scope `attention`, 1 of 3 tensors (30% of the entries) of a delta."
    )
    assert "`all`, 3 of 3 tensors (100% of the entries)" in scope_text("all", [pair, pair])
    other = Pair("tuned", None, str(own))
    told = "scope `norms, mlp`, 2 of 3 tensors (70% of the entries) or 2 of 4 tensors (47% of the entries) of a delta."
    assert told in scope_text("norms, mlp", [pair, other, pair])


def _cells(*rows: tuple[str, float, str, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["pair", "drop_rate", "metric", "value"])


def test_a_model_that_answers_nothing_is_no_ability_to_measure() -> None:
    check_answers(_cells(("a", 0.0, "accuracy", 0.1), ("a", 0.9, "accuracy", 0.0), ("a", 0.0, "kl", 0.0)))
    silent = _cells(("a", 0.0, "accuracy", 0.5), ("b", 0.0, "accuracy", 0.0), ("b", 0.0, "accuracy", 0.0))
    with pytest.raises(ValueError, match="parameter evaluation: b answers none of the questions even untouched"):
        check_answers(silent)


@pytest.mark.parametrize(("count", "grid"), [(1, (1, 1)), (2, (1, 2)), (3, (2, 2)), (4, (2, 2)), (5, (3, 2))])
def test_panels_stand_in_rows_of_two_and_no_empty_one_is_left(count: int, grid: tuple[int, int]) -> None:
    names = [f"pair {i}" for i in range(count)]
    figure, axes = panels(names, sharey=True)
    assert list(axes) == names == [ax.get_title(loc="center") for ax in axes.values()]
    assert figure.axes == list(axes.values())
    places = [ax.get_subplotspec() for ax in axes.values()]
    assert [(place.rowspan.start, place.colspan.start) for place in places if place] == [
        divmod(i, 2) for i in range(count)
    ]
    assert places[0] is not None
    assert places[0].get_gridspec().get_geometry() == grid


def test_panels_share_one_legend_below_them() -> None:
    figure, axes = panels(["a", "b", "c"])
    for ax in axes.values():
        ax.plot([0, 1], [0, 1], label="DARE")
        ax.set_xlabel("drop rate")
    shared_legend(figure, axes["c"])
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["DARE"]
    assert legend.get_window_extent().y1 <= min(ax.get_tightbbox().y0 for ax in axes.values())
