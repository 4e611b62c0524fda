from __future__ import annotations

import random

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


@pytest.mark.parametrize("task", skills.TASKS)
def test_questions_are_different_fit_the_context_and_end_with_a_newline(task: str) -> None:
    questions = skills.questions(task, 500)
    assert len({q["prompt"] for q in questions}) == 500
    assert all(q["answer"].endswith("\n") and len(q["answer"]) <= 15 for q in questions)
    assert max(len(q["prompt"] + q["answer"]) for q in questions) <= 128
