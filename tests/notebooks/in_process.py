"""Run a notebook with other parameters in the process that asks for it; a kernel would import everything anew."""

from __future__ import annotations

import os
import traceback
from base64 import b64encode
from pathlib import Path
from typing import Any

import matplotlib as mpl
import papermill
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from nbformat import NotebookNode
from nbformat.v4 import new_output
from papermill.engines import Engine, NotebookExecutionManager, papermill_engines

from delta_analysis.checkpoints.paths import find_root
from delta_analysis.sweeps import STORE

TEXT = "23 plus 45 is 68\n\nuser: what does python print for len('abc')?\nbot: 3\n\n>>> 2 + 3\n5\n\n" * 6
"""What `text.txt` holds, which every run finds in its working directory."""


class InProcess(Engine):
    """Cells are run by IPython here, and show what they show in a kernel."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: NotebookExecutionManager, kernel_name: str, **_: Any) -> None:
        shell = InteractiveShell.instance()
        # Kernels have it from the environment.
        mpl.rcParams["backend"] = "module://matplotlib_inline.backend_inline"
        for index, cell in enumerate(nb_man.nb.cells):
            if cell.cell_type != "code":
                continue
            nb_man.cell_start(cell, index)
            with capture_output() as shown:
                done = shell.run_cell(cell.source, store_history=True)
            cell.execution_count = done.execution_count
            cell.outputs = [new_output("display_data", _encoded(each.data)) for each in shown.outputs]
            error = done.error_before_exec or done.error_in_exec
            if error is not None:
                lines = traceback.format_exception(error)
                cell.outputs.append(new_output("error", ename=type(error).__name__, evalue=str(error), traceback=lines))
                nb_man.cell_exception(cell, index)
                break
            nb_man.cell_complete(cell, index)


def _encoded(data: dict[str, Any]) -> dict[str, Any]:
    """Images as text."""
    return {mime: b64encode(each).decode() if isinstance(each, bytes) else each for mime, each in data.items()}


def run_notebook(name: str, parameters: dict[str, Any], folder: Path, cells: Path) -> NotebookNode:
    """The notebook as it was run in the folder, which gets its `results`; only once in a process."""
    os.environ[STORE] = str(cells)
    # Two processes share two cores.
    torch.set_num_threads(1)
    papermill_engines.register("in process", InProcess)
    (folder / "text.txt").write_text(TEXT)
    return papermill.execute_notebook(
        str(find_root() / "notebooks" / f"{name}.ipynb"),
        str(folder / "out.ipynb"),
        {"out_dir": str(folder / "results"), **parameters},
        engine_name="in process",
        kernel_name="python3",
        progress_bar=False,
        cwd=str(folder),
    )
