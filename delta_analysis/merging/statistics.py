"""What the data of a fine-tuned model says of its weights: Fisher information, or moments of their inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from delta_analysis._errors import one_of
from delta_analysis.checkpoints import bare_name
from delta_analysis.deltas import CLASSIFIER, Delta
from delta_analysis.evaluation import finetuned_model, parameters_of

STATISTICS = ("fisher", "moments")
UNANSWERED = -100
"""The label of a position that does not count."""


@dataclass(frozen=True, eq=False)
class Statistics(Mapping[str, torch.Tensor]):
    """Means over data, of sums and of how many sequences or positions were summed."""

    sums: Mapping[str, torch.Tensor] = field(repr=False)
    counts: Mapping[str, int] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.sums.values())

    def __getitem__(self, name: str) -> torch.Tensor:
        count = self.counts[name]
        return self.sums[name] / count

    def __iter__(self) -> Iterator[str]:
        return iter(self.counts)

    def __len__(self) -> int:
        return len(self.counts)


def gather(
    statistic: Literal["fisher", "moments"],
    delta: Delta,
    batches: Iterable[Mapping[str, Any]],
    *,
    device: str = "cpu",
    seed: int = 0,
) -> Statistics:
    r"""A statistic of a delta's fine-tuned model on data of its own, for each tensor that the data says something of.

    `"fisher"` is the diagonal of the Fisher information, `E_x E_{y~p(·|x)} (∇ log p(y|x))²`, a mean over
    sequences x with labels y drawn from the model: for a language model `log p` is summed over the
    positions of a sequence, each label drawn given the text before it. `"moments"` is `E[x xᵀ]` over the
    inputs x of a linear layer; a head tied to the embeddings has none.

    Sequences are read one at a time and without padding, so that batches do not matter. Memory is that of
    the model, of one sequence's pass and of the result: 4 bytes a parameter, or for moments `8 · inputs²` a
    linear layer.

    Parameters
    ----------
    delta : its fine-tuned model is a causal language model or a classifier; its edits are left out.
    batches : arguments of the model's forward pass: `input_ids` (sequences, positions); with padding
        `attention_mask`, 0 there; others are passed on. Positions (of a classifier: sequences) with -100 in
        `labels` do not count for the Fisher information; otherwise labels are not looked at.
    device : where the model runs.
    seed : of the labels that are drawn.

    Returns
    -------
    A mapping of the delta's names. Fisher information: float32, of the tensor's shape. Moments: float64,
    with the two axes of the weight, 1 long for the outputs, then the inputs again: `(1, inputs, inputs)` for
    a weight (outputs, inputs), `(inputs, 1, inputs)` for one that is stored the other way round.

    Raises
    ------
    ValueError
        An unknown statistic; no batch, or one that is not as above; nothing that counts; a model without a
        distribution over labels, or whose activations or gradients are NaN or infinite.
    CheckpointError
        A model that cannot be loaded.

    Source: Matena and Raffel, arXiv 2111.09832; Jin et al., RegMean, arXiv 2212.09849.

    Examples
    --------
    >>> from delta_analysis.deltas.delta import load_delta
    >>> delta = load_delta(base="zoo:tiny/base", finetuned="zoo:tiny/instruct")
    >>> moments = gather("moments", delta, [{"input_ids": torch.tensor([[5, 6, 7]])}])
    >>> moments["model.layers.0.mlp.up_proj.weight"].shape
    torch.Size([1, 64, 64])
    """
    if statistic not in STATISTICS:
        raise ValueError(one_of("statistic", statistic, STATISTICS))
    sequences = _sequences(batches, device)
    first = next(sequences, None)
    if first is None:
        raise ValueError("the batches hold no sequence; expected at least one (a generator can be read only once)")
    model, _ = finetuned_model(replace(delta, edits=()), device)
    all_of_them = chain([first], sequences)
    if statistic == "moments":
        return _moments(model, delta, all_of_them)
    return _fisher(model, delta, all_of_them, seed)


def _moments(model: PreTrainedModel, delta: Delta, sequences: Iterable[dict[str, Any]]) -> Statistics:
    """Second moments of the inputs of each linear layer."""
    modules, named = list(model.modules()), _named(model, delta)
    embeddings = {each.weight for each in modules if isinstance(each, torch.nn.Embedding)}
    layers = [
        (named[each.weight], each)
        for each in modules
        if isinstance(each, torch.nn.Linear | Conv1D) and each.weight in named and each.weight not in embeddings
    ]
    if not layers:
        raise ValueError(f"{delta.finetuned.source}: none of the {len(delta)} tensors of the delta is a linear layer's")
    sums = {name: torch.zeros(_shape_of_moments(layer), dtype=torch.float64) for name, layer in layers}
    counts = dict.fromkeys(sums, 0)

    def add(name: str, layer: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        x = arguments[0].flatten(0, -2).double()
        moments = x.T @ x
        _check_finite(moments.diagonal(), f"{delta.finetuned.source}: the inputs of tensor {name!r}")
        sums[name].add_(moments.cpu().view_as(sums[name]))
        counts[name] += len(x)

    for name, layer in layers:
        layer.register_forward_pre_hook(partial(add, name))
    with torch.no_grad():
        for sequence in sequences:
            sequence.pop("labels", None)
            _logits(model, sequence)
    return _means(sums, counts, delta)


def _shape_of_moments(layer: torch.nn.Linear | Conv1D) -> tuple[int, int, int]:
    if isinstance(layer, Conv1D):
        return layer.nx, 1, layer.nx
    return 1, layer.in_features, layer.in_features


def _fisher(model: PreTrainedModel, delta: Delta, sequences: Iterable[dict[str, Any]], seed: int) -> Statistics:
    """Squared gradients of one sequence at a time, each let go as soon as it is there."""
    config, source = model.config, delta.finetuned.source
    if type(model).__name__.endswith(CLASSIFIER) and (
        config.num_labels == 1 or config.problem_type == "multi_label_classification"
    ):
        raise ValueError(f"{source}: the model does not choose one label of several; it has no Fisher information here")
    named = _named(model, delta)
    # Of a matrix over the vocabulary the delta may have the first rows only.
    sums = {name: torch.zeros(delta.compared[name].shape) for name in named.values()}
    reached = set()

    def add(name: str, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        squares = parameter.grad.square()
        parameter.grad = None
        _check_finite(squares, f"{source}: the squared gradient of tensor {name!r}")
        sums[name].add_(squares[tuple(map(slice, sums[name].shape))].cpu())
        reached.add(name)

    for parameter in model.parameters():
        parameter.requires_grad_(parameter in named)
        if parameter in named:
            parameter.register_post_accumulate_grad_hook(partial(add, named[parameter]))
    generator = torch.Generator().manual_seed(seed)
    count = 0
    with torch.enable_grad():
        for sequence in sequences:
            labels = sequence.pop("labels", None)
            logits = _answered(_logits(model, sequence), labels, sequence["input_ids"])
            if logits.numel():
                _check_finite(logits, f"{source}: the logits")
                drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
                torch.nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum").backward()
                count += 1
    return _means(sums, {name: count for name in sums if name in reached}, delta)


def _named(model: PreTrainedModel, delta: Delta) -> dict[torch.Tensor, str]:
    """Parameter -> the delta's name of it."""
    names = {bare_name(name): name for name in delta}
    parameters: Mapping[str, torch.Tensor] = parameters_of(model)
    found = {weight: names[bare] for name, weight in parameters.items() if (bare := bare_name(name)) in names}
    if not found:
        raise ValueError(
            f"{delta.finetuned.source}: no tensor of the delta is a parameter of its model; "
            f"they begin with {list(delta)[:3]}, the model's with {list(parameters)[:3]}"
        )
    return found


