"""Parameters of the notebooks: what each may be told, checked before any work begins.

A notebook declares them in its first cell and says `parameters = AblationParameters.from_cell(globals())`
in its second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

from delta_analysis._errors import checked_number, one_of
from delta_analysis.checkpoints import PREFIX, pair_sources
from delta_analysis.deltas import VOCABULARIES, Delta, Vocabulary, load_delta
from delta_analysis.evaluation import Evaluation, check_device
from delta_analysis.pruning import Pruner
from delta_analysis.reports.family import (
    BOTH,
    ENCODER_PAIRS,
    PAIRS,
    SFT,
    SIZES,
    TASK_PAIRS,
    Relation,
    short_source,
    task_pairs,
    trail,
)
from delta_analysis.reports.parameter_checks import (
    ParameterError,
    Rates,
    blamed_on,
    check_model,
    check_pair,
    check_scope,
    choose_evaluation,
    evaluation_file,
    found_source,
    made_folder,
    named_sources,
    parse_drop_rates,
)
from delta_analysis.sweeps import Edit, Pair

OWN = "needs base and finetuned; the embedded family brings its own"


def present_device(device: str) -> str:
    check_device(device)
    return device


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameters of any notebook.

    A field's metadata is its rule: whole numbers `at_least` that, one `among` some, or what `parse` makes of a value.
    """

    out_dir: str = field(metadata={"parse": made_folder})

    @classmethod
    def from_cell(cls, names: Mapping[str, Any]) -> Self:
        """The parameters among the names that a notebook's cells have set, its `globals()`.

        A value under another name, such as papermill adds for a mistyped parameter, is an error.
        """
        known = [each.name for each in fields(cls)]
        plain = (str, int, float, list, tuple, dict, type(None))
        for name, value in names.items():
            if name.islower() and not name.startswith("_") and name not in known and isinstance(value, plain):
                near = get_close_matches(name, known, n=1, cutoff=0)[0]
                raise ParameterError(name, f"is unknown here; did you mean {near}? Known are {', '.join(known)}")
        return cls(**{name: names[name] for name in known})

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type == "str" and not isinstance(value, str):
                raise ParameterError(each.name, f"must be text, or empty; not {value!r}")
            if each.type == "bool" and not isinstance(value, bool):
                raise ParameterError(each.name, f"must be True or False; not {value!r}")
            with blamed_on(each.name):
                if "at_least" in each.metadata:
                    checked_number(each.name, value, each.metadata["at_least"], whole=True)
                if value not in (allowed := each.metadata.get("among", [value])):
                    raise ValueError(one_of(each.name, value, allowed))
                if parse := each.metadata.get("parse"):
                    self._set(each.name, parse(value))
        self.check()

    def check(self) -> None:
        """Raise unless the values fit together."""

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class ModelParameters(Parameters):
    """The checkpoints of a report; empty `base` and `finetuned` mean the embedded family."""

    base: str
    finetuned: str

    @property
    def embedded(self) -> bool:
        return not self.finetuned and not self.base

    def only_with_models(self, *names: str) -> None:
        """Raise if one of those parameters is given for the embedded family."""
        for name in names:
            if self.embedded and getattr(self, name):
                raise ParameterError(name, OWN)

    def find_pair(self, **how: Any) -> None:
        """Put full paths in place of relative ones, and check that the two can be compared."""
        named = next((value for value in (self.finetuned, self.base) if value.startswith(PREFIX)), "")
        if named:
            with blamed_on("finetuned"):
                sides = pair_sources(named)
            for parameter, side in zip(("base", "finetuned"), sides, strict=True):
                if getattr(self, parameter) in ("", named):
                    self._set(parameter, side)
        self._set("base", found_source(self.base))
        self._set("finetuned", found_source(self.finetuned))
        check_pair(self.base, self.finetuned, **how)


