"""Parameters of the notebooks, checked before any work begins.

Each error names the parameter, the value given and what is allowed, because papermill passes
whatever it is handed: numbers as text, a single number for a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from delta_analysis._errors import one_of
from delta_analysis.alignment import VOCABULARIES, Vocabulary
from delta_analysis.checkpoint import open_checkpoint, tokenizer_folder
from delta_analysis.delta import Delta, load_delta
from delta_analysis.editable import Edit, Pair
from delta_analysis.evaluate import (
    Classification,
    Evaluation,
    ExactMatch,

    TextPerplexity,
    load_labelled,
    load_questions,
)
from delta_analysis.family import (
    PAIRS,
    TASK_PAIRS,
    TASKS,
    Relation,
    questions_file,
    sample_text_file,
    trail,
)
from delta_analysis.known_pairs import PREFIX, pair_sources
from delta_analysis.paths import find_input, resolve
from delta_analysis.pruning import Pruner
from delta_analysis.scope import in_scope

Rates = str | float | Sequence[float]


class ParameterError(ValueError):
    """A notebook parameter with a value that is not allowed."""

    def __init__(self, parameter: str, problem: object) -> None:
        super().__init__(f"parameter {parameter}: {problem}")


@dataclass(frozen=True)
class ValueRangesParameters:
    """Parameters of 01_value_ranges; empty `base` and `finetuned` mean the embedded family.

    An adapter needs no base. `vocab` and `finetuned_is_delta` are those of `load_delta`.
    """

    base: str
    finetuned: str
    vocab: Vocabulary
    finetuned_is_delta: bool
    out_dir: str

    def __post_init__(self) -> None:
        if self.vocab not in VOCABULARIES:
            raise ParameterError("vocab", one_of("it", self.vocab, VOCABULARIES))
        if not isinstance(self.finetuned_is_delta, bool):
            raise ParameterError("finetuned_is_delta", f"must be True or False; not {self.finetuned_is_delta!r}")
        _resolve_pair(self, vocab=self.vocab, finetuned_is_delta=self.finetuned_is_delta)
        check_out_dir(self.out_dir)

    @property
    def embedded(self) -> bool:
        return not self.finetuned

    def relations(self) -> tuple[Relation, ...]:
        """The pairs of the report."""
        return PAIRS if self.embedded else (Relation(self.base, self.finetuned, "given", ""),)

    def load(self, relation: Relation) -> Delta:
        """The delta of a pair."""
        how = {} if self.embedded else {"vocab": self.vocab, "finetuned_is_delta": self.finetuned_is_delta}
        return load_delta(base=relation.base or None, finetuned=relation.finetuned, **how)  # type: ignore[arg-type]


@dataclass(frozen=True)
class AblationParameters:
    """Parameters of the ablations, 02 to 06; empty `base` and `finetuned` mean the embedded family.

    `scope` is one of `in_scope`. `n_questions` is the most that are asked. `evaluation` is a task
    (`instruct`, `math`, `code`), a `.jsonl` file of questions or of texts with labels, `lm-eval:TASK`
    (several with commas between), a text file for perplexity, or empty: then the task that the
    embedded model was tuned for, else perplexity on a short English text. `chat_template` puts
    questions into the tokenizer's chat template.
    """

    base: str
    finetuned: str
    drop_rates: Rates
    scope: str
    first_seed: int
    n_seeds: int
    n_questions: int
    evaluation: str
    chat_template: bool
    device: str
    out_dir: str

    def __post_init__(self) -> None:
        _resolve_pair(self)
        object.__setattr__(self, "drop_rates", parse_drop_rates(self.drop_rates))
        check_integer("first_seed", self.first_seed, low=0)
        check_integer("n_seeds", self.n_seeds, low=2)
        check_integer("n_questions", self.n_questions, low=1)
        check_device(self.device)
        if not isinstance(self.chat_template, bool):
            raise ParameterError("chat_template", f"must be True or False; not {self.chat_template!r}")
        self.evaluations()
        check_scope(self.scope, self.relations())
        check_model(self.base, self.finetuned)
        check_out_dir(self.out_dir)

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
        task = self.evaluation or known.get(self.finetuned, "")
        return (Relation(self.base, self.finetuned, "given", task),)

    def evaluation_files(self) -> list[Path]:
        """The files that the pairs are judged on."""
        files = [evaluation_file(relation.task) for relation in self.relations()]
        return [file for file in files if file is not None]

    def pairs(self) -> list[Pair]:
        """The pairs of the report."""
        return [relation.pair for relation in self.relations()]

    def evaluations(self) -> dict[str, tuple[Evaluation, ...]]:
        """Name of each pair -> what it is judged by."""
        if self.embedded and self.evaluation:
            raise ParameterError(
                "evaluation", f"{self.evaluation!r} needs a pair; the embedded family brings its own, leave it empty"
            )
        how = {"chat_template": self.chat_template}
        return {r.name: (choose_evaluation(r.task, self.n_questions, **how),) for r in self.relations()}

    def edit(self, pruner: Pruner) -> Edit:
        """The pruner on the tensors of the scope."""
        return Edit(pruner, self.scope)


def _resolve_pair(parameters: ValueRangesParameters | AblationParameters, **how: Any) -> None:
    """Put full paths in place of relative ones, and check that the two can be compared."""
    for parameter in ("base", "finetuned"):
        value = getattr(parameters, parameter)
        if not isinstance(value, str):
            raise ParameterError(parameter, f"must be a path, a hub id or zoo:<size>/<name>, or empty; not {value!r}")
    pair = next((value for value in (parameters.finetuned, parameters.base) if value.startswith(PREFIX)), "")
    if pair:
        try:
            base, finetuned = pair_sources(pair)
        except ValueError as error:
            raise ParameterError("finetuned", error) from error
        object.__setattr__(parameters, "base", base if parameters.base in ("", pair) else parameters.base)
        object.__setattr__(
            parameters, "finetuned", finetuned if parameters.finetuned in ("", pair) else parameters.finetuned
        )
    for parameter in ("base", "finetuned"):
        value = getattr(parameters, parameter)
        if value and not value.startswith("zoo:") and find_input(value).exists():
            object.__setattr__(parameters, parameter, str(find_input(value)))
    check_pair(parameters.base, parameters.finetuned, **how)


def check_pair(base: str, finetuned: str, **how: Any) -> None:
    """Both empty, or two checkpoints that can be opened and compared; an adapter may stand without its base."""
    if not finetuned and not base:
        return
    if not finetuned:
        raise ParameterError("finetuned", "is empty while base is not; give both, or neither (embedded family)")
    for parameter, value in (("base", base), ("finetuned", finetuned)):
        try:
            checkpoint = open_checkpoint(value) if value else None
        except ValueError as error:
            raise ParameterError(parameter, error) from error
    if not base and not (checkpoint and checkpoint.is_difference):
        raise ParameterError("base", "is empty while finetuned is not; give both, or neither (embedded family)")
    try:
        load_delta(base=base or None, finetuned=finetuned, **how)
    except ValueError as error:
        raise ParameterError("base", error) from error


def check_model(base: str, finetuned: str) -> None:
    """A model to evaluate, the fine-tuned one or an adapter's base: a directory with configuration and tokenizer."""
    if not finetuned:
        return
    tuned = open_checkpoint(finetuned)
    parameter, whole = ("base", base) if tuned.is_difference else ("finetuned", finetuned)
    folder = tokenizer_folder(open_checkpoint(whole)) if whole else None
    if not folder or not ((folder / "config.json").is_file() and list(folder.glob("tokenizer*"))):
        raise ParameterError(
            parameter, f"{whole}: evaluation needs a directory with config.json and tokenizer files beside the weights"
        )


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
    """A folder; it is made here, so that no work is done that could not be written."""
    try:
        if not isinstance(out_dir, str) or not out_dir:
            raise NotADirectoryError("no folder is named")
        resolve(out_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ParameterError("out_dir", f"must name a folder that can be made; not {out_dir!r} ({error})") from error


def check_scope(scope: str, relations: Sequence[Relation]) -> None:
    """A scope that selects something of every pair's delta."""
    if not isinstance(scope, str):
        raise ParameterError("scope", f"must be text such as all or attention; not {scope!r}")
    for relation in relations:
        delta = load_delta(base=relation.base or None, finetuned=relation.finetuned)
        shapes = {name: len(match.finetuned.shape) for name, match in delta.compared.items() if match.finetuned}
        try:
            in_scope(scope, shapes)
        except ValueError as error:
            raise ParameterError("scope", f"{relation.name}: {error}") from error


HARNESS = "lm-eval:"


def evaluation_file(evaluation: str) -> Path | None:
    """The file behind a task name or a path, the sample text if it is empty; None for tasks of the harness."""
    if evaluation in TASKS:
        return questions_file(evaluation)
    if isinstance(evaluation, str) and evaluation.startswith(HARNESS):
        return None
    path = find_input(evaluation) if isinstance(evaluation, str) and evaluation else sample_text_file()
    if not isinstance(evaluation, str) or not path.is_file():
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
        if not text:
            raise ValueError("is empty; expected questions, texts with labels, or a text")
        if path.suffix != ".jsonl":
            return TextPerplexity(text, name=name)
        if '"label"' in text.split("\n", 1)[0]:
            return Classification(tuple(load_labelled(path, n_questions)), name=name)
        return ExactMatch(tuple(load_questions(path, n_questions)), name=name, chat_template=chat_template)
    except ValueError as error:
        raise ParameterError("evaluation", f"{path}: {error}") from error
