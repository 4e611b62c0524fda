"""Headers of weight files as safetensors and torch write them, and files that would harm."""

from __future__ import annotations

import io
import json
import os
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from delta_analysis._errors import CheckpointError
from delta_analysis.checkpoints.files import MOST_PICKLED, NESTED, SAFETENSORS_DTYPES, read_header
from delta_analysis.checkpoints.tensors import InFile, TensorReference
from tests.deltas.test_delta import normal

DTYPES = list(SAFETENSORS_DTYPES.values())


def refusal(file: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    return message


def assert_holds(entries: dict[str, TensorReference], tensors: dict[str, torch.Tensor]) -> None:
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        entry = entries[name]
        read = entry.read()
        assert (entry.shape, entry.dtype) == (tuple(tensor.shape), tensor.dtype), name
        assert read.flatten().tolist() == tensor.flatten().tolist(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_of_safetensors_lies_where_the_header_says(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": (normal(0, 3, 5) * 9).to(dtype), "b": torch.ones(7).to(dtype), "empty": torch.empty(0, 2).to(dtype)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt", "a": "no tensor"})
    assert_holds(read_header(tmp_path / "a.safetensors"), tensors)


def test_a_scalar_of_safetensors(tmp_path: Path) -> None:
    save_file({"scale": torch.tensor(2.5)}, tmp_path / "a.safetensors")
    assert read_header(tmp_path / "a.safetensors")["scale"].read().item() == 2.5


def test_a_dtype_that_this_package_does_not_know_is_named(tmp_path: Path) -> None:
    header = json.dumps({"a.weight": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    assert refusal(file).startswith(f"{file}: tensor 'a.weight' is stored as F8_E8M0: fp8 codes, which mean nothing")


def written(file: Path, tensors: object, *, legacy: bool = False) -> Path:
    torch.save(tensors, file, _use_new_zipfile_serialization=not legacy)
    return file


@pytest.mark.parametrize("key", NESTED)
def test_of_a_training_runs_file_the_weights_are_read(tmp_path: Path, key: str) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    whole = {"epoch": 3, key: model.state_dict(), "optimizer_states": [optimizer.state_dict()], "loss": torch.ones(())}
    file = written(tmp_path / "pytorch_model.bin", whole)
    assert_holds(read_header(file), {name: tensor.detach() for name, tensor in model.state_dict().items()})
    assert "holds other tensors beside the weights" in refusal(written(file, whole, legacy=True))


def test_what_a_training_run_keeps_is_never_made(tmp_path: Path) -> None:
    file = written(tmp_path / "pytorch_model.bin", {"state_dict": {"a.weight": torch.ones(2)}, "args": Namespace(lr=1)})
    message = refusal(file)
    assert "not a readable checkpoint of tensors" in message
    assert message.endswith("or, of a training run's own file, save its 'state_dict' by itself and open that")


TENSORS = {
    "a.weight": normal(0, 3, 5).bfloat16(),
    "b.weight": normal(1, 4).half(),
    "c.weight": normal(2, 2, 3, 4).double(),
    "scale": torch.tensor(7.0),
    "ids": torch.arange(5),
    "empty": torch.empty(0, 3),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("parameter", [False, True])
def test_a_bin_file_holds_what_torch_saved(tmp_path: Path, legacy: bool, parameter: bool) -> None:
    def kept(tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.Parameter(tensor) if parameter and tensor.is_floating_point() else tensor

    tensors = {name: kept(tensor) for name, tensor in TENSORS.items()}
    entries = read_header(written(tmp_path / "pytorch_model.bin", tensors, legacy=legacy))
    assert_holds(entries, TENSORS)
    assert {type(entry) for entry in entries.values()} == {InFile}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_views_of_one_storage_are_read_where_they_lie(tmp_path: Path, legacy: bool) -> None:
    whole = normal(0, 6, 4)
    tensors = {
        "whole": whole,
        "again": whole,
        "last rows": whole[4:],
        "flat": whole.view(-1),
        "by columns": whole.T,
        "columns of some rows": whole[2:5].T,
        "permuted": whole.view(2, 3, 4).permute(2, 0, 1),
        "an entry": whole[5, 3],
        "one row, of any stride": whole[:1].T,
    }
    assert_holds(read_header(written(tmp_path / "pytorch_model.bin", tensors, legacy=legacy)), tensors)


@settings(deadline=None, max_examples=30)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    data=st.data(),
    first=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_permuted_tensor_behind_any_offset_is_read(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], data: st.DataObject, first: int, dtype: torch.dtype
) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    numel = torch.Size(shape).numel()
    tensor = normal(0, first + numel + 2).to(dtype)[first : first + numel].view(shape).permute(order)
    file = tmp_path_factory.getbasetemp() / "pytorch_model.bin"
    assert_holds(read_header(written(file, {"a": tensor})), {"a": tensor})


@pytest.mark.parametrize(
    "view",
    [torch.arange(12.0).view(3, 4)[:, :2], torch.arange(12.0)[::2], torch.ones(1).expand(5)],
    ids=["columns", "every other", "expanded"],
)
def test_a_view_that_skips_or_repeats_entries_of_a_zip_is_refused(tmp_path: Path, view: torch.Tensor) -> None:
    message = refusal(written(tmp_path / "pytorch_model.bin", {"a.weight": view}))
    assert "tensor 'a.weight' is a view that skips or repeats entries" in message


def test_a_small_pickle_of_a_large_tensor_is_refused(tmp_path: Path) -> None:
    # An expanded tensor takes four bytes of a file, and terabytes in memory.
    huge = torch.ones(1).expand(2**40)
    for legacy in (False, True):
        assert "repeats entries" in refusal(written(tmp_path / "pytorch_model.bin", {"a": huge}, legacy=legacy))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([torch.ones(2)], "it holds a list, not a dict from name to tensor"),
        (torch.ones(2), "it holds a View, not a dict"),
        ({"epoch": 3}, "'epoch' is a int, where a name and a tensor were expected"),
        ({"ema": {"a": torch.ones(2)}}, "'ema' is a dict, where a name and a tensor were expected"),
        ({0: torch.ones(2)}, "it has the number 0 where the name of a tensor was expected"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_anything_but_named_tensors_is_refused(tmp_path: Path, content: object, problem: str, legacy: bool) -> None:
    assert problem in refusal(written(tmp_path / "pytorch_model.bin", content, legacy=legacy))


class Harm:
    """Creates a file when it is unpickled."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.flag),)


def in_a_zip(file: Path, harm: object) -> None:
    torch.save({"a.weight": harm}, file)


def behind_legacy_magic(file: Path, harm: object) -> None:
    torch.save({"a.weight": harm}, file, _use_new_zipfile_serialization=False)


FORMS = [in_a_zip, behind_legacy_magic]


@pytest.mark.parametrize("write", FORMS, ids=lambda write: write.__name__)
def test_no_pickle_is_ever_run(tmp_path: Path, write: Callable[[Path, object], None]) -> None:
    flag, file = tmp_path / "harmed", tmp_path / "pytorch_model.bin"
    write(file, Harm(flag))
    message = refusal(file)
    assert not flag.exists()
    assert "not a readable checkpoint of tensors" in message
    assert "posix.mkdir" in message and "code in it is never run" in message
    assert "safetensors" in message
    # Torch's own text proposes to load it all the same.
    assert "weights_only" not in message


def rezipped(
    file: Path, change: Callable[[zipfile.ZipInfo, bytes], bytes | None], compression: int = zipfile.ZIP_STORED
) -> None:
    """Write the archive anew, without torch's padding, with each record changed or left out."""
    good = io.BytesIO(file.read_bytes())
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(file, "w", compression) as target:
        for info in source.infolist():
            content = change(info, source.read(info))
            if content is not None:
                target.writestr(info.filename, content)


def test_an_archive_as_older_versions_of_torch_wrote_it_is_read(tmp_path: Path) -> None:
    file = written(tmp_path / "pytorch_model.bin", TENSORS)
    newer = (".format_version", ".storage_alignment", "byteorder", "serialization_id")
    rezipped(file, lambda info, content: None if info.filename.endswith(newer) else content)
    assert_holds(read_header(file), TENSORS)


def test_an_archive_whose_records_are_not_where_torch_puts_them_is_read(tmp_path: Path) -> None:
    file = written(tmp_path / "pytorch_model.bin", TENSORS)
    rezipped(file, lambda info, content: content)
    assert_holds(read_header(file), TENSORS)


def test_a_storage_that_is_no_record_of_data_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "pytorch_model.bin", {"a.weight": torch.ones(2)})

    def misled(info: zipfile.ZipInfo, content: bytes) -> bytes:
        return (
            content.replace(b"X\1\0\0\x000", b"X\x14\0\0\0pytorch_model/secret") if ".pkl" in info.filename else content
        )

    rezipped(file, misled)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("pytorch_model/secret", bytes(8))
    assert "KeyError: 'pytorch_model/secret'" in refusal(file)


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "pytorch_model.bin", {"a.weight": torch.zeros(2**20)})
    rezipped(file, lambda info, content: content, zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 2**16
    assert "compressed or encrypted records, which torch never writes" in refusal(file)


def test_a_pickle_too_large_for_names_is_refused_unread(tmp_path: Path) -> None:
    file = written(tmp_path / "pytorch_model.bin", {"a.weight": torch.zeros(2)})
    rezipped(file, lambda info, content: bytes(MOST_PICKLED + 1) if info.filename.endswith(".pkl") else content)
    assert f"its pickle is larger than {MOST_PICKLED} bytes" in refusal(file)


def test_entries_of_another_byte_order_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "pytorch_model.bin", {"a.weight": torch.ones(2)})
    rezipped(file, lambda info, content: b"big" if info.filename.endswith("byteorder") else content)
    assert "its entries are not little-endian" in refusal(file)
