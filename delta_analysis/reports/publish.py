"""Run the notebooks and publish them as HTML: `python -m delta_analysis.reports.publish [--base … --finetuned …]`.

Each notebook gets its parameters from papermill, runs in a kernel of its own and becomes a page. The
overview runs last, on the results of the others: it opens `index.html`, which then shows the headline
sentence and figure that each of the others left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import html
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import nbformat
import papermill
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert import HTMLExporter
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from delta_analysis.checkpoints import find_root

OVERVIEW = "00_overview"


MERGES = "08_merging"
"""Takes two fine-tunes, each with questions of its own: left out of a report on one pair."""


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
th, td {{ padding: .25rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }}
.dataframe th, .dataframe td {{ text-align: right; white-space: nowrap; }}
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


class NotebookError(Exception):
    """A notebook that stopped: which one, why, and where it lies as far as it came."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m delta_analysis.reports.publish", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--base", default="", help="checkpoint before fine-tuning; empty: the embedded family")
    parser.add_argument("--finetuned", default="", help="checkpoint after fine-tuning")
    parser.add_argument("--evaluation", default="", help="a task, a .jsonl file of questions or a text file")
    parser.add_argument("--other-base", default="", help="checkpoint before the continual pre-training of the base")
    parser.add_argument("--inputs", default="", help="a file of texts to calibrate on, without labels")
    parser.add_argument("--out", type=Path, default=find_root() / "reports")
    given = vars(parser.parse_args())
    out = given.pop("out").resolve()
    # The notebooks run in their own folder, so paths are made absolute here.
    given = {
        name: str(Path(value).resolve()) if Path(value).exists() else value for name, value in given.items() if value
    }
    try:
        index = asyncio.run(build_report(given, out))
    except NotebookError as error:
        sys.exit(str(error))
    print(f"\nReport: {index}")


async def build_report(given: dict[str, str], out: Path) -> Path:
    """Run every notebook with the parameters given, write the pages and return the index."""
    notebooks = sorted((find_root() / "notebooks").glob("[0-9]*.ipynb"))
    if "finetuned" in given:
        notebooks = [notebook for notebook in notebooks if notebook.stem != MERGES]
    others = [notebook for notebook in notebooks if notebook.stem != OVERVIEW]
    out.mkdir(parents=True, exist_ok=True)
    # Models of unknown size might not fit into memory more than once, and are run on all cores by themselves.
    at_once = 1 if "finetuned" in given else min(available_cores(), len(others))
    pages: dict[str, nbformat.NotebookNode] = {}

    async def publish(notebook: Path) -> None:
        label = f"[{notebooks.index(notebook) + 1}/{len(notebooks)}] {notebook.stem}"
        print(f"{label} starts", flush=True)
        started = time.perf_counter()
        results = out / "results" / notebook.stem
        shutil.rmtree(results, ignore_errors=True)
        parameters = {**given, "out_dir": str(results), "results": str(out / "results")}
        page = await run_notebook(notebook, out / notebook.name, parameters, at_once)
        (out / f"{notebook.stem}.html").write_text(notebook_page(page), encoding="utf-8")
        pages[notebook.stem] = page
        print(f"{label} took {time.perf_counter() - started:.0f} s", flush=True)

    # 01 is the shortest: started last, it leaves the least time in which a core has nothing to do.
    await run_all(reversed(others), publish, at_once)
    await run_all((notebook for notebook in notebooks if notebook.stem == OVERVIEW), publish)

    overview = notebook_body(pages.pop(OVERVIEW)) if OVERVIEW in pages else ""
    entries = [index_entry(stem, title_of(page), out / "results") for stem, page in sorted(pages.items())]
    index = out / "index.html"
    index.write_text(index_page(overview, entries, given), encoding="utf-8")
    return index


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


