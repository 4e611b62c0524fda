"""Evaluate deltas under many prunings: one row a cell, with the outcome of every question."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from threading import Lock
from typing import Protocol, TypeVar

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from delta_analysis.blocks import single_threaded_pool
from delta_analysis.delta import Delta, load_delta
from delta_analysis.evaluate import load_model, load_tokenizer, patched
from delta_analysis.intervals import METRICS, metric_interval
from delta_analysis.names import output_head
from delta_analysis.pruning import Pruner, prepared

Result = TypeVar("Result")
_LOADING = Lock()


class Evaluation(Protocol):
    """Judges a model: one outcome an item (a question, a token), from whose mean the metric follows.

    `texts` are what it is judged on, as a model reads them.
    """

    @property
    def metric(self) -> str: ...
    @property
    def texts(self) -> tuple[str, ...]: ...

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> np.ndarray: ...


@dataclass(frozen=True)
class Pair:
    """A base and a fine-tune, with the evaluation of what the fine-tune is for.

    Attributes
    ----------
    name : how tables and figures call the pair, `base → fine-tune`.
    base, finetuned : sources as `load_delta` takes them; without a base (None) it is the fine-tuned
        weights themselves that are dropped.
    evaluation : such as `ExactMatch(questions)` or `TextPerplexity(text)`.
    """

    name: str
    base: str | None
    finetuned: str
    evaluation: Evaluation


@dataclass(frozen=True, eq=False)
class EditableModel:
    """A pair in memory: the fine-tuned model, the base weights and the delta, each loaded once."""

    pair: Pair
    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    base: dict[str, torch.Tensor] = field(repr=False)
    delta: dict[str, torch.Tensor] = field(repr=False)

    @classmethod
    def load(cls, pair: Pair, device: str = "cpu") -> EditableModel:
        lazy = load_delta(base=pair.base, finetuned=pair.finetuned)
        tensors = {name: lazy.read(name) for name in lazy}
        delta = {name: tensor for name, (tensor, _) in tensors.items()}
        base = {name: torch.zeros_like(delta[name]) if start is None else start for name, (_, start) in tensors.items()}
        # An adapter or a published delta has no model of its own: its base is edited.
        whole = lazy.base if lazy.finetuned.is_difference and lazy.base is not None else lazy.finetuned
        # transformers builds models under a global device context, so one thread at a time.
        with _LOADING:
            model = load_model(whole, device)
        _untie_head(model, lazy)
        return cls(pair, model, load_tokenizer(whole), base, delta)

    def judge(self, pruner: Pruner, seed: int) -> dict[str, object]:
        """One cell of a sweep: prune, patch the model, evaluate, restore the model."""
        started = time.perf_counter()
        nonzero, left = 0, 0
        prune = prepared(pruner, self.delta, seed)

        def edited() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal nonzero, left
            for name, tensor in self.delta.items():
                pruned = prune(tensor, name=name, seed=seed)
                nonzero += int(torch.count_nonzero(tensor))
                left += int(torch.count_nonzero(pruned))
                yield name, self._with_other_rows(name, self.base[name] + pruned)

        with patched(self.model, edited()) as model:
            outcomes = self.pair.evaluation(model, self.tokenizer)
        metric = self.pair.evaluation.metric
        value, low, high = metric_interval(METRICS[metric], outcomes[None])
        return {
            "pair": self.pair.name,
            "method": pruner.method,
            "drop_rate": float(pruner.drop_rate),
            "rescale": str(pruner.rescale),
            "scope": "all",
            "seed": seed,
            "metric": metric,
            "value": value,
            "low": low,
            "high": high,
            "achieved_drop_rate": 1 - left / nonzero if nonzero else 0.0,
            "seconds": time.perf_counter() - started,
            "outcomes": outcomes.tolist(),
            **options(pruner),
        }

    def _with_other_rows(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight of all tokens, where the delta has only those that both vocabularies share."""
        whole = dict(self.model.named_parameters(remove_duplicate=False)).get(name)
        rows = weight.shape[0] if weight.dim() else 0
        if whole is None or weight.shape == whole.shape or weight.shape[1:] != whole.shape[1:] or rows > len(whole):
            return weight
        return torch.cat([weight, whole[rows:].detach().to(weight)])


