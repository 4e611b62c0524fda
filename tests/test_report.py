"""The report as a reader gets it: pages that stand alone and an index that leads to them."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from delta_analysis import report


def _notebook(*outputs: nbformat.NotebookNode) -> nbformat.NotebookNode:
    cell = nbformat.v4.new_code_cell("secret_source = 1", outputs=list(outputs), execution_count=1)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Does it break?\n\nText."), cell])
    notebook.metadata["papermill"] = {"parameters": {"base": "a<b", "out_dir": "/somewhere"}}
    return notebook


def test_a_page_shows_outputs_without_code_and_loads_nothing_from_elsewhere() -> None:
    table = nbformat.v4.new_output("display_data", {"text/html": '<table border="1"><tr><td>7</td></tr></table>'})
    page = report.notebook_page(_notebook(table))
    assert "<title>Does it break?</title>" in page
    assert "<td>7</td>" in page
    assert '<div class="table"><table>' in page
    assert "secret_source" not in page
    assert "base = a&lt;b" in page
    assert "somewhere" not in page
    assert not re.search(r"<(script|link|img)[^>]*https?://", page)


def test_the_index_links_each_report_with_its_headline() -> None:
    run = {"headline": "It breaks at p < 0.5."}
    page = report.index_page([report.index_entry("02_x", "Does it break?", run)], {})
    assert 'href="02_x.html"' in page
    assert "It breaks at p &lt; 0.5." in page
    assert 'src="results/02_x/headline.png"' in page
    assert "embedded family" in page
    assert "b → f" in report.index_page([], {"base": "b", "finetuned": "f"})
    assert "Reports on pair:f." in report.index_page([], {"finetuned": "pair:f"})


def test_a_notebook_that_fails_ends_the_report_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise report.papermill.exceptions.PapermillExecutionError(1, 3, "", "ParameterError", "parameter base: no", [])

    monkeypatch.setattr(report.papermill, "execute_notebook", fail)
    notebook = report.find_root() / "notebooks" / "01_value_ranges.ipynb"
    with pytest.raises(SystemExit, match="01_value_ranges.ipynb stopped: ParameterError: parameter base: no"):
        report.run_notebook(notebook, tmp_path / "out.ipynb", {})
