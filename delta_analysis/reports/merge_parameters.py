"""Parameters of 08_merging: fine-tunes of one base, what each is for, and perhaps a continually pre-trained model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from delta_analysis.checkpoints import PREFIX, find_input
from delta_analysis.deltas import load_delta
from delta_analysis.evaluation import ExactMatch
from delta_analysis.merging import check_mergeable
from delta_analysis.reports.family import CPT, SFT, Relation, trail, tuned_on_trail
from delta_analysis.reports.parameter_checks import (
    ParameterError,
    Rates,
    check_device_parameter,
    check_integer,
    check_model,
    check_pair,
    choose_evaluation,
    evaluation_file,
    made_folder,
    parse_drop_rates,
)
from delta_analysis.sweeps import Pair


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
        object.__setattr__(self, "out_dir", made_folder(self.out_dir))

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
