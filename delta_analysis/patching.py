"""Edit a model's weights in place, and restore them bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


@contextmanager
def patched(
    model: PreTrainedModel, weights: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
) -> Iterator[PreTrainedModel]:
    """The model with some of its weights replaced, restored bit for bit afterwards.

    Parameters
    ----------
    model : any model whose parameters bear the names in `weights`.
    weights : name -> new weight, or pairs of both, read one at a time.

    Raises
    ------
    ValueError
        A name that the model lacks, a shape that differs, or a weight that is NaN or infinite; the
        model is left as it was.
    """
    parameters = parameters_of(model)
    saved: dict[str, torch.Tensor] = {}
    try:
        with torch.no_grad():
            for name, weight in weights.items() if isinstance(weights, Mapping) else weights:
                parameter = matching(parameters, name, weight)
                saved[name] = parameter.clone()
                parameter.copy_(weight)
        yield model
    finally:
        with torch.no_grad():
            # In reverse, since a tied weight may have been saved twice, the second time already patched.
            for name, weight in reversed(saved.items()):
                parameters[name].copy_(weight)


def parameters_of(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Name -> parameter; tied ones appear under each of their names and share one storage."""
    return dict(model.named_parameters(remove_duplicate=False))


def matching(parameters: dict[str, torch.nn.Parameter], name: str, weight: torch.Tensor) -> torch.nn.Parameter:
    """The parameter of that name, if the weight fits it and is finite."""
    if name not in parameters:
        raise ValueError(f"tensor {name!r} has no place in the model; its parameters begin with {list(parameters)[:3]}")
    parameter = parameters[name]
    if parameter.shape != weight.shape:
        raise ValueError(f"tensor {name!r} has shape {tuple(weight.shape)}, the model's {tuple(parameter.shape)}")
    if bad := int((~torch.isfinite(weight)).sum()):
        raise ValueError(
            f"tensor {name!r} has {bad} NaN or infinite entries of {weight.numel()}; a model with them cannot be judged"
        )
    return parameter
