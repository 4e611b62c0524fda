"""The project's files agree with each other."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import delta_analysis as da
from delta_analysis.checkpoints.paths import find_root

ROOT = find_root()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LAYERS = (
    ("_errors", "names", "memory"),
    ("paths", "philox", "storage", "entry", "pickled", "ray_executor"),
    ("formats", "kernel_drop", "kernel_tally", "hub"),
    ("configuration", "folder", "known_pairs", "kernel_order"),
    ("adapter", "kernels", "torch_kernels"),
    ("checkpoint",),
    ("blocks", "alignment", "loading", "provenance"),
    ("cut", "rescaling", "tally", "election"),
    ("rows", "laws"),
    ("pruning",),
    ("proportional", "merge_methods"),
    ("delta", "intervals", "scope", "patching", "cells"),
    ("streaming", "saving", "merge_tensors", "data_methods", "widen", "mergekit_recipe", "mergeable"),
    ("ranges", "curve", "claims"),
    ("interference",),
    ("evaluate.protocol", "evaluate.batching", "evaluate.beginning"),
    ("evaluate.generation", "evaluate.prepared"),
    ("evaluate.texts",),
    (
        "evaluate.classification",
        "evaluate.drift",
        "evaluate.exact_match",
        "evaluate.harness",
        "evaluate.perplexity",
        "evaluate.similarity",
        "evaluate.weights",
    ),
    ("evaluate",),
    ("editable",),
    ("jobs", "family", "meeting", "changes", "merge_statistics"),
    ("pruning_error", "merging", "merge_edit", "outvoted"),
    ("sweep", "comparison", "layer_noise", "interventions"),
    ("tolerance", "damage", "factors", "predictors", "mending"),
    ("recovery", "merge_ways"),
    ("claim_measures", "foresight", "equivalence", "merge_scores"),
    ("predictor_errors",),
    ("claim_leads", "claim_merges"),
    ("claim_effects",),
    ("plots.style",),
    ("plots.claims", "plots.curves", "plots.merging", "plots.methods", "plots.ranges"),
    ("plots.noise",),
    ("plots",),
    ("parameter_checks", "notebook"),
    ("parameters", "overview", "calibration"),
    ("continual", "merge_parameters"),
    ("reports.publish", "reports.refresh"),
    ("zoo", "zoo.tokenizer", "zoo.skills"),
    ("zoo.corpus", "zoo.recipe"),
    ("zoo.train",),
    ("zoo.decoder", "zoo.encoder"),
    ("zoo.__main__",),
)
"""Modules by rank (a package stands for its `__init__`): each imports only from ranks listed before its own."""


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[^,*]+", str(pin.specifier)) for pin in pins)
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    pins = _pins()
    extras = PROJECT["optional-dependencies"]
    for text in (*PROJECT["dependencies"], *(each for extra in extras.values() for each in extra)):
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])


def test_the_conda_environment_is_the_same_project() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(each for each in environment["dependencies"] if isinstance(each, str) and each.startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python="))
    pip = next(each["pip"] for each in environment["dependencies"] if isinstance(each, dict))
    assert pip[0] == "--constraint constraints.txt"
    (extras,) = re.findall(r"--editable \.\[(.+)\]", pip[1])
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert f'".[{extras}]"' in (ROOT / "Makefile").read_text()


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    readme = (ROOT / "README.md").read_text()
    assert "\nmake report" in readme
    assert "\nmake test" in readme


def _modules() -> dict[str, Path]:
    """Name of each module within the package -> its file; a package goes by its own name."""
    package = ROOT / "delta_analysis"
    named = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in named.items() if name != "__init__"}


def _imported(path: Path, modules: Collection[str]) -> set[str]:
    """The modules of the package that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("delta_analysis."):
            where = (node.module or "").removeprefix("delta_analysis").removeprefix(".")
            for alias in node.names:
                inner = f"{where}.{alias.name}".removeprefix(".")
                found.add(inner if inner in modules else where)
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("delta_analysis") for alias in node.names), path
    return found


def test_imports_go_one_way() -> None:
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    modules = _modules()
    assert set(modules) == set(rank)
    assert sum(map(len, LAYERS)) == len(rank)
    for name, path in modules.items():
        for imported in _imported(path, modules):
            assert rank[imported] < rank[name], f"{name} imports {imported}"


def test_public_names_are_documented() -> None:
    for name in da.__all__:
        assert getattr(da, name).__doc__, name


def test_modules_can_be_read_in_one_sitting() -> None:
    for path in (ROOT / "delta_analysis").rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 70, f"{path}: {node.name}"


def test_the_pruner_of_the_guide_works() -> None:
    (example,) = re.findall(r"```python\n(.+?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.S)
    names: dict[str, Any] = {"__name__": "guide"}
    exec(compile(example, "CONTRIBUTING.md", "exec", dont_inherit=True), names)
    delta = torch.randn(40, 2000, generator=torch.Generator().manual_seed(0))
    pruned = names["HalfAndHalf"](0.5)(delta, name="w", seed=0)
    large = delta.abs() >= delta.abs().median(dim=1, keepdim=True).values
    for entries, p in ((large, 0.2), (~large, 0.8)):
        dropped = float((pruned[entries] == 0).double().mean())
        # Six sigmas of a binomial share: a false alarm in 1e9.
        assert abs(dropped - p) < 6 * (p * (1 - p) / int(entries.sum())) ** 0.5
    assert not names["HalfAndHalf"](1)(delta, name="w", seed=0).any()
    assert torch.equal(names["HalfAndHalf"](0)(delta, name="w", seed=0), delta)
    torch.testing.assert_close(pruned[large & (pruned != 0)], delta[large & (pruned != 0)] / 0.8)


def test_links_of_the_readme_lead_somewhere() -> None:
    for document in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / document).read_text()):
            assert (ROOT / target).exists(), target


def test_every_notebook_is_named_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        assert f"notebooks/{path.name}" in readme


def test_help_of_the_command_lines_names_their_options() -> None:
    options = {"zoo": "--size", "report": "--other-base", "calibration": "--out"}
    commands = [[sys.executable, "-m", f"delta_analysis.{module}", "--help"] for module in options]
    # At the same time: most of it is the import of torch.
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    helps = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(options)
    assert all(option in shown for option, shown in zip(options.values(), helps, strict=True))
