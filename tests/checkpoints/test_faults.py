from __future__ import annotations

import json
import warnings
from collections import Counter
from io import FileIO
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from delta_analysis._errors import CheckpointError
from delta_analysis.checkpoints.tensors import InFile
from delta_analysis.deltas.delta import load_delta
from delta_analysis.deltas.ranges import value_ranges
from delta_analysis.deltas.tally import PIECE
from tests.checkpoints.faults import child
from tests.checkpoints.faults.good import TORCH, torch_bytes

LONG = 4 * PIECE


def test_two_thousand_faults_end_in_our_error_or_in_the_right_numbers(
    tmp_path: Path, processes: ForkServerContext
) -> None:
    folders = [tmp_path / "even", tmp_path / "odd"]
    children = [processes.Process(target=child.main, args=(folder, "", i, 2)) for i, folder in enumerate(folders)]
    for each in children:
        each.start()
    found: list[tuple[str, str]] = []
    for each, folder in zip(children, folders, strict=True):
        each.join()
        assert each.exitcode == 0, f"ended with {each.exitcode} in {(folder / 'label').read_text(encoding='utf-8')!r}"
        found += json.loads((folder / "results.json").read_text(encoding="utf-8"))
    bad = {label: outcome for label, outcome in found if outcome not in ("read", "refused")}
    assert not bad, "\n\n".join(
        [f"{len(bad)} of {len(found)}", *(f"{a}: {b[:1500]}" for a, b in list(bad.items())[:20])]
    )
    count = Counter(outcome for _, outcome in found)
    assert min(count["read"], count["refused"]) > 500, count
    faults = [label for label, _ in found if label.startswith("faulty")]
    assert len(set(faults)) == len(faults) > 2000


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    """A base and a fine-tune of several pieces."""
    for name, value in (("base", 1.0), ("finetuned", 1.5)):
        (tmp_path / name).mkdir()
        save_file({"a.weight": torch.full((LONG,), value)}, tmp_path / name / "model.safetensors")
    return tmp_path / "base" / "model.safetensors", tmp_path / "finetuned" / "model.safetensors"


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("lost", [1, 2 * LONG, 4 * LONG, None])
def test_a_file_that_shrinks_after_opening_is_reported(sides: tuple[Path, Path], side: int, lost: int | None) -> None:
    delta = load_delta(base=sides[0], finetuned=sides[1])
    whole = sides[side].read_bytes()
    sides[side].write_bytes(b"" if lost is None else whole[:-lost])
    with pytest.raises(CheckpointError) as caught:
        value_ranges(delta)
    assert str(caught.value).startswith(f"{sides[side]}: tensor 'a.weight' cannot be read: it ends ")


@pytest.mark.parametrize("side", [0, 1])
def test_a_file_that_is_removed_after_opening_is_reported(sides: tuple[Path, Path], side: int) -> None:
    delta = load_delta(base=sides[0], finetuned=sides[1])
    sides[side].unlink()
    with pytest.raises(CheckpointError, match="tensor 'a.weight' cannot be read: No such file"):
        value_ranges(delta)


@pytest.mark.parametrize("reads", [1, 2, 5])
@pytest.mark.parametrize("side", [0, 1])
def test_a_file_that_shrinks_in_the_midst_of_the_pass_is_reported(
    sides: tuple[Path, Path], side: int, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = load_delta(base=sides[0], finetuned=sides[1])
    read_into, done = InFile.read_into, []

    def shrinking(self: InFile, file: FileIO, out: torch.Tensor, start: int) -> None:
        read_into(self, file, out, start)
        done.append(start)
        if len(done) == reads:
            with sides[side].open("r+b") as opened:
                opened.truncate(sides[side].stat().st_size - 4 * PIECE)

    monkeypatch.setattr(InFile, "read_into", shrinking)
    with pytest.raises(CheckpointError) as caught:
        value_ranges(delta)
    assert str(caught.value).startswith(f"{sides[side]}: tensor 'a.weight' cannot be read: it ends {4 * PIECE} bytes")
    assert len(done) > reads


def test_a_read_error_of_the_disk_is_reported(sides: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    delta = load_delta(base=sides[0], finetuned=sides[1])

    class Failing(FileIO):
        def readinto(self, buffer: object) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(InFile, "open", lambda self: Failing(self.file))
    with pytest.raises(
        CheckpointError, match=r"tensor 'a\.weight' cannot be read: Input/output error; .*fetch it again"
    ):
        value_ranges(delta)


def test_entries_that_are_no_numbers_are_counted_by_tensor_and_left_out(tmp_path: Path) -> None:
    values = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf, 3.0, 0.0])
    for name, tensors in (
        ("base", {"a.weight": torch.zeros(6), "b.weight": torch.ones(2)}),
        ("finetuned", {"a.weight": values, "b.weight": torch.ones(2)}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / TORCH).write_bytes(torch_bytes(tensors))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = value_ranges(load_delta(base=tmp_path / "base", finetuned=tmp_path / "finetuned")).set_index("tensor")
    assert table["nonfinite"].to_dict() == {"a.weight": 3, "b.weight": 0}
    assert table.loc["a.weight", ["mean", "min", "max", "zero_share"]].tolist() == pytest.approx([4 / 3, 0, 3, 1 / 3])
    assert any(
        "1 of 2 tensors have NaN or infinite entries on either side: 'a.weight' has 3 of 6" in str(warning.message)
        for warning in caught
    )
