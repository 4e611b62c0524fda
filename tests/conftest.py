"""Shared fixtures: small checkpoints on disk, made for one test."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import secrets
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import hypothesis
import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch
from safetensors.torch import save_file

mpl.use("agg")

# The same few examples each time; many new ones with HYPOTHESIS_PROFILE=nightly.
hypothesis.settings.register_profile("ci", max_examples=25, derandomize=True, deadline=None)
hypothesis.settings.register_profile("nightly", max_examples=300, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

SaveCheckpoint = Callable[..., Path]


@contextmanager
def _without_store() -> Iterator[None]:
    """`make test` lets committed notebooks share a store of cells: it is none of the tests', nor of their processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DELTA_ANALYSIS_CELLS", raising=False)
        yield


@pytest.fixture(scope="module", autouse=True)
def _cells_in_out_dir() -> Iterator[None]:
    with _without_store():
        yield


@pytest.fixture
def save_checkpoint(tmp_path: Path) -> SaveCheckpoint:
    """Write tensors as a checkpoint directory: one file, or one shard a name when `shards` is given.

    `shards` maps file name -> names of the tensors in it; an index is written beside them.
    """

    def save(
        name: str,
        tensors: Mapping[str, torch.Tensor],
        *,
        config: Mapping[str, Any] | None = None,
        shards: Mapping[str, list[str]] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        if shards is None:
            save_file(dict(tensors), folder / "model.safetensors")
            return folder
        for file, names in shards.items():
            save_file({key: tensors[key] for key in names}, folder / file)
        weight_map = {key: file for file, names in shards.items() for key in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    return save


@pytest.fixture(scope="session", autouse=True)
def _server_of_processes(request: pytest.FixtureRequest) -> None:
    """Start it with the first test, if any wants it, so that it imports while others run."""
    if any("processes" in getattr(item, "fixturenames", ()) for item in request.session.items):
        multiprocessing.set_forkserver_preload(
            ["delta_analysis.reports.session", "hypothesis", "papermill", "tests.sweeps.test_sweep_kills"]
        )
        with _without_store():
            forkserver.ensure_running()


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Processes that are forks of a server which has imported the package once, so that they start at once."""
    return multiprocessing.get_context("forkserver")


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A Ray cluster of two cores, on this machine."""
    # Takes seconds, and few tests need it.
    import ray

    # A short path of its own: Ray's sockets lie in it, and their names are limited in length.
    with (
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as environment,
    ):
        # Else Ray writes a token into the home directory.
        environment.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", _temp_dir=folder)
        yield
        ray.shutdown()
        with warnings.catch_warnings():
            # Ray lets go of the processes that it has ended without having waited for them.
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()


@pytest.fixture(autouse=True)
def _close_figures() -> Any:
    yield
    plt.close("all")
