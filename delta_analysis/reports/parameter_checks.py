"""Checks of the notebooks' parameters, before any work begins.

Each error names the parameter, the value given and what is allowed, because papermill passes
whatever it is handed: numbers as text, a single number for a list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from delta_analysis.checkpoints import find_input, open_checkpoint, resolve, tokenizer_folder, writable_folder
from delta_analysis.deltas import load_delta
from delta_analysis.evaluation import (
    Classification,
    Evaluation,
    ExactMatch,
    LmEval,
    TextPerplexity,
    load_labelled,
    load_questions,
)
from delta_analysis.reports.family import TASKS, Relation, questions_file, sample_text_file

Rates = str | float | Sequence[float]


class ParameterError(ValueError):
    """A notebook parameter with a value that is not allowed."""

    def __init__(self, parameter: str, problem: object) -> None:
        self.parameter = parameter
        self.problem = str(problem).removeprefix(f"{parameter} ")
        super().__init__(f"parameter {parameter}: {self.problem}")


@contextmanager
def blamed_on(parameter: str, *, but: Sequence[str] = ()) -> Iterator[None]:
    """Errors of values inside are errors of this parameter, unless they name one of those."""
    try:
        yield
    except ParameterError as error:
        raise ParameterError(error.parameter if error.parameter in but else parameter, error.problem) from error
    except ValueError as error:
        raise ParameterError(parameter, error) from error


def check_pair(base: str, finetuned: str, **how: Any) -> None:
    """Both empty, or two checkpoints that can be opened and compared; an adapter may stand without its base."""
    if not finetuned and not base:
        return
    if not finetuned:
        raise ParameterError("finetuned", "is empty while base is not; give both, or neither (embedded family)")
    for parameter, value in (("base", base), ("finetuned", finetuned)):
        with blamed_on(parameter):
            checkpoint = open_checkpoint(value) if value else None
    if not base and not (checkpoint and checkpoint.is_delta):
        raise ParameterError("base", "is empty while finetuned is not; give both, or neither (embedded family)")
    with blamed_on("base"):
        load_delta(base=base or None, finetuned=finetuned, **how)


def check_model(base: str, finetuned: str) -> None:
    """A model to evaluate, the fine-tuned one or an adapter's base: a directory with configuration and tokenizer."""
    if not finetuned:
        return
    tuned = open_checkpoint(finetuned)
    parameter, whole = ("base", base) if tuned.is_delta else ("finetuned", finetuned)
    folder = tokenizer_folder(open_checkpoint(whole)) if whole else None
    if not folder or not ((folder / "config.json").is_file() and list(folder.glob("tokenizer*"))):
        raise ParameterError(
            parameter,
            f"{whole or 'is empty'}: evaluation needs a directory with config.json and tokenizer files beside weights",
        )


def check_scope(scope: str, relations: Iterable[Relation]) -> None:
    """A scope that selects something of every pair's delta."""
    for relation in relations:
        delta = load_delta(base=relation.base or None, finetuned=relation.finetuned)
        try:
            delta.select(scope)
        except ValueError as error:
            raise ParameterError("scope", f"{relation.name}: {error}") from error


def parse_drop_rates(given: Rates) -> tuple[float, ...]:
    """Sorted drop rates in [0, 1] from a list, a number or text such as `0.1,0.5`; 0 and 1 are added.

    >>> parse_drop_rates("0.5, 0.1")
    (0.0, 0.1, 0.5, 1.0)
    """
    inner = [rate for rate in _numbers(given) if rate not in (0, 1)]
    if not inner or not all(0 < rate < 1 for rate in inner):
        raise ValueError(f"must be numbers in [0, 1], at least one strictly between, as [0.1, 0.5]; not {given!r}")
    return (0.0, *inner, 1.0)


def parse_scalings(given: Rates) -> tuple[float, ...]:
    """Sorted scalings above 0 from a list, a number or text such as `0.8,1.0`.

    >>> parse_scalings("1, 0.5")
    (0.5, 1.0)
    """
    scalings = _numbers(given)
    if not scalings or not all(0 < each < float("inf") for each in scalings):
        raise ValueError(f"must be finite numbers above 0, as [0.5, 1.0]; not {given!r}")
    return scalings


def _numbers(given: Rates) -> tuple[float, ...]:
    """The numbers of a list or a text, or a single one, sorted; none if one of them is no number."""
    parts: Sequence[str | float]
    if isinstance(given, str):
        # The text may be that of a list.
        parts = given.strip().removeprefix("[").removesuffix("]").split(",")
    else:
        parts = [given] if isinstance(given, int | float) else given
    try:
        return tuple(sorted({float(part) for part in parts}))
    except (TypeError, ValueError):
        return ()


def made_folder(out_dir: str) -> str:
    """The folder's full path, a relative one in the repository; made here, so that no work is done in vain."""
    try:
        if not out_dir:
            raise NotADirectoryError("no folder is named")
        return str(writable_folder(resolve(out_dir)))
    except OSError as error:
        raise ValueError(f"must name a folder that can be made and written; not {out_dir!r} ({error})") from error


def found_source(source: str) -> str:
    """A source as given, or its full path if it is a path."""
    if source and not source.startswith("zoo:") and (path := find_input(source)).exists():
        return str(path)
    return source


def named_sources(value: str) -> list[str]:
    """The sources in a text, with commas between; a path that has commas of its own is one, if it is there."""
    parts = value.split(",")
    sources: list[str] = []
    while parts:
        joined = {n: ",".join(parts[:n]).strip() for n in range(len(parts), 0, -1)}
        count = next((n for n, path in joined.items() if n > 1 and find_input(path).exists()), 1)
        sources.append(joined[count])
        del parts[:count]
    return sources


HARNESS = "lm-eval:"


def evaluation_file(evaluation: str) -> Path | None:
    """The file behind a task name or a path, the sample text if it is empty; None for tasks of the harness."""
    if evaluation in TASKS:
        return questions_file(evaluation)
    if evaluation.startswith(HARNESS):
        return None
    path = find_input(evaluation) if evaluation else sample_text_file()
    if not path.is_file():
        raise ParameterError(
            "evaluation",
            f"must be one of {', '.join(TASKS)}, a .jsonl file of questions or of texts with labels, {HARNESS}TASK, "
            f"a text file for perplexity, or empty; not {evaluation!r}",
        )
    return path


def choose_evaluation(evaluation: str, n_questions: int, *, chat_template: bool = False) -> Evaluation:
    """What a file is for: questions, texts with labels, or a text; on at most `n_questions` items."""
    path = evaluation_file(evaluation)
    if path is None:
        tasks = tuple(task.strip() for task in evaluation.removeprefix(HARNESS).split(","))
        return LmEval(tasks, limit=n_questions, chat_template=chat_template)
    name = evaluation if evaluation in TASKS else path.name
    try:
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            raise ValueError("is empty; expected questions, texts with labels, or a text")
        if path.suffix != ".jsonl":
            return TextPerplexity(text, name=name)
        if '"label"' in text.split("\n", 1)[0]:
            return Classification(tuple(load_labelled(path, n_questions)), name=name)
        return ExactMatch(tuple(load_questions(path, n_questions)), name=name, chat_template=chat_template)
    except ValueError as error:
        raise ParameterError("evaluation", f"{path}: {error}") from error
