"""The embedded family as the reports use it: which model was made from which, and for what task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from delta_analysis.checkpoints import find_root, zoo_names
from delta_analysis.sweeps import Pair


class Relation(NamedTuple):
    """A base and a fine-tune, what lies between them, and the task the fine-tune is for."""

    base: str
    finetuned: str
    kind: str
    task: str

    @property
    def name(self) -> str:
        finetuned = short_source(self.finetuned)
        # Decoders and encoders of the family may stand in one table.
        kind = "encoder " if self.finetuned.startswith("zoo:encoder/") else ""
        return f"{kind}{short_source(self.base)} → {finetuned}" if self.base else f"{kind}{finetuned}"

    @property
    def pair(self) -> Pair:
        """As a sweep takes it."""
        return Pair(self.name, self.base or None, self.finetuned)


def short_source(source: str) -> str:
    """The last part of a source: `instruct` for `zoo:small/instruct`, a folder's name for a path."""
    return source.rstrip("/").rsplit("/", 1)[-1]


SFT, CPT, BOTH = "SFT", "continual pre-training", "continual pre-training + SFT"
SIZES = ("tiny", "small", "medium")
"""The decoders of the family, from few parameters to many."""


def task_pairs(size: str = "small") -> tuple[Relation, ...]:
    """Every fine-tune of a size on its true base, and `code` on the base before continual pre-training."""
    return tuple(
        Relation(f"zoo:{size}/{base}", f"zoo:{size}/{finetuned}", kind, task)
        for base, finetuned, kind, task in (
            ("base", "instruct", SFT, "instruct"),
            ("base", "math", SFT, "math"),
            ("code-cpt", "code", SFT, "code"),
            ("base", "code", BOTH, "code"),
        )
    )


TASK_PAIRS = task_pairs()

PAIRS = (*TASK_PAIRS, Relation("zoo:small/base", "zoo:small/code-cpt", CPT, ""))
"""The pairs whose deltas are compared: those with a task, and continual pre-training alone."""

ENCODER_PAIRS = tuple(
    Relation(f"zoo:encoder/{base}", f"zoo:encoder/{finetuned}", kind, task)
    for base, finetuned, kind, task in (
        ("base", "strings", SFT, "strings-right"),
        ("code-cpt", "code", SFT, "code-right"),
        ("base", "code", BOTH, "code-right"),
        ("base", "code-cpt", CPT, ""),
    )
)
"""The same relations in the embedded encoder, whose tasks are classifications."""

TASKS = ("instruct", "math", "code", "strings-right", "code-right")
"""Tasks with a file of held-out questions, or of texts with labels."""


def questions_file(task: str) -> Path:
    """The JSONL file of a task's held-out questions."""
    return find_root() / "data" / "zoo" / "tasks" / f"{task}.jsonl"


def sample_text_file() -> Path:
    """A short English text, the evaluation of last resort for a pair without questions."""
    return find_root() / "data" / "reference" / "sample.txt"


def trail(size: str = "small") -> list[tuple[int, str]]:
    """Steps of continual pre-training and the checkpoint kept there, the last one `code-cpt` itself."""
    found = []
    for name in zoo_names():
        if name == f"{size}/code-cpt" or name.startswith(f"{size}/code-cpt-"):
            record = json.loads((find_root() / "data" / "zoo" / name / "training.json").read_text())
            found.append((int(record["step"]), f"zoo:{name}"))
    return sorted(found)


def tuned_on_trail(size: str = "small") -> dict[int, str]:
    """Step of continual pre-training -> the model of that step fine-tuned as `instruct` is, where there is one."""
    prefix = f"{size}/instruct-"
    found = {int(name.removeprefix(prefix)): f"zoo:{name}" for name in zoo_names() if name.startswith(prefix)}
    return dict(sorted(found.items()))
