"""What every notebook does: begin, state a finding, write results and where they came from."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from IPython import get_ipython
from IPython.display import Markdown, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from delta_analysis import plots
from delta_analysis.checkpoints import file_hashes, find_root, sha256, versions, written_whole
from delta_analysis.deltas import load_delta
from delta_analysis.evaluation import Evaluation
from delta_analysis.sweeps import END, HIGHEST, LOWEST, NONE, STORE, Interval, Pair, first_metric


def say(sentence: str) -> None:
    """Show a sentence that was computed, as text of the report."""
    display(Markdown(sentence))


@contextmanager
def notes() -> Iterator[None]:
    """Show warnings as text of the report, not as messages of the program."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for each in caught:
        say(f"**Note.** {each.message}")


class LiveLine:
    """A stream for a progress bar in a notebook: one line, rewritten in place, and gone in the end."""

    def __init__(self) -> None:
        self._shown = display(Markdown(""), display_id=True)

    def write(self, text: str) -> None:
        if self._shown is not None:
            self._shown.update(Markdown(text.strip("\r\n ")))

    def flush(self) -> None:
        """Nothing is held back."""


def protocols(evaluations: Mapping[str, Sequence[Evaluation]]) -> str:
    """What each pair is judged by, as a list; pairs that are judged alike share a line."""
    pairs: dict[str, list[str]] = {}
    for pair, own in evaluations.items():
        for evaluation in own:
            pairs.setdefault(f"{evaluation.name}: {evaluation.protocol}", []).append(pair)
    return "\n".join(f"- *{'; '.join(names)}*, {protocol}" for protocol, names in pairs.items())


def scope_text(scope: str, pairs: Sequence[Pair]) -> str:
    """Which tensors an edit reaches, with the share of the delta's entries that they are."""
    lines = []
    for pair in pairs:
        delta = load_delta(base=pair.base, finetuned=pair.finetuned)
        numel = {name: math.prod(match.shape) for name, match in delta.compared.items()}
        chosen = delta.select(scope)
        share = sum(numel[name] for name in chosen) / max(sum(numel.values()), 1)
        lines.append((len(chosen), len(numel), percent(share)))
    told = " or ".join(
        dict.fromkeys(f"{some} of {every} tensors ({share} of the entries)" for some, every, share in lines)
    )
    return f"Edited: scope `{scope}`, {told} of a delta."


def check_answers(cells: pd.DataFrame) -> None:
    """Raise if an untouched model answers nothing: what would be measured is not an ability."""
    silent = cells[(cells["drop_rate"] == 0) & (cells["metric"] == "accuracy") & (cells["value"] == 0)]
    if len(silent):
        raise ValueError(
            f"parameter evaluation: {', '.join(dict.fromkeys(silent['pair']))} answers none of the questions even "
            "untouched; check that questions and prompt format are the ones it was tuned for"
        )


def judged_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells of the first metric of each pair; an error as of `check_answers`."""
    check_answers(cells)
    return first_metric(cells)


def panel(width: float, height: float) -> Axes:
    """The axes of a figure with a single panel, sizes in inches."""
    _, ax = plt.subplots(figsize=(width, height))
    return ax


def panels(names: Sequence[str], *, height: float = 3.1, **options: Any) -> tuple[Figure, dict[str, Axes]]:
    """A grid of axes, one for each name and titled by it, two in a row, in reading order."""
    columns = min(len(names), 2)
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.2 * columns, height * rows), squeeze=False, layout="constrained", **options
    )
    for ax, name in zip(axes.flat, names, strict=False):
        ax.set_title(name)
    for ax in axes.flat[len(names) :]:
        ax.remove()
    return figure, dict(zip(names, axes.flat, strict=False))


def shared_legend(figure: Figure, ax: Axes) -> None:
    """The legend of one panel under all of them."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5))


def percent(share: float, digits: int = 0) -> str:
    """A share as a percentage.

    Examples
    --------
    >>> percent(0.9731)
    '97%'
    """
    return f"{100 * share:.{digits}f}%"


def percent_range(shares: pd.Series, digits: int = 0) -> str:
    """The least and the greatest of some shares, once if they read the same.

    Examples
    --------
    >>> percent_range(pd.Series([0.5, 0.25])), percent_range(pd.Series([0.5]))
    ('25% to 50%', '50%')
    """
    ends = percent(shares.min(), digits), percent(shares.max(), digits)
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def begin() -> None:
    """What every report begins with: one style, small figures, and one store of cells for all of them.

    What one report has measured, the next one reads.
    """
    plots.set_style()
    small_figures()
    os.environ.setdefault(STORE, str(find_root() / "runs" / "cells"))


