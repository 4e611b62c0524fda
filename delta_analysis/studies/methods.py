"""Reconstruction error: of a pruned delta's entries, of what its layers make of them, of what the model says."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TextIO

import pandas as pd

from delta_analysis.deltas import Delta, load_delta
from delta_analysis.evaluation import OutputDrift
from delta_analysis.prediction import delta_noise
from delta_analysis.pruning import Pruner
from delta_analysis.sweeps import Edit, Evaluations, Pair, drop_curve, evaluations_of, sweep

N_TEXTS = 24


def reconstruction_errors(
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
    """Errors of a pruned delta in three places: its entries, the output of its layers, the output of the model.

    The first two are expectations over masks, in the closed forms of `layer_noise`; the third is measured.
    All are of the first 24 texts of a pair's evaluation, and of the tensors in an edit's scope.

    Parameters
    ----------
    pairs, edits, seeds, out_dir, executor, device, progress : as in `sweep`; edits of one method, drop rate
        and scope must not differ in anything else.
    evaluations : as in `sweep`; the first of each pair brings the texts.

    Returns
    -------
    DataFrame, one row a pair and edit: `pair, method, drop_rate, scope`; with D the delta, D̂ the pruned one
    and x a layer's input in the fine-tune, `parameter_error`, `Σ(D̂-D)² / ΣD²`; `layer_error`, the median over
    linear layers of `E‖D̂x-Dx‖² / E‖Dx‖²`, and `signal_kept`, that of `E⟨D̂x, Dx⟩ / E‖Dx‖²`; `drift`, the
    divergence KL(fine-tune ‖ pruned) of the model's predictions in nats a token, with its 95% interval
    `low, high` over masks and texts.

    Raises
    ------
    ValueError
        As `layer_noise` and `sweep`.
    """
    asked = [edit if isinstance(edit, Edit) else Edit(edit) for edit in edits]
    texts = {pair.name: evaluations_of(pair, evaluations)[0].texts[:N_TEXTS] for pair in pairs}
    judged = {name: [OutputDrift(own)] for name, own in texts.items()}
    cells = sweep(pairs, asked, judged, seeds, out_dir, executor, device=device, progress=progress)
    drifts = drop_curve(cells[cells["metric"] == "kl"]).rename(columns={"value": "drift"})
    rows = []
    for pair in pairs:
        delta = load_delta(base=pair.base, finetuned=pair.finetuned)
        rows += [{"pair": pair.name, **row} for row in _expected(delta, asked, texts[pair.name], device)]
    keys = ["pair", "method", "drop_rate", "scope"]
    return pd.DataFrame(rows).merge(drifts[[*keys, "drift", "low", "high"]], on=keys, validate="one_to_one")


def _expected(delta: Delta, edits: Sequence[Edit], texts: Sequence[str], device: str) -> list[dict[str, object]]:
    """Of each edit the errors that are known in closed form."""
    found: dict[int, dict[str, object]] = {}
    for scope in dict.fromkeys(edit.scope for edit in edits):
        here = [i for i, edit in enumerate(edits) if edit.scope == scope]
        pruners = [edits[i].pruner for i in here]
        entries = delta_noise(delta, pruners=pruners, scope=scope)
        layers = delta_noise(delta, texts, pruners=pruners, scope=scope, device=device)
        for place, i in enumerate(here):
            own, of_layers = (table.iloc[place :: len(here)] for table in (entries, layers))
            linear = of_layers[of_layers["kind"] == "linear"]
            found[i] = {
                "method": edits[i].pruner.method,
                "drop_rate": float(edits[i].pruner.drop_rate),
                "scope": scope,
                "parameter_error": own["error"].sum() / own["noise"].sum(),
                "layer_error": (linear["error"] / linear["signal"]).median(),
                "signal_kept": linear["signal_kept"].median(),
            }
    return [found[i] for i in range(len(edits))]
