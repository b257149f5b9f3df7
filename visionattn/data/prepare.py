"""Prepares sets of images for training, as BasicSR does: pieces of large images, and LMDB."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from visionattn.data.files import ImageSource, check_lmdb_key, import_lmdb, list_by_stem, source_bytes
from visionattn.data.pictures import Picture, encode_picture, read_picture, write_picture
from visionattn.files import check_folder, replacing

_PNG_LEVEL = 1  # BasicSR's: decoding is what must be fast


def cut_pieces(folder: str | Path, output: str | Path, size: int, step: int) -> int:
    """Cut the images of a folder into overlapping squares, which are read faster than whole images.

    The last row and column of pieces end at the borders of the image. Pieces are called `0001_s001.png`; a
    scale in which the names of all files end, as in `0001x4.png`, is left out, so that inputs and truths bear
    one name. Bits per channel, transparency and profile stay as they are.

    Args:
        folder: image files.
        output: the folder to be made.
        size: side of a piece in pixels: 480 for truths, 480 / scale for their inputs.
        step: distance of two pieces: 240, or 240 / scale.

    Returns:
        How many pieces there are.

    Raises:
        ValueError: something is at the place of the output, a size or step is below 1, or an image is
            smaller than a piece.
        FileNotFoundError: the folder is missing or holds no image.
        ImageError: a file is not an image.
    """
    if size < 1 or step < 1:
        raise ValueError(f"size and step must be at least 1, got {size} and {step}")
    files = list_by_stem(folder)
    names = _without_scale(list(files))

    def cut(stem: str) -> int:
        picture = _read(files[stem])
        height, width = picture.color.shape[1:]
        if min(height, width) < size:
            raise ValueError(f"{files[stem]}: {height}x{width} pixels are less than {size}")
        corners = [(top, left) for top in _starts(height, size, step) for left in _starts(width, size, step)]
        for number, (top, left) in enumerate(corners, start=1):
            cut = (slice(None), slice(top, top + size), slice(left, left + size))
            alpha = None if picture.alpha is None else picture.alpha[cut]
            piece = replace(picture, color=picture.color[cut], alpha=alpha)
            write_picture(piece, beside / f"{names[stem]}_s{number:03d}.png", compression=_PNG_LEVEL)
        return len(corners)

    with _new_folder(Path(output)) as beside, ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(pool.map(cut, files))


def make_lmdb(folder: str | Path, database: str | Path) -> int:
    """Store the images of a folder as an LMDB that this library and BasicSR read, with all of their bits.

    Args:
        folder: image files.
        database: the folder to be made, called `*.lmdb`.

    Returns:
        How many images it holds.

    Raises:
        ValueError: the name does not end in .lmdb, something is at its place, or a file has a name that
            cannot be a key.
        FileNotFoundError: the folder is missing or holds no image.
        ImageError: a file is not an image.
        ModuleNotFoundError: the package lmdb is not installed.
    """
    database = Path(database)
    if database.suffix != ".lmdb":
        raise ValueError(f"an LMDB must be called *.lmdb, not {database}")
    lmdb, files, lines = import_lmdb(), list_by_stem(folder), []
    for key in files:
        check_lmdb_key(key)
    with _new_folder(database) as beside:
        environment = lmdb.open(str(beside), map_size=1 << 30, sync=False)
        for key, file in files.items():
            picture = _read(file)
            content = encode_picture(picture, file, compression=_PNG_LEVEL)
            _put(environment, key, content, lmdb.MapFullError)
            channels = len(picture.color) + (picture.alpha is not None)
            height, width = picture.color.shape[1:]
            lines.append(f"{key}.png ({height},{width},{channels}) {_PNG_LEVEL}\n")
        environment.sync(True)
        environment.close()
        (beside / "meta_info.txt").write_text("".join(lines), encoding="utf-8")
    return len(files)


@contextmanager
def _new_folder(place: Path) -> Iterator[Path]:
    """A folder to fill, which takes its place when the block ends well."""
    if os.path.lexists(place):
        raise ValueError(f"there is something at {place} already")
    check_folder(place.parent)
    with replacing(place) as beside:
        beside.mkdir()
        yield beside


def _read(source: ImageSource) -> Picture:
    """A picture without its EXIF data, which training does not need."""
    return replace(read_picture(str(source), source_bytes(source)), exif=None)


def _without_scale(stems: list[str]) -> dict[str, str]:
    """Names by stems: without the scale in which all of them end, or as they are."""
    found = {re.sub(r"^.*(x\d)$|^.*$", r"\1", stem) for stem in stems}
    scale = found.pop() if len(found) == 1 else ""
    return {stem: stem.removesuffix(scale) for stem in stems}


def _starts(side: int, size: int, step: int) -> list[int]:
    starts = list(range(0, side - size + 1, step))
    return starts if starts[-1] + size == side else [*starts, side - size]


def _put(environment: Any, key: str, value: bytes, full: type[Exception]) -> None:
    try:
        with environment.begin(write=True) as transaction:
            transaction.put(key.encode(), value)
    except full:
        environment.set_mapsize(2 * environment.info()["map_size"] + len(value))
        _put(environment, key, value, full)
