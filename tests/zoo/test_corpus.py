"""No held-out problem stands in any training text, looked for by reading the texts themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from delta_analysis.reports.family import questions_file
from delta_analysis.zoo import corpus, skills
from delta_analysis.zoo.recipe import RECIPES
from delta_analysis.zoo.train import EXAMPLE_COUNT, TEXT_SIZE

ALL = (*skills.STRING_SKILLS, *skills.ARITHMETIC_SKILLS, *skills.CODE_SKILLS)
# Sizes read the same: data and seed alone tell what a stage is trained on.
STAGES = {f"{stage.data}, seed {stage.seed}": stage for recipe in RECIPES.values() for stage in recipe.stages}
WORD_BEFORE = re.compile(r"\w+\Z")
LONGEST = 50
"""Of a word, in letters."""


def _pattern(template: str) -> re.Pattern[str]:
    """A regular expression that finds every filling of a template."""
    parts = re.split(r"\{\d\}", template)
    return re.compile(r"(\w+)".join(map(re.escape, parts)))


def _fillings(template: str, text: str) -> Iterator[tuple[str, ...]]:
    """The operands of every filling of a template, at the start of a line or anywhere."""
    literal = template.removeprefix("{0}")
    for match in _pattern(literal).finditer(text):
        if literal == template:
            yield match.groups()
        # What begins with a word is found by what follows it: any word may begin it, and the text has millions.
        elif word := WORD_BEFORE.search(text, max(match.start() - LONGEST, 0), match.start()):
            yield word[0], *match.groups()


def _problems_in(text: str) -> set[str]:
    """Names of all problems that the text states, in any form of any skill."""
    found: set[str] = set()
    for skill in ALL:
        for template in (skill.raw, skill.prose, *map(skills.chat_prompt, skill.requests)):
            for operands in _fillings(template, text):
                if skill in skills.ARITHMETIC_SKILLS and not all(part.isdigit() for part in operands):
                    continue
                found.add(skill.problem(operands))
    return found


def _committed(task: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in questions_file(task).read_text().splitlines()]


def _asked() -> set[str]:
    """Names of the problems behind the committed questions."""
    prompts = [question["prompt"] for task in skills.TASKS for question in _committed(task)]
    assert len(prompts) == 500 * len(skills.TASKS)
    texts = [question["text"] for task in skills.STATEMENT_TASKS for question in _committed(task)]
    assert len(texts) == 500 * len(skills.STATEMENT_TASKS)
    return _problems_in("\n".join([*prompts, *texts]))


def _stage_text(stage_name: str) -> str:
    stage = STAGES[stage_name]
    if stage.data in corpus.TEXTS:
        return corpus.TEXTS[stage.data](TEXT_SIZE, stage.seed)
    if stage.data in skills.STATEMENT_TASKS:
        return "".join(text for text, _ in corpus.statements(stage.data, EXAMPLE_COUNT, stage.seed))
    return "".join(prompt + answer for prompt, answer in corpus.chats(stage.data, EXAMPLE_COUNT, stage.seed))


@pytest.mark.parametrize("stage", STAGES)
def test_no_question_is_trained_on(stage: str) -> None:
    asked, trained = _asked(), _problems_in(_stage_text(stage))
    # Words are drawn from millions, so far fewer questions than 2,500 would mean a broken search.
    assert len(asked) > 1900
    assert len(trained) > 5000
    assert asked.isdisjoint(trained)


def test_the_search_finds_a_problem_that_is_there() -> None:
    assert _problems_in("23 plus 45 is 68\n") == {"23+45"}
    assert _problems_in("user: spell abc backwards\nbot: cba\n") == {"abc"}
    assert _problems_in(">>> 'abc'[::-1]\n'cba'\n") == {"abc"}


def test_committed_questions_are_those_of_the_recipe() -> None:
    for task in skills.TASKS:
        assert _committed(task) == skills.questions(task, 500)
    for task in skills.STATEMENT_TASKS:
        assert _committed(task) == skills.statement_questions(task, 500)


def test_texts_depend_on_the_seed_alone() -> None:
    assert corpus.base_text(20_000, seed=1) == corpus.base_text(20_000, seed=1)
    assert corpus.base_text(20_000, seed=1) != corpus.base_text(20_000, seed=2)


def test_texts_stay_in_the_alphabet() -> None:
    text = "".join(make(50_000, seed=1) for make in corpus.TEXTS.values())
    assert set(text) <= {"\n", *map(chr, range(32, 127))}


def test_a_fifth_of_the_python_text_is_replayed_base_text() -> None:
    text = corpus.python_text(2_000_000, seed=3)
    # Only base blocks hold requests about strings and sums; their share within base text is known.
    count = _raw_lines(text)
    base = corpus.base_text(2_000_000, seed=4)
    assert count / _raw_lines(base) == pytest.approx(0.2, abs=0.02)


def _raw_lines(text: str) -> int:
    return sum(text.count(f"\n{skill.name}(") for skill in skills.STRING_SKILLS)


def test_no_task_bears_the_name_of_a_text() -> None:
    assert set(corpus.TEXTS).isdisjoint({*skills.TASKS, *skills.STATEMENT_TASKS})


@pytest.mark.parametrize("task", skills.STATEMENT_TASKS)
def test_statements_are_right_as_often_as_wrong(task: str) -> None:
    pairs = corpus.statements(task, 200, seed=1)
    assert [label for _, label in pairs] == [0, 1] * 100
    assert corpus.statements(task, 200, seed=2) != pairs
