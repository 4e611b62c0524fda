"""What pruning does to the parameters, to the output of each layer, and to the output of the model."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd

from delta_analysis.evaluation import OutputDrift, WeightDamage
from delta_analysis.pruning import Pruner
from delta_analysis.sweeps import (
    RESAMPLES,
    Edit,
    Evaluations,
    Interval,
    Pair,
    evaluations_of,
    percentile_interval,
    resampled_means,
    sweep,
    two_way_resamples,
)

N_TEXTS = 24


def pruning_damage(
    pairs: Sequence[Pair],
    edits: Sequence[Edit | Pruner],
    evaluations: Evaluations,
    seeds: Sequence[int],
    out_dir: str | Path,
    executor: Executor | None = None,
    *,
    device: str = "cpu",
    progress: TextIO | None = None,
) -> pd.DataFrame:
    """Errors of a pruned delta in three places, from the entries to what the model says.

    A sweep of `WeightDamage` and `OutputDrift` over the texts of the pairs' evaluations, the first
    24 of each, brought into one row a mask.

    Parameters
    ----------
    pairs, edits, seeds, out_dir, executor, device, progress : as in `sweep`.
    evaluations : as in `sweep`; the first of each pair brings the texts.

    Returns
    -------
    DataFrame, one row a pair, edit and seed: `pair, method, drop_rate, scope, seed`; `parameter_error`
    over all entries; `layer_error` and `signal_kept`, medians over the linear layers; `drift`, the
    divergence KL(untouched ‖ pruned) of the model's predictions in nats a token; `drifts`, one for
    each text.
    """
    judged = {}
    for pair in pairs:
        texts = evaluations_of(pair, evaluations)[0].texts[:N_TEXTS]
        judged[pair.name] = (WeightDamage(pair.base, texts), OutputDrift(texts))
    cells = sweep(pairs, edits, judged, seeds, out_dir, executor, device=device, progress=progress)
    keys = ["pair", "method", "drop_rate", "scope", "seed"]
    errors = cells[cells["metric"].isin(["parameter_error", "layer_error", "signal_kept"])]
    table = errors.pivot_table(index=keys, columns="metric", values="value", sort=False)
    drifts = cells[cells["metric"] == "kl"].set_index(keys)
    return table.assign(drift=drifts["value"], drifts=drifts["outcomes"]).reset_index().rename_axis(columns=None)


def damage_summary(damage: pd.DataFrame) -> pd.DataFrame:
    """The rows of `pruning_damage` averaged over seeds.

    Returns
    -------
    DataFrame, one row a `pair, method, drop_rate, scope`; `seeds`, how many; the means of
    `parameter_error, layer_error, signal_kept`; `drift` with a 95% interval `low, high` over seeds
    and texts.
    """
    keys = ["pair", "method", "drop_rate", "scope"]
    rows = []
    for labels, group in damage.groupby(keys, sort=False):
        means = {column: group[column].mean() for column in ("parameter_error", "layer_error", "signal_kept")}
        drifts = _drifts(group)
        samples = resampled_means(drifts, two_way_resamples(*drifts.shape))
        drift = percentile_interval(drifts.mean(), samples)
        row = {**dict(zip(keys, labels, strict=True)), "seeds": len(group), **means}
        rows.append({**row, "drift": drift.value, "low": drift.low, "high": drift.high})
    return pd.DataFrame(rows)


def rank_agreement(damage: pd.DataFrame, column: str) -> Interval:
    """Spearman's correlation over methods between a column and the drift, for one pair, drop rate and scope.

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
        [resampled_means(each[:, None], resamples._replace(items=np.ones((RESAMPLES, 1)), block=1)) for each in values]
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
