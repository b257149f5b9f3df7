"""Prepares sets of images for training, as BasicSR does: pieces of large images, and LMDB."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from visionattn.data.files import import_lmdb, list_by_stem
from visionattn.data.images import open_image
from visionattn.files import replacing

_PNG_LEVEL = 1  # BasicSR's: decoding is what must be fast


def cut_pieces(folder: str | Path, output: str | Path, size: int, step: int) -> int:
    """Cut the images of a folder into overlapping squares, which are read faster than whole images.

    The last row and column of pieces end at the borders of the image. Pieces are called `0001_s001.png`; the
    scale in the name of an input, as in `0001x4.png`, is left out, so that inputs and truths bear one name.

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

    def cut(stem: str) -> int:
        image = open_image(str(files[stem]))
        if min(image.size) < size:
            raise ValueError(f"{files[stem]}: {image.height}x{image.width} pixels are less than {size}")
        name = re.sub(r"x\d+$", "", stem)
        corners = [
            (top, left)
            for top in _starts(image.height, size, step)
            for left in _starts(image.width, size, step)
        ]
        for number, (top, left) in enumerate(corners, start=1):
            piece = image.crop((left, top, left + size, top + size))
            piece.save(beside / f"{name}_s{number:03d}.png", compress_level=_PNG_LEVEL)
        return len(corners)

    with _new_folder(Path(output)) as beside, ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(pool.map(cut, files))


def make_lmdb(folder: str | Path, database: str | Path) -> int:
    """Store the images of a folder as an LMDB that this library and BasicSR read.

    Args:
        folder: image files.
        database: the folder to be made, called `*.lmdb`.

    Returns:
        How many images it holds.

    Raises:
        ValueError: the name does not end in .lmdb, or something is at its place.
        FileNotFoundError: the folder is missing or holds no image.
        ImageError: a file is not an image.
        ModuleNotFoundError: the package lmdb is not installed.
    """
    database = Path(database)
    if database.suffix != ".lmdb":
        raise ValueError(f"an LMDB must be called *.lmdb, not {database}")
    lmdb, files, lines = import_lmdb(), list_by_stem(folder), []
    with _new_folder(database) as beside:
        environment = lmdb.open(str(beside), map_size=1 << 30, sync=False)
        for key, file in files.items():
            image, content = open_image(str(file)), io.BytesIO()
            image.save(content, format="PNG", compress_level=_PNG_LEVEL)
            _put(environment, key, content.getvalue(), lmdb.MapFullError)
            lines.append(f"{key}.png ({image.height},{image.width},3) {_PNG_LEVEL}\n")
        environment.sync(True)
        environment.close()
        (beside / "meta_info.txt").write_text("".join(lines), encoding="utf-8")
    return len(files)


@contextmanager
def _new_folder(place: Path) -> Iterator[Path]:
    """A folder to fill, which takes its place when the block ends well."""
    if place.exists():
        raise ValueError(f"there is something at {place} already")
    with replacing(place) as beside:
        beside.mkdir()
        yield beside


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