@dataclass(frozen=True, kw_only=True)
class ValueRangesParameters(ModelParameters):
    """Parameters of 01_value_ranges. An adapter needs no base. `vocab` and `finetuned_is_delta` are `load_delta`'s."""

    vocab: Vocabulary = field(metadata={"among": VOCABULARIES})
    finetuned_is_delta: bool

    def check(self) -> None:
        self.find_pair(vocab=self.vocab, finetuned_is_delta=self.finetuned_is_delta)

    def relations(self) -> tuple[Relation, ...]:
        """The pairs of the report."""
        return PAIRS if self.embedded else (Relation(self.base, self.finetuned, "given", ""),)

    def load(self, relation: Relation) -> Delta:
        """The delta of a pair."""
        if self.embedded:
            return load_delta(base=relation.base, finetuned=relation.finetuned)
        how = {"vocab": self.vocab, "finetuned_is_delta": self.finetuned_is_delta}
        return load_delta(base=relation.base or None, finetuned=relation.finetuned, **how)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class SweepParameters(ModelParameters):
    """What a report that judges models is told beside their sources.

    `n_questions` is the most that are asked. `chat_template` puts them into the tokenizer's chat template.
    `evaluation` is a task (`instruct`, `math`, `code`), a `.jsonl` file of questions or of texts with labels,
    `lm-eval:TASK` (several with commas between), a text file for perplexity, or empty: then the task that
    the embedded model was tuned for, else perplexity on a short English text.
    """

    drop_rates: Rates = field(metadata={"parse": parse_drop_rates})
    first_seed: int = field(metadata={"at_least": 0})
    n_seeds: int = field(metadata={"at_least": 2})
    n_questions: int = field(metadata={"at_least": 1})
    evaluation: str
    chat_template: bool
    device: str = field(metadata={"parse": present_device})

    @property
    def seeds(self) -> list[int]:
        return list(range(self.first_seed, self.first_seed + self.n_seeds))

    @property
    def rates(self) -> list[float]:
        """Drop rates between 0 and 1."""
        return [p for p in parse_drop_rates(self.drop_rates) if 0 < p < 1]

    def choose(self, task: str) -> Evaluation:
        """What a task's models are judged by."""
        return choose_evaluation(task, self.n_questions, chat_template=self.chat_template)

    def given_relation(self) -> Relation:
        """The pair that was given, with its task where one is known."""
        known = {r.finetuned: r.task for r in (*(r for size in SIZES for r in task_pairs(size)), *ENCODER_PAIRS)}
        return Relation(self.base, self.finetuned, "given", self.evaluation or known.get(self.finetuned, ""))


@dataclass(frozen=True, kw_only=True)
class AblationParameters(SweepParameters):
    """Parameters of the ablations 02, 03, 04 and 06; `scope` is one of `Delta.select`."""

    scope: str

    def check(self) -> None:
        self.find_pair()
        self.only_with_models("evaluation")
        self.evaluations()
        check_scope(self.scope, self.relations())
        check_model(self.base, self.finetuned)

    def relations(self) -> tuple[Relation, ...]:
        """The pairs of the report."""
        return TASK_PAIRS if self.embedded else (self.given_relation(),)

    def pairs(self) -> list[Pair]:
        """The same as a sweep takes them."""
        return [relation.pair for relation in self.relations()]

    def evaluations(self) -> dict[str, tuple[Evaluation, ...]]:
        """Name of each pair -> what it is judged by."""
        judged = zip(self.pairs(), self.relations(), strict=True)
        return {pair.name: (self.choose(relation.task),) for pair, relation in judged}

    def readable(self) -> dict[str, tuple[Evaluation, ...]]:
        """Name of each pair -> what brings texts to read: its evaluation, or the sample text for one without."""
        sample = choose_evaluation("", self.n_questions)
        return {name: own if own[0].texts else (sample,) for name, own in self.evaluations().items()}

    def evaluation_files(self) -> list[Path]:
        """The files that the pairs are judged on."""
        return _files(relation.task for relation in self.relations())

    def edit(self, pruner: Pruner) -> Edit:
        """The pruner on the tensors of the scope."""
        return Edit(pruner, self.scope)


@dataclass(frozen=True, kw_only=True)
class ModelSizeParameters(AblationParameters):
    """Parameters of 07_model_size: `base` and `finetuned` name several checkpoints with commas between, or none.

    Both have the same number, of which the first belong together, and so on. The other parameters serve every pair.
    """

    def check(self) -> None:
        self.each()
        names = [pair.name for pair in self.pairs()]
        if twice := next((name for name in names if names.count(name) > 1), ""):
            raise ParameterError("finetuned", f"two pairs would both be called {twice!r}; name the folders differently")

    def each(self) -> list[AblationParameters]:
        """The parameters of each pair by itself; of the embedded family, a single one."""
        sides = {}
        for parameter in ("base", "finetuned"):
            value = getattr(self, parameter)
            sides[parameter] = named_sources(value)
            if "," in value and not all(sides[parameter]):
                raise ParameterError(parameter, f"names nothing between two commas or at an end: {value!r}")
        bases, finetuned = sides.values()
        if len(bases) != len(finetuned):
            raise ParameterError("base", f"names {len(bases)} checkpoints and finetuned {len(finetuned)}; give as many")
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        return [
            AblationParameters(**{**given, "base": base, "finetuned": tuned})
            for base, tuned in zip(bases, finetuned, strict=True)
        ]

    def relations(self) -> tuple[Relation, ...]:
        """The pairs of the report."""
        if self.embedded:
            return tuple(relation for size in SIZES for relation in task_pairs(size))
        return tuple(relation for each in self.each() for relation in each.relations())

    def pairs(self) -> list[Pair]:
        """The same as a sweep takes them; embedded models under names that tell the size too."""
        sizes = [relation.finetuned.removeprefix("zoo:").split("/")[0] for relation in self.relations()]
        return [
            replace(relation.pair, name=f"{size}, {relation.name}" if size in SIZES else relation.name)
            for size, relation in zip(sizes, self.relations(), strict=True)
        ]

    def labels(self) -> dict[str, list[str]]:
        """Columns for a row of each pair: what is compared in several sizes, how it was made, its size."""
        relations, names = self.relations(), [pair.name for pair in self.pairs()]
        return {
            "relation": [relation.name if self.embedded else "pair of the size" for relation in relations],
            "made_by": [relation.kind for relation in relations],
            "size": [name.split(", ")[0] if self.embedded else name for name in names],
        }


