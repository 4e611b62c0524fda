"""What pruning does to the parameters, to the output of each layer, and to the output of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch

from delta_analysis.evaluate import patched
from delta_analysis.intervals import RESAMPLES, Interval, percentile_interval, resampled_means, two_way_resamples
from delta_analysis.pruning import Pruner, prepared
from delta_analysis.sweep import EditableModel, Pair, for_each_pair, useful_seeds

N_TEXTS = 32
LONGEST_TEXT = 256
"""Tokens that are read of each text."""
N_POSITIONS = 256
"""About how many positions, spread over all texts, have their layer inputs held."""


@dataclass(frozen=True, eq=False)
class Probe:
    """What the untouched model does on some texts.

    `inputs[name]` holds the inputs of a linear layer, (positions, in); `log_probabilities[t]` the
    model's predictions on text t, (tokens, vocabulary).
    """

    texts: list[torch.Tensor]
    inputs: dict[str, torch.Tensor]
    log_probabilities: list[torch.Tensor]


def pruning_damage(
    pairs: Sequence[Pair], pruners: Sequence[Pruner], seeds: Sequence[int], *, device: str = "cpu", workers: int = 1
) -> pd.DataFrame:
    """Errors of a pruned delta in three places, from the entries to what the model says.

    With D a layer's delta, D̂ the pruned one and x the layer's input in the untouched fine-tune:
    the error of the parameters is `Σ(D̂-D)² / ΣD²`, that of a layer's output `Σ|D̂x-Dx|² / Σ|Dx|²`,
    the part of the signal that is kept `Σ⟨D̂x, Dx⟩ / Σ|Dx|²`; and the drift of the model's output is
    KL(untouched ‖ pruned) between its predictions of the next token, in nats, averaged over the
    tokens of a text, then over texts.

    Parameters
    ----------
    pairs : with evaluations that bring texts; the first 32 of each are read, up to 256 tokens each.
    pruners, seeds, device, workers : as in `sweep`.

    Returns
    -------
    DataFrame, one row a pair, pruner and seed: `pair, method, drop_rate, seed`; `parameter_error`
    over all entries; `layer_error` and `signal_kept`, medians over the linear layers; `drift`;
    `drifts`, one for each text.
    """

    def work(pair: Pair) -> list[dict[str, object]]:
        editable = EditableModel.load(pair, device)
        before = probe(editable)
        return [damage(editable, before, pruner, seed) for pruner in pruners for seed in useful_seeds(pruner, seeds)]

    return pd.DataFrame([row for rows in for_each_pair(work, pairs, workers) for row in rows])


def damage_summary(damage: pd.DataFrame) -> pd.DataFrame:
    """The rows of `pruning_damage` averaged over seeds.

    Returns
    -------
    DataFrame, one row a `pair, method, drop_rate`; `seeds`, how many; the means of
    `parameter_error, layer_error, signal_kept`; `drift` with a 95% interval `low, high` over seeds
    and texts.
    """
    rows = []
    for (pair, method, drop_rate), group in damage.groupby(["pair", "method", "drop_rate"], sort=False):
        means = {column: group[column].mean() for column in ("parameter_error", "layer_error", "signal_kept")}
        drifts = _drifts(group)
        samples = resampled_means(drifts, two_way_resamples(*drifts.shape))
        drift = percentile_interval(drifts.mean(), samples)
        row = {"pair": pair, "method": method, "drop_rate": drop_rate, "seeds": len(group), **means}
        rows.append({**row, "drift": drift.value, "low": drift.low, "high": drift.high})
    return pd.DataFrame(rows)


def rank_agreement(damage: pd.DataFrame, column: str) -> Interval:
    """Spearman's correlation over methods between a column and the drift, for one pair and drop rate.

    `column` is one of `pruning_damage`, or `signal_lost`, |1 - mean signal kept|; its 95% interval
    resamples seeds, on both sides alike, and texts. A method has all seeds or a single one.
    """
    groups = [group.sort_values("seed") for _, group in damage.groupby("method", sort=False)]
    drifts = [_drifts(group) for group in groups]
    source = "signal_kept" if column == "signal_lost" else column
    values = [group[source].to_numpy(dtype=np.float64) for group in groups]
    resamples = two_way_resamples(max(map(len, drifts)), drifts[0].shape[1])

    def ranks(means: list[np.ndarray]) -> np.ndarray:
        """Ranks of the methods in each sample, (samples, methods)."""
        return pd.DataFrame(np.stack(means, axis=1)).rank(axis=1).to_numpy()

    def of_column(means: list[np.ndarray]) -> np.ndarray:
        return ranks([np.abs(1 - each) for each in means] if column == "signal_lost" else means)

    sampled = of_column(
        [resampled_means(each[:, None], resamples._replace(items=np.ones((RESAMPLES, 1)))) for each in values]
    )
    drifted = ranks([resampled_means(each, resamples) for each in drifts])
    observed = np.corrcoef(
        of_column([each.mean(keepdims=True) for each in values])[0],
        ranks([each.mean(keepdims=True).ravel() for each in drifts])[0],
    )
    samples = [np.corrcoef(one, two)[0, 1] for one, two in zip(sampled, drifted, strict=True)]
    return percentile_interval(observed[0, 1], np.array(samples))


def _drifts(rows: pd.DataFrame) -> np.ndarray:
    """Drifts of one method, (seeds, texts)."""
    return np.array(rows.sort_values("seed")["drifts"].tolist(), dtype=np.float64)


def probe(editable: EditableModel) -> Probe:
    """Run the untouched model on the texts of the pair's evaluation."""
    texts = [
        torch.tensor(editable.tokenizer(text, add_special_tokens=False)["input_ids"][:LONGEST_TEXT])
        for text in editable.pair.evaluation.texts[:N_TEXTS]
    ]
    texts = [text for text in texts if len(text)]
    stride = max(sum(map(len, texts)) // N_POSITIONS, 1)
    inputs: dict[str, list[torch.Tensor]] = {}
    with _recorded(editable, inputs, stride):
        predictions = log_probabilities(editable, texts)
    if not inputs:
        raise ValueError(f"{editable.pair.name}: no linear layer is among the tensors of the delta; nothing to measure")
    return Probe(texts, {name: torch.cat(parts) for name, parts in inputs.items()}, predictions)


@contextmanager
def _recorded(editable: EditableModel, inputs: dict[str, list[torch.Tensor]], stride: int) -> Iterator[None]:
    """While it lasts, one in `stride` inputs of every linear layer that the delta has is appended, (tokens, in)."""

    def record(name: str, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        rows = arguments[0].detach().flatten(0, -2)[::stride]
        inputs.setdefault(name, []).append(rows.to("cpu", copy=True))

    linear = {
        f"{name}.weight": module
        for name, module in editable.model.named_modules()
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" in editable.delta
    }
    hooks = [module.register_forward_pre_hook(partial(record, name)) for name, module in linear.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def log_probabilities(editable: EditableModel, texts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The model's predictions after each token of each text, (tokens, vocabulary)."""
    with torch.inference_mode():
        return [
            editable.model(input_ids=text[None].to(editable.model.device), use_cache=False)
            .logits[0]
            .float()
            .log_softmax(-1)
            for text in texts
        ]


def damage(editable: EditableModel, before: Probe, pruner: Pruner, seed: int) -> dict[str, object]:
    """One row of `pruning_damage`."""
    prune = prepared(pruner, editable.delta, seed)
    errors, layers = [], []

    def edited() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in editable.delta.items():
            pruned = prune(tensor, name=name, seed=seed)
            errors.append(_energy(pruned - tensor))
            if name in before.inputs:
                layers.append(_layer_error(tensor, pruned, before.inputs[name]))
            yield name, editable.base[name] + pruned

    with patched(editable.model, edited()):
        after = log_probabilities(editable, before.texts)
    drifts = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(before.log_probabilities, after, strict=True)]
    return {
        "pair": editable.pair.name,
        "method": pruner.method,
        "drop_rate": float(pruner.drop_rate),
        "seed": seed,
        "parameter_error": sum(errors) / (sum(map(_energy, editable.delta.values())) or 1.0),
        "layer_error": float(np.median([error for error, _ in layers])),
        "signal_kept": float(np.median([kept for _, kept in layers])),
        "drift": float(np.mean(drifts)),
        "drifts": drifts,
    }


def _energy(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().sum())


def _layer_error(delta: torch.Tensor, pruned: torch.Tensor, inputs: torch.Tensor) -> tuple[float, float]:
    """Relative error of a layer's output, and the part of the signal that is kept."""
    signal, output = (inputs @ delta.T).double(), (inputs @ pruned.T).double()
    energy = _energy(signal) or 1.0
    return _energy(output - signal) / energy, float((output * signal).sum()) / energy
