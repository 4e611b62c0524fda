"""Parameters of 05_continual_pretraining: one fine-tune, its true base, and the base before continual pre-training."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from delta_analysis.checkpoints import PREFIX, find_input
from delta_analysis.evaluation import Evaluation
from delta_analysis.reports.family import BOTH, SFT, Relation, short_source
from delta_analysis.reports.parameter_checks import (
    ParameterError,
    Rates,
    check_pair,
    choose_evaluation,
    evaluation_file,
)
from delta_analysis.reports.parameters import AblationParameters
from delta_analysis.sweeps import Pair

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
        for field in ("base", "finetuned", "drop_rates", "out_dir"):
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
