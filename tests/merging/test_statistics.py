"""Fisher information against closed forms and enumerated labels; moments against inputs that hooks saw."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from delta_analysis.checkpoints.checkpoint import open_checkpoint
from delta_analysis.deltas.delta import Delta, load_delta
from delta_analysis.evaluation.models import finetuned_model, load_model
from delta_analysis.merging.statistics import gather
from delta_analysis.pruning import Dare
from delta_analysis.zoo.tokenizer import character_tokenizer

VOCABULARY = 5
IDS = torch.tensor([[3, 1, 4, 1, 2], [2, 4, 4, 0, 0], [1, 3, 2, 4, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
BATCH = {"input_ids": IDS, "attention_mask": MASK}
SIZES: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def llama(*, tie: bool = False, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=16, tie_word_embeddings=tie, **SIZES)
    return _spread(LlamaForCausalLM(config))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return _spread(GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **sizes)))


def classifier(**settings: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **SIZES, **{"num_labels": 3, **settings})
    return _spread(BertForSequenceClassification(config))


def _spread(model: PreTrainedModel) -> Any:
    """Larger weights than a fresh model's, so that labels are not all as likely."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def whole(model: PreTrainedModel, folder: Path) -> Delta:
    """A delta of all weights, from nothing."""
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return load_delta(base=None, finetuned=folder)


def tiny(name: str = "instruct") -> Delta:
    return load_delta(base="zoo:tiny/base", finetuned=f"zoo:tiny/{name}")


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("make", [llama, gpt2, classifier])
def test_moments_are_those_of_the_inputs_without_padding(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    found = gather("moments", whole(make(), tmp_path / "model"), [BATCH])
    model = load_model(open_checkpoint(tmp_path / "model"))
    layers = {path: each for path, each in model.named_modules() if isinstance(each, torch.nn.Linear | Conv1D)}
    seen: dict[str, torch.Tensor] = {}
    for path, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, arguments, path=path: seen.update({path: arguments[0].detach()}))
    model(**BATCH)
    tied = {"lm_head"} if make is gpt2 else set()
    assert set(found) == {f"{path}.weight" for path in layers.keys() - tied}
    for path in layers.keys() - tied:
        x = seen[path]
        # The pooler and what follows it read one input a text.
        x = (x[MASK.bool()] if x.shape[:2] == MASK.shape else x).double()
        expected = torch.einsum("ni,nj->ij", x, x) / len(x)
        moments = found[f"{path}.weight"]
        inputs = len(expected)
        assert moments.dtype == torch.float64
        assert moments.shape == ((inputs, 1, inputs) if isinstance(layers[path], Conv1D) else (1, inputs, inputs))
        torch.testing.assert_close(moments.view(inputs, inputs), expected, rtol=1e-5, atol=1e-7)


def test_moments_are_of_the_linear_layers_of_the_delta() -> None:
    delta = tiny()
    found = gather("moments", delta, [BATCH])
    assert set(found) == {name for name in delta if name.endswith("_proj.weight")}
    assert len(found) == 4 * 7


def apart(side: str) -> list[dict[str, torch.Tensor]]:
    """The sequences of the batch in other batches, with more padding on a side."""
    batches = []
    for ids, mask in zip(IDS, MASK, strict=True):
        zeros = torch.zeros(3, dtype=torch.long)
        own, more = ids[mask.bool()], (zeros, torch.ones_like(ids[mask.bool()]))
        parts, masks = ([own, zeros], more[::-1]) if side == "right" else ([zeros, own], more)
        batches.append({"input_ids": torch.cat(parts)[None], "attention_mask": torch.cat(masks)[None]})
    return batches


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("statistic", ["fisher", "moments"])
def test_neither_batches_nor_padding_matter(statistic: Any, side: str) -> None:
    together = gather(statistic, tiny(), [BATCH])
    assert same(together, gather(statistic, tiny(), apart(side)))
    assert same(together, gather(statistic, tiny(), iter([BATCH])))
    bare = [{"input_ids": ids[None, mask.bool()]} for ids, mask in zip(IDS, MASK, strict=True)]
    assert same(together, gather(statistic, tiny(), bare))


def test_other_arguments_are_passed_on(tmp_path: Path) -> None:
    delta = whole(classifier(), tmp_path / "model")
    plain = gather("moments", delta, [BATCH])
    kinds = torch.zeros_like(IDS)
    assert same(plain, gather("moments", delta, [{**BATCH, "token_type_ids": kinds, "output_attentions": True}]))
    kinds[:, 1:] = 1
    assert not same(plain, gather("moments", delta, [{**BATCH, "token_type_ids": kinds}]))
    with_cache = gather("fisher", tiny(), [{**BATCH, "use_cache": True}])
    assert same(with_cache, gather("fisher", tiny(), [BATCH]))