async def run_all(notebooks: Iterable[Path], publish: Callable[[Path], Awaitable[None]], at_once: int = 1) -> None:
    """Publish notebooks in their order, some at once; an error stops those that run and those to come."""
    queue = iter(notebooks)

    async def work() -> None:
        for notebook in queue:
            await publish(notebook)

    workers = [asyncio.create_task(work()) for _ in range(at_once)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def run_notebook(
    notebook: Path, target: Path, parameters: dict[str, str], at_once: int = 1
) -> nbformat.NotebookNode:
    """Execute a notebook in its folder with those of the parameters that it declares; `target` follows its cells."""
    declared = papermill.inspect_notebook(str(notebook))
    passed = {name: value for name, value in parameters.items() if name in declared}
    node = parameterize_notebook(load_notebook_node(str(notebook)), passed, kernel_name="python3")
    for cell in node.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)

    def save(**_: object) -> None:
        nbformat.write(node, target)

    client = NotebookClient(
        node,
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
        # Stopped in the middle of a cell, the kernel gets no time to end it.
        shutdown_kernel="immediate",
        on_cell_start=save,
    )
    # Kernels that share the cores would slow each other down if each had a thread on every core.
    share = {} if at_once == 1 else {"OMP_NUM_THREADS": str(max(available_cores() // at_once, 1))}
    try:
        await client.async_execute(cwd=str(notebook.parent), env={**share, **os.environ})
    except (CellExecutionError, DeadKernelError) as error:
        reason = f"{error.ename}: {error.evalue}" if isinstance(error, CellExecutionError) else error
        raise NotebookError(f"{notebook.name} stopped: {reason}\nThe notebook so far: {target}") from error
    finally:
        save()
    return node


def title_of(notebook: nbformat.NotebookNode) -> str:
    """The notebook's question: the heading of its first cell."""
    first: str = notebook.cells[0].source
    return first.splitlines()[0].lstrip("# ")


def notebook_page(notebook: nbformat.NotebookNode) -> str:
    """A notebook as a page of its own."""
    home = '<p><a href="index.html">All reports</a></p>'
    return PAGE.format(title=html.escape(title_of(notebook)), body=f"{home}\n{notebook_body(notebook)}")


def notebook_body(notebook: nbformat.NotebookNode) -> str:
    """A notebook's text, tables and figures, without its code, and the parameters it was run with."""
    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_output_prompt=True)
    body, _ = exporter.from_notebook_node(notebook)
    body = body.replace("<table", '<div class="table"><table').replace("</table>", "</table></div>")
    body = re.sub(r' border="1"| style="text-align: right;"', "", body)
    used = parameters_in(notebook)
    footer = f"<footer>Parameters: {html.escape(used)}</footer>" if used else ""
    return f"{body}\n{footer}"


def parameters_in(notebook: nbformat.NotebookNode) -> str:
    """What the notebook was run with beyond its defaults, as papermill recorded it."""
    given = notebook.metadata.get("papermill", {}).get("parameters", {})
    return ", ".join(f"{name} = {value}" for name, value in given.items() if name not in ("out_dir", "results"))


def index_entry(stem: str, title: str, results: Path) -> str:
    """One report on the front page: its question, its headline sentence and figure."""
    run = json.loads((results / stem / "run.json").read_text(encoding="utf-8"))
    return (
        f'<article><h2><a href="{stem}.html">{html.escape(title)}</a></h2>\n'
        f"<p>{html.escape(run['headline'])}</p>\n"
        f'<a href="{stem}.html"><img src="results/{stem}/headline.png" alt="{html.escape(title)}"></a></article>'
    )


def index_page(overview: str, entries: list[str], given: dict[str, str]) -> str:
    """The front page: the overview, then the reports that it rests on."""
    # An adapter or a known pair is given without a base.
    sides = [given[side] for side in ("base", "finetuned") if side in given]
    subject = " → ".join(sides) or "the embedded family of trained models"
    head = (
        "<p><strong>What is inside a fine-tuning delta.</strong> "
        f"Reports on {html.escape(subject)}. Every figure, table and finding was computed in this run. "
        '<a href="#reports">The reports</a> follow the claims that they judge.</p>'
    )
    reports = '<h1 id="reports">The reports</h1>'
    return PAGE.format(title="What is inside a fine-tuning delta", body="\n".join([head, overview, reports, *entries]))


if __name__ == "__main__":
    main()
