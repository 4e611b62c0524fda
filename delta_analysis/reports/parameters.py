"""Parameters of the notebooks: what each may be told, checked before any work begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from delta_analysis._errors import one_of
from delta_analysis.checkpoints import PREFIX, find_input, open_checkpoint, pair_sources, resolve, tokenizer_folder
from delta_analysis.deltas import VOCABULARIES, Delta, Vocabulary, editable_shapes, in_scope, load_delta
from delta_analysis.evaluation import (
    Classification,
    Evaluation,
    ExactMatch,
    LmEval,
    TextPerplexity,
    check_device,
    load_labelled,
    load_questions,
)
from delta_analysis.merging import check_mergeable
from delta_analysis.pruning import Pruner
from delta_analysis.reports.family import (
    BOTH,
    CPT,
    ENCODER_PAIRS,
    PAIRS,
    SFT,
    SIZES,
    TASK_PAIRS,
    TASKS,
    Relation,
    questions_file,
    sample_text_file,
    short_source,
    task_pairs,
    trail,
    tuned_on_trail,
)
from delta_analysis.sweeps import Edit, Pair


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
        check_device_parameter(self.device)
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
        known = {r.finetuned: r.task for r in (*(r for size in SIZES for r in task_pairs(size)), *ENCODER_PAIRS)}
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

    def readable(self) -> dict[str, tuple[Evaluation, ...]]:
        """Name of each pair -> what brings texts to read: its evaluation, or the sample text for one without."""
        sample = choose_evaluation("", self.n_questions)
        return {name: own if own[0].texts else (sample,) for name, own in self.evaluations().items()}

    def edit(self, pruner: Pruner) -> Edit:
        """The pruner on the tensors of the scope."""
        return Edit(pruner, self.scope)


@dataclass(frozen=True)
class ModelSizeParameters:
    """Parameters of 07_model_size: `base` and `finetuned` name several checkpoints with commas between, or none.

    Both have the same number, of which the first belong together, and so on. The other parameters are
    those of `AblationParameters`, and serve every pair.
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
        object.__setattr__(self, "drop_rates", parse_drop_rates(self.drop_rates))
        self.each()
        names = [self.pair(relation).name for relation in self.relations()]
        if twice := next((name for name in names if names.count(name) > 1), ""):
            raise ParameterError("finetuned", f"two pairs would both be called {twice!r}; name the folders differently")

    @property
    def embedded(self) -> bool:
        return not self.finetuned

    @property
    def seeds(self) -> list[int]:
        return list(range(self.first_seed, self.first_seed + self.n_seeds))

    def each(self) -> list[AblationParameters]:
        """The parameters of each pair by itself; of the embedded family, a single one."""
        sides = {}
        for parameter in ("base", "finetuned"):
            value = getattr(self, parameter)
            if not isinstance(value, str):
                raise ParameterError(parameter, f"must be sources with commas between, or empty; not {value!r}")
            sides[parameter] = [part.strip() for part in value.split(",")]
            if "," in value and not all(sides[parameter]):
                raise ParameterError(parameter, f"names nothing between two commas or at an end: {value!r}")
        if len(sides["base"]) != len(sides["finetuned"]):
            raise ParameterError(
                "base", f"names {len(sides['base'])} checkpoints and finetuned {len(sides['finetuned'])}; give as many"
            )
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return [
            AblationParameters(**{**given, "base": base, "finetuned": finetuned})
            for base, finetuned in zip(sides["base"], sides["finetuned"], strict=True)
        ]

    def relations(self) -> list[Relation]:
        """The pairs of the report."""
        if self.embedded:
            return [relation for size in SIZES for relation in task_pairs(size)]
        return [relation for each in self.each() for relation in each.relations()]

    def pair(self, relation: Relation) -> Pair:
        """A pair of the report; of embedded models, under a name that tells the size too."""
        zoo = relation.finetuned.startswith("zoo:")
        size = f"{relation.finetuned.removeprefix('zoo:').split('/')[0]}, " if zoo else ""
        return replace(relation.pair, name=f"{size}{relation.name}")

    def evaluations(self) -> dict[str, tuple[Evaluation, ...]]:
        """Name of each pair -> what it is judged by."""
        how = {"chat_template": self.chat_template}
        return {self.pair(r).name: (choose_evaluation(r.task, self.n_questions, **how),) for r in self.relations()}

    def readable(self) -> dict[str, tuple[Evaluation, ...]]:
        """Name of each pair -> what brings texts to read: its evaluation, or the sample text for one without."""
        sample = choose_evaluation("", self.n_questions)
        return {name: own if own[0].texts else (sample,) for name, own in self.evaluations().items()}

    def edit(self, pruner: Pruner) -> Edit:
        """The pruner on the tensors of the scope."""
        return Edit(pruner, self.scope)

    def evaluation_files(self) -> list[Path]:
        """The files that the pairs are judged on."""
        return [file for relation in self.relations() if (file := evaluation_file(relation.task))]


