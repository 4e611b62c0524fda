"""Parameters of 08_merging: fine-tunes of one base, what each is for, and perhaps a continually pre-trained model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from delta_analysis.checkpoints import PREFIX
from delta_analysis.deltas import load_delta
from delta_analysis.evaluation import ExactMatch
from delta_analysis.merging import check_mergeable
from delta_analysis.reports.family import CPT, SFT, Relation, trail, tuned_on_trail
from delta_analysis.reports.parameter_checks import (
    ParameterError,
    Rates,
    blamed_on,
    check_model,
    check_pair,
    evaluation_file,
    found_source,
    named_sources,
    parse_scalings,
)
from delta_analysis.reports.parameters import SweepParameters
from delta_analysis.sweeps import Pair


class Stop(NamedTuple):
    """A model on the way of continual pre-training.

    `steps` is how far along it is, 0 if that is not known; `tuned` the same model after fine-tuning on the
    data of the first fine-tune, None if there is none.
    """

    steps: int
    pair: Pair
    tuned: Pair | None


@dataclass(frozen=True, kw_only=True)
class MergeParameters(SweepParameters):
    """Parameters of 08_merging.

    `finetuned` names two or more fine-tunes of `base` with commas between, `evaluation` as many files of
    questions or embedded tasks, one for each. `continued` is a continually pre-trained model of the same
    base and `continued_evaluation` questions of its domain; both may be empty. `scalings` are what each
    method has to choose from.
    """

    continued: str
    continued_evaluation: str
    scalings: Rates = field(metadata={"parse": parse_scalings})
    n_questions: int = field(metadata={"at_least": 4})

    def check(self) -> None:
        self.only_with_models("evaluation", "continued", "continued_evaluation")
        if not self.embedded:
            self._check_sources()
        self.evaluations()

    def _check_sources(self) -> None:
        sources = named_sources(self.finetuned)
        tasks = named_sources(self.evaluation)
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
            parts = named_sources(getattr(self, parameter))
            if named := [part for part in parts if part.startswith(PREFIX)]:
                raise ParameterError(
                    parameter, f"{named[0]!r} names two models; give base and fine-tunes by themselves"
                )
            self._set(parameter, ",".join(map(found_source, parts)))
        self._check_models()

    def _check_models(self) -> None:
        """All are models of the base that a sweep can merge, under names of their own."""
        sources = [("finetuned", source) for source in self.sources()] + [("continued", self.continued)]
        deltas = []
        for parameter, source in [each for each in sources if each[1]]:
            with blamed_on(parameter, but=("base",)):
                check_pair(self.base, source)
                check_model(self.base, source)
                deltas.append(load_delta(base=self.base, finetuned=source))
        names = [relation.name for relation in self.relations()] + [stop.pair.name for stop in self.stops()]
        if twice := next((name for name in names if names.count(name) > 1), ""):
            raise ParameterError(
                "finetuned", f"two models would both be called {twice!r}; name the folders differently"
            )
        with blamed_on("finetuned"):
            check_mergeable(self.base, deltas)
        # A sweep edits the tensors of a merge's first delta, and merges fine-tunes into the continued model too.
        firsts = [("finetuned", deltas[0]), *[("continued", delta) for delta in deltas[len(self.sources()) :]]]
        for parameter, first in firsts:
            if beyond := [name for delta in deltas for name in delta if name not in first]:
                raise ParameterError(
                    parameter,
                    f"{first.finetuned.source} leaves {beyond[0]!r} alone, which another one changes; "
                    "an adapter may come second, after a model that changes all tensors",
                )

    def sources(self) -> list[str]:
        """The fine-tunes that are merged."""
        return ["zoo:small/instruct", "zoo:small/math"] if self.embedded else named_sources(self.finetuned)

    def relations(self) -> list[Relation]:
        """The fine-tunes that are merged, each with its task."""
        tasks = ["instruct", "math"] if self.embedded else named_sources(self.evaluation)
        base = "zoo:small/base" if self.embedded else self.base
        return [Relation(base, source, SFT, task) for source, task in zip(self.sources(), tasks, strict=True)]

    def stops(self) -> list[Stop]:
        """Models on the way of continual pre-training, least first."""
        if not self.embedded:
            given = Relation(self.base, self.continued, CPT, "").pair
            return [Stop(0, given, None)] if self.continued else []
        tuned = tuned_on_trail()

        def pair(source: str) -> Pair:
            return Relation("zoo:small/base", source, CPT, "code").pair

        return [Stop(steps, pair(source), pair(tuned[steps])) for steps, source in trail() if steps in tuned]

    def tasks(self) -> list[tuple[str, str]]:
        """Each task with the parameter that names it: of the fine-tunes in their order, the continued model's last."""
        named = [(relation.task, "evaluation") for relation in self.relations()]
        new = "code" if self.embedded else self.continued_evaluation
        return [*named, (new, "continued_evaluation")] if new else named

    def evaluations(self) -> dict[str, ExactMatch]:
        """Name of each task -> its questions."""
        found: dict[str, ExactMatch] = {}
        for task, parameter in self.tasks():
            with blamed_on(parameter):
                chosen = self.choose(task)
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
        return [file for task, _ in self.tasks() if (file := evaluation_file(task))]
