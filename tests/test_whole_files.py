"""Files and folders that are replaced whole or not at all."""

from __future__ import annotations

import errno
import os
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from visionattn.errors import InputError, RunError, WriteError
from visionattn.files import (
    check_folder,
    refuse_inputs,
    remove_half_written,
    replacing,
    unique_stems,
    why_unwritable,
)


class Interrupted(Exception):
    pass


def test_a_write_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def half() -> None:
        with replacing(path) as beside:
            beside.write_text("ne")
            raise Interrupted

    with pytest.raises(Interrupted):
        half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    def full() -> None:
        with replacing(tmp_path / "a"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(RunError, match="no space left on device"):
        full()


def test_a_folder_is_there_whole_and_others_may_read_its_files(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        with replacing(tmp_path / "above/folder") as beside:
            beside.mkdir()
            save_file({"x": torch.ones(1)}, beside / "x.safetensors")
            assert not (tmp_path / "above/folder").exists()
    finally:
        os.umask(umask)
    assert (tmp_path / "above/folder/x.safetensors").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in (tmp_path / "above").iterdir()] == ["folder"]


def test_remains_of_killed_processes_are_removed(tmp_path: Path) -> None:
    mine = [".bashrc.20240131", ".kept.txt", ".visionattn-notes-1.part", "kept"]
    (tmp_path / "checkpoints").mkdir()
    for name in (*mine, "checkpoints/.visionattn-0123456789ab-4711.part"):
        (tmp_path / name).touch()
    remove_half_written(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == mine
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("name", ["file/a", "folder", "n" * 256])
def test_places_where_nothing_can_be_written_are_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()

    def write() -> None:
        with replacing(tmp_path / name) as beside:
            beside.write_text("new")

    assert why_unwritable(tmp_path / name) is not None
    with pytest.raises(
        WriteError, match=r"cannot write .*: (file name too long|not a directory|is a directory|file exists)"
    ):
        write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_the_longest_name_can_be_written_and_errors_of_other_files_pass(tmp_path: Path) -> None:
    with replacing(tmp_path / ("n" * 255)) as beside:
        beside.write_text("new")
    assert why_unwritable(tmp_path / ("n" * 255)) is None

    def read() -> None:
        with replacing(tmp_path / "a"):
            (tmp_path / "missing.png").read_bytes()

    with pytest.raises(FileNotFoundError):
        read()


def test_folders_for_results_are_checked_before_work_starts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    check_folder(tmp_path / "new/and/newer")
    for name in ("file", "file/out", "lost", "n" * 256):
        with pytest.raises(InputError, match="cannot write to"):
            check_folder(tmp_path / name)


def test_results_in_the_place_of_inputs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x").touch()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    refuse_inputs([tmp_path / "a/y"], [tmp_path / "a/x", tmp_path / "a/missing"])
    with pytest.raises(InputError, match=r"b/x would replace the input .*a/x"):
        refuse_inputs([tmp_path / "b/x"], [tmp_path / "a/x"])


@given(st.lists(st.text("aB.\u00e9\u0065\u0301_2", min_size=1, max_size=5), unique=True, max_size=8))
def test_names_of_results_are_unique_on_every_file_system(names: list[str]) -> None:
    found = unique_stems([Path(name) for name in names if name.strip(".")])
    assert len({unicodedata.normalize("NFC", name).casefold() for name in found}) == len(found)


def test_names_of_results() -> None:
    def stems(*names: str) -> list[str]:
        return unique_stems([Path(name) for name in names])

    assert stems("a.png", "b.jpg") == ["a", "b"]
    assert stems("a.png", "a.jpg", "a.png.png") == ["a.png", "a.jpg", "a.png.png"]
    assert stems("a.png", "A.jpg") == ["a.png", "A.jpg"]
    assert stems("x/a.png", "y/a.png") == ["a.png", "a.png_2"]