def jacobian(delta: Delta, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of each log probability in float64: (positions, labels, *shape); of a classifier one position."""
    model = finetuned_model(delta)[0].double()
    model.set_attn_implementation("eager")
    parameters = {name: each.detach() for name, each in model.named_parameters()}

    def log_probabilities(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = torch.func.functional_call(model, parameters, (), {"input_ids": ids[None]}).logits
        return (logits[0, :-1] if logits.dim() == 3 else logits).log_softmax(-1)

    return torch.func.jacrev(log_probabilities)(parameters)


COPIES = 150


@pytest.mark.parametrize("make", [llama, classifier])
def test_labels_are_drawn_from_the_model(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    delta = whole(make(), tmp_path / "model")
    ids = torch.tensor([3, 1])
    found = gather("fisher", delta, [{"input_ids": ids.expand(COPIES, 2)}], seed=1)
    gradients = {name: each[0] for name, each in jacobian(delta, ids).items()}
    # By the bias or row that belongs to a label: (y - p) h, so that its mean square tells how often y was drawn.
    head = next(name for name in gradients if name in (HEAD, "classifier.weight"))
    model, _ = finetuned_model(delta)
    p = model(input_ids=ids[None]).logits[0].reshape(-1, len(gradients[head]))[0].detach().double().softmax(-1)
    energy = (gradients[head][0, 0] / (1 - p[0])).square().sum()
    share = (found[head].double().sum(-1) / energy - p**2) / (1 - 2 * p)
    draws = (share * COPIES).round()
    torch.testing.assert_close(share * COPIES, draws, atol=1e-2, rtol=0)
    assert int(draws.sum()) == COPIES
    # Five standard errors: a false alarm in a million.
    assert ((draws - COPIES * p).abs() < 5 * (COPIES * p * (1 - p)).sqrt()).all()
    assert int((draws > 0).sum()) > 1
    assert set(found) == set(delta) == set(gradients)
    for name, each in gradients.items():
        expected = torch.einsum("y,y...->...", draws / COPIES, each.square())
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-3, atol=1e-8)
        assert found[name].dtype == torch.float32


@pytest.mark.parametrize("kept", [(0, 1, 2), (2,)], ids=["all positions", "the last"])
@pytest.mark.parametrize("tie", [False, True], ids=["own head", "tied head"])
def test_a_sequence_is_the_square_of_a_sum_over_its_positions(tie: bool, kept: tuple[int, ...], tmp_path: Path) -> None:
    delta = whole(llama(tie=tie), tmp_path / "model")
    ids = torch.tensor([3, 1, 4, 2])
    labels = torch.tensor([[4 if t - 1 in kept else -100 for t in range(4)]])
    found = gather("fisher", delta, [{"input_ids": ids[None], "labels": labels}])
    gradients = jacobian(delta, ids)
    matching = 0
    # One combination of labels was drawn; what they are asked for does not matter.
    for drawn in itertools.product(range(VOCABULARY), repeat=len(kept)):
        squares = {n: g[kept, drawn].sum(0).square() for n, g in gradients.items()}
        matching += all(torch.allclose(found[n].double(), squares[n], rtol=1e-3, atol=1e-7) for n in found)
    assert matching == 1
    assert set(found) == set(delta)
    assert (HEAD in found) == (not tie)


def test_information_is_a_mean_over_sequences(tmp_path: Path) -> None:
    # Two labels as likely as each other: whichever is drawn, the squares are the same.
    model = classifier(num_labels=2)
    with torch.no_grad():
        model.classifier.weight.copy_(torch.stack([torch.arange(8.0)] * 2))
        model.classifier.bias.zero_()
    delta = whole(model, tmp_path / "model")
    rows = [{"input_ids": ids[None, mask.bool()]} for ids, mask in zip(IDS, MASK, strict=True)]
    each = [gather("fisher", delta, [row], seed=i)["classifier.weight"] for i, row in enumerate(rows)]
    together = gather("fisher", delta, [BATCH], seed=7)["classifier.weight"]
    torch.testing.assert_close(together, torch.stack(each).mean(0))
    counted = gather("fisher", delta, [{**BATCH, "labels": torch.tensor([0, -100, 1])}])["classifier.weight"]
    torch.testing.assert_close(counted, (each[0] + each[2]) / 2)


def test_seeds_draw_other_labels_and_moments_draw_none() -> None:
    one, two = (gather("fisher", tiny(), [BATCH], seed=seed) for seed in (0, 1))
    assert same(one, gather("fisher", tiny(), [BATCH], seed=0))
    assert not same(one, two)
    with torch.no_grad():
        assert same(one, gather("fisher", tiny(), [BATCH], seed=0))
    moments = gather("moments", tiny(), [BATCH])
    labels = torch.full_like(IDS, -100)
    assert same(moments, gather("moments", tiny(), [{**BATCH, "labels": labels}], seed=1))


def test_edits_of_the_delta_are_left_out() -> None:
    assert same(gather("moments", tiny(), [BATCH]), gather("moments", tiny().pruned(Dare(0.9), seed=0), [BATCH]))


def test_of_a_larger_vocabulary_the_rows_that_both_have_are_known(tmp_path: Path) -> None:
    whole(llama(), tmp_path / "base")
    alone = whole(llama(vocabulary=VOCABULARY + 2), tmp_path / "tuned")
    cut = load_delta(base=tmp_path / "base", finetuned=tmp_path / "tuned")
    every, common = (gather("fisher", delta, [BATCH]) for delta in (alone, cut))
    assert common[HEAD].shape == cut[HEAD].shape == (VOCABULARY, 8)
    assert torch.equal(common[HEAD], every[HEAD][:VOCABULARY])
    assert torch.equal(common[EMBEDDING], every[EMBEDDING][:VOCABULARY])


@pytest.mark.parametrize(
    ("statistic", "batches", "message"),
    [
        ("hessian", [BATCH], "statistic must be one of 'fisher', 'moments'; not 'hessian'"),
        ("moments", [], "hold no sequence"),
        ("fisher", iter([]), "hold no sequence"),
        ("fisher", [{**BATCH, "attention_mask": torch.zeros_like(MASK)}], "hold no sequence"),
        ("moments", BATCH, "batch 0 is 'input_ids'; expected arguments of the model's forward pass"),
        ("moments", [{"ids": IDS}], "batch 0 has 'ids'; expected"),
        ("moments", [{"input_ids": IDS[0]}], "batch 0 has 'input_ids'; expected"),
        ("moments", [{"input_ids": IDS, "attention_mask": MASK[:, 1:]}], r"attention_mask of shape \(3, 4\)"),
        ("moments", [{"input_ids": IDS + 97}], "input_ids go from 98 to 101, and the model has 97 tokens"),
        ("moments", [{"input_ids": IDS - 1}], "input_ids go from -1 to 3"),
        ("fisher", [{"input_ids": IDS[:, :1]}], "zoo:tiny/instruct: the data says nothing of any tensor"),
        ("fisher", [{**BATCH, "labels": torch.full_like(IDS, -100)}], "labels that are not all -100"),
        ("fisher", [{**BATCH, "labels": torch.tensor([1, 0, 1])}], r"shape \(1,\); expected \(1, 5\), one a position"),
    ],
)
def test_what_cannot_be_used_is_refused(statistic: Any, batches: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gather(statistic, tiny(), batches)


def test_batches_are_looked_at_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delta_analysis.merging.statistics.finetuned_model", None)
    with pytest.raises(ValueError, match="hold no sequence"):
        gather("fisher", tiny(), [])


@pytest.mark.parametrize("settings", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}])
def test_a_model_without_a_distribution_over_labels_has_no_information(settings: Any, tmp_path: Path) -> None:
    delta = whole(classifier(**settings), tmp_path / "model")
    with pytest.raises(ValueError, match="does not choose one label of several"):
        gather("fisher", delta, [BATCH])
    assert gather("moments", delta, [BATCH])


@pytest.mark.parametrize("statistic", ["fisher", "moments"])
def test_a_delta_of_other_names_than_the_model_is_refused(statistic: Any, tmp_path: Path) -> None:
    delta = whole(llama(), tmp_path / "model")
    others = tuple(replace(match, tensor=f"other.{match.tensor}") for match in delta.matches)
    with pytest.raises(ValueError, match="no tensor of the delta is a parameter of its model; they begin with"):
        gather(statistic, Delta(None, delta.finetuned, others), [BATCH])


def test_a_delta_without_linear_layers_has_no_moments(tmp_path: Path) -> None:
    delta = whole(llama(), tmp_path / "model")
    norms = tuple(match for match in delta.matches if "norm" in match.tensor)
    with pytest.raises(ValueError, match="none of the 3 tensors of the delta is a linear layer's"):
        gather("moments", Delta(None, delta.finetuned, norms), [BATCH])
    assert len(gather("fisher", Delta(None, delta.finetuned, norms), [BATCH])) == 3


@pytest.mark.parametrize(
    ("statistic", "message"),
    [("moments", "inputs of tensor 'model.layers.0.mlp.down_proj.weight' are NaN"), ("fisher", "the logits are NaN")],
)
def test_a_model_that_makes_no_numbers_is_refused(statistic: Any, message: str, tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=message):
        gather(statistic, whole(model, tmp_path / "model"), [BATCH])


def test_gradients_that_are_too_large_are_refused(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.model.norm.weight.mul_(1e-22)
        model.lm_head.weight.mul_(1e22)
    with pytest.raises(ValueError, match="the squared gradient of tensor 'model.norm.weight'"):
        gather("fisher", whole(model, tmp_path / "model"), [BATCH])
