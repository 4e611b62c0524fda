"""Run the notebooks and publish them as HTML: `python -m delta_analysis.reports.publish [--base … --finetuned …]`.

Each notebook gets its parameters from papermill, runs in a kernel of its own and becomes a page. The
overview runs last, on the results of the others: it is the front page, `index.html`, which then shows
the headline sentence and figure that each of the others left behind.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter

from delta_analysis.checkpoints import find_input, find_root

OVERVIEW = "00_overview"


MERGES = "08_merging"
"""Takes two fine-tunes, each with questions of its own: left out of a report on one pair."""


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
    given = {name: str(find_input(value)) if Path(value).exists() else value for name, value in given.items() if value}
    try:
        index = build_report(given, out)
    except NotebookError as error:
        sys.exit(str(error))
    print(f"\nReport: {index}")


def build_report(given: dict[str, str], out: Path) -> Path:
    """Run every notebook with the parameters given, write the pages and return the index."""
    notebooks = sorted((find_root() / "notebooks").glob("[0-9]*.ipynb"))
    if "finetuned" in given:
        notebooks = [notebook for notebook in notebooks if notebook.stem != MERGES]
    others = [notebook for notebook in notebooks if notebook.stem != OVERVIEW]
    out.mkdir(parents=True, exist_ok=True)
    # Models of unknown size might not fit into memory more than once, and are run on all cores by themselves.
    at_once = 1 if "finetuned" in given else min(available_cores(), len(others))
    publish = partial(run_notebook, out=out, given=given, stems=[notebook.stem for notebook in notebooks])
    threads = available_cores() // at_once if at_once > 1 else 0
    # An error ends the pool, and with it the notebooks that run.
    with multiprocessing.get_context("spawn").Pool(at_once, limit_threads, [threads]) as pool:
        # 01 is the shortest: started last, it leaves the least time in which a core has nothing to do.
        for _ in pool.imap_unordered(publish, reversed(others)):
            pass
        reports = [entry(notebook.stem, out) for notebook in others]
        overview = nbformat.v4.new_notebook()
        if len(notebooks) > len(others):
            pool.apply(publish, notebooks[:1])
            overview = nbformat.read(out / notebooks[0].name, as_version=4)
    # An adapter or a known pair is given without a base.
    subject = " → ".join(given[side] for side in ("base", "finetuned") if side in given)
    index = out / "index.html"
    told = {"subject": subject or "the embedded family of trained models", "reports": reports}
    index.write_text(page_of(overview, "What is inside a fine-tuning delta", **told), encoding="utf-8")
    return index


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_threads(n_threads: int) -> None:
    """Kernels that share the cores would slow each other down if each had a thread on every core; 0 sets no limit."""
    if n_threads:
        os.environ.setdefault("OMP_NUM_THREADS", str(n_threads))


def run_notebook(notebook: Path, out: Path, given: dict[str, str], stems: Sequence[str]) -> None:
    """Execute a notebook in its folder with those of the parameters that it declares, and write its page.

    `out` gets the notebook too, which follows its cells.
    """
    label = f"[{stems.index(notebook.stem) + 1}/{len(stems)}] {notebook.stem}"
    print(f"{label} starts", flush=True)
    started = time.perf_counter()
    results = out / "results"
    shutil.rmtree(results / notebook.stem, ignore_errors=True)
    offered = {**given, "out_dir": str(results / notebook.stem), "results": str(results)}
    declared = papermill.inspect_notebook(str(notebook))
    target = out / notebook.name
    try:
        done = papermill.execute_notebook(
            str(notebook),
            str(target),
            {name: value for name, value in offered.items() if name in declared},
            kernel_name="python3",
            progress_bar=False,
            cwd=str(notebook.parent),
            extra_arguments=["--log-level=ERROR"],
        )
    except (papermill.PapermillExecutionError, DeadKernelError) as error:
        reason = f"{error.ename}: {error.evalue}" if isinstance(error, papermill.PapermillExecutionError) else error
        # Theirs cannot be sent from one process to another.
        raise NotebookError(f"{notebook.name} stopped: {reason}\nThe notebook so far: {target}") from None
    (out / f"{notebook.stem}.html").write_text(page_of(done, title_of(done)), encoding="utf-8")
    print(f"{label} took {time.perf_counter() - started:.0f} s", flush=True)


def title_of(notebook: nbformat.NotebookNode) -> str:
    """The notebook's question: the heading of its first cell that has one."""
    return next(cell.source for cell in notebook.cells if cell.source.startswith("# ")).splitlines()[0].lstrip("# ")


def page_of(notebook: nbformat.NotebookNode, title: str, **told: Any) -> str:
    """A notebook's text, tables and figures, without its code, and the parameters it was run with."""
    exporter = HTMLExporter(
        template_name="report",
        extra_template_basedirs=[str(Path(__file__).parent / "templates")],
        exclude_input=True,
        exclude_output_prompt=True,
    )
    page: str = exporter.from_notebook_node(notebook, {"title": title, "used": parameters_in(notebook), **told})[0]
    return page


def parameters_in(notebook: nbformat.NotebookNode) -> str:
    """What the notebook was run with beyond its defaults, as papermill recorded it."""
    given = notebook.metadata.get("papermill", {}).get("parameters", {})
    return ", ".join(f"{name} = {value}" for name, value in given.items() if name not in ("out_dir", "results"))


def entry(stem: str, out: Path) -> dict[str, str]:
    """What the front page says of a report: its question and its headline sentence."""
    run = json.loads((out / "results" / stem / "run.json").read_text(encoding="utf-8"))
    title = title_of(nbformat.read(out / f"{stem}.ipynb", as_version=4))
    return {"stem": stem, "title": title, "headline": run["headline"]}


if __name__ == "__main__":
    main()