def small_figures() -> None:
    """From now on show figures as PNG with a palette of 128 colours, a third of the size of full colour."""
    shell = get_ipython()
    if shell is not None:
        # The backend registers its own format when the first figure is made, unless it has done so before.
        importlib.import_module("matplotlib_inline.backend_inline")
        shell.display_formatter.formatters["image/png"].for_type(Figure, palette_png)


def palette_png(figure: Figure) -> bytes:
    """A figure as PNG with a palette."""
    full, small = BytesIO(), BytesIO()
    figure.savefig(full, format="png", bbox_inches="tight", dpi=figure.dpi)
    Image.open(full).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    return small.getvalue()


def interval_text(interval: Interval, digits: int = 2) -> str:
    """A value with the ends of its interval.

    Examples
    --------
    >>> interval_text(Interval(0.456, 0.3, 0.61), digits=1)
    '0.5 [0.3, 0.6]'
    """
    value, low, high = (f"{0.0 if round(x, digits) == 0 else x:.{digits}f}" for x in interval)
    return f"{value} [{low}, {high}]"


def table(frame: pd.DataFrame, digits: int = 2) -> pd.DataFrame:
    """A table for reading: rounded, its axes without names of their own."""
    return frame.round(digits).rename_axis(index=[None] * frame.index.nlevels, columns=[None] * frame.columns.nlevels)


def drop_rate_text(p: float) -> str:
    """A drop rate with as many digits as tell it from 1; at the ends of the search, a bound; none if it is missing.

    Examples
    --------
    >>> drop_rate_text(0.5), drop_rate_text(0.98712)
    ('0.50', '0.987')
    >>> drop_rate_text(HIGHEST), drop_rate_text(math.nan)
    ('at least 0.99995', 'none')
    """
    if math.isnan(p):
        return NONE
    if p >= HIGHEST - END or p <= LOWEST + END:
        return f"at least {HIGHEST:.5f}" if p > LOWEST + END else f"at most {LOWEST:g}"
    return f"{p:.2f}" if p < 0.95 else f"{p:.3f}" if p < 0.995 else f"{p:.4f}" if p < 0.9995 else f"{p:.5f}"


def tolerance_text(row: pd.Series) -> str:
    """A tolerated drop rate, a row of `measure_tolerance`, with its interval.

    Examples
    --------
    >>> tolerance_text(pd.Series({"tolerated": 0.9, "low": 0.8, "high": 0.951}))
    '0.90 [0.80, 0.951]'
    """
    value, low, high = (drop_rate_text(row[column]) for column in ("tolerated", "low", "high"))
    return f"{value} [{low}, {high}]"


def tables(**frames: pd.DataFrame) -> pd.DataFrame:
    """Several tables as one, with their names in the column `table`."""
    return stacked(*(frame.assign(table=name) for name, frame in frames.items()))


def stacked(*frames: pd.DataFrame) -> pd.DataFrame:
    """Several tables, one below the other."""
    return pd.concat(frames, ignore_index=True)


def sources(pairs: Iterable[Pair]) -> list[str]:
    """The checkpoints of some pairs."""
    return [str(source) for pair in pairs for source in (pair.base, pair.finetuned) if source]


def write_results(
    parameters: Any,
    results: pd.DataFrame,
    *,
    sources: Iterable[str],
    files: Iterable[Path] = (),
    headline: str,
    figure: Figure,
) -> None:
    """Write `results.parquet`, `run.json` and `headline.png` into the parameters' `out_dir`.

    Parameters
    ----------
    parameters : the notebook's frozen dataclass, with a field `out_dir`.
    results : tidy, one row an observation.
    sources : checkpoints that were read; their weight files are hashed.
    files : whatever else was read, such as questions; hashed too.
    headline : the report's main finding, one computed sentence.
    figure : the figure that shows it.
    """
    folder, given = Path(parameters.out_dir), dataclasses.asdict(parameters)
    run = {
        "headline": headline,
        # Where a run was written says nothing of it.
        "parameters": {name: value for name, value in given.items() if name != "out_dir"},
        "versions": versions(),
        "checkpoints": {source: file_hashes(source) for source in sorted(set(sources))},
        "files": {path.name: sha256(path) for path in sorted(set(files))},
    }
    with written_whole(folder / "results.parquet") as path:
        results.to_parquet(path, index=False)
    with written_whole(folder / "run.json") as path:
        path.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n")
    with written_whole(folder / "headline.png") as path:
        figure.savefig(path, format="png", bbox_inches="tight")
