"""Weights and their inputs: what entries make of them, against the modules themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from delta_analysis.evaluation.tokens import Batch
from delta_analysis.prediction.layer_inputs import Isotropic, LayerInputs, Matrix, layer_inputs, positions

LENGTHS = [2, 5, 3]
MASK = torch.tensor([[1] * length + [0] * (5 - length) for length in LENGTHS])
BATCH = Batch([0, 1, 2], LENGTHS, torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(3)), MASK)
WIDE, NARROW = 7, 6


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=i))
    return module


HIDDEN = (normal(3, 5, WIDE, seed=5),)
MODULES: dict[str, tuple[Callable[[], torch.nn.Module], str, tuple[Any, ...]]] = {
    "linear": (lambda: torch.nn.Linear(WIDE, NARROW), "weight", HIDDEN),
    "linear without bias": (lambda: torch.nn.Linear(WIDE, NARROW, bias=False), "weight", HIDDEN),
    "linear, texts in a row": (lambda: torch.nn.Linear(WIDE, NARROW), "weight", (HIDDEN[0].flatten(0, 1),)),
    "linear bias": (lambda: torch.nn.Linear(WIDE, NARROW), "bias", HIDDEN),
    "conv1d": (lambda: Conv1D(NARROW, WIDE), "weight", HIDDEN),
    "conv1d bias": (lambda: Conv1D(NARROW, WIDE), "bias", HIDDEN),
    "layer norm": (lambda: torch.nn.LayerNorm(WIDE), "weight", HIDDEN),
    "layer norm bias": (lambda: torch.nn.LayerNorm(WIDE), "bias", HIDDEN),
    "llama norm": (lambda: LlamaRMSNorm(WIDE), "weight", HIDDEN),
    "gemma norm": (lambda: Gemma3RMSNorm(WIDE), "weight", HIDDEN),
    "norm of heads": (lambda: LlamaRMSNorm(4), "weight", (normal(3, 5, 2, 4),)),
    "embedding": (lambda: torch.nn.Embedding(11, NARROW), "weight", (BATCH.ids,)),
    "scaled embedding": (lambda: Gemma3TextScaledWordEmbedding(11, NARROW, 0, 2.5), "weight", (BATCH.ids,)),
    "embedding of positions": (lambda: torch.nn.Embedding(8, NARROW), "weight", (torch.arange(5)[None],)),
}
SLACK = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("kind", MODULES)
def test_responses_are_the_difference_that_entries_make(kind: str, dtype: torch.dtype) -> None:
    make, parameter, arguments = MODULES[kind]
    module = randomised(make()).to(dtype)
    weight = module.get_parameter(parameter)
    stored = tuple(each.to(dtype) if each.is_floating_point() else each for each in arguments)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    made = positions(module(*stored), BATCH)
    found = layer_inputs(module, parameter, stored, made, BATCH)
    entries = normal(*weight.shape, seed=9)
    responses, noise = found.responses(entries), found.noise_base(entries)

    # The module is as before.
    assert module.get_parameter(parameter) is weight
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())

    exact = module.double()
    inputs = tuple(each.double() if each.is_floating_point() else each for each in stored)
    with torch.no_grad():
        start = exact(*inputs)
        exact.get_parameter(parameter).add_(entries)
        change = positions_of_tokens((exact(*inputs) - start).double())
    assert responses.dtype == torch.float32
    assert len(responses) == len(made) == len(change)
    torch.testing.assert_close(responses.double(), change, atol=SLACK[dtype], rtol=SLACK[dtype])
    if kind not in ("linear", "linear without bias", "linear, texts in a row", "conv1d"):
        alone = responses.double().square()
    else:
        alone = (inputs[0].reshape(-1, WIDE)[MASK.flatten().bool()][:, None] * _by_output(entries, kind)).square()
    assert noise == pytest.approx(float(alone.sum()), rel=1e-5)


def _by_output(entries: torch.Tensor, kind: str) -> torch.Tensor:
    return entries.T if kind == "conv1d" else entries


def positions_of_tokens(values: torch.Tensor) -> torch.Tensor:
    """Text by text, without the helper that is under test."""
    if values.dim() == 2:
        values = values.reshape(3, 5, -1)
    texts = values if len(values) == 3 else [values[0]] * 3
    return torch.cat([text[:length].reshape(-1, values.shape[-1]) for text, length in zip(texts, LENGTHS, strict=True)])


@pytest.mark.parametrize("kind", ["linear without bias", "linear bias", "embedding", "embedding of positions"])
def test_entries_may_be_the_first_rows_only(kind: str) -> None:
    make, parameter, arguments = MODULES[kind]
    module = randomised(make())
    found = layer_inputs(module, parameter, arguments, positions(module(*arguments), BATCH), BATCH)
    entries = normal(*module.get_parameter(parameter).shape)[:4]
    padded = torch.zeros_like(module.get_parameter(parameter).detach())
    padded[:4] = entries
    whole = found.responses(padded)
    if "linear" in kind:
        assert not whole[:, 4:].any()
        whole = whole[:, :4]
    torch.testing.assert_close(found.responses(entries), whole)
    assert found.noise_base(entries) == pytest.approx(found.noise_base(padded), rel=1e-6)


def test_a_norm_of_two_inputs_is_called_with_both() -> None:
    class Gated(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(normal(WIDE))

        def forward(self, x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
            return self.weight * (x if gate is None else x * gate)

    gate = normal(3, 5, WIDE, seed=1)
    for arguments, factors in (((*HIDDEN, gate), HIDDEN[0] * gate), ((*HIDDEN, None), HIDDEN[0])):
        found = layer_inputs(Gated(), "weight", arguments, positions(HIDDEN[0], BATCH), BATCH)
        torch.testing.assert_close(found.responses(torch.ones(WIDE)), positions_of_tokens(factors))


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(-100, 100))
def test_responses_are_linear_and_the_noise_is_quadratic(seed: int, k: float) -> None:
    x, one, other = normal(8, WIDE, seed=seed), normal(5, WIDE, seed=seed + 1), normal(5, WIDE, seed=seed + 2)
    inputs: list[LayerInputs] = [Matrix(x), Isotropic()]
    for found in inputs:
        together = found.responses(one) + k * found.responses(other)
        torch.testing.assert_close(found.responses(one + k * other), together, rtol=1e-4, atol=1e-3)
        assert found.noise_base(k * one) == pytest.approx(k**2 * found.noise_base(one), rel=1e-5, abs=1e-30)
    # A matrix the other way round is the same matrix.
    turned = Matrix(x, transposed=True)
    torch.testing.assert_close(turned.responses(one.T), Matrix(x).responses(one))
    assert turned.noise_base(one.T) == pytest.approx(Matrix(x).noise_base(one))


@pytest.mark.parametrize(
    "shape", [(3, 5, 4), (15, 4), (1, 5, 4), (3, 5, 2, 4)], ids=["texts", "in a row", "once for all", "heads"]
)
def test_padding_is_left_out_where_it_can_be_told(shape: tuple[int, ...]) -> None:
    values = normal(*shape)
    assert torch.equal(positions(values, BATCH), positions_of_tokens(values))


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 5, 4), (7, 4)], ids=["a text each", "heads first", "some"])
def test_other_values_are_taken_whole(shape: tuple[int, ...]) -> None:
    values = normal(*shape)
    assert torch.equal(positions(values, BATCH), values.reshape(-1, 4))
