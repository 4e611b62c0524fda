"""Hashes of checkpoints: what changes them, and what does not."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from delta_analysis._errors import CheckpointError
from delta_analysis.checkpoints import provenance
from delta_analysis.checkpoints.paths import find_root
from delta_analysis.checkpoints.provenance import PACKAGES, content_hash, file_hashes, versions

SaveCheckpoint = Callable[..., Path]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_versions_are_those_that_run() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == importlib.metadata.version("torch")
    assert found["delta_analysis"] == importlib.metadata.version("delta_analysis")
    assert list(found) == ["python", *PACKAGES]


def test_file_hashes_are_sha256_of_the_weight_files(save_checkpoint: SaveCheckpoint) -> None:
    tensors = {"a.weight": torch.ones(2, 2), "b.weight": torch.zeros(3)}
    one = save_checkpoint("one", tensors, config={})
    assert file_hashes(str(one)) == {"model.safetensors": sha256(one / "model.safetensors")}
    shards = {"model-1.safetensors": ["a.weight"], "model-2.safetensors": ["b.weight"]}
    two = save_checkpoint("two", tensors, shards=shards)
    assert file_hashes(str(two)) == {name: sha256(two / name) for name in shards}
    assert file_hashes(str(one / "model.safetensors")) == file_hashes(str(one))
    zoo = find_root() / "data" / "zoo" / "small" / "base"
    assert file_hashes("zoo:small/base") == {"model.safetensors": sha256(zoo / "model.safetensors")}


@pytest.fixture
def model(save_checkpoint: SaveCheckpoint) -> Path:
    folder = save_checkpoint("model", {"a.weight": torch.ones(2, 2)}, config={"architectures": ["One"]})
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_where_a_checkpoint_lies_does_not_matter(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = shutil.copytree(model, tmp_path / "else" / "where")
    monkeypatch.chdir(there.parent)
    assert content_hash(str(model)) == content_hash(str(there)) == content_hash("where")


def change_weight(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        change_weight,
        lambda folder: (folder / "config.json").write_text('{"architectures": ["Two"]}'),
        lambda folder: (folder / "tokenizer.json").write_text('{"a": 1}'),
        lambda folder: (folder / "tokenizer.json").rename(folder / "vocab.json"),
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        lambda folder: (folder / "merges.txt").write_text("a b"),
        lambda folder: (folder / "spiece.model").write_bytes(b"abc"),
    ],
    ids=["weight", "config", "tokenizer", "name", "template", "merges", "sentencepiece"],
)
def test_what_a_model_is_made_of_matters(model: Path, change: Callable[[Path], object]) -> None:
    before = content_hash(str(model))
    assert content_hash(str(model)) == before
    change(model)
    assert content_hash(str(model)) != before


def test_what_stands_beside_does_not_matter(model: Path) -> None:
    before = content_hash(str(model))
    (model / "README.md").write_text("a model")
    for name in ("training.json", "trainer_state.json", "all_results.json", "requirements.txt", "optimizer.pt"):
        (model / name).write_text("{}")
    (model / ".git").mkdir()
    (model / "original").mkdir()
    (model / "original" / "params.json").write_text("{}")
    assert content_hash(str(model)) == before


def test_tensors_in_other_shards_are_another_checkpoint(save_checkpoint: SaveCheckpoint) -> None:
    # Not the same files: told apart, though a model would be the same.
    tensors = {"a.weight": torch.ones(2, 2), "b.weight": torch.zeros(3)}
    one = save_checkpoint("one", tensors)
    two = save_checkpoint("two", tensors, shards={"m-1.safetensors": ["a.weight"], "m-2.safetensors": ["b.weight"]})
    assert content_hash(str(one)) != content_hash(str(two))


def test_a_file_is_read_again_only_if_it_changed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counted(path: Path) -> str:
        read.append(path.name)
        return sha256(path)

    provenance._hash_of.cache_clear()
    monkeypatch.setattr(provenance, "sha256", counted)
    first = content_hash(str(model))
    assert sorted(read) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert content_hash(str(model)) == first
    assert len(read) == 3
    change_weight(model)
    assert content_hash(str(model)) != first
    assert read[3:] == ["model.safetensors"]


def test_weights_in_a_hub_cache_are_known_by_the_name_of_their_blob(model: Path, tmp_path: Path) -> None:
    blobs, filed = tmp_path / "blobs", "0123456789abcdef" * 4
    blobs.mkdir()
    (model / "model.safetensors").rename(blobs / filed)
    (model / "model.safetensors").symlink_to(blobs / filed)
    # Small files are filed there under the hash of a commit's tree, which is no SHA-256.
    (model / "config.json").rename(blobs / filed[:40])
    (model / "config.json").symlink_to(blobs / filed[:40])
    assert file_hashes(str(model)) == {"model.safetensors": filed}
    before = content_hash(str(model))
    (blobs / filed[:40]).write_text(json.dumps({"architectures": ["Two"]}))
    assert content_hash(str(model)) != before


def test_a_source_that_is_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or directory"):
        content_hash(str(tmp_path / "nothing" / "there"))
