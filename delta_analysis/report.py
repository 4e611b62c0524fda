"""Run the notebooks and publish them as HTML: `python -m delta_analysis.report [--base … --finetuned …]`.

Each notebook is executed by papermill into the output folder and written as a page of its own;
`index.html` shows the headline sentence and figure that each run left behind.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbconvert import HTMLExporter

from delta_analysis.paths import find_root

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ font: 16px/1.55 system-ui, sans-serif; color: #1d1d1f; background: #fff; margin: 0 auto;
       max-width: 56rem; padding: 1.5rem 1rem 4rem; overflow-wrap: break-word; }}
h1 {{ font-size: 1.7rem; line-height: 1.2; }} h2 {{ font-size: 1.25rem; margin-top: 2.2rem; }}
a {{ color: #0b57a4; }} img {{ max-width: 100%; height: auto; }}
table {{ border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }}
thead th {{ border-bottom: 2px solid #888; }}
.table {{ overflow-x: auto; margin: 1rem 0; }}
pre {{ overflow-x: auto; background: #f5f5f7; padding: .6rem; font-size: .82rem; }}
code {{ font-size: .88em; background: #f5f5f7; }}
article {{ border-top: 1px solid #ddd; padding: 1rem 0; }}
.anchor-link {{ display: none; }} footer {{ color: #666; font-size: .85rem; margin-top: 3rem; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m delta_analysis.report", description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="", help="checkpoint before fine-tuning; empty: the embedded family")
    parser.add_argument("--finetuned", default="", help="checkpoint after fine-tuning")
    parser.add_argument("--evaluation", default="", help="a task, a .jsonl file of questions or a text file")
    parser.add_argument("--out", type=Path, default=find_root() / "reports")
    arguments = parser.parse_args()
    # The notebooks run in their own folder, so paths are made absolute here.
    given = {name: getattr(arguments, name) for name in ("base", "finetuned", "evaluation")}
    given = {
        name: str(Path(value).resolve()) if Path(value).exists() else value for name, value in given.items() if value
    }
    index = build_report(given, arguments.out.resolve())
    print(f"\nReport: {index}")


def build_report(given: dict[str, str], out: Path) -> Path:
    """Run every notebook with the parameters given, write the pages and return the index."""
    notebooks = sorted((find_root() / "notebooks").glob("[0-9]*.ipynb"))
    out.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, notebook in enumerate(notebooks, start=1):
        print(f"[{number}/{len(notebooks)}] {notebook.stem}", flush=True)
        results = out / "results" / notebook.stem
        shutil.rmtree(results, ignore_errors=True)
        executed = run_notebook(notebook, out / f"{notebook.stem}.ipynb", {**given, "out_dir": str(results)})
        (out / f"{notebook.stem}.html").write_text(notebook_page(executed), encoding="utf-8")
        run = json.loads((results / "run.json").read_text(encoding="utf-8"))
        entries.append(index_entry(notebook.stem, title_of(executed), run))
    index = out / "index.html"
    index.write_text(index_page(entries, given), encoding="utf-8")
    return index


def run_notebook(notebook: Path, target: Path, parameters: dict[str, Any]) -> nbformat.NotebookNode:
    """Execute a notebook with those of the parameters that it declares."""
    declared = papermill.inspect_notebook(str(notebook))
    passed = {name: value for name, value in parameters.items() if name in declared}
    try:
        return papermill.execute_notebook(
            str(notebook), str(target), passed, kernel_name="python3", cwd=str(find_root() / "notebooks")
        )
    except papermill.exceptions.PapermillExecutionError as error:
        sys.exit(f"{notebook.name} stopped: {error.ename}: {error.evalue}\nThe notebook so far: {target}")


def title_of(notebook: nbformat.NotebookNode) -> str:
    """The notebook's question: the heading of its first cell."""
    first: str = notebook.cells[0].source
    return first.splitlines()[0].lstrip("# ")


def notebook_page(notebook: nbformat.NotebookNode) -> str:
    """A notebook as a page of text, tables and figures, without its code."""
    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_output_prompt=True)
    body, _ = exporter.from_notebook_node(notebook)
    body = body.replace("<table", '<div class="table"><table').replace("</table>", "</table></div>")
    body = re.sub(r' border="1"| style="text-align: right;"', "", body)
    used = parameters_in(notebook)
    footer = f"<footer>Parameters: {html.escape(used)}</footer>" if used else ""
    home = '<p><a href="index.html">All reports</a></p>'
    return PAGE.format(title=html.escape(title_of(notebook)), body=f"{home}\n{body}\n{footer}")


def parameters_in(notebook: nbformat.NotebookNode) -> str:
    """What the notebook was run with beyond its defaults, as papermill recorded it."""
    given = notebook.metadata.get("papermill", {}).get("parameters", {})
    return ", ".join(f"{name} = {value}" for name, value in given.items() if name != "out_dir")


def index_entry(stem: str, title: str, run: dict[str, Any]) -> str:
    """One report on the front page: its question, its headline sentence and figure."""
    return (
        f'<article><h2><a href="{stem}.html">{html.escape(title)}</a></h2>\n'
        f"<p>{html.escape(run['headline'])}</p>\n"
        f'<a href="{stem}.html"><img src="results/{stem}/headline.png" alt="{html.escape(title)}"></a></article>'
    )


def index_page(entries: list[str], given: dict[str, str]) -> str:
    """The front page."""
    # An adapter or a known pair is given without a base.
    sides = [given[side] for side in ("base", "finetuned") if side in given]
    subject = " → ".join(sides) or "the embedded family of trained models"
    head = (
        "<h1>What is inside a fine-tuning delta</h1>\n"
        f"<p>Reports on {html.escape(subject)}. Every figure, table and finding was computed in this run.</p>"
    )
    return PAGE.format(title="What is inside a fine-tuning delta", body="\n".join([head, *entries]))


if __name__ == "__main__":
    main()
