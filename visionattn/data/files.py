"""Where paired images lie: folders of image files or of cubes, and LMDB in BasicSR's layout.

A cube is an image of many bands: `.npy` or MATLAB's `.mat`, `[H, W, bands]`. A `.mat` of the hyperspectral
benchmarks holds the truth as `gt` and its input as `input`.

An LMDB is a folder called `*.lmdb` that holds, beside the database, `meta_info.txt` with a line
`0001_s001.png (480,480,3) 1` an image: the stem is the key, the value is the PNG file.
"""

from __future__ import annotations

import fnmatch
import glob
import importlib
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from visionattn.data.decode import ImageError, decode, decoding, opened, read_bytes
from visionattn.data.images import EXTENSIONS, list_images, to_grey

CUBE_EXTENSIONS = frozenset({".npy", ".mat"})
_LARGEST_VALUE = 4  # noise may leave [0, 1], but a cube that reaches further holds counts
_OPEN: dict[str, Any] = {}
_LOCK = threading.Lock()
Role = Literal["gt", "input"]


class LmdbImage(NamedTuple):
    """One image of an LMDB; printed as what a file would be called."""

    database: str
    key: str

    def __str__(self) -> str:
        return f"{self.database}/{self.key}"


ImageSource = Path | LmdbImage


def read_planes(source: ImageSource, channels: int, role: Role = "gt") -> Tensor:
    """An image or cube as `[channels, H, W]`: uint8, or float32 in [0, 1] from 16 bits and from cubes.

    Args:
        source: a file, or an image of an LMDB.
        channels: 3, or 1 (colour becomes luma, of 8 bits rounded), or the bands of a cube.
        role: which array of a `.mat` file is meant.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: it is damaged, or has other bands.
        ModuleNotFoundError: LMDB or `.mat` files need a package that is not installed.
    """
    if isinstance(source, Path) and source.suffix.lower() in CUBE_EXTENSIONS:
        return _read_cube(source, channels, role)
    if channels not in (1, 3):
        raise ImageError(f"{source}: an image file has no {channels} bands; give cubes as .npy or .mat")
    levels = decode(source, source_bytes(source)).levels
    deep = levels.dtype == np.uint16
    image = torch.from_numpy(np.moveaxis(levels, -1, 0).astype(np.float32 if deep else np.uint8))
    image = image[: (len(image) - 1) // 2 * 2 + 1]  # without transparency
    image = image / 65535 if deep else image
    if len(image) == channels:
        return image
    return to_grey(image) if channels == 1 else image.expand(3, -1, -1)


def source_bytes(source: ImageSource) -> bytes:
    """The content of a file, or of an image of an LMDB.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: it cannot be read, or the database has no such image.
        ModuleNotFoundError: LMDB needs a package that is not installed.
    """
    return _lmdb_value(source) if isinstance(source, LmdbImage) else read_bytes(source)


def read_depth(source: ImageSource) -> Tensor:
    """A depth map as float32 `[1, H, W]`: a grey image scaled to [0, 1], or floats as they are.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: it is damaged, or has several channels.
    """
    if not isinstance(source, Path):
        raise ImageError(f"{source}: depth maps are read from files, not from LMDB")
    if source.suffix.lower() in CUBE_EXTENSIONS:
        array = _load_array(source, "gt")
    else:
        content, array = read_bytes(source), None
        with opened(source, content) as image:
            array = np.array(image) if image.mode == "F" else None
        array = decode(source, content).levels if array is None else array
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if array.ndim != 2:
        raise ImageError(f"{source}: a depth map has one channel, but this has the shape {array.shape}")
    return _as_unit_floats(array, source)[None]


def list_by_stem(place: str | Path) -> dict[str, ImageSource]:
    """The images and cubes of a folder, or the images of an LMDB, by stem or key.

    Raises:
        FileNotFoundError: there is no such place, or it holds no image.
        ValueError: two files have the same stem.
    """
    place = Path(place)
    if place.suffix == ".lmdb":
        meta = place / "meta_info.txt"
        if not meta.is_file():
            raise FileNotFoundError(f"there is no LMDB {place} with a meta_info.txt")
        keys = _lmdb_keys(meta)
        return {key: LmdbImage(str(place), key) for key in keys}
    sources: dict[str, ImageSource] = {}
    for file in list_images(place, EXTENSIONS | CUBE_EXTENSIONS):
        if file.stem in sources:
            raise ValueError(f"two images share a name: {sources[file.stem]} and {file}")
        sources[file.stem] = file
    return sources


def _lmdb_keys(meta: Path) -> list[str]:
    """The keys in a `meta_info.txt`; they may hold blanks, dots and slashes.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the file is not UTF-8, or has a key twice.
    """
    try:
        lines = meta.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{meta} is not UTF-8: {error}") from error
    # What follows the name may be missing.
    names = [re.sub(r" \(\d+, ?\d+, ?\d+\) \d+\s*$", "", line) for line in lines if line.strip()]
    keys = [os.path.splitext(name)[0] for name in names]
    if not keys:
        raise FileNotFoundError(f"the LMDB {meta.parent} lists no image in its meta_info.txt")
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        raise ValueError(f"{meta} has the key {twice[0]!r} twice")
    return keys


def check_lmdb_key(key: str) -> None:
    """Refuse a name that an LMDB and its `meta_info.txt` would not give back.

    Raises:
        ValueError: it holds a line break, or bytes that are no text.
    """
    if key.splitlines() != [key] or key.encode("utf-8", "replace").decode() != key:
        raise ValueError(f"the name {key!r} cannot be a key of an LMDB: it holds a line break or no text")


def pair_files(
    gt_place: str | Path, lq_place: str | Path | None = None, template: str = "{}"
) -> tuple[dict[str, ImageSource], dict[str, ImageSource] | None]:
    """The true images of a folder or LMDB and their inputs in another, by the stem of the truth.

    Args:
        gt_place: the true images.
        lq_place: the inputs, if there are any.
        template: stem of an input with `{}` for the stem of its truth, for instance `{}x4`. With a `*`, as in
            `{}_*`, one truth may have several inputs, and the pairs bear the stems of those.

    Raises:
        FileNotFoundError: a place is missing or empty, or true images have no input.
        ValueError: the template has no `{}`, two images of one folder have the same stem, or an input may be
            that of two truths.
    """
    truths = list_by_stem(gt_place)
    if lq_place is None:
        return truths, None
    if "{}" not in template:
        raise ValueError(f"the template of the inputs must hold {{}}, as in {{}}x4, but is {template!r}")
    available = list_by_stem(lq_place)
    several = "*" in template
    patterns = {name: template.replace("{}", glob.escape(name) if several else name) for name in truths}
    partners = {
        name: fnmatch.filter(available, pattern) if several else [pattern] * (pattern in available)
        for name, pattern in patterns.items()
    }
    missing = [patterns[name] for name, stems in partners.items() if not stems]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(truths)} images in {gt_place} have no input in {lq_place}: "
            f"{shorten(missing)} (template {template!r})"
        )
    if not several:
        return truths, {name: available[stems[0]] for name, stems in partners.items()}
    owner: dict[str, str] = {}
    for name, stem in ((name, stem) for name, stems in partners.items() for stem in stems):
        if stem in owner:
            raise ValueError(f"{available[stem]} may be the input of {owner[stem]} and of {name}")
        owner[stem] = name
    return {stem: truths[name] for stem, name in owner.items()}, {stem: available[stem] for stem in owner}


