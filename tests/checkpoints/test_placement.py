"""Which parameters stored tensors become, against what transformers itself loads, for every architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from delta_analysis._errors import CheckpointError
from delta_analysis.checkpoints.placement import ModelMap, model_class, model_map
from tests.architectures import ARCHITECTURES, tiny_model


def map_of(config: dict[str, object], tensors: dict[str, torch.Tensor]) -> ModelMap:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    found = model_class(config, shapes)
    assert found is not None
    return model_map(config, shapes, found)


def placed(found: ModelMap, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight for each in found.placements for name, weight in each.to_model(tensors).items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stored_tensors_become_what_transformers_loads(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    found = map_of(config, stored)
    loaded = type(model).from_pretrained(tmp_path).state_dict()

    weights = placed(found, stored)
    assert found.unplaced == () and found.missing == {}
    # What is not stored is one matrix with what is.
    assert loaded.keys() - weights.keys() == found.tied.keys() - weights.keys()
    for parameter, weight in weights.items():
        assert torch.equal(weight, loaded[parameter]), parameter


@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek-V3", "GPT-2", "T5", "BERT"])
def test_names_of_the_module_are_their_own_places(name: str) -> None:
    model = tiny_model(name)
    state = model.state_dict()
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    weights = placed(map_of(config, state), state)
    assert weights.keys() == state.keys()
    assert all(torch.equal(weight, state[parameter]) for parameter, weight in weights.items())


def test_what_has_no_place_and_what_is_missing_are_told() -> None:
    model = tiny_model("Llama")
    state = model.state_dict()
    lacking = state.pop("model.norm.weight")
    found = map_of(model.config.to_dict(), {**state, "extra.weight": lacking})
    assert found.unplaced == ("extra.weight",)
    assert found.missing == {"model.norm.weight": (32,)}


def test_experts_that_do_not_fit_together_are_an_error(tmp_path: Path) -> None:
    model = tiny_model("Mixtral")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = next(each for each in stored if ".experts.1." in each)
    with pytest.raises(CheckpointError, match="do not make 'model.layers.0.mlp.experts"):
        map_of(model.config.to_dict(), {**stored, name: torch.zeros(3, 3)})


@pytest.mark.parametrize("config", [{}, {"model_type": "unheard-of"}, {"model_type": ["llama"]}])
def test_an_unknown_architecture_has_no_class(config: dict[str, object]) -> None:
    assert model_class(config, {}) is None


def test_a_class_that_transformers_lacks_falls_back_to_that_of_the_model_type() -> None:
    found = model_class({"model_type": "llama", "architectures": ["os.system", "MyOwnLlama"]}, {})
    assert found is not None and found.__name__ == "LlamaForCausalLM"


def test_a_configuration_that_is_none_is_told() -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: not one of a LlamaForCausalLM"):
        map_of({"model_type": "llama", "hidden_size": "wide"}, {})