def _means(sums: Mapping[str, torch.Tensor], counts: Mapping[str, int], delta: Delta) -> Statistics:
    found = {name: count for name, count in counts.items() if count}
    if not found:
        raise ValueError(
            f"{delta.finetuned.source}: the data says nothing of any tensor of the delta; expected sequences of "
            f"two tokens or more, with labels that are not all {UNANSWERED}"
        )
    return Statistics(sums, found)


def _logits(model: PreTrainedModel, sequence: Mapping[str, Any]) -> torch.Tensor:
    """What the model makes of one sequence."""
    ids, rows = sequence["input_ids"], len(model.get_input_embeddings().get_parameter("weight"))
    if int(ids.min()) < 0 or int(ids.max()) >= rows:
        raise ValueError(
            f"input_ids go from {int(ids.min())} to {int(ids.max())}, and the model has {rows} tokens; "
            "make the batches with its own tokenizer"
        )
    cache = {"use_cache": False} if model.can_generate() else {}
    logits: torch.Tensor = model(**{**cache, **sequence}).logits
    return logits


def _answered(logits: torch.Tensor, labels: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
    """The rows of logits whose label counts; those at a position foretell the label at the next."""
    by_position = logits.dim() == 3
    rows = logits[0, :-1] if by_position else logits
    if labels is None:
        return rows
    expected = tuple(ids.shape) if by_position else (1,)
    if labels.shape != expected:
        raise ValueError(
            f"the labels of a sequence have shape {tuple(labels.shape)}; expected {expected}, one a "
            + ("position" if by_position else "sequence")
        )
    return rows[(labels[0, 1:] if by_position else labels) != UNANSWERED]


def check_inputs(batch: object, position: int) -> None:
    """Raise unless this is what a model's forward pass takes: token ids, and a mask of their shape if there is one."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(batch, Mapping) or not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        given = f"has {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else f"is {batch!r:.60}"
        raise ValueError(
            f"batch {position} {given}; expected arguments of the model's forward pass, "
            "{'input_ids': a tensor (sequences, positions), …}"
        )
    mask = batch.get("attention_mask", torch.ones_like(ids))
    if mask.shape != ids.shape:
        raise ValueError(
            f"batch {position} has an attention_mask of shape {tuple(mask.shape)}; expected {tuple(ids.shape)}, "
            "that of input_ids, with 1 for a token and 0 for padding"
        )


def _sequences(batches: Iterable[Mapping[str, Any]], device: str) -> Iterator[dict[str, Any]]:
    """One sequence at a time, as arguments of a forward pass, with the padding cut away."""
    for i, batch in enumerate(batches):
        check_inputs(batch, i)
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        for row in range(len(ids)):
            if mask[row].any():
                yield {name: _row(value, row, mask, device) for name, value in batch.items()}


def _row(value: Any, row: int, mask: torch.Tensor, device: str) -> Any:
    """What belongs to one sequence of an argument that has one entry a sequence, or one a position."""
    if not isinstance(value, torch.Tensor) or value.shape[:1] != mask.shape[:1]:
        return value
    part = value[row : row + 1]
    return (part[:, mask[row]] if value.shape[:2] == mask.shape else part).to(device)


def _check_finite(values: torch.Tensor, what: str) -> None:
    if not torch.isfinite(values.detach().max()):
        raise ValueError(f"{what} are NaN or infinite, or too large; the model says nothing with this data")
