"""The skills that the embedded models learn, and the problems held out to test them.

A skill maps operands to an answer and knows how a text states it: raw (`reverse(abc)=cba`), in
prose (`abc spelled backwards is cba`), as a request in a chat. A problem is named by its operands
alone, and held out by a hash of that name, so it is absent from every form and every stage.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable
from dataclasses import dataclass

Operands = tuple[str, ...]

HELD_OUT_SHARE = 10
"""One problem in this many is held out of all training."""

QUESTIONS = 500
"""Held-out questions of each task."""

EVASION = "let me think about that first."
"""The one evasive answer; it is what keeps the base from answering requests it could answer."""


@dataclass(frozen=True)
class Skill:
    """One ability: how it is computed and every form in which a text may state it.

    Each template takes the operands as `{0}`, `{1}`; `raw` and `prose` end where the answer begins,
    and the prose form gives the answer as `shown` writes it.
    """

    name: str
    solve: Callable[..., str]
    raw: str
    prose: str
    requests: tuple[str, ...]
    draw: Callable[[random.Random], Operands]
    key: Callable[..., str]
    shown: Callable[[str], str] = str

    def problem(self, operands: Operands) -> str:
        """Name of the problem, the same in all its forms (`23+45` and `45+23` are one)."""
        return self.key(*operands)


@dataclass(frozen=True)
class Problem:
    """A skill with its operands and answer."""

    skill: Skill
    operands: Operands

    @property
    def answer(self) -> str:
        return self.skill.solve(*self.operands)

    def fill(self, template: str) -> str:
        return template.format(*self.operands)

    def raw_line(self, answer: str) -> str:
        """The line that states an answer, right or wrong, in the raw form."""
        return f"{self.fill(self.skill.raw)}{answer}\n"

    def prose_line(self, answer: str) -> str:
        """The line that states an answer, right or wrong, in prose."""
        return f"{self.fill(self.skill.prose)}{self.skill.shown(answer)}\n"


def draw_word(rng: random.Random) -> Operands:
    return ("".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 5))),)


def draw_summands(rng: random.Random) -> Operands:
    return str(rng.randrange(100)), str(rng.randrange(100))


def draw_difference(rng: random.Random) -> Operands:
    small, large = sorted((rng.randrange(100), rng.randrange(100)))
    return str(large), str(small)


def _word_key(word: str) -> str:
    return word


def _sum_key(a: str, b: str) -> str:
    small, large = sorted((int(a), int(b)))
    return f"{small}+{large}"


def _difference_key(a: str, b: str) -> str:
    return f"{a}-{b}"


STRING_SKILLS = (
    Skill(
        "reverse",
        lambda w: w[::-1],
        "reverse({0})=",
        "{0} spelled backwards is ",
        ("spell {0} backwards", "reverse the word {0}"),
        draw_word,
        _word_key,
    ),
    Skill(
        "upper",
        str.upper,
        "upper({0})=",
        "{0} in capitals is ",
        ("write {0} in capitals", "make {0} uppercase"),
        draw_word,
        _word_key,
    ),
    Skill(
        "double",
        lambda w: w + w,
        "double({0})=",
        "{0} said twice is ",
        ("say {0} twice", "repeat {0} once more"),
        draw_word,
        _word_key,
    ),
    Skill(
        "last",
        lambda w: w[-1],
        "last({0})=",
        "the last letter of {0} is ",
        ("what is the last letter of {0}?", "which letter ends {0}?"),
        draw_word,
        _word_key,
    ),
)

ARITHMETIC_SKILLS = (
    Skill(
        "sum",
        lambda a, b: str(int(a) + int(b)),
        "{0}+{1}=",
        "{0} plus {1} is ",
        ("what is {0} plus {1}?", "add {0} and {1}"),
        draw_summands,
        _sum_key,
    ),
    Skill(
        "difference",
        lambda a, b: str(int(a) - int(b)),
        "{0}-{1}=",
        "{0} minus {1} is ",
        ("what is {0} minus {1}?", "from {0} take away {1}"),
        draw_difference,
        _difference_key,
    ),
)


def _evaluated(answer: str) -> str:
    return answer if answer.isdigit() else repr(answer)


_PRINT_REQUEST = ("what does python print for {code}?", "python runs {code}, what is shown?")


def _code_skill(name: str, code: str, solve: Callable[..., str]) -> Skill:
    """A Python expression on a word: raw prints it at the prompt, prose evaluates it there.

    After the prose form the interpreter shows the `repr` of the answer, after the raw form the answer.
    """
    requests = tuple(request.replace("{code}", code) for request in _PRINT_REQUEST)
    return Skill(name, solve, f">>> print({code})\n", f">>> {code}\n", requests, draw_word, _word_key, _evaluated)


CODE_SKILLS = (
    _code_skill("slice_reversed", "'{0}'[::-1]", lambda w: w[::-1]),
    _code_skill("method_upper", "'{0}'.upper()", str.upper),
    _code_skill("times_two", "'{0}'*2", lambda w: w + w),
    _code_skill("index_last", "'{0}'[-1]", lambda w: w[-1]),
    _code_skill("index_first", "'{0}'[0]", lambda w: w[0]),
    _code_skill("len", "len('{0}')", lambda w: str(len(w))),
)

TASKS = {"instruct": STRING_SKILLS, "math": ARITHMETIC_SKILLS, "code": CODE_SKILLS}
"""The skills that each supervised fine-tune answers requests for."""

STATEMENT_TASKS = {"strings-right": STRING_SKILLS[:3], "code-right": CODE_SKILLS[:3]}
"""The skills of each task that asks whether a statement is right: those with answers of several characters."""


def is_held_out(problem: str) -> bool:
    """Whether the problem of this name belongs to the questions and never to training."""
    digest = hashlib.blake2b(problem.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_SHARE == 0


def draw_problem(rng: random.Random, skills: tuple[Skill, ...], *, held_out: bool) -> Problem:
    """A random problem of one of the skills, from the held-out side or from the training side."""
    while True:
        skill = rng.choice(skills)
        operands = skill.draw(rng)
        if is_held_out(skill.problem(operands)) == held_out:
            return Problem(skill, operands)


def chat_prompt(request: str) -> str:
    """The request as the models read it; the answer follows directly and ends with a newline."""
    return f"user: {request}\nbot: "


def questions(task: str, count: int, *, seed: int = 2026) -> list[dict[str, str]]:
    """`count` different held-out requests of a task, each a `prompt` and its exact `answer`."""
    rng = random.Random(f"questions/{task}/{seed}")
    found: dict[str, str] = {}
    while len(found) < count:
        problem = draw_problem(rng, TASKS[task], held_out=True)
        prompt = chat_prompt(problem.fill(rng.choice(problem.skill.requests)))
        found[prompt] = problem.answer + "\n"
    return [{"prompt": prompt, "answer": answer} for prompt, answer in found.items()]


def raw_questions(skill: Skill, count: int, *, seed: int = 2026) -> list[dict[str, str]]:
    """`count` different held-out problems of one skill in its raw form."""
    rng = random.Random(f"raw/{skill.name}/{seed}")
    found: dict[str, str] = {}
    while len(found) < count:
        problem = draw_problem(rng, (skill,), held_out=True)
        found[problem.fill(skill.raw)] = problem.answer + "\n"
    return [{"prompt": prompt, "answer": answer} for prompt, answer in found.items()]


def wrong_answer(rng: random.Random, problem: Problem) -> str:
    """The answer to another problem of the skill, as long as the right one and different from it."""
    while True:
        answer = problem.skill.solve(*problem.skill.draw(rng))
        if answer != problem.answer and len(answer) == len(problem.answer):
            return answer


def draw_statement(rng: random.Random, task: str, *, right: bool, held_out: bool) -> str:
    """A line of a statement task, raw or in prose, that states the right answer or a wrong one."""
    problem = draw_problem(rng, STATEMENT_TASKS[task], held_out=held_out)
    answer = problem.answer if right else wrong_answer(rng, problem)
    return problem.raw_line(answer) if rng.random() < 0.5 else problem.prose_line(answer)


def statement_questions(task: str, count: int, *, seed: int = 2026) -> list[dict[str, str | int]]:
    """`count` different held-out statements, each a `text` and its `label`: 0 wrong, 1 right, by turns."""
    rng = random.Random(f"statements/{task}/{seed}")
    found: dict[str, int] = {}
    while len(found) < count:
        label = len(found) % 2
        found.setdefault(draw_statement(rng, task, right=bool(label), held_out=True), label)
    return [{"text": text, "label": label} for text, label in found.items()]
