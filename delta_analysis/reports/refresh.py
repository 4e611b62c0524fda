"""Execute the committed notebooks in place with their defaults: `python -m delta_analysis.reports.refresh`.

Only what belongs into a repository is kept: no timings, no execution metadata. The results of the
defaults are copied to `notebooks/results`, where the overview reads them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from tqdm import tqdm

from delta_analysis.checkpoints import find_root, written_whole

CELL_METADATA = {"tags"}
NOTEBOOK_METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def main() -> None:
    """Refresh every notebook."""
    folder = find_root() / "notebooks"
    # The overview reads the results of all the others.
    notebooks = sorted(folder.glob("[0-9]*.ipynb"), key=lambda path: (path.stem.startswith("00_"), path))
    for path in tqdm(notebooks, unit="notebook"):
        refresh(path)
        produced = find_root() / "runs" / path.stem
        kept = folder / "results" / path.stem
        kept.mkdir(parents=True, exist_ok=True)
        for name in ("results.parquet", "run.json", "headline.png"):
            shutil.copyfile(produced / name, kept / name)


def refresh(path: Path) -> None:
    """Execute one notebook in its own folder and write it back with stable metadata only."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, kernel_name="python3", record_timing=False).execute(cwd=str(path.parent))
    notebook.metadata = nbformat.from_dict(NOTEBOOK_METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k in CELL_METADATA})
    with written_whole(path) as partial:
        nbformat.write(notebook, partial)


if __name__ == "__main__":
    main()
