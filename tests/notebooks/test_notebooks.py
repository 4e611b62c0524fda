"""The committed notebooks are clean, and run with parameters other than their defaults."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import fields
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import papermill
import pytest

from delta_analysis.checkpoints.paths import find_root
from delta_analysis.deltas.delta import load_delta
from delta_analysis.reports.merge_parameters import MergeParameters
from delta_analysis.reports.overview import OverviewParameters
from delta_analysis.reports.parameter_checks import ParameterError
from delta_analysis.reports.parameters import (
    AblationParameters,
    ContinualParameters,
    ModelSizeParameters,
    ValueRangesParameters,
)
from tests.notebooks.in_process import run_notebook

FOLDER = find_root() / "notebooks"
PARAMETERS: dict[str, type] = {
    "00_overview": OverviewParameters,
    "01_value_ranges": ValueRangesParameters,
    "02_dare_ablation": AblationParameters,
    "03_rescale_vs_drop_only": AblationParameters,
    "04_pruning_methods": AblationParameters,
    "05_continual_pretraining": ContinualParameters,
    "06_finetuned_vs_delta": AblationParameters,
    "07_model_size": ModelSizeParameters,
    "08_merging": MergeParameters,
}
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("[0-9]*.ipynb"))
PAIR = {"base": "zoo:small/base", "finetuned": "zoo:small/math"}
PAIRS = {"base": "zoo:small/base,zoo:small/code-cpt", "finetuned": "zoo:small/math,zoo:small/code"}
SINGLE = {"base": "zoo:tiny/code-cpt", "finetuned": "zoo:tiny/code"}
TUNED = {"base": "zoo:tiny/base", "finetuned": "zoo:tiny/instruct,zoo:tiny/math", "evaluation": "instruct,math"}
ENCODER = {"base": "zoo:encoder/base", "finetuned": "zoo:encoder/strings"}
TASK = "strings-right"
FEW: dict[str, Any] = {"first_seed": 3, "n_seeds": 2, "n_questions": 20}

pytestmark = [
    # Notebook clients of the current releases leave sockets and event loops to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def _read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def _outputs(notebook: nbformat.NotebookNode) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_every_notebook_is_tested() -> None:
    assert list(PARAMETERS) == NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_parameters_are_those_of_the_dataclass_and_have_help(name: str) -> None:
    declared = papermill.inspect_notebook(str(FOLDER / f"{name}.ipynb"))
    assert set(declared) == {field.name for field in fields(PARAMETERS[name])}
    for parameter in declared.values():
        assert parameter["help"], parameter
        assert parameter["inferred_type_name"] in {"str", "int", "float", "list", "bool"}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_notebooks_are_clean(name: str) -> None:
    notebook = _read(name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells) == 1
    assert notebook.cells[0].source.startswith("# ")
    assert notebook.cells[0].source.splitlines()[0].endswith("?")
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    assert (FOLDER / f"{name}.ipynb").stat().st_size <= 300_000
    for output in _outputs(notebook):
        assert output.output_type not in {"error", "stream"}
        text = json.dumps({mime: data for mime, data in output.get("data", {}).items() if mime != "image/png"})
        assert not re.search(r"/(home|root|work|tmp|Users)/|0x[0-9a-f]{6,}", text)


LONGEST = 12
STILL_COMPUTING = [name for name in NOTEBOOKS if name[:2] not in ("00", "02", "07")]
"""Notebooks that hold code which is to move into the package."""


@pytest.mark.parametrize("name", sorted(set(NOTEBOOKS) - set(STILL_COMPUTING)))
def test_a_notebook_calls_what_the_package_computes(name: str) -> None:
    for cell in _read(name).cells:
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
            assert len(cell.source.splitlines()) <= LONGEST, cell.source
            assert not re.search(r"^\s*(def|class) ", cell.source, flags=re.M), cell.source


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_results_are_of_the_committed_notebook(name: str) -> None:
    folder = FOLDER / "results" / name
    run = json.loads((folder / "run.json").read_text())
    assert (folder / "results.parquet").stat().st_size <= 1_000_000
    assert not pd.read_parquet(folder / "results.parquet").empty
    shown = "".join(output.data.get("text/markdown", "") for output in _outputs(_read(name)) if "data" in output)
    assert run["headline"] in shown.replace("**", "")


def running(name: str, **parameters: Any) -> pytest.MarkDecorator:
    """Give a test a run of a notebook, and what it has left: `run`, or `results` and `record`."""
    return pytest.mark.parametrize("run", [(name, parameters)], indirect=True, ids=[name])


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, processes: ForkServerContext, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[nbformat.NotebookNode]]]:
    """The runs that the tests ask for, two at a time, by the names of the tests."""
    asked = {
        item.name: item.callspec.params["run"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.module is request.module and "run" in item.fixturenames
    }
    folder = tmp_path_factory.mktemp
    cells = folder("cells")
    with ProcessPoolExecutor(2, processes, max_tasks_per_child=1) as pool:
        yield {test: pool.submit(run_notebook, *each, folder("run"), cells) for test, each in asked.items()}


@pytest.fixture
def run(
    request: pytest.FixtureRequest, runs: dict[str, Future[nbformat.NotebookNode]]
) -> Future[nbformat.NotebookNode]:
    return runs[request.node.name]


@pytest.fixture
def left(run: Future[nbformat.NotebookNode]) -> Path:
    """The folder of what a run has left."""
    notebook = run.result()
    assert any("image/png" in output.data for output in _outputs(notebook))
    return Path(notebook.metadata.papermill.output_path).parent / "results"


@pytest.fixture
def results(left: Path) -> pd.DataFrame:
    return pd.read_parquet(left / "results.parquet")


@pytest.fixture
def record(left: Path) -> dict[str, Any]:
    return json.loads((left / "run.json").read_text())


# The longest first, for they run in this order.
@running("05_continual_pretraining", **SINGLE, inputs="text.txt", n_seeds=2, drop_rates="0.3,0.9")
def test_explanation_of_a_single_pair_by_a_text(results: pd.DataFrame, record: dict[str, Any]) -> None:
    assert set(results.loc[results["table"] == "tolerances", "pair"]) == {"code-cpt → code"}
    assert set(results.loc[results["table"] == "cells", "metric"]) == {"perplexity", "kl", "top5_logit_mse"}
    assert record["headline"].startswith("DARE keeps 95% up to p = ")


@running("01_value_ranges", **PAIR)
def test_value_ranges_of_another_pair(results: pd.DataFrame, record: dict[str, Any]) -> None:
    assert set(results["pair"]) == {"base → math"}
    assert (results["table"] == "tensor").sum() == 38
    assert record["headline"].startswith("base → math: half of the entries are at most")


@running("02_dare_ablation", **ENCODER, evaluation=TASK, **FEW, drop_rates="0.9", scope="attention")
def test_dare_ablation_of_the_attention_of_a_classifier(results: pd.DataFrame, record: dict[str, Any]) -> None:
    assert set(results["pair"]) == {"encoder base → strings"}
    assert set(results["scope"]) == {"attention"}
    assert {0.0, 0.9, 1.0} <= set(results["drop_rate"])
    assert set(results["seed"]) == {3, 4}
    assert results["outcomes"].map(len).eq(20).all()
    assert set(results["evaluation"]) == {TASK}
    assert list(record["files"]) == [f"{TASK}.jsonl"]
    assert set(record["checkpoints"]) == set(ENCODER.values())
    delta = load_delta(**ENCODER)
    kept = [
        tensor.count_nonzero().item() for name, tensor in delta.items() if ".attention." in name and "Norm" not in name
    ]
    pruned = results[results["drop_rate"] == 0.9]
    # Six sigmas of a binomial share.
    assert (pruned["achieved_drop_rate"] - 0.9).abs().max() < 6 * (0.9 * 0.1 / sum(kept)) ** 0.5
    whole = results[results["drop_rate"] == 1]
    assert whole["achieved_drop_rate"].eq(1).all()


@running("03_rescale_vs_drop_only", **PAIR, **FEW, drop_rates="0.5,0.9")
def test_rescaling_of_another_pair(results: pd.DataFrame) -> None:
    ladder, factors = (results[results["table"] == table] for table in ("ladder", "factors"))
    assert set(ladder["method"]) == {"DARE", "drop only"}
    assert {f"similarity/{layer}" for layer in range(5)} | {"accuracy"} == set(ladder["metric"])
    assert set(factors["metric"]) == {"accuracy", "kl", "top5_logit_mse"}
    untouched = ladder[ladder["drop_rate"] == 0].set_index("metric")["value"]
    assert untouched.filter(like="similarity").to_numpy() == pytest.approx(1)
    unmoved = factors[(factors["drop_rate"] == 0) & (factors["metric"] == "kl")]
    assert unmoved["value"].to_numpy() == pytest.approx(0, abs=1e-6)
    # Judged on all questions, compared on those of the half that may choose a factor.
    assert ladder.groupby("metric")["outcomes"].agg(lambda column: set(map(len, column))).to_dict() == {
        metric: {20 if metric == "accuracy" else 10} for metric in set(ladder["metric"])
    }
    assert factors[factors["drop_rate"] > 0].groupby("drop_rate")["rescale"].nunique().to_dict() == {0.5: 6, 0.9: 6}


@running("04_pruning_methods", **PAIR, drop_rates="0.9", n_seeds=2, evaluation="text.txt")
def test_pruning_methods_of_another_pair_by_perplexity(results: pd.DataFrame) -> None:
    assert set(results["pair"]) == {"base → math"}
    assert set(results["table"]) == {"cells", "windows", "errors"}
    assert {"DARE", "drop only", "MP", "MP + rescale", "MAGPRUNE", "MAGPRUNE by tensor"} <= set(results["method"])
    assert set(results["metric"].dropna()) == {"perplexity"}


@running("06_finetuned_vs_delta", **PAIR, **FEW, drop_rates="0.1,0.5")
def test_weights_and_delta_of_another_model(results: pd.DataFrame) -> None:
    assert set(results["dropped from"]) == {"delta", "weights"}
    assert set(results["method"]) == {"DARE", "MP"}
    untouched = results[results["drop_rate"] == 0]
    assert len({tuple(outcomes) for outcomes in untouched["outcomes"]}) == 1
    nothing_left = results[(results["drop_rate"] == 1) & (results["dropped from"] == "weights")]
    assert len(nothing_left)
    assert nothing_left["value"].eq(0).all()
    assert set(results.loc[results["dropped from"] == "weights", "base_hash"]) == {""}


@running("07_model_size", **PAIRS, **FEW, drop_rates=0.5)
def test_sizes_of_two_pairs(results: pd.DataFrame) -> None:
    tolerances, cells = (results[results["table"] == table] for table in ("tolerances", "cells"))
    names = ["small, base → math", "small, code-cpt → code"]
    assert tolerances["pair"].tolist() == names
    assert set(cells["pair"]) == set(names)
    assert tolerances["tolerated"].between(tolerances["low"], tolerances["high"]).all()
    assert tolerances["tolerated"].between(0.001, 0.999).all()
    assert set(tolerances["parameters"]) == {sum(tensor.numel() for tensor in load_delta(**PAIR).values())}
    assert cells["outcomes"].map(len).eq(20).all()


@running("08_merging", **TUNED, **FEW, drop_rates=0.5, scalings=1)
def test_merges_of_fine_tunes_alone(results: pd.DataFrame) -> None:
    assert set(results["table"]) == {"merge", "single", "interference"}
    merges = results[results["table"] == "merge"]
    assert set(merges["role"]) >= {"at each drop rate", "one setting"}
    assert {"average", "task arithmetic", "TIES", "DELLA", "Fisher", "RegMean", "WIDEN"} <= set(merges["way"])
    # One half of the questions chose, under a mask of its own; the other judges.
    assert merges["outcomes"].map(len).eq(10).all()
    assert set(merges["seed"]) == {3, 4}


@running("02_dare_ablation", n_seeds="many")
def test_a_wrong_parameter_stops_the_run_in_the_validation_cell(run: Future[nbformat.NotebookNode]) -> None:
    with pytest.raises(papermill.PapermillExecutionError, match="parameter n_seeds: must be a whole number") as stopped:
        run.result()
    # The injected parameters are one more cell before it.
    assert stopped.value.exec_count == 3


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("00_overview", {"results": "nowhere"}, "parameter results: nowhere: holds no"),
        ("01_value_ranges", {"base": "zoo:small/bas", "finetuned": "zoo:small/math"}, "parameter base: .*known are"),
        ("02_dare_ablation", {"device": "gpu"}, "parameter device: must be one of cpu"),
        ("03_rescale_vs_drop_only", {"scope": "attn"}, "parameter scope: base → instruct: scope 'attn' selects none"),
        ("04_pruning_methods", {"drop_rates": "0.5,2"}, "parameter drop_rates: must be numbers in"),
        ("05_continual_pretraining", {"other_base": "zoo:tiny/base"}, "parameter other_base: needs base and finetuned"),
        ("06_finetuned_vs_delta", {**PAIR, "evaluation": "maths"}, "parameter evaluation: must be one of instruct"),
        ("07_model_size", {**PAIR, "base": "a,b"}, "parameter base: names 2 checkpoints and finetuned 1; give as many"),
    ],
)
def test_every_notebook_checks_its_parameters_in_its_second_cell(
    name: str, parameters: dict[str, Any], message: str
) -> None:
    # In this process: a kernel for each would take half a minute.
    declared, validation, *_ = (cell.source for cell in _read(name).cells if cell.cell_type == "code")
    names: dict[str, Any] = {}
    exec(declared, names)
    names.update(parameters)
    with pytest.raises(ParameterError, match=message):
        exec(validation, names)
    # As papermill adds it, with a warning of which nobody hears.
    names["out_dirs"] = "runs"
    with pytest.raises(ParameterError, match="parameter out_dirs: .* did you mean out_dir"):
        exec(validation, names)


def test_every_pattern_of_the_comparison_is_loaded() -> None:
    text = (find_root() / "tests" / "nbval.cfg").read_text()
    patterns = re.findall("^regex: (.*)$\n^replace: (.*)$", text, flags=re.M)
    assert len(patterns) == text.count("regex: ") > 0
