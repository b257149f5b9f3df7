"""Whatever happened to a file that Pillow can write: it is a picture, or is refused in one sentence."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionattn.data.decode import ImageError
from visionattn.data.files import read_depth, read_planes
from visionattn.data.images import open_image
from visionattn.data.label_maps import read_class_map
from visionattn.data.pictures import Picture, encode_picture, read_picture

MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
DEEP_MODES = ("I", "I;16", "I;16B", "F")
CASES = 2000


def written() -> list[tuple[str, bytes]]:
    """A file of every format and mode that Pillow writes here, and animations of those that move."""
    Image.init()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 4), np.uint8)
    color = Image.fromarray(pixels[..., :3])
    images = [(color.convert("RGBA") if mode[-1] == "a" else color).convert(mode) for mode in MODES]
    images[MODES.index("RGBA")] = Image.fromarray(pixels)
    deep = pixels[..., 0].astype(np.uint16) * 257
    images += [Image.fromarray(deep.astype(np.int32)), Image.fromarray(deep)]
    images += [Image.frombytes("I;16B", (24, 20), deep.astype(">u2").tobytes())]
    images += [Image.fromarray(deep / np.float32(65535))]
    found = []
    for format in sorted(Image.SAVE):
        for mode, image in zip((*MODES, *DEEP_MODES), images, strict=True):
            for several in (False, True):
                content = io.BytesIO()
                options = {"save_all": True, "append_images": [image]} if several else {}
                try:
                    image.save(content, format=format, **options)
                except (OSError, ValueError, KeyError, TypeError, SystemError, RuntimeError):
                    continue  # what Pillow does not write
                if not several or content.getvalue() != found[-1][1]:
                    found.append((f"{format} {mode}{' moving' * several}", content.getvalue()))
    return found


def truncated(content: bytearray, random: np.random.Generator) -> bytearray:
    return content[: random.integers(len(content))]


def flipped(content: bytearray, random: np.random.Generator) -> bytearray:
    for _ in range(random.integers(1, 9)):
        content[random.integers(len(content))] ^= 1 << random.integers(8)
    return content


def flipped_head(content: bytearray, random: np.random.Generator) -> bytearray:
    """Where sizes, kinds and offsets stand."""
    for _ in range(random.integers(1, 4)):
        content[random.integers(min(64, len(content)))] = random.integers(256)
    return content


def moved(content: bytearray, random: np.random.Generator) -> bytearray:
    """A part of the file stands elsewhere, or twice."""
    start, place = random.integers(len(content), size=2)
    part = content[start : start + random.integers(1, 64)]
    return content[:place] + part + content[place + random.integers(2) * len(part) :]


def emptied(content: bytearray, random: np.random.Generator) -> bytearray:
    """A hole of zeros, as a disk leaves it."""
    start = random.integers(len(content))
    count = min(int(random.integers(1, 256)), len(content) - start)
    content[start : start + count] = bytes(count)
    return content


def whole(content: bytearray, random: np.random.Generator) -> bytearray:
    return content


DAMAGES: tuple[Callable[[bytearray, np.random.Generator], bytearray], ...] = (
    truncated,
    flipped,
    flipped_head,
    moved,
    emptied,
)
ENDINGS = (".png", ".jpg", ".tif", ".webp", ".gif", ".bmp", ".ppm", ".npy", ".mat", "")


def cases(count: int) -> Iterator[tuple[str, bytes, str]]:
    """Name, content and ending of files, first every whole one and then damaged ones of each in turn."""
    random, files, made = np.random.default_rng(1), written(), 0
    for turn in range(count):
        for name, content in files:
            if made == count:
                return
            damage = whole if turn == 0 else DAMAGES[made % len(DAMAGES)]
            damaged = bytes(damage(bytearray(content), random))
            yield f"{name} {damage.__name__} {made}", damaged, ENDINGS[random.integers(len(ENDINGS))]
            made += 1


def attempt(read: Callable[[Path], object], file: Path, name: str) -> object:
    """What a reader returns; None where it refuses the file, by its name and in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of strange EXIF data and of large pictures
            return read(file)
    except ImageError as error:
        refusal = str(error)
    except Exception as error:
        raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
    assert refusal.startswith(str(file)), name
    assert "\n" not in refusal, name
    return None


def check(folder: Path, every: int = 1) -> dict[str, int]:
    """Let every reader read files; how many of them were pictures to `read_picture`, and how many not."""
    outcomes = {"picture": 0, "refused": 0}
    for name, content, ending in islice(cases(CASES), None, None, every):
        file = folder / f"a{ending}"
        file.write_bytes(content)
        for read in (open_image, lambda path: read_planes(path, 3), read_class_map, read_depth):
            attempt(read, file, name)
        picture = attempt(read_picture, file, name)
        outcomes["refused" if picture is None else "picture"] += 1
        if isinstance(picture, Picture):
            assert min(picture.color.shape) > 0, name
            assert encode_picture(picture, name), name
    return outcomes


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No damaged header shall ask for gigabytes."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)


def test_a_sample_of_damaged_pictures(tmp_path: Path):
    outcomes = check(tmp_path, every=11)  # not a multiple of the kinds of damage
    assert min(outcomes.values()) > 30


@pytest.mark.slow
def test_damaged_pictures(tmp_path: Path):
    outcomes = check(tmp_path)
    assert sum(outcomes.values()) == CASES
    assert min(outcomes.values()) > 300
