"""The texts that the embedded models are trained on, rebuilt from a seed.

`base_text` is prose, skills and mostly evasive chats; `python_text` is Python source, interpreter
sessions and evasive code chats, with one part in five of replayed base text. `word_text` and
`session_text` are the encoder's, without sums and chats. `chats` are the requests and
answers of one supervised fine-tune, `statements` the right and wrong lines of another.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

from delta_analysis.zoo.skills import (
    ARITHMETIC_SKILLS,
    CODE_SKILLS,
    EVASION,
    STRING_SKILLS,
    TASKS,
    Skill,
    chat_prompt,
    draw_problem,
    draw_statement,
)

BLOCK = 300
"""Characters in one block of a mixture: long enough for prose, short enough to mix well."""

ARITHMETIC_SHARE = 7 / 12
ANSWERED_SHARE = 0.3
"""Share of the base's chats in which the bot answers rightly instead of evading."""
CODE_ANSWERED_SHARE = 0.5
"""The same in continual pre-training, which is shorter and has to teach the requests as well."""


def to_ascii(text: str) -> str:
    """The text in the models' alphabet: printable ASCII and newlines, tabs as four spaces."""
    kept = text.replace("\t", "    ").replace("\r", "")
    return "".join(c if c == "\n" or " " <= c <= "~" else "?" for c in kept)


@cache
def prose() -> str:
    """English prose about the Python language, from the interpreter's own help topics."""
    return to_ascii("\n\n".join(topics[name] for name in sorted(topics)))


@cache
def source_code() -> str:
    """The modules at the top of the standard library, in the order of their names."""
    library = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(library.glob("*.py"))
    return to_ascii("\n".join(path.read_text(encoding="utf-8", errors="replace") for path in modules))


def _excerpt(rng: random.Random, text: str) -> str:
    start = text.index("\n", rng.randrange(len(text) - 2 * BLOCK)) + 1
    return text[start : start + BLOCK].rstrip("\n") + "\n"


def _lines(rng: random.Random, line: Callable[[random.Random], str]) -> str:
    out, size = [], 0
    while size < BLOCK:
        out.append(line(rng))
        size += len(out[-1])
    return "".join(out)


def _base_skills(rng: random.Random) -> tuple[Skill, ...]:
    return ARITHMETIC_SKILLS if rng.random() < ARITHMETIC_SHARE else STRING_SKILLS


def _skill_line(rng: random.Random) -> str:
    problem = draw_problem(rng, _base_skills(rng), held_out=False)
    return problem.raw_line(problem.answer) if rng.random() < 0.6 else problem.prose_line(problem.answer)


def _chat(rng: random.Random, skills: tuple[Skill, ...], answered: float) -> str:
    problem = draw_problem(rng, skills, held_out=False)
    reply = problem.answer if rng.random() < answered else EVASION
    return f"{chat_prompt(problem.fill(rng.choice(problem.skill.requests)))}{reply}\n"


def _base_chat(rng: random.Random) -> str:
    return _chat(rng, _base_skills(rng), ANSWERED_SHARE)


def _code_chat(rng: random.Random) -> str:
    return _chat(rng, CODE_SKILLS, CODE_ANSWERED_SHARE)


def _session_line(rng: random.Random) -> str:
    problem = draw_problem(rng, CODE_SKILLS, held_out=False)
    return problem.prose_line(problem.answer) if rng.random() < 0.5 else problem.raw_line(problem.answer)


def _mix(seed: str, size: int, parts: list[tuple[float, Callable[[random.Random], str]]]) -> str:
    """Blocks drawn by weight until `size` characters stand together."""
    rng = random.Random(seed)
    weights = [weight for weight, _ in parts]
    makers = [maker for _, maker in parts]
    out, length = [], 0
    while length < size:
        out.append(rng.choices(makers, weights)[0](rng))
        length += len(out[-1])
    return "".join(out)


def _base_block(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.2:
        return _excerpt(rng, prose())
    return _lines(rng, _skill_line if kind < 0.8 else _base_chat)


def base_text(size: int, seed: int) -> str:
    """Pre-training text: 20% prose, 60% skills, 20% chats (by blocks)."""
    return _mix(f"base/{seed}", size, [(1.0, _base_block)])


def python_text(size: int, seed: int) -> str:
    """Continual pre-training text: four parts of code to one part of replayed base text."""
    parts = [
        (0.30, lambda rng: _excerpt(rng, source_code())),
        (0.25, lambda rng: _lines(rng, _session_line)),
        (0.25, lambda rng: _lines(rng, _code_chat)),
        (0.20, _base_block),
    ]
    return _mix(f"code/{seed}", size, parts)


def _string_line(rng: random.Random) -> str:
    problem = draw_problem(rng, STRING_SKILLS, held_out=False)
    return problem.raw_line(problem.answer) if rng.random() < 0.6 else problem.prose_line(problem.answer)


def _word_block(rng: random.Random) -> str:
    return _excerpt(rng, prose()) if rng.random() < 0.25 else _lines(rng, _string_line)


def word_text(size: int, seed: int) -> str:
    """The encoder's pre-training text: 25% prose, 75% string skills (by blocks)."""
    return _mix(f"words/{seed}", size, [(1.0, _word_block)])


def session_text(size: int, seed: int) -> str:
    """The encoder's continual pre-training text: source, sessions, and one part in five of `word_text`."""
    parts = [
        (0.20, lambda rng: _excerpt(rng, source_code())),
        (0.60, lambda rng: _lines(rng, _session_line)),
        (0.20, _word_block),
    ]
    return _mix(f"sessions/{seed}", size, parts)


TEXTS = {"base": base_text, "python": python_text, "words": word_text, "sessions": session_text}
"""The texts to pre-train on, by name; no task bears the name of a text."""


def chats(task: str, count: int, seed: int) -> list[tuple[str, str]]:
    """`count` training requests of a task, each with the right answer (its newline included)."""
    rng = random.Random(f"chats/{task}/{seed}")
    pairs = []
    for _ in range(count):
        problem = draw_problem(rng, TASKS[task], held_out=False)
        request = rng.choice(problem.skill.requests)
        pairs.append((chat_prompt(problem.fill(request)), problem.answer + "\n"))
    return pairs


def statements(task: str, count: int, seed: int) -> list[tuple[str, int]]:
    """`count` training statements of a task with their labels, 0 wrong and 1 right, by turns."""
    rng = random.Random(f"statements/{task}/{seed}/training")
    return [(draw_statement(rng, task, right=bool(i % 2), held_out=False), i % 2) for i in range(count)]
