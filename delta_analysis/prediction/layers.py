"""How much noise dropping makes in each layer's output, beside signal and output, in closed form."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from delta_analysis.checkpoints import Source, parse_name
from delta_analysis.deltas import Delta, load_delta, placements
from delta_analysis.evaluation import Batch, check_texts, finetuned_model, parameters_of, token_batches
from delta_analysis.prediction.layer_inputs import Isotropic, LayerInputs, Matrix, energy, layer_inputs, positions
from delta_analysis.pruning import Dare, Law, Lawful, Number, Prune, Pruner, bind

MOST_TOKENS = 256


class _Energies(NamedTuple):
    """Sums over the outputs and positions of a layer; `error` and `kept` have one for each pruner."""

    positions: int
    signal: float
    noise: float
    output: float
    error: np.ndarray
    kept: np.ndarray


@dataclass(frozen=True)
class _Use:
    """A module that uses a tensor of the delta, as its parameter `parameter`."""

    tensor: str
    path: str
    parameter: str
    module: torch.nn.Module = field(repr=False)


def layer_noise(
    base: Source | None,
    finetuned: Source,
    inputs: Sequence[str] | None = None,
    *,
    pruners: Sequence[Pruner] = (Dare(0.5),),
    seed: int = 0,
    most_tokens: int = MOST_TOKENS,
    device: str = "cpu",
    dtype: str = "float32",
) -> pd.DataFrame:
    r"""The expected squared error that pruners make in the output of each layer, without drawing a mask.

    For a weight W with delta D and input x, C = E[xxᵀ], as means over the positions of the inputs:
    signal `S = E‖Dx‖² = tr(D C Dᵀ)`, noise base `N = Σ_ij D_ij² C_jj`, output `Y = E‖Wx‖²`. A pruner
    that drops entry ij with probability p_ij and multiplies survivors by f_ij makes the expected error
    `E‖B x‖² + Σ_ij p_ij (1-p_ij) f_ij² D_ij² C_jj`, with `B_ij = ((1-p_ij) f_ij - 1) D_ij`. So DARE's is
    `p/(1-p) · N`, that of drop only `p² S + p(1-p) N`, that of a factor 1/q `((1-p)/q - 1)² S +
    p(1-p)/q² · N`, MAGPRUNE's `Σ D_ij² C_jj p_ij/(1-p_ij)`; magnitude pruning is not random, and its is
    `E‖Ex‖²` with E the dropped part.

    One pass over the inputs: in each layer, while the model computes it, the delta's tensor is read and
    sums are formed. Beyond the fine-tuned model there are a layer's inputs, a few tensors of its size,
    and never a matrix of inputs by inputs.

    Parameters
    ----------
    base, finetuned : sources as `load_delta` takes them.
    inputs : texts, best what the fine-tune is for. None: a version without data from the norms alone,
        which reads the checkpoints and loads no model; inputs are then taken as isotropic (C = 1), so
        that energies are squared Frobenius norms, in other units than with inputs, and the alignment
        gain is unknown. Its shares of the output can be compared across models.
    pruners : random ones must know their `law`; others are applied. With `rescale="l1"` or `"l2"` the
        factor is taken as the ratio of mean norms.
    seed : breaks the ties of magnitude pruning.
    most_tokens : of each text, at least 1.
    device : where the model runs.
    dtype : of the loaded model: `float32`, or `auto` for the checkpoint's own, which needs less memory.

    Returns
    -------
    DataFrame, one row a use of a tensor and pruner, in the order of the model (without inputs: a
    tensor and pruner, in the delta's order): `tensor`; `layer, module, kind`, of its name (`linear`,
    `embedding`, `norm`, `bias`; a tied embedding has a second row as the output head, kind `linear`);
    `positions`, how many inputs; `signal, noise, output`; `gain`, the alignment gain S/N; `noise_share`,
    N/Y; `method, drop_rate`; `error`; `error_share`, of Y; `signal_kept`, the expected `E⟨D̂x, Dx⟩ / S` with
    the pruned delta D̂: 1 for an unbiased pruner whatever its noise. Weights of modules that are no linear
    layer, embedding, norm or bias, such as fused experts, or that are never called, are missing with inputs.

    Raises
    ------
    ValueError
        No pruner; a random one without a law; no text; a NaN or infinite entry of the delta.
    CheckpointError, NotHomologousError
        As `load_delta`; with inputs also a model that cannot be loaded.

    Source: this package, from the variance of DARE's sum.

    Examples
    --------
    >>> noise = layer_noise("zoo:tiny/base", "zoo:tiny/instruct", ["reverse abc\n"], pruners=[Dare(0.9)])
    >>> bool((noise["error"] / noise["noise"]).between(8.999, 9.001).all())
    True
    """
    delta = load_delta(base=base, finetuned=finetuned)
    how = {"pruners": pruners, "seed": seed, "most_tokens": most_tokens, "device": device, "dtype": dtype}
    return delta_noise(delta, inputs, **how)  # type: ignore[arg-type]


def delta_noise(
    delta: Delta,
    inputs: Sequence[str] | None = None,
    *,
    pruners: Sequence[Pruner] = (Dare(0.5),),
    scope: str | None = None,
    of_finetuned: bool = True,
    seed: int = 0,
    most_tokens: int = MOST_TOKENS,
    device: str = "cpu",
    dtype: str = "float32",
) -> pd.DataFrame:
    """The table of `layer_noise` for a delta, or for those of its tensors that an edit of a scope reaches.

    The delta may be edited: inputs, and the output that noise is compared with, are those of the fine-tune as it is
    if `of_finetuned`, else of the model that the edits make.
    """
    if not isinstance(pruners, Sequence) or not pruners or not all(callable(each) for each in pruners):
        raise ValueError(f"pruners must be a list of at least one, such as [Dare(0.9)]; not {pruners!r}")
    if isinstance(inputs, str):
        raise ValueError("inputs must be a list of texts, and this is a single one; give [text]")
    part = delta if scope is None else delta.select(scope)
    ready = ReadyPruners.of(part, pruners, seed)
    if inputs is None:
        found = [(_Use(name, "", "", torch.nn.Module()), _without_inputs(part, name, ready)) for name in part]
    else:
        check_texts(tuple(inputs), most_tokens)
        model, tokenizer = finetuned_model(replace(delta, edits=()) if of_finetuned else delta, device, dtype)
        batches = token_batches(tuple(inputs), model, tokenizer, most_tokens=most_tokens)
        found = _over_batches(part, model, batches, ready)
    return pd.DataFrame([row for use, energies in found for row in _rows(use, part, energies, pruners)])


def _measured(
    inputs: LayerInputs, pruners: ReadyPruners, name: str, tensor: torch.Tensor, output: float, count: int
) -> _Energies:
    """All energies of a layer at some inputs."""
    if not math.isfinite(energy(tensor)) and (bad := int(torch.count_nonzero(~torch.isfinite(tensor)))):
        raise ValueError(f"tensor {name!r} of the delta has {bad} NaN or infinite entries of {tensor.numel()}")
    noise, signal = inputs.noise_base(tensor), inputs.responses(tensor)
    error, kept = np.array(list(pruners.errors(inputs, name, tensor, noise, signal))).T
    return _Energies(count, energy(signal), noise, output, error, kept)


def _without_inputs(delta: Delta, name: str, pruners: ReadyPruners) -> _Energies:
    tensor, base = delta.read(name)
    weight = tensor if base is None else base + tensor
    found = _measured(Isotropic(), pruners, name, tensor, energy(weight), 1)
    return found._replace(signal=math.nan)


def _over_batches(
    delta: Delta, model: PreTrainedModel, batches: Iterator[Batch], pruners: ReadyPruners
) -> list[tuple[_Use, _Energies]]:
    """Energies of each use of a tensor of the delta, summed over the batches."""
    uses = list(_uses(model, delta))
    totals: dict[_Use, _Energies] = {}
    for batch in batches:
        with _watched(uses, partial(_add, totals, delta, pruners, batch)), torch.inference_mode():
            model(**batch.inputs(model))
    seen = {use.tensor for use in totals}
    if missing := [name for name in delta if name not in seen]:
        warnings.warn(
            f"{delta.finetuned.source}: {len(missing)} of {len(delta)} tensors are not in the table, such as "
            f"{missing[0]!r}: they belong to modules that are no linear layer, embedding, norm or bias, such as fused "
            "experts, or that these inputs do not reach",
            stacklevel=4,
        )
    return [(use, totals[use]) for use in uses if use in totals]


def _uses(model: PreTrainedModel, delta: Delta) -> Iterator[_Use]:
    """Which module uses which tensor of the delta: a tied one has two uses."""
    parameters = parameters_of(model)
    named = {
        id(parameters[parameter]): placement.stored[0]
        for placement in placements(delta)
        for parameter in placement.shapes
        if not placement.converts
    }
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        matrix = isinstance(module, torch.nn.Linear | Conv1D | torch.nn.Embedding)
        norm = own.keys() <= {"weight", "bias"} and all(each.dim() == 1 for each in own.values())
        if matrix or (norm and not any(module.children())):
            for parameter, weight in own.items():
                if id(weight) in named:
                    yield _Use(named[id(weight)], path, parameter, module)


@contextmanager
def _watched(uses: Sequence[_Use], add: Any) -> Iterator[None]:
    """While it lasts, every call of a module that uses the delta is handed on."""
    handles = [use.module.register_forward_hook(partial(add, use)) for use in uses]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(
    totals: dict[_Use, _Energies],
    delta: Delta,
    pruners: ReadyPruners,
    batch: Batch,
    use: _Use,
    module: torch.nn.Module,
    arguments: tuple[Any, ...],
    output: torch.Tensor,
) -> None:
    """Add what a use makes of one call's inputs."""
    made = positions(output, batch)
    inputs = layer_inputs(module, use.parameter, arguments, made, batch)
    if isinstance(inputs, Matrix) and isinstance(module.bias, torch.Tensor):
        made = made - module.bias
    tensor = delta[use.tensor].to(made.device)
    found = _measured(inputs, pruners, use.tensor, tensor, energy(made), len(made))
    before = totals.get(use)
    totals[use] = found if before is None else _Energies(*map(operator.add, before, found))


