"""Files and folders that are complete at any moment: written beside their place, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from visionattn.errors import RunError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write to, which takes the place of `path` when the block ends well.

    The block writes a file or makes a folder. If it fails, nothing of it is left and `path` is as it was.
    Folders above `path` are made.

    Raises:
        RunError: the disk is full.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield beside
            if beside.is_dir():
                _open_to_readers(beside)
            os.replace(beside, path)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside)
        else:
            beside.unlink(missing_ok=True)


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say in one sentence that there is no room for what the block writes to `path`.

    Raises:
        RunError: the disk or the quota is full, or the file would be larger than is allowed.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        reason = os.strerror(error.errno).lower()
        raise RunError(f"cannot write {path}: {reason}; what was saved before is untouched") from error


def remove_half_written(folder: Path) -> None:
    """Remove the files that processes which were killed inside `replacing` left in a folder."""
    for stray in folder.rglob(".*"):
        if stray.suffix[1:].isdigit():
            stray.unlink(missing_ok=True)


def _open_to_readers(folder: Path) -> None:
    """Give files the mode of their folder: safetensors writes such as only their owner can read."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(folder.stat().st_mode & 0o666)