def _untie_head(model: PreTrainedModel, delta: Delta) -> None:
    """Give the model a head of its own where the delta changes the head and not the embeddings tied to it."""
    head = output_head(delta)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if head in parameters and sum(parameter is parameters[head] for parameter in parameters.values()) > 1:
        own = torch.nn.Parameter(parameters[head].detach().clone())
        model.get_submodule(head.removesuffix(".weight")).register_parameter("weight", own)


def options(pruner: Pruner) -> dict[str, object]:
    """What a pruner has beyond drop rate and rescale, as columns such as `option_window`."""
    own = [each.name for each in fields(pruner) if each.name not in ("drop_rate", "rescale")]  # type: ignore[arg-type]
    return {f"option_{name}": str(getattr(pruner, name)) for name in own}


def for_each_pair(work: Callable[[Pair], Result], pairs: Sequence[Pair], workers: int) -> list[Result]:
    """The work on each pair, in their order; with several workers side by side, one core each.

    The matrices of a small model do not fill several cores, so pairs in parallel are faster; each
    worker holds a model of its own.
    """
    if workers == 1:
        return [work(pair) for pair in pairs]
    with single_threaded_pool(workers) as pool:
        return list(pool.map(work, pairs))


def useful_seeds(pruner: Pruner, seeds: Sequence[int]) -> list[int]:
    """The seeds that make a difference: all of them, or the first for a pruner that is not random."""
    return list(seeds) if pruner.random else list(seeds)[:1]


def sweep(
    pairs: Sequence[Pair], pruners: Sequence[Pruner], seeds: Sequence[int], *, device: str = "cpu", workers: int = 1
) -> pd.DataFrame:
    """Judge every pair under every pruner and seed.

    At drop rates 0 and 1, and for magnitude pruning but for ties, no random number matters; those
    cells run once, under the first seed.
    All tensors that the delta has are edited: embeddings, norms and biases too, as in DARE's
    scripts for language models.

    Parameters
    ----------
    pairs : what is compared and how it is judged.
    pruners : such as `[Dare(0.5), Magnitude(0.5)]`.
    seeds : one mask for each; masks are nested across drop rates and shared by rescale variants.
    device : where the model runs.
    workers : how many pairs are judged at a time, each with a model in memory and one core.

    Returns
    -------
    DataFrame, one row a cell: `pair, method, drop_rate, rescale, scope, seed, metric`; `value` with
    its 95% interval `low, high` over items; `achieved_drop_rate` of the entries that were not zero;
    `seconds`; `outcomes`, one for each item; a column `option_<name>` for each option of a pruner
    beyond drop rate and rescale, missing where it has none.
    """
    plan = [(pruner, seed) for pruner in pruners for seed in useful_seeds(pruner, seeds)]
    with tqdm(total=len(plan) * len(pairs), unit="cell", disable=None) as progress:

        def judge_all(pair: Pair) -> list[dict[str, object]]:
            editable = EditableModel.load(pair, device)
            rows = []
            for pruner, seed in plan:
                rows.append(editable.judge(pruner, seed))
                progress.update()
            return rows

        return pd.DataFrame([row for rows in for_each_pair(judge_all, pairs, workers) for row in rows])


def outcome_matrix(cells: pd.DataFrame) -> np.ndarray:
    """Outcomes of the cells of one pair, method and drop rate: (seeds, items)."""
    return np.array(cells.sort_values("seed")["outcomes"].tolist(), dtype=np.float64)


def drop_curve(cells: pd.DataFrame) -> pd.DataFrame:
    """The metric against drop rate, with intervals that resample both seeds and items.

    Returns
    -------
    DataFrame, one row a `pair, method, metric, drop_rate`; `seeds`, how many; `value, low, high`.
    """
    keys = ["pair", "method", "metric", "drop_rate"]
    rows = []
    for _, group in cells.groupby(keys, sort=False):
        first = group.iloc[0]
        value, low, high = metric_interval(METRICS[first["metric"]], outcome_matrix(group))
        rows.append(
            {**{key: first[key] for key in keys}, "seeds": len(group), "value": value, "low": low, "high": high}
        )
    return pd.DataFrame(rows).sort_values(["pair", "method", "drop_rate"], key=_in_order, ignore_index=True)


def _in_order(column: pd.Series) -> pd.Series:
    """Sort key that leaves names in order of appearance and numbers by size."""
    return column if column.dtype.kind == "f" else pd.Series(pd.factorize(column)[0], index=column.index)