def trail_pairs() -> list[Pair]:
    """`code` against checkpoints on the way to its true base: one fine-tune, deltas of several sizes."""
    return [Relation(source, "zoo:small/code", "", "code").pair for step, source in trail()[:-1] if step >= 512]


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


Rates = str | float | Sequence[float]


class ParameterError(ValueError):
    """A notebook parameter with a value that is not allowed."""

    def __init__(self, parameter: str, problem: object) -> None:
        super().__init__(f"parameter {parameter}: {problem}")


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
    if not base and not (checkpoint and checkpoint.is_delta):
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
    parameter, whole = ("base", base) if tuned.is_delta else ("finetuned", finetuned)
    folder = tokenizer_folder(open_checkpoint(whole)) if whole else None
    if not folder or not ((folder / "config.json").is_file() and list(folder.glob("tokenizer*"))):
        raise ParameterError(
            parameter,
            f"{whole or 'is empty'}: evaluation needs a directory with config.json and tokenizer files beside weights",
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


def check_device_parameter(device: str) -> None:
    """`cpu`, or a CUDA device that is there."""
    try:
        check_device(device)
    except ValueError as error:
        raise ParameterError("device", str(error).removeprefix("device ")) from error


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
        try:
            in_scope(scope, {name: len(shape) for name, shape in editable_shapes(delta).items()})
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


MOST_TEXTS = 64
"""Texts that layers get their inputs from."""


@dataclass(frozen=True)
class ContinualParameters:
    """Parameters of 05_continual_pretraining; empty `base` and `finetuned` mean the embedded family.

    `other_base` is a second base of the same fine-tune, such as the one before continual pre-training;
    without it, what is explained is `base → finetuned` itself. `inputs` is a text file or a `.jsonl`
    of questions or labelled texts of the kind that the fine-tune is for; without `evaluation` it also
    judges. The others are those of `AblationParameters`.
    """

    base: str
    finetuned: str
    other_base: str
    inputs: str
    drop_rates: Rates
    first_seed: int
    n_seeds: int
    n_questions: int
    evaluation: str
    chat_template: bool
    device: str
    out_dir: str

    def __post_init__(self) -> None:
        for parameter in ("other_base", "inputs"):
            if not isinstance(getattr(self, parameter), str):
                raise ParameterError(parameter, f"must be text, or empty; not {getattr(self, parameter)!r}")
        if self.embedded:
            for parameter in ("other_base", "inputs"):
                if getattr(self, parameter):
                    raise ParameterError(parameter, "needs base and finetuned; the embedded family brings its own")
        checked = self._ablation(self.evaluation)
        for field in ("base", "finetuned", "drop_rates"):
            object.__setattr__(self, field, getattr(checked, field))
        if self.other_base:
            self._check_other_base()
        if self.inputs and not self._inputs().texts:
            raise ParameterError("inputs", f"{self.inputs!r} has no texts to read; give a text file or a .jsonl")

    def _ablation(self, evaluation: str) -> AblationParameters:
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("other_base", "inputs")}
        return AblationParameters(**{**given, "evaluation": evaluation}, scope="all")

    def _check_other_base(self) -> None:
        if self.other_base.startswith(PREFIX):
            raise ParameterError("other_base", f"{self.other_base!r} names two models; give a single one")
        if not self.other_base.startswith("zoo:") and find_input(self.other_base).exists():
            object.__setattr__(self, "other_base", str(find_input(self.other_base)))
        if self.other_base == self.base:
            raise ParameterError("other_base", "is the same as base; give another base of the fine-tune, or none")
        if short_source(self.other_base) == short_source(self.base):
            name = short_source(self.base)
            raise ParameterError("other_base", f"is called {name!r}, as base is; name the folders differently")
        try:
            check_pair(self.other_base, self.finetuned)
        except ParameterError as error:
            raise ParameterError("other_base", str(error).split(": ", 1)[1]) from error

    def _inputs(self) -> Evaluation:
        try:
            return choose_evaluation(self.inputs, max(self.n_questions, MOST_TEXTS), chat_template=self.chat_template)
        except ParameterError as error:
            raise ParameterError("inputs", str(error).split(": ", 1)[1]) from error

    @property
    def embedded(self) -> bool:
        return not self.finetuned and not self.base

    @property
    def seeds(self) -> list[int]:
        return list(range(self.first_seed, self.first_seed + self.n_seeds))

    def relations(self) -> tuple[Relation, ...]:
        """The pairs of one fine-tune: on its base, then on the other base if there is one."""
        if self.embedded:
            task = "code"
            near = Relation("zoo:small/code-cpt", "zoo:small/code", SFT, task)
            return near, Relation("zoo:small/base", "zoo:small/code", BOTH, task)
        (given,) = self._ablation(self.evaluation or self.inputs).relations()
        return (given, given._replace(base=self.other_base)) if self.other_base else (given,)

    def pairs(self) -> list[Pair]:
        """The same as a sweep takes them."""
        return [relation.pair for relation in self.relations()]

    def evaluation_of(self) -> Evaluation:
        """What the fine-tune is judged by."""
        return choose_evaluation(self.relations()[0].task, self.n_questions, chat_template=self.chat_template)

    def texts(self) -> tuple[str, ...]:
        """What layers get their inputs from: the texts of `inputs`, or of the evaluation, or the sample text."""
        own = self._inputs() if self.inputs else self.evaluation_of()
        found = own.texts or choose_evaluation("", self.n_questions).texts
        return found[:MOST_TEXTS]

    def evaluation_files(self) -> list[Path]:
        """The files that are read beside the checkpoints."""
        named = {self.relations()[0].task, self.inputs} - {""} or {""}
        files = [evaluation_file(each) for each in sorted(named)]
        return [file for file in files if file is not None]


