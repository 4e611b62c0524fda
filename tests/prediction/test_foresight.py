"""The tolerated drop rate foretold: exact where margins are linear, near what is measured where they are not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm
from transformers import LlamaConfig, LlamaForSequenceClassification

import delta_analysis as da
from delta_analysis.evaluation import Classification, Labelled, Margins, OutputDrift, TextPerplexity
from delta_analysis.prediction.foresight import tolerated_drop_rate
from delta_analysis.prediction.margins import Curve, Scale, Weights, crossing_down, expand, mask, noise
from delta_analysis.reports.parameter_checks import choose_evaluation
from delta_analysis.sweeps import MEAN, PERPLEXITY, Floor, inverse_logit, logit
from delta_analysis.zoo.tokenizer import ALPHABET, character_tokenizer

DIM, ITEMS = 40, 60


class Same:
    """The stored tensor is the parameter."""

    stored = ("weight",)

    def to_model(self, tensors: Mapping[str, torch.Tensor], /) -> dict[str, torch.Tensor]:
        return dict(tensors)


class Linear(torch.nn.Module):
    """Margins that are linear in the weights, and a quadratic part of some strength."""

    device = torch.device("cpu")

    def __init__(self, curvature: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(DIM, generator=generator))
        self.inputs = torch.randn(ITEMS, DIM, generator=generator)
        self.curvature = curvature

    def margins(self) -> np.ndarray:
        moved = self.weight.detach() - self.start
        found = self.first + self.inputs @ moved - self.curvature * moved.square().sum()
        return found.numpy()[:, None]

    @property
    def start(self) -> torch.Tensor:
        return torch.randn(DIM, generator=torch.Generator().manual_seed(0))

    @property
    def first(self) -> torch.Tensor:
        return 1 + torch.arange(ITEMS) / ITEMS


def judged(metric: str = "accuracy") -> Margins:
    def read(model: Linear) -> tuple[np.ndarray, np.ndarray]:
        margins = model.margins()
        return margins, (margins[:, 0] > 0).astype(float) if metric == "accuracy" else margins[:, 0]

    return Margins(metric, read, np.arange(ITEMS))  # type: ignore[arg-type]


def delta() -> torch.Tensor:
    return torch.linspace(0.01, 0.3, DIM)


def none_left() -> Floor:
    return Floor(np.zeros((1, ITEMS)))


@pytest.mark.parametrize("part", [1e-4, 0.1, 1.0])
def test_of_linear_margins_the_curve_is_the_formula_whatever_odds_are_tried(part: float) -> None:
    """An item keeps a margin g with spread s√r with probability Φ(g / (s√r)). 256 noises: spreads are known to 4%."""
    model = Linear()
    spreads = (model.inputs * delta()).norm(dim=1).numpy()
    gaps = model.first.numpy()

    def kept(x: float) -> float:
        return float(norm.cdf(gaps / spreads / math.exp(x / 2)).mean())

    expected = crossing_down(kept, 0.95, -5, 5)
    found = expand(Weights(model, [Same()], {"weight": delta()}), judged(), part * math.exp(expected), 256, 0)  # type: ignore[arg-type]
    curve = Curve(found, judged(), Scale(MEAN, np.ones(ITEMS), none_left()))
    assert curve.tolerated() == pytest.approx(expected, abs=0.1)
    for x in (expected - 1, expected + 1, expected + 3):
        assert curve.kept(x) == pytest.approx(kept(x), abs=0.02)


def test_the_shift_is_the_curvature_times_the_energy_of_the_noise() -> None:
    """E[-c |√r D ξ|²] = -c r |D|². 400 noises: a standard error of 5%·√2·(kurtosis of D) below 7%."""
    model, odds = Linear(curvature=0.5), 0.3
    found = expand(Weights(model, [Same()], {"weight": delta()}), judged(), odds, 400, 1)  # type: ignore[arg-type]
    expected = -0.5 * odds * float(delta().square().sum())
    np.testing.assert_allclose(found.shifts.mean(0), expected, rtol=0.07)
    # The responses have none of it: half a difference leaves what is odd.
    flat = expand(Weights(Linear(), [Same()], {"weight": delta()}), judged(), odds, 400, 1)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.responses, flat.responses, atol=1e-4)
    np.testing.assert_allclose(flat.shifts, 0, atol=1e-4)


def test_of_a_text_the_mean_loss_grows_with_the_odds() -> None:
    """Losses 1 + i/n - c|noise|²; with c < 0 they grow, and exp(-c r |D|²) = 0.95 decides."""
    model = Linear(curvature=-0.5)
    found = expand(Weights(model, [Same()], {"weight": delta()}), judged("perplexity"), 0.05, 400, 1)  # type: ignore[arg-type]
    losses = model.first.numpy().astype(float)
    curve = Curve(found, judged("perplexity"), Scale(PERPLEXITY, losses, Floor(np.full((1, ITEMS), np.inf))))
    expected = math.log(-math.log(0.95) / (0.5 * float(delta().square().sum())))
    assert curve.tolerated() == pytest.approx(expected, abs=0.15)


@given(seed=st.integers(0, 99), drop_rate=st.floats(0.01, 0.99))
@settings(max_examples=10)
def test_weights_come_back_and_masks_are_those_of_dare(seed: int, drop_rate: float) -> None:
    model = Linear()
    before = model.weight.detach().clone()
    weights = Weights(model, [Same()], {"weight": delta()})  # type: ignore[arg-type]
    change = mask(drop_rate, seed)
    expected = da.Dare(drop_rate)(delta(), name="weight", seed=seed) - delta()
    torch.testing.assert_close(change("weight", delta()), expected)
    weights.add(change)
    torch.testing.assert_close(model.weight.detach(), before + expected)
    weights.add(change, -1.0)
    torch.testing.assert_close(model.weight.detach(), before, atol=1e-5, rtol=0)
    one, other = (noise(each)("weight", delta()) for each in (seed, seed + 1))
    assert torch.equal(one, noise(seed)("weight", delta()))
    assert not torch.equal(one, other)
    assert not torch.equal(one, noise(seed)("bias", delta()))


WIDTH = 256


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> tuple[da.Delta, Classification]:
    """A classifier of single characters without layers: its margin is linear in the row of a character.

    Towards the right label half of a row's entries are 3 and half -1, so that the margin has mean n and its noise
    variance 5n·r, n entries. The norm changes no sign, and the base, all zeros, answers nothing.
    """
    config = LlamaConfig(
        vocab_size=97, hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=0, num_attention_heads=2,
        max_position_embeddings=16, num_labels=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    generator = torch.Generator().manual_seed(0)
    signs = torch.where(torch.rand(WIDTH, generator=generator) < 0.5, 1.0, -1.0)
    labels = torch.arange(97) % 2
    folder = tmp_path_factory.mktemp("one layer")
    towards = torch.ones(97, WIDTH)
    for row in towards:
        row[torch.randperm(WIDTH, generator=generator)[: WIDTH // 2]] = -1 / 3
    rows = 3 * towards * signs * (2 * labels - 1)[:, None]
    with torch.no_grad():
        model.score.weight.copy_(torch.stack([-signs, signs]))
        for name, embeddings in (("tuned", rows / 64), ("base", torch.zeros(97, WIDTH))):
            model.model.embed_tokens.weight.copy_(embeddings)
            model.save_pretrained(folder / name)
            character_tokenizer().save_pretrained(folder / name)
    examples = tuple(Labelled(text, int(labels[i])) for i, text in enumerate(ALPHABET) if i)
    return da.load_delta(base=folder / "base", finetuned=folder / "tuned"), Classification(examples)


def kept_by_masks(x: float) -> float:
    """Of K and L survivors among halves of n entries, 3K > L is right, and a half is chance."""
    counts = np.arange(WIDTH // 2 + 1)
    chances = binom.pmf(counts, WIDTH // 2, 1 - inverse_logit(x))
    right = (chances[:, None] * chances)[3 * counts[:, None] > counts].sum()
    return float(2 * right - 1)


def test_of_a_classifier_of_one_layer_the_odds_have_a_formula(one_layer: tuple[da.Delta, Classification]) -> None:
    """95% of what is above chance: of normal noise Φ(z) - 1/2 = 0.95/2, z = √(n / (5r)); so r = n / (5 · 1.96²) = 13.3.

    Masks do a little less harm, which survivors tell exactly.
    """
    found = tolerated_drop_rate(*one_layer)
    of_noise = math.log(WIDTH / 5 / norm.ppf(0.975) ** 2)
    of_masks = crossing_down(kept_by_masks, 0.95, 0, 6)
    assert of_noise < of_masks < of_noise + 0.2
    assert logit(found.expansion) == pytest.approx(of_noise, abs=0.4)
    assert logit(found.tolerated) == pytest.approx(of_masks, abs=0.4)
    assert logit(found.low) - 0.1 < of_masks < logit(found.high) + 0.1
    assert found.agreed
    assert found.reading == "measured"


def test_another_seed_is_another_answer_and_the_same_seed_the_same(one_layer: tuple[da.Delta, Classification]) -> None:
    one, again, other = (tolerated_drop_rate(*one_layer, seed=seed) for seed in (0, 0, 1))
    assert (one.tolerated, one.low, one.high) == (again.tolerated, again.low, again.high)
    assert one.tolerated != other.tolerated
    assert logit(one.tolerated) == pytest.approx(logit(other.tolerated), abs=0.5)


def test_a_scope_that_nothing_depends_on_is_a_bound(one_layer: tuple[da.Delta, Classification]) -> None:
    delta, evaluation = one_layer
    found = tolerated_drop_rate(delta, evaluation, scope="norms")
    assert (found.reading, found.tolerated, found.high) == ("at least", inverse_logit(10), inverse_logit(10))


def test_where_the_base_answers_as_well_there_is_none(one_layer: tuple[da.Delta, Classification]) -> None:
    delta, evaluation = one_layer
    wrong = Classification(tuple(Labelled(each.text, i % 2) for i, each in enumerate(evaluation.examples[::2])))
    found = tolerated_drop_rate(delta, wrong)
    assert found.reading == "none"
    assert math.isnan(found.tolerated)


TABLE = pd.read_csv(Path(__file__).parents[2] / "data" / "reference" / "foretold.csv")


def test_the_committed_table_holds_what_is_promised() -> None:
    """Of all whole deltas: an error of .20 at most, a median of .125, nine in ten within the interval."""
    logits = TABLE[["tolerated", "foretold_tolerated"]].map(logit)
    errors = (logits["foretold_tolerated"] - logits["tolerated"]).abs()
    assert len(TABLE) == 21
    assert np.sqrt((errors**2).mean()) <= 0.20
    assert errors.median() <= 0.125
    assert TABLE["tolerated"].between(TABLE["foretold_low"], TABLE["foretold_high"]).mean() >= 0.9


@pytest.mark.parametrize(
    ("base", "finetuned", "task"),
    [("tiny/base", "tiny/math", "math"), ("encoder/base", "encoder/code", "code-right")],
)
def test_it_is_near_what_was_measured(base: str, finetuned: str, task: str) -> None:
    """The interval and that of the measured rate, which has errors of its own, have some part in common."""
    found = tolerated_drop_rate(
        da.load_delta(base=f"zoo:{base}", finetuned=f"zoo:{finetuned}"), choose_evaluation(task, 500)
    )
    row = TABLE[(TABLE["base"] == f"zoo:{base}") & (TABLE["finetuned"] == f"zoo:{finetuned}")].iloc[0]
    assert found.low < row["high"]
    assert row["low"] < found.high
    assert abs(logit(found.tolerated) - logit(row["tolerated"])) < 0.7


def test_texts_are_judged_by_their_perplexity() -> None:
    """As the evaluation that a sweep would have, and within half a unit of what it measures."""
    delta = da.load_delta(base="zoo:tiny/base", finetuned="zoo:tiny/code-cpt")
    texts = [f"{question.prompt}{question.answer}" for question in choose_evaluation("code", 3).questions]  # type: ignore[attr-defined]
    found = tolerated_drop_rate(delta, texts)
    same = tolerated_drop_rate(delta, TextPerplexity("\n\n".join(texts)))
    assert found.tolerated == same.tolerated


@pytest.mark.parametrize(
    ("evaluation", "scope", "message"),
    [
        (None, "all", r"from weights alone nothing is foretold.*‖D‖²/‖W‖² is at most .*see layer_noise.*ExactMatch"),
        ([], "all", "from weights alone nothing is foretold"),
        (OutputDrift(("a",)), "all", "OutputDrift has no margins"),
        (["some text"], "nowhere", "scope 'nowhere' selects none"),
    ],
)
def test_what_nothing_is_foretold_from(evaluation: object, scope: str, message: str) -> None:
    delta = da.load_delta(base="zoo:tiny/base", finetuned="zoo:tiny/math")
    with pytest.raises(ValueError, match=message):
        tolerated_drop_rate(delta, evaluation, scope=scope)  # type: ignore[arg-type]


def test_a_classifier_has_no_perplexity(one_layer: tuple[da.Delta, Classification]) -> None:
    with pytest.raises(ValueError, match="writes no text, so it has no perplexity; give a Classification"):
        tolerated_drop_rate(one_layer[0], ["some text"])