MOST_TEXTS = 64
"""Texts that layers get their inputs from."""


@dataclass(frozen=True, kw_only=True)
class ContinualParameters(SweepParameters):
    """Parameters of 05_continual_pretraining: one fine-tune, its true base, and the base before continual pre-training.

    `other_base` is a second base of the same fine-tune, such as the one before continual pre-training;
    without it, what is explained is `base → finetuned` itself. `inputs` is a text file or a `.jsonl`
    of questions or labelled texts of the kind that the fine-tune is for; without `evaluation` it also judges.
    """

    other_base: str
    inputs: str

    def check(self) -> None:
        self.only_with_models("other_base", "inputs", "evaluation")
        self.find_pair()
        self.choose(self.evaluation)
        check_model(self.base, self.finetuned)
        if self.other_base:
            self._check_other_base()
        if self.inputs and not self._inputs().texts:
            raise ParameterError("inputs", f"{self.inputs!r} has no texts to read; give a text file or a .jsonl")

    def _check_other_base(self) -> None:
        if self.other_base.startswith(PREFIX):
            raise ParameterError("other_base", f"{self.other_base!r} names two models; give a single one")
        self._set("other_base", found_source(self.other_base))
        if self.other_base == self.base:
            raise ParameterError("other_base", "is the same as base; give another base of the fine-tune, or none")
        if (name := short_source(self.other_base)) == short_source(self.base):
            raise ParameterError("other_base", f"is called {name!r}, as base is; name the folders differently")
        with blamed_on("other_base"):
            check_pair(self.other_base, self.finetuned)

    def _inputs(self) -> Evaluation:
        with blamed_on("inputs"):
            return choose_evaluation(self.inputs, max(self.n_questions, MOST_TEXTS), chat_template=self.chat_template)

    def relations(self) -> tuple[Relation, ...]:
        """The pairs of one fine-tune: on its base, then on the other base if there is one."""
        if self.embedded:
            near = Relation("zoo:small/code-cpt", "zoo:small/code", SFT, "code")
            return near, Relation("zoo:small/base", "zoo:small/code", BOTH, "code")
        given = self.given_relation()
        if self.inputs and not self.evaluation:
            given = given._replace(task=self.inputs)
        return (given, given._replace(base=self.other_base)) if self.other_base else (given,)

    def pairs(self) -> list[Pair]:
        """The same as a sweep takes them."""
        return [relation.pair for relation in self.relations()]

    def evaluation_of(self) -> Evaluation:
        """What the fine-tune is judged by."""
        return self.choose(self.relations()[0].task)

    def texts(self) -> tuple[str, ...]:
        """What layers get their inputs from: the texts of `inputs`, or of the evaluation, or the sample text."""
        own = self._inputs() if self.inputs else self.evaluation_of()
        found = own.texts or choose_evaluation("", self.n_questions).texts
        return found[:MOST_TEXTS]

    def evaluation_files(self) -> list[Path]:
        """The files that are read beside the checkpoints."""
        return _files(sorted({self.relations()[0].task, self.inputs} - {""} or {""}))


def _files(tasks: Iterable[str]) -> list[Path]:
    """The files behind tasks that have one."""
    return [file for task in tasks if (file := evaluation_file(task))]


def trail_pairs() -> list[Pair]:
    """`code` against checkpoints on the way to its true base: one fine-tune, deltas of several sizes."""
    return [Relation(source, "zoo:small/code", "", "code").pair for step, source in trail()[:-1] if step >= 512]
