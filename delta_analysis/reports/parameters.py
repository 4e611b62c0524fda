"""Parameters of the notebooks: what each may be told, checked before any work begins."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from delta_analysis._errors import one_of
from delta_analysis.checkpoints import PREFIX, find_input, pair_sources
from delta_analysis.deltas import VOCABULARIES, Delta, Vocabulary, load_delta
from delta_analysis.evaluation import Evaluation
from delta_analysis.pruning import Pruner
from delta_analysis.reports.family import ENCODER_PAIRS, PAIRS, SIZES, TASK_PAIRS, Relation, task_pairs, trail
from delta_analysis.reports.parameter_checks import (
    ParameterError,
    Rates,
    check_device_parameter,
    check_integer,
    check_model,
    check_pair,
    check_scope,
    choose_evaluation,
    evaluation_file,
    made_folder,
    parse_drop_rates,
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
        object.__setattr__(self, "out_dir", made_folder(self.out_dir))

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

    `scope` is one of `Delta.select`. `n_questions` is the most that are asked. `evaluation` is a task
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
        object.__setattr__(self, "out_dir", made_folder(self.out_dir))

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
        object.__setattr__(self, "out_dir", self.each()[0].out_dir)
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
