"""Files and folders that are complete at any moment: written beside their place, then renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from visionattn.errors import InputError, RunError, WriteError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A name that no user gives, and that is short, however long the name of the file is.
_BESIDE = re.compile(r"\.visionattn-[0-9a-f]{12}-\d+\.part")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write to, which takes the place of `path` when the block ends well.

    The block writes a file or makes a folder. If it fails, nothing of it is left and `path` is as it was.
    Folders above `path` are made.

    Raises:
        RunError: the disk is full.
        WriteError: there can be no such file.
    """
    path = Path(path)
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]
    beside = path.with_name(f".visionattn-{name}-{os.getpid()}.part")
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
        elif os.path.lexists(beside):
            beside.unlink()


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say in one sentence why what the block writes to `path` cannot be written.

    Errors of files elsewhere, which the block reads, pass unchanged.

    Raises:
        RunError: the disk or the quota is full, or the file would be larger than is allowed.
        WriteError: a folder above it is a file, the name is too long, the permission is missing, or the like.
    """
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno is not None else ""
        if error.errno in _NO_ROOM:
            raise RunError(f"cannot write {path}: {reason}; what was saved before is untouched") from error
        if error.errno is None or not _belongs(error.filename, Path(path)):
            raise
        raise WriteError(f"cannot write {path}: {reason}") from error


def _belongs(name: object, path: Path) -> bool:
    """Whether the file that an error names, if any, lies where `path` is written: beside it or above it."""
    if not isinstance(name, (str, bytes)):
        return name is None
    named = Path(os.fsdecode(name)).absolute()
    return path.absolute().is_relative_to(named) or any(
        _BESIDE.fullmatch(part.name) for part in (named, *named.parents)
    )


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder for results in which none can be written, before work starts. It need not exist yet.

    Raises:
        InputError: one sentence on what stands in the way.
    """
    place = Path(folder).absolute()
    for above in (place, *place.parents):
        if os.path.lexists(above):
            reason = why_unwritable(above / "result") if above.is_dir() else f"{above} is no folder"
            break
        if (reason := why_unwritable(above)) is not None:
            break
    if reason is not None:  # pyright: ignore[reportPossiblyUnbound]
        raise InputError(f"cannot write to {folder}: {reason}")


def why_unwritable(path: Path) -> str | None:
    """Why no file can stand at `path`, as far as is known before it is written; None where one can."""
    try:
        path.lstat()
        exists = True
    except FileNotFoundError:
        exists = False
    except OSError as error:  # the name is too long, or a file is where a folder would have to be
        return f"{path}: {os.strerror(error.errno or 0).lower()}"
    if exists and path.is_dir():
        return f"{path} is a folder"
    folder = path.parent
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        return f"there is no permission to write in {folder}"
    return None


def refuse_inputs(targets: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Refuse results that would take the place of files that are read.

    Raises:
        InputError: names the result and the input.
    """
    # Not `Path.exists`, which does not bear names that are too long.
    read = {_identity(file): file for file in inputs if os.path.exists(file)}
    for target in targets:
        if os.path.exists(target) and (file := read.get(_identity(target))) is not None:
            raise InputError(f"the result {target} would replace the input {file}: choose another output")


def _identity(path: Path) -> tuple[int, int]:
    """The same for one file under whatever name."""
    status = path.stat()
    return status.st_dev, status.st_ino


def unique_stems(files: Sequence[Path]) -> list[str]:
    """A name for the result of each file, without ending; no two are one, on no file system.

    It is the stem of the file, or its whole name where others share the stem or are called so, or that and a
    number where even these meet.
    """
    stems = Counter(_folded(file.stem) for file in files)
    wholes = Counter(_folded(file.name) for file in files if file.suffix)
    names: list[str] = []
    taken: set[str] = set()
    for file in files:
        alone = stems[_folded(file.stem)] == 1 and not wholes[_folded(file.stem)]
        name, number = file.stem if alone else file.name, 1
        while _folded(name) in taken:
            number += 1
            name = f"{file.name}_{number}"
        names.append(name)
        taken.add(_folded(name))
    return names


def _folded(name: str) -> str:
    """The same for names that some file systems take for one: of other case, or composed otherwise."""
    return unicodedata.normalize("NFC", name).casefold()


def remove_half_written(folder: Path) -> None:
    """Remove the files that processes which were killed inside `replacing` left in a folder."""
    for stray in folder.rglob(".visionattn-*.part"):
        if _BESIDE.fullmatch(stray.name) and stray.is_file():
            stray.unlink(missing_ok=True)


def _open_to_readers(folder: Path) -> None:
    """Give files the mode of their folder: safetensors writes such as only their owner can read."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(folder.stat().st_mode & 0o666)
