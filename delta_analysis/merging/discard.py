"""How much of a fine-tune the election of signs discards when it is merged with continual pre-training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch

from delta_analysis._errors import checked_number
from delta_analysis.deltas import LABELS, Grouping
from delta_analysis.merging.conflicts import check_grouping, common_names, energy, group_sums, labels, read_together
from delta_analysis.merging.election import Slack, outvoted
from delta_analysis.merging.merger import source_seed
from delta_analysis.pruning import Magnitude, Permuted, Prune, Pruner, bind

Tensors = Mapping[str, torch.Tensor]


def discard_rate(
    sft: Tensors,
    cpt: Tensors,
    *,
    trim: Pruner | None = None,
    slack: Slack | None = None,
    weights: tuple[float, float] = (1.0, 1.0),
    by: Grouping = "layer",
    seed: int = 0,
) -> pd.DataFrame:
    """Which share of a fine-tune's entries is outvoted by another delta, by group of tensors.

    Both deltas are trimmed as in a merge of the two under this seed. Then an entry s of the fine-tune is
    discarded if its sign is not that of `w_s s + w_c c`, positive where this is 0, as in `Ties`. Two null
    models tell what sizes alone would do. Tensors that one side lacks are left out.

    Parameters
    ----------
    sft, cpt : name -> tensor, as from `load_delta`: of the fine-tune, and of what it is merged with.
    trim : applied to both before, such as `Magnitude(0.8)`; None for none.
    slack : protects the fine-tune with `protected=0`, the other delta with 1; None for the plain election.
    weights : w_s and w_c, finite.
    by : the groups of `value_ranges`: `tensor`, `place`, `layer`, `module`, `kind` or `model`.
    seed : of the trimming, and of the permutation.

    Returns
    -------
    DataFrame, one row a group: `tensor, layer, module, kind, shape` (missing where a group spans many; layer
    -1 is outside the stack); `tensors`, how many; `numel`; `kept`, how many entries of the fine-tune are
    not zero after trimming; of these, `discard_rate`, the share that is outvoted, and `conflict`, the share that
    meets an entry of the other sign; `lost_given_conflict`, their ratio; `gaussian_null`, the discard
    rate of independent normal entries of mean 0, `arctan(k) / π` with a tensor's own size ratio k, a mean over
    kept entries, NaN with trim or slack; `independent_null`, the discard rate when the other
    delta's entries, trimmed, are permuted within each tensor: equal sizes and as many zeros, but no relation;
    `size_ratio`, of rms of w_c c over rms of w_s s, untrimmed. Shares of nothing are NaN.

    Raises
    ------
    ValueError
        Weights that are not two finite numbers; a slack for a third delta; an unknown `by`; a NaN or
        infinite entry.
    NotHomologousError
        No common tensor, or one of two shapes.

    Source: discard of fine-tuned entries in merges with continual pre-training: Tao et al., arXiv
    2407.03994; the null models are this package's. For normal s and c, s loses if they differ in sign and
    |c| > |s|: the angle of (s, c) is then within two sectors of arctan(k) each, of the circle's 2π.

    Examples
    --------
    >>> sft, cpt = {"w": torch.tensor([1.0, -2.0, 3.0, 0.0])}, {"w": torch.tensor([-2.0, 1.0, 1.0, 5.0])}
    >>> discard_rate(sft, cpt)[["kept", "discard_rate", "conflict", "lost_given_conflict"]].values.round(3).tolist()
    [[3.0, 0.333, 0.667, 0.5]]
    """
    check_grouping(by)
    if len(weights) != 2:
        raise ValueError(f"weights must be two numbers, of the fine-tune and of the other; not {weights!r}")
    weights = (checked_number("weights[0]", weights[0]), checked_number("weights[1]", weights[1]))
    if slack is not None and slack.protected > 1:
        raise ValueError(f"slack protects delta {slack.protected} (from 0), and there are 2")
    deltas: dict[str, Tensors] = {"sft": sft, "cpt": cpt}
    names, pruner = common_names(deltas), Magnitude(0.0) if trim is None else trim
    seeds = [source_seed(seed, position) for position in range(2)]
    prunes = [partial(bind(pruner, delta, each), seed=each) for delta, each in zip(deltas.values(), seeds, strict=True)]
    rows = [_sums(name, read_together(deltas, name), prunes, weights, slack, seed) for name in names]
    table = _shares(group_sums(rows, by))
    return table if trim is None and slack is None else table.assign(gaussian_null=math.nan)


def _sums(
    name: str,
    tensors: Tensors,
    prunes: Sequence[Prune],
    weights: tuple[float, float],
    slack: Slack | None,
    seed: int,
) -> dict[str, object]:
    """The labels of a tensor, and what is added over the tensors of a group."""
    energies = [energy(tensor, name, label) for label, tensor in tensors.items()]
    size, other_size = (abs(weight) * math.sqrt(each) for weight, each in zip(weights, energies, strict=True))
    own, other = (prune(tensor, name=name) for prune, tensor in zip(prunes, tensors.values(), strict=True))
    kept, conflicts, lost = outvoted(own, other, weights, slack)
    *_, lost_by_chance = outvoted(own, Permuted()(other, name=name, seed=seed), weights, slack)
    return {
        **labels(name, own),
        "kept": kept,
        "conflicts": conflicts,
        "lost": lost,
        "lost_by_chance": lost_by_chance,
        "lost_if_gaussian": kept * math.atan2(other_size, size) / math.pi,
        "square": size**2,
        "other_square": other_size**2,
    }


def _shares(sums: pd.DataFrame) -> pd.DataFrame:
    """The columns of `discard_rate` out of sums."""
    shares = {
        "discard_rate": sums["lost"] / sums["kept"],
        "conflict": sums["conflicts"] / sums["kept"],
        "lost_given_conflict": sums["lost"] / sums["conflicts"],
        "gaussian_null": sums["lost_if_gaussian"] / sums["kept"],
        "independent_null": sums["lost_by_chance"] / sums["kept"],
        "size_ratio": np.sqrt(sums["other_square"] / sums["square"]),
    }
    return sums[[*LABELS, "tensors", "numel", "kept"]].assign(**shares)
