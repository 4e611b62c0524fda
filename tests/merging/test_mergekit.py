"""The configuration for mergekit: what it says of each merge, and which merges have none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from delta_analysis.checkpoints.checkpoint import open_checkpoint
from delta_analysis.checkpoints.paths import zoo_model
from delta_analysis.deltas.delta import Delta, load_delta
from delta_analysis.deltas.saving import save_checkpoint
from delta_analysis.merging.average import Average
from delta_analysis.merging.della import Della
from delta_analysis.merging.election import Slack
from delta_analysis.merging.fisher import Fisher
from delta_analysis.merging.mergekit import FILE, mergekit_recipe
from delta_analysis.merging.merger import merge
from delta_analysis.merging.methods import MergeMethod
from delta_analysis.merging.regmean import RegMean
from delta_analysis.merging.task_arithmetic import TaskArithmetic
from delta_analysis.merging.ties import Ties
from delta_analysis.merging.widen import Widen
from delta_analysis.pruning import Dare, Magnitude, MagPrune, Pruner
from delta_analysis.pruning.proportional import Proportional

BASE = "zoo:tiny/base"
PLACES = [str(zoo_model(f"zoo:tiny/{name}")) for name in ("base", "instruct", "math")]
DELTAS = [load_delta(base=BASE, finetuned=f"zoo:tiny/{name}") for name in ("instruct", "math")]


def text_of(
    method: MergeMethod,
    prune: Pruner | list[Pruner | None] | None = None,
    *,
    base: str = BASE,
    deltas: list[Delta] = DELTAS,
    weights: tuple[float, ...] = (1.0, 1.0),
) -> str | None:
    pruners = prune if isinstance(prune, list) else [prune] * len(deltas)
    return mergekit_recipe(base, deltas, method, pruners, weights)


def recipe(*args: Any, **kwargs: Any) -> dict[str, Any]:
    text = text_of(*args, **kwargs)
    assert text is not None
    return yaml.safe_load(text)


def of_models(found: dict[str, Any], name: str) -> list[float]:
    return [each["parameters"][name] for each in found["models"]]


@pytest.mark.parametrize(
    ("method", "prune", "name", "normalize", "rescale", "density"),
    [
        (Average(), None, "task_arithmetic", True, False, None),
        (TaskArithmetic(), None, "task_arithmetic", False, False, None),
        (Ties(0.0), None, "ties", True, False, None),
        (Ties(0.8), None, "ties", True, False, 0.2),
        (Ties(0.9, fuse="sum"), None, "ties", False, False, 0.1),
        (Ties(0.0), Magnitude(0.7), "ties", True, False, 0.3),
        (Ties(0.0), Magnitude(0.7, rescale="l1"), "ties", True, True, 0.3),
        (Ties(0.0), Dare(0.9), "dare_ties", True, True, 0.1),
        (Ties(0.0, "model", "sum"), Dare(0.9, "none"), "dare_ties", False, False, 0.1),
        (Ties(0.0), MagPrune(0.9), "della", True, True, 0.1),
        (Della(0.9), None, "della", True, True, 0.1),
        (Della(0.0), None, "ties", True, False, None),
        (Della(0.0), Dare(0.99), "dare_ties", True, True, 0.01),
        (Average(), Dare(0.5, "l1"), "dare_linear", True, True, 0.5),
        (TaskArithmetic(), Dare(1.0), "dare_linear", False, True, 0.0),
        (TaskArithmetic(), MagPrune(0.9, rescale="none"), "della_linear", False, False, 0.1),
        (Average(), Magnitude(0.9), "breadcrumbs", True, False, 0.1),
    ],
)
def test_every_merge_that_mergekit_has(
    method: MergeMethod,
    prune: Pruner | None,
    name: str,
    normalize: bool,
    rescale: bool,
    density: float | None,
) -> None:
    found = recipe(method, prune, weights=(0.5, 2.0))
    assert found["merge_method"] == name
    assert found["parameters"] == {"normalize": normalize, "rescale": rescale, "lambda": 1.0}
    assert of_models(found, "weight") == [0.5, 2.0]
    assert [each["parameters"].get("density") for each in found["models"]] == [density] * 2
    assert [each["parameters"].get("gamma") for each in found["models"]] == [0.0 if name == "breadcrumbs" else None] * 2
    assert [found["base_model"], *(each["model"] for each in found["models"])] == PLACES
    assert found["dtype"] == "float32"


@pytest.mark.parametrize("method", [Average(0.3), TaskArithmetic(0.3), Ties(0.5, scaling=0.3), Della(0.5, scaling=0.3)])
def test_lambda_is_the_scaling(method: MergeMethod) -> None:
    assert recipe(method)["parameters"]["lambda"] == 0.3


@pytest.mark.parametrize(
    ("method", "prune", "epsilon"),
    [
        (Della(0.6), None, 0.36),
        (Della(0.6, window=0.2), None, 0.1),
        (Average(), MagPrune(0.6, window=0.0), 0.0),
        (TaskArithmetic(), MagPrune(0.25), 0.225),
    ],
)
def test_epsilon_is_half_of_the_window(method: MergeMethod, prune: Pruner | None, epsilon: float) -> None:
    assert of_models(recipe(method, prune), "epsilon") == [epsilon] * 2


@pytest.mark.parametrize(
    ("prunes", "name", "densities"),
    [
        ([Dare(0.9), Dare(0.5)], "dare_ties", [0.1, 0.5]),
        ([None, Dare(0.5)], "dare_ties", [1.0, 0.5]),
        ([Magnitude(0.75), None], "ties", [0.25, 1.0]),
    ],
)
def test_each_model_has_a_density_of_its_own(prunes: list[Pruner | None], name: str, densities: list[float]) -> None:
    found = recipe(Ties(0.0), prunes)
    assert (found["merge_method"], of_models(found, "density")) == (name, densities)


@pytest.mark.parametrize(
    ("method", "prune"),
    [
        (Fisher(), None),
        (RegMean(), None),
        (Widen(), None),
        (Ties(0.8, slack=Slack(0)), None),
        (Ties(0.8, "model"), None),
        (Ties(0.8, "row"), None),
        (Della(0.5, within="tensor"), None),
        (Della(0.5, elect=False), None),
        (Della(0.0, elect=False), None),
        # Two prunings, one after the other.
        (Ties(0.8), Dare(0.9)),
        (Della(0.5), Magnitude(0.5)),
        # Drops and factors that it does not have.
        (Average(), Dare(0.9, 2.0)),
        (Average(), Dare(0.9, "l2")),
        (Average(), Magnitude(0.9, rescale="inverse_keep")),
        (Average(), Magnitude(0.9, "row")),
        (Ties(0.0), Magnitude(0.9, "model")),
        (Average(), MagPrune(0.5, within="tensor")),
        (Average(), Proportional(0.9)),
        # Probabilities of 1 are refused there.
        (Average(), MagPrune(0.25, window=0.5)),
        (Della(0.25, window=0.5), None),
        # One method drops in one way, and rescales all models or none.
        (Ties(0.0), [Dare(0.9), Magnitude(0.9)]),
        (Ties(0.0), [Dare(0.9), Dare(0.9, "none")]),
    ],
    ids=repr,
)
def test_no_recipe_where_mergekit_has_no_such_merge(method: MergeMethod, prune: Any) -> None:
    assert text_of(method, prune) is None


def test_no_recipe_of_an_elected_mean_where_a_weight_is_negative() -> None:
    for method in (Ties(0.8), Della(0.5)):
        assert text_of(method, weights=(1.0, -0.5)) is None
        assert text_of(method, weights=(1.0, 0.0)) is not None
    for method in (Ties(0.8, fuse="sum"), Average(), TaskArithmetic()):
        assert of_models(recipe(method, weights=(1.0, -0.5)), "weight") == [1.0, -0.5]


def test_no_recipe_of_what_mergekit_cannot_load(tmp_path: Path) -> None:
    first, second = DELTAS
    file = zoo_model("zoo:tiny/math") / "model.safetensors"
    module = torch.nn.Embedding(97, 64)
    cases = [
        [first, second.pruned(Dare(0.9), seed=0)],
        [first, first],
        [first, load_delta(base=BASE, finetuned=BASE)],
        [first, load_delta(base=BASE, finetuned=file)],
        [first, load_delta(base=BASE, finetuned="zoo:tiny/math", finetuned_is_delta=True)],
        [first, load_delta(base=module, finetuned=torch.nn.Embedding(97, 64))],
        [first, merge(BASE, DELTAS, Average())],
    ]
    for deltas in cases:
        assert text_of(Average(), deltas=deltas) is None
    assert text_of(Average(), deltas=[first, second]) is not None


def remarks(*args: Any) -> str:
    text = text_of(*args)
    assert text is not None
    comments, settings = [
        [line for line in text.splitlines() if line.startswith("#") is sign] for sign in (True, False)
    ]
    assert text.splitlines() == [*comments, *settings]
    assert all(len(line) <= 200 for line in comments)
    return "\n".join(comments)


def test_remarks_are_those_that_matter_for_the_method() -> None:
    plain = remarks(TaskArithmetic())
    assert "same" in plain
    assert not any(word in plain for word in ("random", "density", "epsilon", "L1", "gamma"))
    for method, prune, present, absent in (
        (Ties(0.8), None, ("int(density * n)",), ("random", "epsilon", "L1", "gamma")),
        (Ties(0.0), Dare(0.9), ("--random-seed", "1 - drop rate", "L1"), ("epsilon", "int(", "rank", "gamma")),
        (Ties(0.0), Dare(0.9, "l1"), ("--random-seed", "1 - drop rate"), ("L1",)),
        (Ties(0.0), Dare(0.9, "none"), ("--random-seed",), ("L1",)),
        (Della(0.5), None, ("--random-seed", "half of the window", "ranks", "L1", "too large"), ("int(", "gamma")),
        (TaskArithmetic(), MagPrune(0.5, rescale="l1"), ("half of the window",), ("L1",)),
        (TaskArithmetic(), Magnitude(0.5), ("gamma 0", "0.1.5", "int(density * n)"), ("random", "L1")),
    ):
        said = remarks(method, prune)
        assert all(word in said for word in present), (said, present)
        assert not any(word in said for word in absent), (said, absent)


def test_numbers_stay_numbers_and_places_stay_text(tmp_path: Path) -> None:
    odd = tmp_path / 'a: "b" # c'
    shutil.copytree(zoo_model("zoo:tiny/math"), odd)
    deltas = [load_delta(base=BASE, finetuned=odd)]
    found = recipe(TaskArithmetic(1e20), Dare(1 - 1e-6), base="org/name@main", deltas=deltas, weights=(-1e-7,))
    assert found["models"] == [{"model": str(odd), "parameters": {"weight": -1e-7, "density": 1e-6}}]
    assert found["parameters"]["lambda"] == 1e20
    assert found["base_model"] == "org/name@main"


def test_a_folder_is_named_by_its_full_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(zoo_model("zoo:tiny/math"), tmp_path / "models" / "math")
    monkeypatch.chdir(tmp_path / "models")
    found = recipe(Average(), deltas=[load_delta(base=BASE, finetuned="math")], weights=(1.0,))
    assert found["models"][0]["model"] == str(tmp_path / "models" / "math")


def test_it_is_saved_beside_the_merge_and_with_no_edit_of_it(tmp_path: Path) -> None:
    base, merged = open_checkpoint(BASE), merge(BASE, DELTAS, Ties(0.0), Dare(0.9), weights=(1.0, 0.5))
    save_checkpoint(base, merged, tmp_path / "merged")
    assert (tmp_path / "merged" / FILE).read_text() == text_of(Ties(0.0), Dare(0.9), weights=(1.0, 0.5))
    save_checkpoint(base, merged.pruned(Dare(0.5), seed=0), tmp_path / "pruned")
    save_checkpoint(base, merge(BASE, DELTAS, Widen()), tmp_path / "widened")
    assert not (tmp_path / "pruned" / FILE).exists()
    assert not (tmp_path / "widened" / FILE).exists()