def shorten(items: Sequence[str], shown: int = 3) -> str:
    """The first few of many, and how many more there are."""
    more = len(items) - shown
    return "; ".join([*items[:shown], *([f"and {more} more"] if more > 0 else [])])


def _read_cube(file: Path, channels: int, role: Role) -> Tensor:
    array = _load_array(file, role)
    if array.ndim != 3 or array.shape[-1] != channels:
        raise ImageError(f"{file}: the shape {array.shape} is not [H, W, {channels} bands]")
    cube = _as_unit_floats(np.moveaxis(array, -1, 0), file)
    if cube.abs().max() > _LARGEST_VALUE:
        raise ImageError(f"{file}: values reach {cube.abs().max():g}, but must lie in [0, 1] up to noise")
    return cube


def _load_array(file: Path, role: Role) -> np.ndarray:
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    npy = file.suffix.lower() == ".npy"
    loadmat = None if npy else _import_loadmat()
    with decoding(file):  # MATLAB's v7.3 is another format (HDF5), which its reader says
        array = np.load(file, allow_pickle=False) if loadmat is None else _load_mat(loadmat, file, role)
    if array.dtype.kind not in "fiu":
        raise ImageError(f"{file}: holds no numbers but {array.dtype}")
    return array


def _import_loadmat() -> Callable[..., Mapping[str, Any]]:
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading .mat files needs scipy: pip install visionattn[hyperspectral]"
        ) from error
    return loadmat


def _load_mat(loadmat: Callable[..., Mapping[str, Any]], file: Path, role: Role) -> np.ndarray:
    arrays: Mapping[str, Any] = {k: v for k, v in loadmat(file).items() if not k.startswith("__")}
    if role in arrays:
        return arrays[role]
    if len(arrays) != 1:
        raise ValueError(f"holds {', '.join(arrays) or 'nothing'}, but no array called {role}")
    return next(iter(arrays.values()))


def _as_unit_floats(array: np.ndarray, source: ImageSource) -> Tensor:
    """float32; integers are scaled so that their largest value becomes 1."""
    scale = np.iinfo(array.dtype).max if array.dtype.kind in "iu" else 1
    values = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32) / np.float32(scale))
    if not values.isfinite().all():
        raise ImageError(f"{source}: some values are not finite")
    return values


def import_lmdb() -> Any:
    """The package lmdb, which is optional.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module("lmdb")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading and writing LMDB needs the package lmdb: pip install visionattn[lmdb]"
        ) from error


def _environment(database: str) -> Any:
    with _LOCK:
        if database not in _OPEN:
            _OPEN[database] = import_lmdb().open(database, readonly=True, lock=False, readahead=False)
        return _OPEN[database]


def _close_databases() -> None:
    with _LOCK:
        while _OPEN:
            _OPEN.popitem()[1].close()


# A process must not use a database that another has opened: the workers of a loader open their own.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_close_databases)


def _lmdb_value(image: LmdbImage) -> bytes:
    lmdb = import_lmdb()
    try:
        with _environment(image.database).begin() as transaction:
            value = transaction.get(image.key.encode())
    except lmdb.Error as error:
        raise ImageError(f"{image.database}: {error}") from error
    if value is None:
        raise ImageError(f"{image}: the database has no such key")
    return value
