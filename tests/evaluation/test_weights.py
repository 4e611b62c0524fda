"""Weights that replace a model's own, on a tiny model with random weights."""

from __future__ import annotations

import math

import pytest
import torch

from delta_analysis.evaluation import write_weights
from tests.evaluation.conftest import tiny_model

NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"


def test_rows_beyond_a_shorter_vocabulary_stay() -> None:
    model = tiny_model()
    before = model.model.embed_tokens.weight.detach().clone()
    write_weights(model, [(EMBED, torch.ones(5, before.shape[1])), (NORM, torch.full((32,), 2.0))])
    assert model.model.embed_tokens.weight[:5].eq(1).all()
    assert torch.equal(model.model.embed_tokens.weight[5:], before[5:])
    assert model.model.norm.weight.eq(2).all()


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        ("model.norm.bias", torch.ones(32), "'model.norm.bias' has no place in the model"),
        (NORM, torch.ones(33), r"'model.norm.weight' has shape \(33,\), the model's \(32,\)"),
        (NORM, torch.ones(1, 32), r"shape \(1, 32\)"),
        (NORM, torch.tensor([math.nan, *[1.0] * 31]), "'model.norm.weight' has 1 NaN or infinite entries of 32"),
        (NORM, torch.tensor([math.inf, -math.inf, *[1.0] * 30]), "has 2 NaN or infinite entries of 32"),
    ],
    ids=["name", "shape", "dimensions", "nan", "infinite"],
)
def test_a_weight_that_does_not_fit_is_refused(name: str, weight: torch.Tensor, message: str) -> None:
    model = tiny_model()
    before = model.model.norm.weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        write_weights(model, [(name, weight)])
    assert torch.equal(model.model.norm.weight, before)
