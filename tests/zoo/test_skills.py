from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delta_analysis.zoo import skills

ALL = (*skills.STRING_SKILLS, *skills.ARITHMETIC_SKILLS, *skills.CODE_SKILLS)


@given(st.integers(0, 99), st.integers(0, 99))
def test_a_sum_is_one_problem_in_either_order(a: int, b: int) -> None:
    total = next(skill for skill in ALL if skill.name == "sum")
    assert total.problem((str(a), str(b))) == total.problem((str(b), str(a)))


def test_about_one_problem_in_ten_is_held_out() -> None:
    sums = {f"{a}+{b}" for a in range(100) for b in range(a, 100)}
    share = sum(map(skills.is_held_out, sums)) / len(sums)
    assert share == pytest.approx(1 / skills.HELD_OUT_SHARE, abs=0.02)


@pytest.mark.parametrize("skill", skills.CODE_SKILLS, ids=lambda skill: skill.name)
def test_code_answers_are_what_python_prints(skill: skills.Skill) -> None:
    rng = random.Random(5)
    for _ in range(20):
        problem = skills.Problem(skill, skill.draw(rng))
        line = problem.fill(skill.prose).removeprefix(">>> ").strip()
        assert str(eval(line, {"__builtins__": {"len": len}})) == problem.answer


@pytest.mark.parametrize(
    ("name", "operands", "answer"),
    [
        ("reverse", ("abc",), "cba"),
        ("upper", ("abc",), "ABC"),
        ("double", ("abc",), "abcabc"),
        ("last", ("abc",), "c"),
        ("sum", ("23", "45"), "68"),
        ("difference", ("68", "45"), "23"),
    ],
)
def test_answers_of_the_base_skills(name: str, operands: tuple[str, ...], answer: str) -> None:
    skill = next(skill for skill in ALL if skill.name == name)
    assert skills.Problem(skill, operands).answer == answer


@pytest.mark.parametrize("held_out", [True, False])
def test_draws_come_from_the_side_asked_for(held_out: bool) -> None:
    rng = random.Random(1)
    for _ in range(200):
        problem = skills.draw_problem(rng, ALL, held_out=held_out)
        assert skills.is_held_out(problem.skill.problem(problem.operands)) == held_out


@pytest.mark.parametrize("skill", (*skills.STRING_SKILLS, *skills.CODE_SKILLS), ids=lambda skill: skill.name)
def test_a_wrong_answer_is_wrong_and_as_long_as_the_right_one(skill: skills.Skill) -> None:
    rng = random.Random(3)
    for _ in range(100):
        problem = skills.draw_problem(rng, (skill,), held_out=False)
        wrong = skills.wrong_answer(rng, problem)
        assert wrong != problem.answer
        assert len(wrong) == len(problem.answer)


@pytest.mark.parametrize("task", skills.STATEMENT_TASKS)
def test_half_of_the_statements_are_right_as_recomputed_from_their_text(task: str) -> None:
    found = skills.statement_questions(task, 100)
    assert len({question["text"] for question in found}) == 100
    for question in found:
        assert _states_the_truth(str(question["text"])) == (question["label"] == 1)


def _states_the_truth(text: str) -> bool:
    """Reads the statement without the package: by Python itself, or by the words that name the skill."""
    if text.startswith(">>> "):
        line, shown = text.removeprefix(">>> ").rstrip("\n").split("\n")
        printed = line.startswith("print(")
        value = eval(line, {"__builtins__": {"len": len, "print": str}})
        return shown == (value if printed else repr(value))
    words = re.findall(r"[A-Za-z]+", text)
    solve = next(solve for name, solve in SOLVERS.items() if name in words)
    word = words[4] if "letter" in words else words[1] if "(" in text else words[0]
    return words[-1] == solve(word)


SOLVERS = {
    "reverse": lambda w: w[::-1],
    "backwards": lambda w: w[::-1],
    "upper": str.upper,
    "capitals": str.upper,
    "double": lambda w: 2 * w,
    "twice": lambda w: 2 * w,
    "last": lambda w: w[-1],
}


@pytest.mark.parametrize("task", skills.TASKS)
def test_questions_are_different_fit_the_context_and_end_with_a_newline(task: str) -> None:
    questions = skills.questions(task, 500)
    assert len({q["prompt"] for q in questions}) == 500
    assert all(q["answer"].endswith("\n") and len(q["answer"]) <= 15 for q in questions)
    assert max(len(q["prompt"] + q["answer"]) for q in questions) <= 128
