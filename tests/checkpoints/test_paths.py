"""Files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from delta_analysis.checkpoints.paths import find_input, writable_folder, written_whole


def test_a_reader_of_the_old_file_keeps_it_and_a_new_one_has_the_new(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "table.txt"
    with written_whole(path) as partial:
        partial.write_text("old and long")
    with path.open() as reader:
        with written_whole(path) as partial:
            partial.write_text("new")
            assert path.read_text() == "old and long"
        assert reader.read() == "old and long"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_appears_with_all_that_it_holds(tmp_path: Path) -> None:
    with written_whole(tmp_path / "model") as partial:
        partial.mkdir()
        (partial / "weights").write_text("1")
        assert not (tmp_path / "model").exists()
    assert (tmp_path / "model" / "weights").read_text() == "1"


def test_a_folder_that_cannot_be_written_is_found_out_at_once(tmp_path: Path) -> None:
    assert writable_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert not list((tmp_path / "a" / "b").iterdir())
    with pytest.raises(OSError):
        writable_folder("/proc/self")


def test_a_link_to_a_file_keeps_its_name_and_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "0123abcd").touch()
    (tmp_path / "folder" / "model.safetensors").symlink_to("0123abcd")
    (tmp_path / "link").symlink_to("folder")
    assert find_input(tmp_path / "link" / "model.safetensors") == tmp_path.resolve() / "folder" / "model.safetensors"
    assert find_input(tmp_path / "link") == tmp_path.resolve() / "folder"


@pytest.mark.parametrize("folder", [False, True])
def test_what_fails_leaves_nothing(folder: bool, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "out") as partial:
        if folder:
            partial.mkdir()
        (partial / "weights" if folder else partial).write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
