"""Parameters of the notebooks, checked before any work begins.

Each error names the parameter, the value given and what is allowed, because papermill passes
whatever it is handed: numbers as text, a single number for a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from delta_analysis.checkpoint import open_checkpoint
from delta_analysis.delta import load_delta
from delta_analysis.evaluate import ExactMatch, TextPerplexity, load_questions
from delta_analysis.family import (
    PAIRS,
    TASK_PAIRS,
    TASKS,
    Relation,
    questions_file,
    sample_text_file,
)
from delta_analysis.paths import find_input, resolve
from delta_analysis.sweep import Evaluation, Pair

Rates = str | float | Sequence[float]


class ParameterError(ValueError):
    """A notebook parameter with a value that is not allowed."""

    def __init__(self, parameter: str, problem: object) -> None:
        super().__init__(f"parameter {parameter}: {problem}")


@dataclass(frozen=True)
class ValueRangesParameters:
    """Parameters of 01_value_ranges; empty `base` and `finetuned` mean the embedded family."""

    base: str
    finetuned: str
    out_dir: str

    def __post_init__(self) -> None:
        _resolve_pair(self)
        check_out_dir(self.out_dir)

    @property
    def embedded(self) -> bool:
        return not self.finetuned

    def relations(self) -> tuple[Relation, ...]:
        """The pairs of the report."""
        return PAIRS if self.embedded else (Relation(self.base, self.finetuned, "given", ""),)


@dataclass(frozen=True)
class DareAblationParameters:
    """Parameters of 02_dare_ablation; empty `base` and `finetuned` mean the embedded family.

    `evaluation` is a task (`instruct`, `math`, `code`), a `.jsonl` file of questions, a text file
    for perplexity, or empty: then the task that the embedded model was tuned for, else perplexity on
    a short English text.
    """

    base: str
    finetuned: str
    drop_rates: Rates
    first_seed: int
    n_seeds: int
    n_questions: int
    evaluation: str
    device: str
    out_dir: str

    def __post_init__(self) -> None:
        _resolve_pair(self)
        object.__setattr__(self, "drop_rates", parse_drop_rates(self.drop_rates))
        check_integer("first_seed", self.first_seed, low=0)
        check_integer("n_seeds", self.n_seeds, low=2)
        check_integer("n_questions", self.n_questions, low=1)
        check_device(self.device)
        check_out_dir(self.out_dir)
        self.pairs()

    @property
    def embedded(self) -> bool:
        return not self.finetuned

    @property
    def seeds(self) -> list[int]:
        return list(range(self.first_seed, self.first_seed + self.n_seeds))

    def relations(self) -> tuple[Relation, ...]:
        """The pairs of the report, each with its task where one is known."""
        if self.embedded:
            return TASK_PAIRS
        known = {relation.finetuned: relation.task for relation in TASK_PAIRS}
        return (Relation(self.base, self.finetuned, "given", known.get(self.finetuned, "")),)

    def pairs(self) -> list[Pair]:
        """The pairs of the report with their evaluations."""
        if self.embedded and self.evaluation:
            raise ParameterError(
                "evaluation", f"{self.evaluation!r} needs a pair; the embedded family brings its own, leave it empty"
            )
        return [
            Pair(r.name, r.base, r.finetuned, choose_evaluation(self.evaluation or r.task, self.n_questions))
            for r in self.relations()
        ]


def _resolve_pair(parameters: ValueRangesParameters | DareAblationParameters) -> None:
    """Put full paths in place of relative ones, and check that the two can be compared."""
    for parameter in ("base", "finetuned"):
        value = getattr(parameters, parameter)
        if not isinstance(value, str):
            raise ParameterError(parameter, f"must be a path or zoo:<size>/<name>, or empty; not {value!r}")
        if value and not value.startswith("zoo:") and find_input(value).exists():
            object.__setattr__(parameters, parameter, str(find_input(value)))
    check_pair(parameters.base, parameters.finetuned)


def check_pair(base: str, finetuned: str) -> None:
    """Both empty, or two checkpoints that can be opened and compared."""
    for parameter, value, other in (("base", base, "finetuned"), ("finetuned", finetuned, "base")):
        if not value and (finetuned or base):
            raise ParameterError(parameter, f"is empty while {other} is not; give both, or neither (embedded family)")
        if value:
            try:
                open_checkpoint(value)
            except ValueError as error:
                raise ParameterError(parameter, error) from error
    if base:
        try:
            load_delta(base=base, finetuned=finetuned)
        except ValueError as error:
            raise ParameterError("base", error) from error


def parse_drop_rates(given: Rates) -> tuple[float, ...]:
    """Sorted drop rates in [0, 1] from a list, a number or text such as `0.1,0.5`; 0 and 1 are added.

    Examples
    --------
    >>> parse_drop_rates("0.5, 0.1")
    (0.0, 0.1, 0.5, 1.0)
    """
    parts = given.split(",") if isinstance(given, str) else [given] if isinstance(given, int | float) else given
    try:
        rates = {float(part) for part in parts}
    except (TypeError, ValueError):
        rates = set()
    inner = sorted(rates - {0.0, 1.0})
    if not inner or not all(0 < rate < 1 for rate in inner):
        raise ParameterError(
            "drop_rates", f"must be numbers in [0, 1], at least one strictly between, as [0.1, 0.5]; not {given!r}"
        )
    return (0.0, *inner, 1.0)


def check_integer(parameter: str, value: object, *, low: int) -> None:
    """An integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ParameterError(parameter, f"must be an integer of at least {low}; not {value!r}")


def check_device(device: str) -> None:
    """`cpu`, or a CUDA device that is there."""
    present = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if device not in (present + ["cuda"] * torch.cuda.is_available()):
        raise ParameterError("device", f"must be one of {', '.join(present)}; not {device!r}")


def check_out_dir(out_dir: str) -> None:
    """A path that is not an existing file."""
    if not isinstance(out_dir, str) or not out_dir or resolve(out_dir).is_file():
        raise ParameterError("out_dir", f"must name a folder, made if it is absent; not {out_dir!r}")


def choose_evaluation(evaluation: str, n_questions: int) -> Evaluation:
    """The evaluation that a task name or a file stands for; the sample text if it is empty."""
    if evaluation in TASKS:
        return _questions(questions_file(evaluation), n_questions)
    path = find_input(evaluation) if evaluation else sample_text_file()
    if not path.is_file():
        raise ParameterError(
            "evaluation",
            f"must be one of {', '.join(TASKS)}, a .jsonl file of questions, a text file for perplexity, or empty; "
            f"not {evaluation!r}",
        )
    if path.suffix == ".jsonl":
        return _questions(path, n_questions)
    return TextPerplexity(path.read_text(encoding="utf-8"))


def _questions(path: Path, count: int) -> ExactMatch:
    try:
        return ExactMatch(tuple(load_questions(path, count)))
    except ValueError as error:
        raise ParameterError("n_questions" if "asked for" in str(error) else "evaluation", error) from error
