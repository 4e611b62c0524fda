"""Merges beside those of mergekit, run by the recipes that are saved beside ours; `make bench` begins with it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from mergekit.merge_methods.generalized_task_arithmetic import get_mask
from safetensors.torch import save_file

import delta_analysis as da
from delta_analysis.checkpoints.paths import find_root, zoo_model
from delta_analysis.merging.average import Average
from delta_analysis.merging.della import Della
from delta_analysis.merging.election import elected
from delta_analysis.merging.mergekit import FILE
from delta_analysis.merging.merger import merge
from delta_analysis.merging.methods import MergeMethod
from delta_analysis.merging.task_arithmetic import TaskArithmetic
from delta_analysis.merging.ties import Ties
from delta_analysis.pruning import Dare, Magnitude, MagPrune, Pruner

NAMES = ("base", "instruct", "math", "code")
DROP_RATE = 0.75
"""Of every tensor of these models, a quarter of the entries is a whole number."""
WEIGHTS = [(1.0, 1.0, 1.0), (0.5, 1.5, 0.0)]
NEGATIVE = (1.0, -0.5, 2.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and three fine-tunes in float32, with a little noise, so that no two entries of a delta are equal."""
    generator = torch.Generator().manual_seed(0)
    paths = []
    for name in NAMES:
        source, path = zoo_model(f"zoo:tiny/{name}"), tmp_path_factory.mktemp(name)
        for file in source.glob("*.json"):
            shutil.copy(file, path)
        weights = {key: value.float() for key, value in da.open_checkpoint(source).items()}
        noisy = {key: value + 1e-4 * torch.randn(value.shape, generator=generator) for key, value in weights.items()}
        save_file(noisy, path / "model.safetensors", metadata={"format": "pt"})
        paths.append(path)
    return paths


def both(
    sources: Sequence[Path | str],
    out: Path,
    method: MergeMethod,
    prune: Pruner | None = None,
    weights: Sequence[float] = WEIGHTS[0],
) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]:
    """The deltas of our merge, saved in float32, and of mergekit's by the recipe beside it."""
    base, *finetuned = map(str, sources)
    deltas = [da.load_delta(base=base, finetuned=each) for each in finetuned]
    merged = merge(base, deltas, method, prune, weights=weights)
    da.save_checkpoint(da.open_checkpoint(base), merged, out / "ours", dtype="float32")
    settings = yaml.safe_load((out / "ours" / FILE).read_text())
    run_merge(MergeConfiguration.model_validate(settings), str(out / "theirs"), MergeOptions(random_seed=0, quiet=True))
    found = [da.load_delta(base=base, finetuned=out / each) for each in ("ours", "theirs")]
    assert list(found[0]) == list(found[1])
    return found[0], found[1]


def assert_same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    # Weights up to 5, which are rounded once here, and there after each addition.
    torch.testing.assert_close(dict(theirs), dict(ours), rtol=1e-5, atol=2e-6)


SAME: list[tuple[MergeMethod, Pruner | None]] = [
    (Average(), None),
    (Average(0.7), None),
    (TaskArithmetic(), None),
    (TaskArithmetic(0.3), None),
    (Ties(0.0), None),
    (Ties(DROP_RATE), None),
    (Ties(DROP_RATE, fuse="sum", scaling=0.5), None),
    (Ties(0.0), Magnitude(DROP_RATE)),
    (Ties(0.0), Magnitude(DROP_RATE, rescale="l1")),
    (Della(0.0), None),
    (TaskArithmetic(0.5), Magnitude(DROP_RATE)),
    (Average(), Magnitude(DROP_RATE, rescale="l1")),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(("method", "prune"), SAME, ids=repr)
def test_the_same_merge(
    models: list[Path], tmp_path: Path, method: MergeMethod, prune: Pruner | None, weights: Sequence[float]
) -> None:
    assert_same(*both(models, tmp_path, method, prune, weights))


@pytest.mark.parametrize("method", [Average(), TaskArithmetic(), Ties(DROP_RATE, fuse="sum")], ids=repr)
def test_negative_weights(models: list[Path], tmp_path: Path, method: MergeMethod) -> None:
    assert_same(*both(models, tmp_path, method, None, NEGATIVE))


@pytest.mark.parametrize("method", [Average(), TaskArithmetic(0.5), Ties(0.0)], ids=repr)
def test_embedded_models_by_their_names(tmp_path: Path, method: MergeMethod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(find_root())
    assert_same(*both([f"zoo:tiny/{name}" for name in NAMES], tmp_path, method))


@pytest.mark.parametrize("method", [Average(), TaskArithmetic(), Ties(0.0), Ties(0.0, fuse="sum")], ids=repr)
@pytest.mark.parametrize("prune", [Dare(0.9), Dare(0.5, "none"), MagPrune(0.6), MagPrune(0.6, rescale="l1")], ids=repr)
def test_random_drops_are_alike_in_number_and_size(
    models: list[Path], tmp_path: Path, method: MergeMethod, prune: Pruner
) -> None:
    """The masks differ: of a large matrix, the shares of entries that are 0 and the mean sizes agree."""
    name = "model.layers.0.mlp.up_proj.weight"
    ours, theirs = (found[name].double() for found in both(models, tmp_path, method, prune))
    # What base + delta rounds away is not 0 in neither.
    zero = [float((found.abs() < 1e-7).double().mean()) for found in (ours, theirs)]
    size = [float(found.abs().mean()) for found in (ours, theirs)]
    # Five standard errors of a share of so many entries; sizes depend on a random factor of each model there.
    assert abs(zero[0] - zero[1]) < 5 / np.sqrt(2 * ours.numel())
    assert size[1] == pytest.approx(size[0], rel=10 / np.sqrt(ours.numel()) + 0.05)


def test_an_election_that_ends_in_a_draw() -> None:
    """Small integers, with many zeros and sums that are exactly zero."""
    votes = torch.randint(-3, 4, (4, 10_000), generator=torch.Generator().manual_seed(0)).float()
    mask = get_mask(votes, "sum")
    expected = (votes * mask).sum(0) / mask.sum(0).clamp(min=1)
    torch.testing.assert_close(elected(list(votes), [1.0] * 4), expected)
