"""Shared fixtures: small checkpoints on disk, made for one test."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch
from safetensors.torch import save_file

mpl.use("agg")

SaveCheckpoint = Callable[..., Path]


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


@pytest.fixture(autouse=True)
def _close_figures() -> Any:
    yield
    plt.close("all")
