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
from delta_analysis.intervals import Interval, percentile_interval, resampled_means, two_way_resamples
from delta_analysis.pruning import Pruner, prepared
from delta_analysis.sweep import EditableModel, Pair, for_each_pair, useful_seeds

N_TEXTS = 32
LONGEST_TEXT = 256
"""Tokens that are read of each text."""
N_POSITIONS = 256
"""Positions, spread over all texts, whose layer inputs are held."""


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
    the mean over tokens of KL(untouched ‖ pruned) between its predictions of the next token, in nats.

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

    `column` is one of `pruning_damage`, or `signal_lost`, |1 - signal kept|; its 95% interval
    resamples the seeds and texts of the drifts. A method has all seeds or a single one.
    """
    groups = [group for _, group in damage.groupby("method", sort=False)]
    values = damage.assign(signal_lost=(1 - damage["signal_kept"]).abs()).groupby("method", sort=False)[column].mean()
    drifts = [_drifts(group) for group in groups]
    resamples = two_way_resamples(max(map(len, drifts)), drifts[0].shape[1])
    samples = pd.DataFrame(np.stack([resampled_means(each, resamples) for each in drifts], axis=1)).rank(axis=1)
    ranks, observed = values.rank().to_numpy(), pd.Series([each.mean() for each in drifts]).rank().to_numpy()
    return percentile_interval(
        np.corrcoef(ranks, observed)[0, 1], np.array([np.corrcoef(ranks, row)[0, 1] for row in samples.to_numpy()])
    )


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
    inputs: dict[str, list[torch.Tensor]] = {}
    with _recorded(editable, inputs):
        predictions = log_probabilities(editable, texts)
    stacked = {name: torch.cat(parts) for name, parts in inputs.items()}
    total = sum(len(text) for text in texts)
    chosen = torch.linspace(0, total - 1, min(total, N_POSITIONS)).round().long()
    return Probe(texts, {name: values[chosen] for name, values in stacked.items()}, predictions)


@contextmanager
def _recorded(editable: EditableModel, inputs: dict[str, list[torch.Tensor]]) -> Iterator[None]:
    """While it lasts, the inputs of every linear layer that the delta has are appended, (tokens, in)."""

    def record(name: str, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        inputs.setdefault(name, []).append(arguments[0].detach().flatten(0, -2).cpu())

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
    pruned = {name: prune(tensor, name=name, seed=seed) for name, tensor in editable.delta.items()}
    with patched(editable.model, ((name, editable.base[name] + tensor) for name, tensor in pruned.items())):
        after = log_probabilities(editable, before.texts)
    drifts = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(before.log_probabilities, after, strict=True)]
    layers = [_layer_error(editable.delta[name], pruned[name], x) for name, x in before.inputs.items()]
    error = sum(_energy(pruned[name] - tensor) for name, tensor in editable.delta.items())
    return {
        "pair": editable.pair.name,
        "method": pruner.method,
        "drop_rate": float(pruner.drop_rate),
        "seed": seed,
        "parameter_error": error / (sum(map(_energy, editable.delta.values())) or 1.0),
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