class Stop(NamedTuple):
    """A model on the way of continual pre-training.

    `steps` is how far along it is, 0 if that is not known; `tuned` the same model after fine-tuning on the
    data of the first fine-tune, None if there is none.
    """

    steps: int
    pair: Pair
    tuned: Pair | None


@dataclass(frozen=True)
class MergeParameters:
    """Parameters of 08_merging; empty `base` and `finetuned` mean the embedded family.

    `finetuned` names two or more fine-tunes of `base` with commas between, `evaluation` as many files of
    questions or embedded tasks, one for each. `continued` is a continually pre-trained model of the same
    base and `continued_evaluation` questions of its domain; both may be empty. `scalings` are what each
    method has to choose from.
    """

    base: str
    finetuned: str
    evaluation: str
    continued: str
    continued_evaluation: str
    drop_rates: Rates
    scalings: Sequence[float] | str | float
    first_seed: int
    n_seeds: int
    n_questions: int
    chat_template: bool
    device: str
    out_dir: str

    def __post_init__(self) -> None:
        for parameter in ("base", "finetuned", "evaluation", "continued", "continued_evaluation"):
            if not isinstance(getattr(self, parameter), str):
                raise ParameterError(parameter, f"must be text, or empty; not {getattr(self, parameter)!r}")
        object.__setattr__(self, "drop_rates", parse_drop_rates(self.drop_rates))
        object.__setattr__(self, "scalings", parse_scalings(self.scalings))
        check_integer("first_seed", self.first_seed, low=0)
        check_integer("n_seeds", self.n_seeds, low=2)
        check_integer("n_questions", self.n_questions, low=4)
        check_device_parameter(self.device)
        if not isinstance(self.chat_template, bool):
            raise ParameterError("chat_template", f"must be True or False; not {self.chat_template!r}")
        if self.embedded:
            for parameter in ("evaluation", "continued", "continued_evaluation"):
                if getattr(self, parameter):
                    raise ParameterError(parameter, "needs base and finetuned; the embedded family brings its own")
        else:
            self._check_sources()
        self.evaluations()
        check_out_dir(self.out_dir)

    def _check_sources(self) -> None:
        sources = [part.strip() for part in self.finetuned.split(",")]
        tasks = [part.strip() for part in self.evaluation.split(",")]
        if len(sources) < 2 or not all(sources):
            raise ParameterError(
                "finetuned", f"must name at least two fine-tunes, commas between; not {self.finetuned!r}"
            )
        if len(tasks) != len(sources) or not all(tasks):
            raise ParameterError(
                "evaluation",
                f"must name questions for each of {len(sources)} fine-tunes, commas between; not {self.evaluation!r}",
            )
        if bool(self.continued) != bool(self.continued_evaluation):
            lacking = "continued_evaluation" if self.continued else "continued"
            raise ParameterError(
                lacking, "is empty; give a continually pre-trained model and its questions, or neither"
            )
        for parameter in ("base", "finetuned", "continued"):
            for source in map(str.strip, getattr(self, parameter).split(",")):
                if source.startswith(PREFIX):
                    raise ParameterError(
                        parameter, f"{source!r} names two models; give base and fine-tunes by themselves"
                    )
        object.__setattr__(self, "base", _found(self.base))
        object.__setattr__(self, "finetuned", ",".join(map(_found, sources)))
        object.__setattr__(self, "continued", self.continued and _found(self.continued))
        deltas = []
        for parameter, source in [("finetuned", each) for each in self.sources()] + [("continued", self.continued)]:
            if source:
                try:
                    check_pair(self.base, source)
                    check_model(self.base, source)
                    deltas.append(load_delta(base=self.base, finetuned=source))
                except ParameterError as error:
                    raise _as_of(parameter, error, but=("base",)) from error
        names = [relation.name for relation in self.relations()] + [stop.pair.name for stop in self.stops()]
        if twice := next((name for name in names if names.count(name) > 1), ""):
            raise ParameterError(
                "finetuned", f"two models would both be called {twice!r}; name the folders differently"
            )
        try:
            check_mergeable(self.base, deltas)
        except ValueError as error:
            raise ParameterError("finetuned", error) from error
        # A sweep edits the tensors of a merge's first delta.
        for parameter, first in [("finetuned", deltas[0]), *(("continued", each) for each in deltas[len(sources) :])]:
            if beyond := [name for delta in deltas for name in delta if name not in first]:
                raise ParameterError(
                    parameter,
                    f"{first.finetuned.source} leaves {beyond[0]!r} alone, which another one changes; "
                    "an adapter may come second, after a model that changes all tensors",
                )

    @property
    def embedded(self) -> bool:
        return not self.finetuned and not self.base

    @property
    def seeds(self) -> list[int]:
        return list(range(self.first_seed, self.first_seed + self.n_seeds))

    @property
    def rates(self) -> list[float]:
        """Drop rates between 0 and 1."""
        return [p for p in parse_drop_rates(self.drop_rates) if 0 < p < 1]

    def sources(self) -> list[str]:
        """The fine-tunes that are merged."""
        return ["zoo:small/instruct", "zoo:small/math"] if self.embedded else self.finetuned.split(",")

    def relations(self) -> list[Relation]:
        """The fine-tunes that are merged, each with its task."""
        tasks = ["instruct", "math"] if self.embedded else [part.strip() for part in self.evaluation.split(",")]
        base = "zoo:small/base" if self.embedded else self.base
        return [Relation(base, source, SFT, task) for source, task in zip(self.sources(), tasks, strict=True)]

    def stops(self) -> list[Stop]:
        """Models on the way of continual pre-training, least first."""
        if self.embedded:
            tuned = tuned_on_trail()
            return [
                Stop(
                    steps,
                    Relation("zoo:small/base", source, CPT, "code").pair,
                    Relation("zoo:small/base", tuned[steps], CPT, "code").pair,
                )
                for steps, source in trail()
                if steps in tuned
            ]
        if not self.continued:
            return []
        return [Stop(0, Relation(self.base, self.continued, CPT, "").pair, None)]

    def evaluations(self) -> dict[str, ExactMatch]:
        """Name of each task -> its questions: of the fine-tunes in their order, and of the continued model last."""
        named = [(relation.task, "evaluation") for relation in self.relations()]
        if new := "code" if self.embedded else self.continued_evaluation:
            named.append((new, "continued_evaluation"))
        found: dict[str, ExactMatch] = {}
        for task, parameter in named:
            try:
                chosen = choose_evaluation(task, self.n_questions, chat_template=self.chat_template)
            except ParameterError as error:
                raise _as_of(parameter, error) from error
            if not isinstance(chosen, ExactMatch):
                raise ParameterError(
                    parameter, f"{task!r} holds no questions; merges are judged by answers to questions"
                )
            if len(chosen.questions) < 4:
                raise ParameterError(parameter, f"{task!r} holds {len(chosen.questions)} questions; give at least 4")
            if chosen.name in found:
                raise ParameterError(
                    parameter, f"{task!r} bears the name of another file, or serves twice; name files differently"
                )
            found[chosen.name] = chosen
        return found

    def evaluation_files(self) -> list[Path]:
        """The files that the merges are judged on."""
        named = [relation.task for relation in self.relations()] + [
            "code" if self.embedded else self.continued_evaluation
        ]
        return [file for task in named if task and (file := evaluation_file(task))]


def parse_scalings(given: Sequence[float] | str | float) -> tuple[float, ...]:
    """Sorted scalings above 0 from a list, a number or text such as `0.8,1.0`.

    Examples
    --------
    >>> parse_scalings("1, 0.5")
    (0.5, 1.0)
    """
    parts = given.split(",") if isinstance(given, str) else [given] if isinstance(given, int | float) else given
    try:
        scalings = sorted({float(part) for part in parts})
    except (TypeError, ValueError):
        scalings = []
    if not scalings or not all(0 < each < float("inf") for each in scalings):
        raise ParameterError("scalings", f"must be finite numbers above 0, as [0.5, 1.0]; not {given!r}")
    return tuple(scalings)


def _as_of(parameter: str, error: ParameterError, *, but: Sequence[str] = ()) -> ParameterError:
    """The same problem as one of another parameter, unless it is of one of those."""
    named, problem = str(error).removeprefix("parameter ").split(": ", 1)
    return ParameterError(named if named in but else parameter, problem)


def _found(source: str) -> str:
    """The full path of a source that is a path."""
    return (
        str(find_input(source)) if source and not source.startswith("zoo:") and find_input(source).exists() else source
    )
