"""Models and tokenizers of checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from delta_analysis.checkpoints.checkpoint import open_checkpoint
from delta_analysis.evaluation.models import check_device, load_model, load_tokenizer
from delta_analysis.zoo.tokenizer import character_tokenizer
from tests.evaluation.conftest import ids_of, tiny_model


def test_model_and_tokenizer_of_a_checkpoint(tmp_path: Path) -> None:
    saved = tiny_model(seed=3)
    saved.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    model, read = load_model(checkpoint), load_tokenizer(checkpoint)
    assert model.dtype == torch.float32
    assert not model.training
    assert model.state_dict().keys() == saved.state_dict().keys()
    for name, tensor in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.float())
    assert read.padding_side == "left"
    assert (read.pad_token_id, read.eos_token_id) == (0, 96)
    assert ids_of(read, "a+b\n") == ids_of(tokenizer, "a+b\n")


def test_tokenizer_without_padding_pads_with_its_end(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tokenizer = character_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    read = load_tokenizer(open_checkpoint(tmp_path))
    assert read.pad_token == "\n"
    assert read(["a", "abc"], padding=True)["attention_mask"] == [[0, 0, 1], [1, 1, 1]]


def test_a_device_is_one_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("cpu", "cuda", "cuda:0", "cuda:1"):
        check_device(device)
    with pytest.raises(ValueError, match="^device must be one of cpu, cuda:0, cuda:1; not 'cuda:2'$"):
        check_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_device("cpu")
    with pytest.raises(ValueError, match="^device must be one of cpu; not 'cuda'$"):
        check_device("cuda")
