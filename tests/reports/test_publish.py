"""The report as a reader gets it: pages that stand alone and an index that leads to them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import nbformat
import pytest

from delta_analysis.reports import publish as report
from delta_analysis.reports.refresh import NOTEBOOK_METADATA


def _notebook(*outputs: nbformat.NotebookNode) -> nbformat.NotebookNode:
    cell = nbformat.v4.new_code_cell("secret_source = 1", outputs=list(outputs), execution_count=1)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Does it break?\n\nText."), cell])
    notebook.metadata["papermill"] = {"parameters": {"base": "a<b", "out_dir": "/somewhere", "results": "/somewhere"}}
    return notebook


def test_a_page_shows_outputs_without_code_and_loads_nothing_from_elsewhere() -> None:
    table = nbformat.v4.new_output("display_data", {"text/html": '<table border="1"><tr><td>7</td></tr></table>'})
    page = report.page_of(_notebook(table), "Does it <break>?")
    assert "<title>Does it &lt;break&gt;?</title>" in page
    assert "<td>7</td>" in page
    assert "secret_source" not in page
    assert "base = a&lt;b" in page
    assert "somewhere" not in page
    assert not re.search(r"<(script|link|img)[^>]*https?://", page)


def test_the_index_links_each_report_with_its_headline(tmp_path: Path) -> None:
    (tmp_path / "results" / "02_x").mkdir(parents=True)
    (tmp_path / "results" / "02_x" / "run.json").write_text(json.dumps({"headline": "It breaks at p < 0.5."}))
    nbformat.write(_notebook(), tmp_path / "02_x.ipynb")
    entry = report.entry("02_x", tmp_path)
    page = report.page_of(nbformat.v4.new_notebook(), "Reports", subject="a<b", reports=[entry])
    assert '<a href="02_x.html">Does it break?</a>' in page
    assert "It breaks at p &lt; 0.5." in page
    assert 'src="results/02_x/headline.png"' in page
    assert "Reports on a&lt;b." in page


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository without notebooks on a machine with two cores, the only one there is."""
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(report, "find_root", lambda: tmp_path)
    monkeypatch.setattr(report, "available_cores", lambda: 2)
    return tmp_path


END = """
import json, pathlib
folder = pathlib.Path(out_dir)
folder.mkdir(parents=True)
(folder / "run.json").write_text(json.dumps({"headline": headline}))
"""
MEET = """
import os, pathlib, time
here, there = (pathlib.Path(f"{name}.met") for name in names)
here.touch()
while not there.exists():
    time.sleep(0.05)
headline = f"{here} saw {there} in {os.environ['OMP_NUM_THREADS']} thread"
"""


def _write(project: Path, stem: str, *sources: str, parameters: str = "") -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    tagged = nbformat.v4.new_code_cell(f"out_dir = ''\n{parameters}", metadata={"tags": ["parameters"]})
    heading = nbformat.v4.new_markdown_cell(f"# What does {stem} say?")
    notebook = nbformat.v4.new_notebook(cells=[heading, tagged, *cells], metadata=NOTEBOOK_METADATA)
    nbformat.write(notebook, project / "notebooks" / f"{stem}.ipynb")


def test_reports_run_at_the_same_time_and_the_overview_reads_them_all(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    _write(project, "01_x", "names = '12'", MEET, END)
    _write(project, "02_y", "names = '21'", MEET, END)
    read = "import pathlib; found = sorted(path.parent.name for path in pathlib.Path(results).glob('*/run.json'))"
    _write(
        project,
        "00_overview",
        read,
        "headline = ' and '.join(found)",
        "print('Claims of', headline)",
        END,
        parameters="results = ''",
    )
    index = report.build_report({}, project / "out")

    page = index.read_text()
    told = ("Claims of 01_x and 02_y", "1.met saw 2.met in 1 thread", "2.met saw 1.met in 1 thread")
    order = [page.index(text) for text in told]
    assert order == sorted(order)
    assert page.count("<article>") == 2
    assert str(project) not in page
    assert (project / "out" / "02_y.html").is_file()
    lines = capfd.readouterr().out.splitlines()
    assert set(lines[:2]) == {"[2/3] 01_x starts", "[3/3] 02_y starts"}
    assert lines[4] == "[1/3] 00_overview starts"
    assert re.fullmatch(r"\[1/3\] 00_overview took \d+ s", lines[5])


def test_what_is_asked_for_reaches_the_notebooks_that_declare_it(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _write(project, "01_x", "headline = base + finetuned", END, parameters="base = ''\nfinetuned = ''")
    told = "headline = f'{other_base} {inputs} {threads}'"
    threads = "import os; threads = os.environ.get('OMP_NUM_THREADS', 'all')"
    _write(project, "05_y", threads, told, END, parameters="other_base = ''\ninputs = ''")
    (project / "texts.txt").touch()
    monkeypatch.chdir(project)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    pair = ["--base", "zoo:small/base", "--finetuned", "org/name", "--other-base", "org/old", "--inputs", "texts.txt"]
    monkeypatch.setattr(sys, "argv", ["report", *pair, "--out", "out"])
    report.main()

    page = (project / "out" / "index.html").read_text()
    assert "Reports on zoo:small/base → org/name." in page
    assert "<p>zoo:small/baseorg/name</p>" in page
    assert f"<p>org/old {project / 'texts.txt'} all</p>" in page
    # Models that are given are not held in memory twice.
    started = [re.sub(r"\d+ s", "0 s", line) for line in capfd.readouterr().out.splitlines()[:4]]
    assert started == ["[2/2] 05_y starts", "[2/2] 05_y took 0 s", "[1/2] 01_x starts", "[1/2] 01_x took 0 s"]


def test_a_notebook_that_fails_ends_the_report_with_its_reason(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _write(project, "01_never", END)
    fail = "while not pathlib.Path('running').exists(): time.sleep(0.05)\nraise ValueError('parameter base: no')"
    _write(project, "02_fails", "import pathlib, time", fail, "print('later')")
    _write(project, "03_runs", "import pathlib; pathlib.Path('running').touch()\nwhile True: pass")
    # A run of the day before must not pass for this one's.
    old = nbformat.read(project / "notebooks" / "02_fails.ipynb", as_version=4)
    old.cells[-1].outputs = [nbformat.v4.new_output("stream", text="later")]
    nbformat.write(old, project / "notebooks" / "02_fails.ipynb")
    monkeypatch.setattr(sys, "argv", ["report", "--out", str(project / "out")])
    with pytest.raises(SystemExit) as stopped:
        report.main()

    target = project / "out" / "02_fails.ipynb"
    assert stopped.value.code == (
        f"02_fails.ipynb stopped: ValueError: parameter base: no\nThe notebook so far: {target}"
    )
    assert "took" not in capfd.readouterr().out
    assert not list((project / "out").glob("results/*/run.json"))
    cells = nbformat.read(target, as_version=4).cells
    assert cells[-2].outputs[0].ename == "ValueError"
    assert not cells[-1].outputs


def test_a_kernel_that_dies_ends_the_report_too(project: Path) -> None:
    _write(project, "01_x", "import os; os._exit(1)")
    with pytest.raises(report.NotebookError, match="01_x.ipynb stopped: Kernel died"):
        report.build_report({}, project / "out")
