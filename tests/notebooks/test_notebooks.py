"""The committed notebooks are clean, and run with parameters other than their defaults."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import papermill
import pytest

from delta_analysis.continual import ContinualParameters
from delta_analysis.delta import load_delta
from delta_analysis.overview import OverviewParameters
from delta_analysis.parameter_checks import ParameterError
from delta_analysis.parameters import AblationParameters, ModelSizeParameters, ValueRangesParameters
from delta_analysis.paths import find_root

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
}
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("[0-9]*.ipynb"))
PAIR = {"base": "zoo:small/base", "finetuned": "zoo:small/math"}
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
    assert list(declared) == [field.name for field in fields(PARAMETERS[name])]
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


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_results_are_of_the_committed_notebook(name: str) -> None:
    folder = FOLDER / "results" / name
    run = json.loads((folder / "run.json").read_text())
    assert (folder / "results.parquet").stat().st_size <= 1_000_000
    assert not pd.read_parquet(folder / "results.parquet").empty
    shown = "".join(output.data.get("text/markdown", "") for output in _outputs(_read(name)) if "data" in output)
    assert run["headline"] in shown.replace("**", "")


def _run(name: str, tmp_path: Path, **parameters: Any) -> nbformat.NotebookNode:
    return papermill.execute_notebook(
        str(FOLDER / f"{name}.ipynb"),
        str(tmp_path / "out.ipynb"),
        {"out_dir": str(tmp_path / "results"), **parameters},
        kernel_name="python3",
        progress_bar=False,
        cwd=str(tmp_path),
    )


def _results(name: str, tmp_path: Path, **parameters: Any) -> pd.DataFrame:
    """The results of a notebook that has run."""
    _run(name, tmp_path, **parameters)
    return pd.read_parquet(tmp_path / "results" / "results.parquet")


def test_value_ranges_of_another_pair(tmp_path: Path) -> None:
    results = _results("01_value_ranges", tmp_path, **PAIR)
    assert set(results["pair"]) == {"base → math"}
    assert (results["table"] == "tensor").sum() == 38
    run = json.loads((tmp_path / "results" / "run.json").read_text())
    assert run["headline"].startswith("base → math: half of the entries are at most")


def test_dare_ablation_by_perplexity_of_a_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("23 plus 45 is 68\nuser: what is 1 plus 2?\nbot: 3\n" * 4)
    results = _results("02_dare_ablation", tmp_path, **PAIR, drop_rates=0.9, n_seeds=2, evaluation=str(text))
    assert set(results["metric"]) == {"perplexity"}
    assert (results["value"] > 1).all()


def test_dare_ablation_of_the_attention_of_a_classifier(tmp_path: Path) -> None:
    encoder = {"base": "zoo:encoder/base", "finetuned": "zoo:encoder/strings", "evaluation": "strings-right"}
    results = _results("02_dare_ablation", tmp_path, **encoder, **FEW, drop_rates="0.9", scope="attention")
    assert set(results["pair"]) == {"base → strings"}
    assert set(results["scope"]) == {"attention"}
    assert {0.0, 0.9, 1.0} <= set(results["drop_rate"])
    assert set(results["seed"]) == {3, 4}
    assert results["outcomes"].map(len).eq(20).all()
    assert set(results["evaluation"]) == {"strings-right"}
    run = json.loads((tmp_path / "results" / "run.json").read_text())
    assert list(run["files"]) == ["strings-right.jsonl"]
    assert set(run["checkpoints"]) == {encoder["base"], encoder["finetuned"]}
    delta = load_delta(base=encoder["base"], finetuned=encoder["finetuned"])
    kept = [
        tensor.count_nonzero().item() for name, tensor in delta.items() if ".attention." in name and "Norm" not in name
    ]
    pruned = results[results["drop_rate"] == 0.9]
    # Six sigmas of a binomial share.
    assert (pruned["achieved_drop_rate"] - 0.9).abs().max() < 6 * (0.9 * 0.1 / sum(kept)) ** 0.5
    whole = results[results["drop_rate"] == 1]
    assert whole["achieved_drop_rate"].eq(1).all()


def test_rescaling_of_another_pair(tmp_path: Path) -> None:
    results = _results("03_rescale_vs_drop_only", tmp_path, **PAIR, **FEW, drop_rates="0.5,0.9")
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


def test_pruning_methods_of_another_pair_by_perplexity(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("23 plus 45 is 68\n\nuser: what is 1 plus 2?\nbot: 3\n\n" * 4)
    results = _results("04_pruning_methods", tmp_path, **PAIR, drop_rates="0.9", n_seeds=2, evaluation=str(text))
    assert set(results["pair"]) == {"base → math"}
    assert set(results["table"]) == {"cells", "windows", "damage"}
    assert {"DARE", "drop only", "MP", "MP + rescale", "MAGPRUNE", "MAGPRUNE by value"} <= set(results["method"])
    assert set(results["metric"].dropna()) == {"perplexity"}


def test_explanation_of_another_fine_tune_by_a_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("user: what does python print for len('abc')?\nbot: 3\n>>> 2 + 3\n5\n\n" * 8)
    triad = {"base": "zoo:tiny/code-cpt", "finetuned": "zoo:tiny/code", "other_base": "zoo:tiny/base"}
    results = _results("05_continual_pretraining", tmp_path, **triad, inputs=str(text), n_seeds=2, drop_rates="0.3,0.9")
    assert set(results.loc[results["table"] == "tolerances", "pair"]) == {"code-cpt → code", "base → code"}
    assert set(results.loc[results["table"] == "verdicts", "verdict"]) <= {"holds", "refuted", "cannot tell"}
    assert set(results.loc[results["table"] == "cells", "metric"]) == {"perplexity", "kl", "top5_logit_mse"}


def test_explanation_of_a_single_pair(tmp_path: Path) -> None:
    pair = {
        "base": "zoo:encoder/base",
        "finetuned": "zoo:encoder/strings",
        "inputs": "data/zoo/tasks/strings-right.jsonl",
    }
    results = _results("05_continual_pretraining", tmp_path, **pair, **FEW, drop_rates="0.5,0.9")
    assert set(results.loc[results["table"] == "cells", "pair"]) >= {"base → strings"}
    run = json.loads((tmp_path / "results" / "run.json").read_text())
    assert run["headline"].startswith("DARE keeps 95% up to p = ")


def test_weights_and_delta_of_another_model(tmp_path: Path) -> None:
    results = _results("06_finetuned_vs_delta", tmp_path, **PAIR, **FEW, drop_rates="0.1,0.5")
    assert set(results["dropped from"]) == {"delta", "weights"}
    assert set(results["method"]) == {"DARE", "MP"}
    untouched = results[results["drop_rate"] == 0]
    assert len({tuple(outcomes) for outcomes in untouched["outcomes"]}) == 1
    nothing_left = results[(results["drop_rate"] == 1) & (results["dropped from"] == "weights")]
    assert len(nothing_left)
    assert nothing_left["value"].eq(0).all()
    assert set(results.loc[results["dropped from"] == "weights", "base_hash"]) == {""}


def test_sizes_of_two_pairs(tmp_path: Path) -> None:
    pairs = {"base": "zoo:small/base,zoo:small/code-cpt", "finetuned": "zoo:small/math,zoo:small/code"}
    results = _results("07_model_size", tmp_path, **pairs, **FEW, drop_rates=0.5)
    tolerances, cells = (results[results["table"] == table] for table in ("tolerances", "cells"))
    names = ["small, base → math", "small, code-cpt → code"]
    assert tolerances["pair"].tolist() == names
    assert set(cells["pair"]) == set(names)
    assert tolerances["tolerated"].between(tolerances["low"], tolerances["high"]).all()
    assert tolerances["tolerated"].between(0.001, 0.999).all()
    delta = load_delta(base="zoo:small/base", finetuned="zoo:small/math")
    assert set(tolerances["parameters"]) == {sum(tensor.numel() for tensor in delta.values())}
    assert cells["outcomes"].map(len).eq(20).all()


def test_a_wrong_parameter_stops_the_run_in_the_validation_cell(tmp_path: Path) -> None:
    with pytest.raises(papermill.PapermillExecutionError, match="parameter n_seeds: must be an integer") as stopped:
        _run("02_dare_ablation", tmp_path, n_seeds="many")
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


def test_every_pattern_of_the_comparison_is_loaded() -> None:
    text = (find_root() / "tests" / "nbval.cfg").read_text()
    patterns = re.findall("^regex: (.*)$\n^replace: (.*)$", text, flags=re.M)
    assert len(patterns) == text.count("regex: ") > 0
