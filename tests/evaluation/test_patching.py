"""Patched weights, on a tiny model with random weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import pytest
import torch
from transformers import LlamaForCausalLM

from delta_analysis.evaluation.models import patched
from delta_analysis.zoo.tokenizer import character_tokenizer
from tests.evaluation.conftest import ids_of, tiny_model

NORM, EMBED, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"


def state(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_as_before(model: LlamaForCausalLM, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], tensor) for name, tensor in before.items())


def random_weights(model: LlamaForCausalLM, *names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {name: torch.randn(model.get_parameter(name).shape, generator=generator) for name in names}


def test_patched_weights_hold_inside_and_are_gone_afterwards() -> None:
    model = tiny_model()
    before = state(model)
    weights = random_weights(model, NORM, EMBED, "model.layers.1.mlp.up_proj.weight")
    with patched(model, weights) as inside:
        assert inside is model
        now = state(model)
        for name, tensor in now.items():
            assert torch.equal(tensor, weights.get(name, before[name]))
        assert not is_as_before(model, before)
    assert is_as_before(model, before)


def test_patching_keeps_storage_and_the_need_for_gradients() -> None:
    model = tiny_model()
    parameter = model.get_parameter(NORM)
    place = parameter.data_ptr()
    with patched(model, random_weights(model, NORM)):
        assert model.get_parameter(NORM) is parameter
    assert parameter.data_ptr() == place
    assert parameter.requires_grad
    assert parameter.grad_fn is None


def test_patched_logits_are_those_of_a_model_with_these_weights() -> None:
    model, other = tiny_model(seed=0), tiny_model(seed=1)
    ids = torch.tensor([ids_of(character_tokenizer(), "one two three")])
    with torch.no_grad():
        own, theirs = (each(input_ids=ids).logits for each in (model, other))
        with patched(model, dict(other.named_parameters())):
            assert torch.equal(model(input_ids=ids).logits, theirs)
        assert torch.equal(model(input_ids=ids).logits, own)


def test_exception_inside_restores_the_model() -> None:
    model = tiny_model()
    before = state(model)
    with pytest.raises(RuntimeError, match="evaluation failed"), patched(model, random_weights(model, NORM, EMBED)):
        raise RuntimeError("evaluation failed")
    assert is_as_before(model, before)


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        ("model.norm.bias", torch.ones(32), "'model.norm.bias' has no place in the model"),
        (NORM, torch.ones(31), r"'model.norm.weight' has shape \(31,\), the model's \(32,\)"),
        (NORM, torch.ones(1), r"shape \(1,\)"),
        (NORM, torch.ones(1, 32), r"shape \(1, 32\)"),
        (NORM, torch.tensor([math.nan, *[1.0] * 31]), "'model.norm.weight' has 1 NaN or infinite entries of 32"),
        (NORM, torch.tensor([math.inf, -math.inf, *[1.0] * 30]), "has 2 NaN or infinite entries of 32"),
    ],
    ids=["name", "shape", "broadcast", "dimensions", "nan", "infinite"],
)
def test_bad_weight_in_the_middle_leaves_the_model_as_it_was(name: str, weight: torch.Tensor, message: str) -> None:
    model = tiny_model()
    before = state(model)
    first, last = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    weights = random_weights(model, first, last)
    with (
        pytest.raises(ValueError, match=message),
        patched(model, {first: weights[first], name: weight, last: weights[last]}),
    ):
        pytest.fail("a model with a bad weight was handed out")
    assert is_as_before(model, before)


class Unreadable(Mapping[str, torch.Tensor]):
    """Weights read one at a time, the second of which cannot be read."""

    def __getitem__(self, name: str) -> torch.Tensor:
        if name == EMBED:
            raise OSError("disk on fire")
        return torch.ones(32)

    def __iter__(self) -> Iterator[str]:
        return iter((NORM, EMBED))

    def __len__(self) -> int:
        return 2


def test_weight_that_cannot_be_read_leaves_the_model_as_it_was() -> None:
    model = tiny_model()
    before = state(model)
    with pytest.raises(OSError, match="disk on fire"), patched(model, Unreadable()):
        pytest.fail("a model with a missing weight was handed out")
    assert is_as_before(model, before)


@pytest.mark.parametrize("names", [(EMBED,), (HEAD,), (EMBED, HEAD), (HEAD, EMBED)], ids=" then ".join)
def test_tied_embeddings_are_patched_under_each_name_and_restored(names: tuple[str, ...]) -> None:
    model = tiny_model(tied=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = state(model)
    weight = torch.randn(97, 32, generator=torch.Generator().manual_seed(0))
    with patched(model, dict.fromkeys(names, weight)):
        assert torch.equal(model.lm_head.weight, weight)
        assert torch.equal(model.model.embed_tokens.weight, weight)
    assert is_as_before(model, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_patches_may_stand_inside_each_other() -> None:
    model = tiny_model()
    before = state(model)
    with patched(model, {NORM: torch.full((32,), 2.0)}):
        with patched(model, {NORM: torch.full((32,), 3.0)}):
            assert model.get_parameter(NORM).tolist() == [3.0] * 32
        assert model.get_parameter(NORM).tolist() == [2.0] * 32
    assert is_as_before(model, before)
