"""Files and folders that are replaced whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from visionattn.errors import RunError
from visionattn.files import remove_half_written, replacing


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
    for name in ("kept", ".kept", ".kept.txt", ".gone.txt.4711"):
        (tmp_path / name).touch()
    remove_half_written(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".kept", ".kept.txt", "kept"]
