"""The embedded family is what the reports say of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import delta_analysis as da
from delta_analysis.checkpoints.paths import find_root, zoo_names
from delta_analysis.reports.family import (
    ENCODER_PAIRS,
    PAIRS,
    SIZES,
    TASKS,
    Relation,
    questions_file,
    sample_text_file,
    short_source,
    task_pairs,
    trail,
    tuned_on_trail,
)
from delta_analysis.sweeps.pairs import Pair
from delta_analysis.zoo.recipe import RECIPES

EVERY = (*(relation for size in SIZES for relation in task_pairs(size)), *PAIRS, *ENCODER_PAIRS)


@pytest.mark.parametrize(
    ("source", "short"),
    [("zoo:small/instruct", "instruct"), ("org/name", "name"), ("/a/b/", "b"), ("folder", "folder")],
)
def test_a_source_is_called_by_its_last_part(source: str, short: str) -> None:
    assert short_source(source) == short


def test_a_relation_without_a_base_is_the_weights_themselves() -> None:
    alone = Relation("", "zoo:small/math", "given", "math")
    assert alone.pair == Pair("math", None, "zoo:small/math")
    assert Relation("zoo:small/base", *alone[1:]).pair == Pair("base → math", "zoo:small/base", "zoo:small/math")


def test_sizes_are_recipes_of_decoders_that_differ_in_width_and_steps_alone() -> None:
    shapes = [RECIPES[size].shape for size in SIZES]
    assert sorted(shape.hidden_size for shape in shapes) == [shape.hidden_size for shape in shapes]
    same = {
        replace(shape, hidden_size=0, intermediate_size=shape.intermediate_size // shape.hidden_size)
        for shape in shapes
    }
    assert len(same) == 1
    assert set(RECIPES) == {*SIZES, "encoder"}


def test_every_pair_follows_the_recipes() -> None:
    """The base is an ancestor of the fine-tune, at one remove unless continual pre-training lies in between."""
    for relation in EVERY:
        size, finetuned = relation.finetuned.removeprefix("zoo:").split("/")
        base_size, base = relation.base.removeprefix("zoo:").split("/")
        parents = {stage.name: stage.parent for stage in RECIPES[size].stages}
        assert base_size == size
        removed = parents[finetuned] if "+" not in relation.kind else parents[str(parents[finetuned])]
        assert removed == base, relation


def test_names_tell_the_pairs_of_a_report_apart() -> None:
    # Decoders and encoders stand in one table.
    pairs = (*PAIRS, *ENCODER_PAIRS)
    assert len({relation.name for relation in pairs}) == len(pairs)
    assert Relation("", "zoo:encoder/code", "given", "").name == "encoder code"


def test_every_task_has_a_file_of_questions() -> None:
    assert {relation.task for relation in EVERY} - {""} == set(TASKS)
    for task in TASKS:
        fields = set(json.loads(questions_file(task).read_text().split("\n", 1)[0]))
        assert fields == ({"text", "label"} if task.endswith("-right") else {"prompt", "answer"})
    assert len(sample_text_file().read_text()) > 1000


def test_every_model_of_a_pair_is_there() -> None:
    assert {source.removeprefix("zoo:") for relation in EVERY for source in relation[:2]} <= set(zoo_names())


def test_the_trail_leads_to_the_continually_pretrained_model() -> None:
    found = trail()
    assert found == sorted(found)
    assert found[-1] == (RECIPES["small"].stages[3].steps, "zoo:small/code-cpt")
    for step, source in found:
        record = json.loads((find_root() / "data" / "zoo" / source.removeprefix("zoo:") / "training.json").read_text())
        assert record["step"] == step
        assert da.open_checkpoint(source).keys() == da.open_checkpoint("zoo:small/base").keys()


def test_points_of_the_trail_were_fine_tuned_as_instruct_was() -> None:
    found, stops = tuned_on_trail(), dict(trail())
    assert list(found) == sorted(found)
    # Scarce and ample, and the last is the end of the trail.
    assert len(found) >= 3
    assert set(found) <= set(stops)
    assert max(found) == max(stops)
    stages = {stage.name: stage for stage in RECIPES["small"].stages}
    instruct = stages["instruct"]
    for step, source in found.items():
        stage = stages[source.removeprefix("zoo:small/")]
        assert f"zoo:small/{stage.parent}" == stops[step]
        assert replace(stage, name=instruct.name, parent=instruct.parent, seed=instruct.seed) == instruct
    assert tuned_on_trail("tiny") == {}
