"""Adapters with weights of their own: what is judged and what is saved is what peft makes of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from delta_analysis.checkpoints import open_checkpoint
from delta_analysis.deltas import load_delta, save_checkpoint
from delta_analysis.evaluation.models import finetuned_model
from tests.checkpoints.test_checkpoint import tiny_llama
from tests.deltas.test_alignment import PEFT_WARNINGS

pytestmark = [
    pytest.mark.filterwarnings(each) for each in (*PEFT_WARNINGS, "ignore:.*has rows for 13 tokens:UserWarning")
]
IDS = torch.tensor([[1, 4, 2, 10, 7]])


def trained(model: LlamaForCausalLM, folder: Path, **options: Any) -> Any:
    """The model with a random adapter, which is saved."""
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, lora_alpha=3, **options))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    return wrapped


def made_of(base: Path, adapter: Path, out: Path) -> list[LlamaForCausalLM]:
    """The model that is judged, and the one that is saved."""
    delta = load_delta(base=base, finetuned=adapter)
    save_checkpoint(open_checkpoint(base), delta, out)
    return [finetuned_model(delta)[0], AutoModelForCausalLM.from_pretrained(out)]


@pytest.mark.parametrize("tokens", [11, 13])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
    ids=["whole", "factors"],
)
def test_whole_weights_and_new_tokens_are_as_in_pefts_merge(
    tmp_path: Path, options: dict[str, Any], tokens: int
) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(tokens)
    merged = trained(model, tmp_path / "adapter", **options).merge_and_unload()
    if tokens == 11 and "modules_to_save" in options:
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
        assert torch.equal(again.merge_and_unload()(IDS).logits, merged(IDS).logits)
    expected = merged.state_dict()
    if tokens > 11:
        with pytest.warns(UserWarning, match=r"has rows for 13 tokens, and 11 of them are in the base too"):
            load_delta(base=tmp_path / "base", finetuned=tmp_path / "adapter")
    for found in made_of(tmp_path / "base", tmp_path / "adapter", tmp_path / "out"):
        assert found.config.vocab_size == tokens
        for name, weight in found.state_dict().items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)


def test_factors_of_both_names_of_a_tied_matrix_make_two_of_it(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    wrapped = trained(model, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens", "lm_head"])
    with torch.no_grad():
        expected = wrapped.eval()(IDS).logits
        for found in made_of(tmp_path / "base", tmp_path / "adapter", tmp_path / "out"):
            torch.testing.assert_close(found.eval()(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_an_adapters_own_tokenizer_goes_before_that_of_its_base(tmp_path: Path) -> None:
    for name in ("base", "tokens"):
        path = open_checkpoint("zoo:tiny/base").path
        assert path is not None
        (tmp_path / name).mkdir()
        for file in path.iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter", target_modules=["q_proj"])
    delta = load_delta(base=tmp_path / "base", finetuned=tmp_path / "adapter")
    assert finetuned_model(delta)[1].chat_template is None
    for file in (tmp_path / "tokens").glob("*token*"):
        (tmp_path / "adapter" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    assert finetuned_model(delta)[1].chat_template == "{{ messages }}"
    save_checkpoint(open_checkpoint(tmp_path / "base"), delta, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
