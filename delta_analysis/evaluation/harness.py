"""Any task of lm-evaluation-harness, on a model in memory."""

from __future__ import annotations

import copy
import difflib
import importlib.metadata
import logging
import os
import random
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from delta_analysis._errors import checked_number
from delta_analysis.evaluation.protocol import SPEED, Evaluation, Kind, Outcomes, Prepared

_LOCK = threading.Lock()
_SEED = 1234
"""The harness's own default, so that few-shot examples are those of its command line."""


@dataclass(frozen=True)
class LmEval:
    """Tasks of lm-evaluation-harness by name (GSM8K, MATH, IFEval, GLUE, …), on a model in memory.

    Calling it on `(model, tokenizer)` gives, for each metric of a task, one outcome a document:
    `gsm8k/exact_match,strict-match` where a task filters answers in several ways, `sst2/acc` where
    in one. Only metrics that are a mean over documents are given, since only these have outcomes, and of
    which more is better: `acc` of MRPC, not its `f1`; none of CoLA (Matthews correlation), which is an error. Names of
    groups and tags mean their tasks; a group whose own value is the mean over all documents of its
    tasks, as `mmlu/acc`, is given as well.

    Needs the extra `eval`. Datasets come from the Hugging Face hub, or its cache when offline. A
    task's YAML may name Python functions beside it, which run: use only task folders you trust. No
    code of models runs, and no code that a model wrote unless `allow_code`. Seeds are fixed, nothing
    is cached; the model and the tokenizer stay as they are. The harness keeps state that all threads
    share, so that calls wait for each other; use processes to run several at once. Tasks that check
    answers within a time limit, as `minerva_math` does, work in the main thread of a process only.

    Parameters
    ----------
    tasks : names of tasks, groups or tags, such as `("gsm8k", "ifeval", "minerva_math", "glue")`.
    limit : the first so many documents of each task; None is all. At least 1.
    num_fewshot : examples before each question; None is what the task sets. A task that sets 0
        itself keeps 0.
    batch_size : documents that the model reads together; at least 1.
    task_folder : a folder of further YAML task files; empty is none. What the files hold is not part
        of a sweep's record: give changed tasks new names.
    chat_template : whether prompts are put in the tokenizer's chat template.
    allow_code : run what the model writes, which HumanEval, MBPP and the like do to check it. In a
        container without network only: the harness itself guards against accidents, not malice.
    name : what tables call it.

    Raises
    ------
    ValueError
        No tasks, a limit or a batch size below 1. When prepared or called: the harness is missing;
        an unknown task or folder; a task that runs what the model writes, without `allow_code`; a
        task none of whose metrics is a mean over documents; a model that cannot generate, a
        tokenizer without a chat template, or a context too short for the task; a task with a time
        limit outside the main thread.
    OSError
        A dataset that can neither be fetched nor found in the cache.

    Examples
    --------
    >>> LmEval(("gsm8k",), limit=200, num_fewshot=5).protocol
    'gsm8k by lm-evaluation-harness on the first 200 documents (items) of each task, 5 examples in a prompt.
    Intervals resample the documents.'
    """

    kind: ClassVar[Kind] = "score"

    tasks: tuple[str, ...]
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = field(default=8, metadata=SPEED)
    task_folder: str = ""
    chat_template: bool = False
    allow_code: bool = field(default=False, metadata=SPEED)
    name: str = "lm-eval"
    version: str = field(default="", init=False)

    def __post_init__(self) -> None:
        if isinstance(self.tasks, str) or not self.tasks:
            raise ValueError(f"tasks must be a tuple of names; not {self.tasks!r}")
        if self.limit is not None:
            checked_number("limit", self.limit, 1, whole=True)
        checked_number("batch_size", self.batch_size, 1, whole=True)
        # Part of what the evaluation is: tasks change between versions of the harness.
        object.__setattr__(self, "version", _version())

    @property
    def protocol(self) -> str:
        """Which tasks, on how many documents, and how prompts are written."""
        count = "all documents (items)" if self.limit is None else f"the first {self.limit:,} documents (items)"
        examples = "the task's own number of" if self.num_fewshot is None else self.num_fewshot
        return (
            f"{', '.join(self.tasks)} by lm-evaluation-harness on {count} of each task, {examples} examples in a prompt"
            f"{', in the chat template' if self.chat_template else ''}. Intervals resample the documents."
        )

    @property
    def texts(self) -> tuple[str, ...]:
        """None: the documents are the harness's."""
        return ()

    def prepared(self, untouched: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
        """The same evaluation with its tasks and their documents loaded."""
        if not untouched.can_generate():
            raise ValueError(f"{self.name}: {type(untouched).__name__} is no language model; its tasks need one")
        if self.chat_template and tokenizer.chat_template is None:
            raise ValueError(f"{self.name}: the tokenizer has no chat template; use chat_template=False")
        with _harness(self):
            return Prepared(self, partial(_judged, self, _loaded(self)))

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Outcomes:
        return self.prepared(model, tokenizer)(model, tokenizer)


def _version() -> str:
    """The harness's version, empty where it is not installed."""
    try:
        return importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError:
        return ""


class _MainThreadNeeded(BaseException):
    """A task set an alarm in a thread that cannot have one; tasks take an Exception for a wrong answer."""


@contextmanager
def _harness(evaluation: LmEval) -> Iterator[None]:
    """The harness for oneself: seeded, silent, and running what a model writes only if that is allowed."""
    try:
        import lm_eval.api.model
        import lm_eval.api.task
        import lm_eval.models.huggingface
    except ImportError as error:
        raise ValueError(
            f"{evaluation.name} needs lm-evaluation-harness: pip install 'delta_analysis[eval]'"
        ) from error
    with ExitStack() as stack:
        stack.enter_context(_LOCK)
        logger = logging.getLogger("lm_eval")
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        for module in (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface):
            stack.enter_context(patch.object(module, "tqdm", _hidden_bar))
        stack.enter_context(patch.object(signal, "signal", partial(_set_handler, signal.signal)))
        stack.callback(_set_variable, "HF_ALLOW_CODE_EVAL", os.environ.get("HF_ALLOW_CODE_EVAL"))
        _set_variable("HF_ALLOW_CODE_EVAL", "1" if evaluation.allow_code else "0")
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002 (the harness's generator)
        random.seed(0)
        np.random.seed(_SEED)  # noqa: NPY002
        yield


def _hidden_bar(*args: Any, **kwargs: Any) -> tqdm:
    return tqdm(*args, **{**kwargs, "disable": True})


def _set_handler(original: Callable[[Any, Any], Any], number: Any, handler: Any) -> Any:
    if threading.current_thread() is not threading.main_thread():
        raise _MainThreadNeeded
    return original(number, handler)


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _loaded(evaluation: LmEval) -> dict[str, Any]:
    """The tasks and groups of the harness, in the form that its evaluator takes."""
    from lm_eval.tasks import TaskManager

    folder, names = evaluation.task_folder, evaluation.tasks
    if folder and not Path(folder).is_dir():
        raise ValueError(f"{evaluation.name}: the task_folder {folder!r} is no folder")
    # To index the harness's own tasks takes seconds, so look into the folder alone first.
    manager = TaskManager(include_path=folder, include_defaults=False) if folder else _every_task("")
    reached = _reached(names, manager.task_index)
    if folder and None in reached.values():
        manager = _every_task(folder)
        reached = _reached(names, manager.task_index)
    for name in names:
        if reached[name] is None:
            close = difflib.get_close_matches(name, manager.all_tasks)
            raise ValueError(f"{evaluation.name}: no task {name!r} in the harness; close to it are {close}")
    unsafe = sorted(name for name, entry in reached.items() if entry and (entry.cfg or {}).get("unsafe_code"))
    if unsafe and not evaluation.allow_code:
        raise ValueError(
            f"{evaluation.name}: {', '.join(unsafe)} would run code that the model wrote on this machine; "
            "pass allow_code=True if that is meant, in a container without network"
        )
    loaded: dict[str, Any] = manager.load(list(names))
    for name, task in loaded["tasks"].items():
        if not any(_is_score(task, metric) for metric in task.aggregation()):
            raise ValueError(
                f"{evaluation.name}: no metric of {name!r} is a mean over documents of which more is better "
                f"({', '.join(task.aggregation())}); intervals need one outcome a document, leave the task out"
            )
        if evaluation.num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config("num_fewshot", evaluation.num_fewshot)
    return loaded


@lru_cache(maxsize=1)
def _every_task(folder: str) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder or None)


def _reached(names: Iterable[str], index: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> entry of the index (None: not there), for tasks, groups and tags and all that they contain."""
    reached: dict[str, Any] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached[name] = entry = index.get(name)
            if entry is not None:
                waiting += entry.tags if entry.cfg is None else _members(entry.cfg["task"])
    return reached


def _members(part: Any) -> list[str]:
    """The names in the `task` field of a group, where they may be nested."""
    if isinstance(part, str):
        return [part]
    if isinstance(part, Mapping):
        return [*_members(part.get("group", ())), *_members(part.get("task", ()))]
    return [name for each in part for name in _members(each)]


def _judged(
    evaluation: LmEval, loaded: dict[str, Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Outcomes:
    """The outcomes of every task and group."""
    with _harness(evaluation):
        samples = _samples(evaluation, loaded, model, tokenizer)
    outcomes = {name: _outcomes(task, samples[name]) for name, task in loaded["tasks"].items()}
    for name, group in loaded["groups"].items():
        outcomes[name] = _pooled(group, [outcomes[task.task_name] for task in group.get_all_tasks()])
    return {f"{name}/{metric}": values for name, found in outcomes.items() for metric, values in found.items()}


def _samples(
    evaluation: LmEval, loaded: dict[str, Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[dict[str, Any]]]:
    """What the harness logs of each document of each task."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    for task in loaded["tasks"].values():
        task.set_fewshot_seed(_SEED)
    training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        # The harness ties the weights again, which would overwrite a head of its own.
        with torch.random.fork_rng(devices), patch.object(model, "tie_weights", lambda: None):
            torch.manual_seed(_SEED)
            # It sets padding in the tokenizer, which other threads may be using.
            wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=evaluation.batch_size)
            results = evaluate(
                lm=wrapped,
                task_dict=loaded,
                limit=evaluation.limit,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=evaluation.chat_template,
                fewshot_as_multiturn=evaluation.chat_template,
                confirm_run_unsafe_code=evaluation.allow_code,
            )
    except AssertionError as error:
        raise ValueError(f"{evaluation.name}: {error}") from error
    except _MainThreadNeeded as error:
        raise ValueError(
            f"{evaluation.name}: the checks of {', '.join(loaded['tasks'])} have a time limit that works in a main "
            "thread only; pass an executor of processes, or RayExecutor()"
        ) from error
    finally:
        model.train(training)
    samples: dict[str, list[dict[str, Any]]] = results["samples"]
    return samples


def _is_score(task: Any, metric: str) -> bool:
    """Whether a metric is a mean over documents, as one that tasks add themselves, and more of it is better."""
    from lm_eval.api.metrics import mean

    return task.aggregation().get(metric, mean) is mean and task.higher_is_better().get(metric) is not False


def _outcomes(task: Any, samples: list[dict[str, Any]]) -> Outcomes:
    """Metric, with its filter if there are several -> outcome of each document."""
    found = defaultdict(list)
    for sample in samples:
        for metric in sample["metrics"]:
            if _is_score(task, metric):
                found[metric, sample["filter"]].append(float(sample[metric]))
    several = len({kind for _, kind in found}) > 1
    return {
        f"{metric},{kind}" if several and kind != "none" else metric: np.array(values)
        for (metric, kind), values in found.items()
    }


def _pooled(group: Any, parts: list[Outcomes]) -> Outcomes:
    """The outcomes of all tasks of a group, of the metrics that the harness averages over their documents."""
    averaged = {each.metric for each in group.aggregate_metric_list or () if each.weight_by_size}
    shared = [name for name in parts[0] if name.split(",")[0] in averaged and all(name in part for part in parts)]
    return {name: np.concatenate([part[name] for part in parts]) for name in shared}