def _rows(use: _Use, delta: Delta, energies: _Energies, pruners: Sequence[Pruner]) -> Iterator[dict[str, object]]:
    """One row for each pruner, of means over positions."""
    match = delta.compared[use.tensor]
    assert match.finetuned is not None
    layer, module, kind = parse_name(use.tensor, len(match.finetuned.shape))
    if isinstance(use.module, torch.nn.Linear) and kind == "embedding":
        layer, module, kind = parse_name(f"{use.path}.weight", 2)
    count = energies.positions
    signal, noise, output = (each / count for each in energies[1:4])
    for pruner, error, kept in zip(pruners, energies.error, energies.kept, strict=True):
        yield {
            "tensor": use.tensor,
            "layer": layer,
            "module": module,
            "kind": kind,
            "positions": count,
            "signal": signal,
            "noise": noise,
            "output": output,
            "gain": signal / noise if noise else math.nan,
            "noise_share": noise / output if output else math.nan,
            "method": pruner.method,
            "drop_rate": float(pruner.drop_rate),
            "error": error / count,
            "error_share": error / count / output if output else math.nan,
            "signal_kept": kept / count / signal if signal else math.nan,
        }


@dataclass(frozen=True)
class ReadyPruners:
    """Pruners, and how each acts on the tensors of one delta."""

    pruners: tuple[Pruner, ...]
    ready: tuple[Prune, ...]
    seed: int

    @classmethod
    def of(cls, delta: Delta, pruners: Sequence[Pruner], seed: int) -> ReadyPruners:
        for pruner in pruners:
            if pruner.random and not isinstance(pruner, Lawful):
                raise ValueError(
                    f"pruners: {pruner} is random and has no method law(tensor, name=…), so no closed form"
                )
        return cls(tuple(pruners), tuple(bind(each, delta, seed) for each in pruners), seed)

    def errors(
        self, inputs: LayerInputs, name: str, tensor: torch.Tensor, noise: float, signal: torch.Tensor
    ) -> Iterator[tuple[float, float]]:
        """Of each pruner the expected squared error of the responses, and their product with the signal."""
        for pruner, prune in zip(self.pruners, self.ready, strict=True):
            if pruner.random and isinstance(prune, Lawful):
                yield expected_error(inputs, tensor, prune.law(tensor, name=name), noise, signal)
            else:
                shift = inputs.responses(prune(tensor, name=name, seed=self.seed) - tensor)
                yield energy(shift), _product(signal + shift, signal)


def expected_error(
    inputs: LayerInputs, delta: torch.Tensor, law: Law, noise: float, signal: torch.Tensor
) -> tuple[float, float]:
    """Under a law `‖B x‖² + Σ v_ij D_ij² x_j²` and `⟨(D + B) x, D x⟩`, summed over positions.

    B is the delta D times the law's bias, v the law's variance, `noise` is `Σ D_ij² x_j²`, `signal` D x.
    """
    variance = law.variance
    random = variance * noise if isinstance(variance, float) else inputs.noise_base(_scaled(delta, variance**0.5))
    # A mean that is off by rounding alone takes no further product.
    if not (torch.as_tensor(law.bias).abs() > 1e-12).any():
        return random, energy(signal)
    shift = inputs.responses(_scaled(delta, law.bias))
    return energy(shift) + random, _product(signal + shift, signal)


def _product(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.linalg.vecdot(one, other).sum(dtype=torch.float64))


def _scaled(delta: torch.Tensor, by: Number) -> torch.Tensor:
    return delta * (by if isinstance(by, float) else by.to(delta))
