"""The project's files agree with each other."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import delta_analysis as da
from delta_analysis.checkpoints.paths import find_root

ROOT = find_root()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


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


def test_imports_run_down_the_rooms() -> None:
    # The contract, with the rooms as layers, lies in pyproject.toml.
    found = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def _reaching_past(path: Path, package: Path) -> list[str]:
    """The files of other rooms that a file imports from, past what their rooms offer."""
    room = path.relative_to(package).parts[0]
    guarded = {
        id(node)
        for block in ast.walk(ast.parse(path.read_text()))
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if id(node) in guarded:
            continue
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            parts = name.split(".")
            if parts[0] == "delta_analysis" and len(parts) > 2 and parts[1] != room:
                found.append(f"{path.relative_to(package)} imports from {name}")
    return found


def test_nobody_reaches_past_a_room() -> None:
    package = ROOT / "delta_analysis"
    files = [path for path in package.rglob("*.py") if path.parent != package]
    assert len(files) > 50
    assert not [each for path in files for each in _reaching_past(path, package)]


def test_a_reach_past_a_room_is_seen(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    path = tmp_path / "plots" / "curves.py"
    path.write_text("def f():\n    from delta_analysis.sweeps.intervals import logit\n")
    assert _reaching_past(path, tmp_path) == ["plots/curves.py imports from delta_analysis.sweeps.intervals"]
    path.write_text("from delta_analysis.sweeps import logit\nfrom delta_analysis.plots.style import GREY\n")
    assert not _reaching_past(path, tmp_path)


def _loaded_after(code: str) -> set[str]:
    """The modules that are loaded once a fresh interpreter has run some code."""
    show = "import sys; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_face_loads_nothing_until_it_is_used() -> None:
    assert not _loaded_after("import delta_analysis") & {"torch", "numpy", "pandas", "transformers", "numba"}


def test_reading_and_value_ranges_load_no_models_and_no_plots() -> None:
    code = (
        "import delta_analysis as da\nda.value_ranges(da.load_delta(base='zoo:tiny/base', finetuned='zoo:tiny/math'))"
    )
    # numba itself loads scipy and its linalg.
    assert not _loaded_after(code) & {"transformers", "scipy.stats", "scipy.optimize", "seaborn", "matplotlib"}


def test_the_face_says_what_it_offers() -> None:
    assert len(da.__all__) <= 20
    assert set(da.__all__) <= set(dir(da))
    for name in da.__all__:
        offered = getattr(da, name)
        assert offered.__name__.rsplit(".", 1)[-1] == name
    with pytest.raises(AttributeError, match="no attribute 'Sweep'"):
        da.Sweep  # noqa: B018


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
    options = {
        "zoo": "--size",
        "reports.publish": "--other-base",
        "reports.calibration": "--out",
        "reports.foretold": "--out",
    }
    commands = [[sys.executable, "-m", f"delta_analysis.{module}", "--help"] for module in options]
    # At the same time: most of it is the import of torch.
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    helps = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(options)
    assert all(option in shown for option, shown in zip(options.values(), helps, strict=True))
