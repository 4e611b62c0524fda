"""Items as margins: right where generation says so, also at the end of an answer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from delta_analysis.checkpoints.checkpoint import open_checkpoint
from delta_analysis.evaluation import (
    ExactMatch,
    OutputDrift,
    Question,
    TextPerplexity,
    first_items,
    load_model,
    load_tokenizer,
    margins_of,
    parameters_of,
)
from delta_analysis.reports.parameter_checks import choose_evaluation


def noisy(source: str, strength: float) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    weights = parameters_of(load_model(open_checkpoint(source)))
    return {name: w.detach() * (1 + strength * torch.randn(w.shape)) for name, w in weights.items()}


@pytest.mark.parametrize(
    ("source", "task", "strength"),
    [("zoo:tiny/instruct", "instruct", 0.15), ("zoo:encoder/strings", "strings-right", 0.2)],
)
def test_outcomes_are_those_of_the_evaluation_whatever_the_weights(source: str, task: str, strength: float) -> None:
    checkpoint = open_checkpoint(source)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    evaluation = choose_evaluation(task, 60)
    judged = margins_of(evaluation, model, tokenizer)
    for weights in ({}, noisy(source, strength)):
        changed = copy.deepcopy(model)
        changed.load_state_dict(weights, strict=False)
        margins, outcomes = judged.read(changed)
        expected = evaluation(changed, tokenizer)["accuracy"]
        assert 0 < outcomes.sum() == expected.sum()
        # The nearest rivals at first are not always those that win in the end.
        assert (judged.outcomes(margins) >= outcomes).all()
        assert np.mean(judged.outcomes(margins) == outcomes) > 0.9
    assert expected.sum() < 60


def test_an_answer_that_goes_on_is_wrong() -> None:
    """The sums of two digits and more, cut by one, which the model would have to end there."""
    checkpoint = open_checkpoint("zoo:small/math")
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    whole = choose_evaluation("math", 60)
    assert isinstance(whole, ExactMatch)
    long = [each for each in whole.questions if len(each.answer.strip()) > 1]
    cut = ExactMatch(tuple(Question(each.prompt, each.answer.strip()[:-1]) for each in long))
    assert margins_of(ExactMatch(tuple(long)), model, tokenizer).read(model)[1].mean() > 0.9
    assert margins_of(cut, model, tokenizer).read(model)[1].sum() == cut(model, tokenizer)["accuracy"].sum() == 0


def test_of_a_text_the_losses_stand_in() -> None:
    checkpoint = open_checkpoint("zoo:tiny/base")
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    evaluation = TextPerplexity("the quick brown fox jumps over the lazy dog. " * 5)
    judged = margins_of(evaluation, model, tokenizer)
    margins, outcomes = judged.read(model)
    np.testing.assert_array_equal(outcomes, evaluation(model, tokenizer)["perplexity"])
    np.testing.assert_array_equal(judged.outcomes(np.stack([margins, margins + 1])), np.stack([outcomes, outcomes + 1]))


@pytest.mark.parametrize("task", ["math", "code-right"])
def test_the_first_items_are_the_first(task: str) -> None:
    assert first_items(choose_evaluation(task, 30), 7) == choose_evaluation(task, 7)
    assert first_items(choose_evaluation(task, 3), 7) == choose_evaluation(task, 3)


def test_an_evaluation_without_margins_is_refused() -> None:
    checkpoint = open_checkpoint("zoo:tiny/base")
    with pytest.raises(ValueError, match="OutputDrift has no margins; expected ExactMatch, Classification"):
        margins_of(OutputDrift(("a",)), load_model(checkpoint), load_tokenizer(checkpoint))
