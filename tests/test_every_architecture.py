"""Compared, edited, saved, foretold and merged: the same exact promises for every architecture."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import delta_analysis as da
from delta_analysis.checkpoints import find_root
from delta_analysis.merging import Average
from delta_analysis.sweeps import Edit, Pair
from delta_analysis.sweeps.pairs import EditablePair
from tests.architectures import ARCHITECTURES, moved, outputs, tiny_model


@pytest.fixture(params=ARCHITECTURES)
def models(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A base and its fine-tune, saved as `base` and `tuned`, and another fine-tune as `other`."""
    base = tiny_model(request.param)
    tuned, other = moved(base, seed=1), moved(base, seed=2)
    for name, model in {"base": base, "tuned": tuned, "other": other}.items():
        model.save_pretrained(tmp_path / name)
    return base, tuned


def test_the_readme_names_what_is_tested() -> None:
    text = (find_root() / "README.md").read_text(encoding="utf-8")
    (named,) = re.findall(r"on a tiny random model each: (.*?)\. An architecture", text)
    names = [name for name in ARCHITECTURES if name not in ("Llama, tied", "Gemma 3, multimodal", "BERT, classifier")]
    assert named.replace(" (text and multimodal)", "").split(", ") == names


def reloaded(model: PreTrainedModel, folder: Path) -> torch.Tensor:
    again, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return outputs(again.eval())


def test_it_is_compared_edited_saved_foretold_and_merged(
    models: tuple[PreTrainedModel, PreTrainedModel], tmp_path: Path
) -> None:
    base, tuned = models
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta = da.load_delta(base=str(tmp_path / "base"), finetuned=str(tmp_path / "tuned"))
    assert delta.coverage()["status"].eq("compared").all()

    pair = EditablePair.load(Pair("p", str(tmp_path / "base"), str(tmp_path / "tuned")))
    with pair.edited(Edit(da.Dare(0.0)), seed=0) as nothing:
        assert torch.equal(outputs(nothing.model), outputs(tuned))
    if "classifier" in dict(tuned.named_children()) and hasattr(tuned, "bert"):
        # A classification head is not dropped from.
        base.classifier.load_state_dict(tuned.classifier.state_dict())
    with pair.edited(Edit(da.Dare(1.0, rescale="none")), seed=0) as everything:
        assert torch.equal(outputs(everything.model), outputs(base))
    with pair.edited(Edit(da.Dare(0.5)), seed=3) as half:
        edited = outputs(half.model)
    assert not torch.equal(edited, outputs(tuned))

    start = da.open_checkpoint(str(tmp_path / "base"))
    da.save_checkpoint(start, delta, tmp_path / "whole", dtype="float32")
    assert torch.equal(reloaded(tuned, tmp_path / "whole"), outputs(tuned))
    da.save_checkpoint(start, delta.select().pruned(da.Dare(0.5), seed=3), tmp_path / "half", dtype="float32")
    assert torch.equal(reloaded(tuned, tmp_path / "half"), edited)

    other = da.load_delta(base=str(tmp_path / "base"), finetuned=str(tmp_path / "other"))
    merged = da.merge(start, [delta, other], Average())
    da.save_checkpoint(start, merged, tmp_path / "merged", dtype="float32")
    assert reloaded(tuned, tmp_path / "merged").isfinite().all()

    told = da.layer_noise(str(tmp_path / "base"), str(tmp_path / "tuned"))
    assert set(told["tensor"]) == set(delta)


def test_of_experts_that_are_fused_in_the_model_some_can_be_edited(tmp_path: Path) -> None:
    base = tiny_model("Mixtral")
    tuned = moved(base, seed=1)
    for name, model in {"base": base, "tuned": tuned}.items():
        model.save_pretrained(tmp_path / name)
    pair = EditablePair.load(Pair("p", str(tmp_path / "base"), str(tmp_path / "tuned")))
    with pair.edited(Edit(da.Dare(1.0), scope="*.experts.10.*"), seed=0) as dropped:
        for layer, before, after in zip(dropped.model.model.layers, base.model.layers, tuned.model.layers, strict=True):
            for parameter in ("gate_up_proj", "down_proj"):
                now, start, own = (getattr(each.mlp.experts, parameter) for each in (layer, before, after))
                assert torch.equal(now[10], start[10])
                assert torch.equal(now[:10], own[:10])
