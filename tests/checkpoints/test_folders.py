"""Which files of a directory are read, and directories whose files contradict each other."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from delta_analysis._errors import CheckpointError
from delta_analysis.checkpoints.folders import MOST_JSON, read_config, read_folder, read_json
from tests.deltas.test_delta import normal

TENSORS = {f"layers.{i}.a.weight": normal(i, 3, 4) for i in range(4)}
NAMES = list(TENSORS)
FORMATS = ["safetensors", "bin"]
STEM = {"safetensors": "model", "bin": "pytorch_model"}


def write(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.save(tensors, file) if file.suffix == ".bin" else save_file(tensors, file)


def write_index(folder: Path, ending: str, weight_map: dict[str, Any]) -> Path:
    index = folder / f"{STEM[ending]}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def shard(ending: str, number: int, of: int = 2) -> str:
    return f"{STEM[ending]}-{number:05}-of-{of:05}.{ending}"


@pytest.fixture(params=FORMATS)
def ending(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def sharded(tmp_path: Path, ending: str) -> Path:
    weight_map = {}
    for number, names in enumerate((NAMES[:3], NAMES[3:]), start=1):
        write(tmp_path / shard(ending, number), {name: TENSORS[name] for name in names})
        weight_map |= dict.fromkeys(names, shard(ending, number))
    write_index(tmp_path, ending, weight_map)
    return tmp_path


def assert_holds(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    found = read_folder(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(entry.read(), tensors[name]) for name, entry in found.items())


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_folder(path)
    return str(caught.value)


def test_one_file_in_a_directory_or_alone(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"{STEM[ending]}.{ending}"
    write(file, TENSORS)
    assert_holds(tmp_path, TENSORS)
    assert_holds(file, TENSORS)


def test_shards_with_their_index_and_without(sharded: Path, ending: str) -> None:
    assert_holds(sharded, TENSORS)
    assert {entry.files for entry in read_folder(sharded).values()} == {(sharded / shard(ending, i),) for i in (1, 2)}
    assert_holds(sharded / shard(ending, 2), {NAMES[3]: TENSORS[NAMES[3]]})
    next(sharded.glob("*.json")).unlink()
    assert_holds(sharded, TENSORS)


def test_shards_that_transformers_saves(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=11, **sizes))
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_holds(tmp_path, {name: parameter.detach() for name, parameter in model.named_parameters()})


def test_only_shards_that_the_index_names_are_read(sharded: Path, ending: str) -> None:
    write(sharded / shard(ending, 3), {"stray.weight": torch.ones(1)})
    (sharded / shard(ending, 4)).write_bytes(b"garbage")
    assert_holds(sharded, TENSORS)


def test_a_shard_may_hold_more_than_the_index_says(sharded: Path, ending: str) -> None:
    # Heads and buffers are left out of some published indices.
    write(sharded / shard(ending, 2), {NAMES[3]: TENSORS[NAMES[3]], "more.weight": torch.ones(1)})
    assert_holds(sharded, {**TENSORS, "more.weight": torch.ones(1)})


def test_a_single_file_is_preferred_to_shards_as_in_transformers(sharded: Path, ending: str) -> None:
    single = {"single.weight": torch.ones(1)}
    write(sharded / f"{STEM[ending]}.{ending}", single)
    assert_holds(sharded, single)


def test_an_index_of_pickles_is_preferred_to_safetensors_without_one(tmp_path: Path) -> None:
    write(tmp_path / "other.safetensors", {"other.weight": torch.ones(1)})
    write(tmp_path / shard("bin", 1, of=1), TENSORS)
    write_index(tmp_path, "bin", dict.fromkeys(TENSORS, shard("bin", 1, of=1)))
    assert_holds(tmp_path, TENSORS)


@pytest.mark.parametrize("form", ["single", "index", "shards"])
def test_safetensors_are_preferred_to_pickles(tmp_path: Path, form: str) -> None:
    (tmp_path / "pytorch_model-00001-of-00001.bin").write_bytes(b"garbage")
    if form != "shards":
        write(tmp_path / "pytorch_model.bin", {"pickled.weight": torch.ones(1)})
        write_index(tmp_path, "bin", {"pickled.weight": "pytorch_model-00001-of-00001.bin"})
    name = "model.safetensors" if form == "single" else shard("safetensors", 1, of=1)
    write(tmp_path / name, TENSORS)
    if form == "index":
        write_index(tmp_path, "safetensors", dict.fromkeys(TENSORS, name))
    assert_holds(tmp_path, TENSORS)


def test_other_pickles_beside_a_checkpoint_are_not_read(tmp_path: Path) -> None:
    write(tmp_path / "pytorch_model.bin", TENSORS)
    for name in ("training_args.bin", "optimizer.bin", "rng_state.pth"):
        (tmp_path / name).write_bytes(b"garbage")
    assert_holds(tmp_path, TENSORS)


def test_a_missing_shard_is_named(sharded: Path, ending: str) -> None:
    (sharded / shard(ending, 2)).unlink()
    index = f"{STEM[ending]}.{ending}.index.json"
    assert refusal(sharded) == f"{sharded / shard(ending, 2)}: named in {index} but absent; fetch the missing shard"


def test_swapped_shards_are_refused(sharded: Path, ending: str) -> None:
    one, two = (sharded / shard(ending, i) for i in (1, 2))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    message = refusal(sharded)
    assert message.startswith(
        f"{one}: tensor '{NAMES[0]}' is named in {STEM[ending]}.{ending}.index.json but is not in "
    )
    assert "(3 such); the shard and the index come from different saves, fetch both again" in message


def test_a_tensor_in_two_shards_is_that_of_the_shard_that_the_index_names(sharded: Path, ending: str) -> None:
    write(sharded / shard(ending, 2), {NAMES[2]: torch.ones(1), NAMES[3]: TENSORS[NAMES[3]]})
    assert_holds(sharded, TENSORS)


def test_a_tensor_that_two_shards_hold_and_no_index_names_is_refused(sharded: Path, ending: str) -> None:
    write(sharded / shard(ending, 2), {name: TENSORS[name] for name in NAMES[2:]})
    next(sharded.glob("*.json")).unlink()
    message = refusal(sharded)
    assert message.startswith(f"{sharded / shard(ending, 2)}: tensor '{NAMES[2]}' also stands in {shard(ending, 1)}; ")


def test_the_same_tensor_in_two_legacy_shards_is_refused(tmp_path: Path) -> None:
    for i in (1, 2):
        torch.save(TENSORS, tmp_path / shard("bin", i), _use_new_zipfile_serialization=False)
    assert f"also stands in {shard('bin', 1)}" in refusal(tmp_path)


@pytest.mark.parametrize("letter", ["a", "é", "\u6a21", "\U0001f600"])
def test_the_name_of_a_shard_may_have_as_many_bytes_as_file_systems_take(
    tmp_path: Path, ending: str, letter: str
) -> None:
    most = (255 - len(f".{ending}")) // len(letter.encode())
    name = f"{letter * most}.{ending}"
    write(tmp_path / name, TENSORS)
    write_index(tmp_path, ending, dict.fromkeys(TENSORS, name))
    assert_holds(tmp_path, TENSORS)
    write_index(tmp_path, ending, dict.fromkeys(TENSORS, letter + name))
    assert "is not the name of a file; fetch the index again" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "..",
        ".",
        "",
        "sub/../../outside",
        "/etc/passwd",
        "\0",
        "a\0.safetensors",
        3,
        None,
        ["a"],
        {"a": "b"},
        True,
    ],
)
def test_an_index_leads_nowhere_but_into_its_folder(tmp_path: Path, ending: str, name: object) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    write(tmp_path / f"outside.{ending}", TENSORS)
    index = write_index(folder, ending, {NAMES[0]: f"{name}.{ending}" if str(name).endswith("outside") else name})
    message = refusal(folder)
    assert message.startswith((f"{index}: shard ", f"{folder}: expected a .safetensors or .bin file"))


def test_shards_may_lie_in_a_folder_of_their_own(tmp_path: Path, sharded: Path, ending: str) -> None:
    (tmp_path / "weights").mkdir()
    for number in (1, 2):
        (sharded / shard(ending, number)).rename(tmp_path / "weights" / shard(ending, number))
    write_index(sharded, ending, {name: f"weights/{shard(ending, 1 + (i > 2))}" for i, name in enumerate(NAMES)})
    assert_holds(sharded, TENSORS)


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("lost", [1, 2])
def test_a_part_is_never_the_whole(tmp_path: Path, sharded: Path, ending: str, lost: int, indexed: bool) -> None:
    (sharded / shard(ending, lost)).unlink()
    index = sharded / f"{STEM[ending]}.{ending}.index.json"
    index.unlink()
    if indexed:
        # An index of the part alone, as an interrupted conversion leaves it.
        held = NAMES[3:] if lost == 1 else NAMES[:3]
        write_index(sharded, ending, dict.fromkeys(held, shard(ending, 3 - lost)))
    assert refusal(sharded).startswith(
        f"{index if indexed else sharded}: holds 1 of 2 shards named {STEM[ending]}-…-of-00002, "
        f"and lacks number {lost}; "
    )


def test_shards_may_be_counted_from_nought(tmp_path: Path, ending: str) -> None:
    for number, names in enumerate((NAMES[:3], NAMES[3:])):
        write(tmp_path / shard(ending, number), {name: TENSORS[name] for name in names})
    assert_holds(tmp_path, TENSORS)


def test_a_shard_of_another_format_is_refused(tmp_path: Path, ending: str) -> None:
    write_index(tmp_path, ending, {NAMES[0]: "model.h5"})
    (tmp_path / "model.h5").write_bytes(b"HDF")
    assert refusal(tmp_path).startswith(f"{tmp_path / 'model.h5'}: expected a .safetensors or .bin file; ")


def refusal_beside_a_pipe(path: Path, pipe: Path) -> str:
    """The refusal; who waits at the pipe all the same is let go after five seconds, and the test fails."""
    # Of another process, since a thread cannot run while compiled code waits.
    with subprocess.Popen(["sh", "-c", 'while sleep 5; do : <> "$0"; done', pipe]) as letting_go:
        try:
            return refusal(path)
        finally:
            letting_go.kill()


@pytest.mark.parametrize("place", ["single", "alone", "in the index", "without index"])
def test_a_pipe_in_place_of_weights_is_not_waited_for(tmp_path: Path, ending: str, place: str) -> None:
    file = tmp_path / (f"{STEM[ending]}.{ending}" if place in ("single", "alone") else shard(ending, 1, of=1))
    os.mkfifo(file)
    if place == "in the index":
        write_index(tmp_path, ending, {NAMES[0]: file.name})
    message = refusal_beside_a_pipe(file if place == "alone" else tmp_path, file)
    assert message.startswith(f"{file}: expected a ")


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_a_pipe_in_place_of_an_index_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    message = refusal_beside_a_pipe(tmp_path, tmp_path / name)
    assert message == f"{tmp_path / name}: expected a file of JSON of at most {MOST_JSON} bytes; fetch it again"


def test_a_pointer_of_git_lfs_in_place_of_weights_is_told(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"{STEM[ending]}.{ending}"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    assert refusal(tmp_path) == f"{file}: a pointer of Git LFS, not the weights: run `git lfs pull` in its folder"


def test_what_a_directory_without_weights_holds_is_counted(tmp_path: Path) -> None:
    assert refusal(tmp_path).endswith(", got nothing")
    for name in ("a.gguf", "b.gguf", "README"):
        (tmp_path / name).touch()
    assert refusal(tmp_path).endswith(", got 2 .gguf, 1 README")


def test_a_directory_in_place_of_weights_is_refused(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"{STEM[ending]}.{ending}").mkdir()
    assert refusal(tmp_path).startswith(f"{tmp_path / f'{STEM[ending]}.{ending}'}: expected a ")


def test_links_are_followed_as_the_cache_of_the_hub_has_them(tmp_path: Path, ending: str) -> None:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    write(tmp_path / f"blob.{ending}", TENSORS)
    (folder / f"{STEM[ending]}.{ending}").symlink_to(tmp_path / f"blob.{ending}")
    assert_holds(folder, TENSORS)


def test_the_configuration_of_a_directory(tmp_path: Path) -> None:
    assert read_config(tmp_path) == {}
    (tmp_path / "config.json").write_text('{"hidden_size": 8, "name": "é"}', encoding="utf-8")
    assert read_config(tmp_path) == {"hidden_size": 8, "name": "é"}
    assert read_config(tmp_path / "config.json") == {}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "not readable as JSON"),
        (b"", "not readable as JSON"),
        (b"\xff{}", "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),
        (b"[]", "expected a JSON object, got list; fetch it again"),
        (b"null", "expected a JSON object, got NoneType; fetch it again"),
    ],
    ids=["open", "empty", "no text", "deep", "list", "null"],
)
def test_json_that_is_broken_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_json(file)
    assert str(caught.value).startswith(f"{file}: {problem}")
