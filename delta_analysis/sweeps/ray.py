"""Run functions on a Ray cluster through the interface of `concurrent.futures`."""

from __future__ import annotations

import concurrent.futures
import signal
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any

import torch


class RayExecutor(Executor):
    """An executor whose workers are those of a Ray cluster: `submit`, `map`, `shutdown`, `with`.

    Connect first, by `ray.init(address="auto")` on a machine of the cluster, or by `ray.init()` for
    a cluster of this machine alone; which one, with what resources, is never guessed. The package
    must be installed on every machine of the cluster, and paths must mean the same on each.

    A function, its arguments and its result are pickled. What the function raises comes back as
    itself, with a note that has the traceback of the worker. A call whose worker or machine dies is
    run again elsewhere, so it may run more than once; one that raises is not. `cancel` of a future
    works until its result is there: a call that waits never starts, one that runs gets a
    `KeyboardInterrupt` at its next step in Python. Callbacks of futures run in a thread of Ray's,
    which must not be kept waiting.

    Parameters
    ----------
    num_cpus : cores that a call reserves, and the threads torch uses in it (at least 1).
    num_gpus : GPUs that a call reserves; a fraction lets several calls share one.
    max_retries : how often a call whose worker dies is run again; -1 for ever.

    Raises
    ------
    ValueError
        Ray is not installed, or not connected to a cluster.

    Examples
    --------
    >>> import ray

    >>> ray.init(num_cpus=2)  # doctest: +SKIP
    >>> with RayExecutor() as executor:  # doctest: +SKIP
    ...     list(executor.map(abs, [-1, 2]))
    [1, 2]
    """

    def __init__(self, num_cpus: float = 1, num_gpus: float = 0, max_retries: int = 3) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError("RayExecutor needs Ray: pip install 'delta_analysis[scale]'") from error
        if not ray.is_initialized():
            raise ValueError(
                'no Ray cluster is connected: call ray.init(address="auto") on a machine of a running cluster, '
                "or ray.init() to start one on this machine alone"
            )
        self._cancel = ray.cancel
        # A worker that has used a GPU keeps it, so it serves one call.
        remote = ray.remote(max_calls=1)(_run) if num_gpus > 0 else ray.remote(_run)
        self._run = remote.options(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=max_retries)
        self._threads = max(1, int(num_cpus))
        self._references: dict[Future[Any], Any] = {}
        self._open = True

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """A future of `fn(*args, **kwargs)`, called on the cluster."""
        if not self._open:
            raise RuntimeError("cannot schedule new futures after shutdown")
        reference = self._run.remote(self._threads, fn, args, kwargs)
        future: Future[Any] = Future()
        self._references[future] = reference
        future.add_done_callback(self._release)
        reference.future().add_done_callback(partial(_settle, future))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002
        """Take no more calls; wait for those submitted, or cancel them. The cluster goes on."""
        self._open = False
        futures = list(self._references)
        if cancel_futures:
            for future in futures:
                future.cancel()
        if wait:
            concurrent.futures.wait(futures)

    def _release(self, future: Future[Any]) -> None:
        reference = self._references.pop(future)
        if future.cancelled():
            self._cancel(reference)


def _run(threads: int, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # A cluster that was started in the background ignores interrupts, by which Ray cancels a call.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A worker that torch is loaded in keeps the threads of its first call otherwise.
    torch.set_num_threads(threads)
    return fn(*args, **kwargs)


def _settle(future: Future[Any], answer: Future[Any]) -> None:
    """Hand Ray's answer over to our future, unless that was cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    error = answer.exception()
    if error is None:
        future.set_result(answer.result())
    elif cause := getattr(error, "cause", None):
        cause.add_note(str(error))
        future.set_exception(cause)
    else:
        future.set_exception(error)
