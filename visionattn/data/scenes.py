"""Scenes of real handwritten digits on real photographs: built-in data for detection and segmentation.

Digits of scikit-learn, enlarged, turned, coloured and laid over one another, on parts of the photographs of
scikit-image and scikit-learn. Boxes, instance masks and class maps are exact, because they are made with the
scenes. They are written once, as the folder in which such data usually comes:

images/{train,validation}/000000.png
annotations/instances_{train,validation}.json    COCO: boxes, and masks as run lengths, of what is visible
annotations/{train,validation}/000000.png        class maps: 0 is the background, 1 to 10 are digits 0 to 9
dataset.json                                     how the scenes were made

A value in a class map is the category of the COCO file. Training and held-out scenes share neither the image
of a digit nor a photograph.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from visionattn.data.coco_format import encode_mask
from visionattn.data.digits import CLASS_NAMES as DIGIT_NAMES
from visionattn.data.digits import Digits
from visionattn.data.images import open_image
from visionattn.data.photographs import photograph_files

Split = Literal["train", "validation"]
CLASS_NAMES = ("background", *DIGIT_NAMES)
_SPLITS: tuple[Split, ...] = ("train", "validation")
_SHAPES = ((128, 128), (112, 144), (144, 112))  # (height, width) in pixels
_VERSION = 1  # goes up with every change of what is drawn, so that no older folder is taken for the new one
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True)
class SceneOptions:
    """The looks and the number of scenes.

    Attributes:
        train: number of training scenes.
        validation: number of held-out scenes.
        objects: fewest and most digits in a scene.
        sides: shortest and longest height of a digit in pixels, before it is turned.
        turn: largest angle in degrees.
        contrast: smallest and largest difference in luma, of 255, between a digit and what it covers.
        visible: share of its pixels that every digit keeps when others are laid over it.
        crowd: fewest and most digits in a training scene, if other than in held-out ones.
        variety: share of the training scenes whose photograph is enlarged further, turned by right angles and
            coloured anew, because there are few photographs.
        seed: another seed gives other scenes.
    """

    train: int = 1200
    validation: int = 200
    objects: tuple[int, int] = (2, 6)
    sides: tuple[int, int] = (24, 56)
    turn: float = 20.0
    contrast: tuple[float, float] = (70.0, 160.0)
    visible: float = 0.6
    crowd: tuple[int, int] | None = None
    variety: float = 0.0
    seed: int = 0


class Scene(NamedTuple):
    """One scene.

    Attributes:
        image: uint8 RGB `[H, W, 3]`.
        digits: the digit of each object, 0 to 9, `[N]`.
        masks: what is visible of each object, bool `[N, H, W]`; no pixel belongs to two.
    """

    image: np.ndarray
    digits: np.ndarray
    masks: np.ndarray


def make_scene(split: Split, index: int, options: SceneOptions | None = None) -> Scene:
    """Scene number `index` of a split, the same at every call.

    Raises:
        ModuleNotFoundError: scikit-learn or scikit-image is not installed.
    """
    options = options or SceneOptions()
    random = np.random.default_rng((options.seed, _SPLITS.index(split), index))
    height, width = _SHAPES[random.integers(len(_SHAPES))]
    pieces, labels, photographs = _sources(split)
    photograph = photographs[random.integers(len(photographs))]
    varied = split == "train" and options.variety > 0 and random.random() < options.variety
    image = (_varied_background if varied else _background)(photograph, height, width, random)
    digits: list[int] = []
    areas: list[int] = []
    masks: list[np.ndarray] = []
    fewest, most = options.crowd if split == "train" and options.crowd else options.objects
    wanted = int(random.integers(fewest, most + 1))
    # A place may hide too much of what lies below: further tries find others.
    for _ in range(10 * wanted):
        if len(digits) == wanted:
            break
        chosen = random.integers(len(labels))
        ink = _ink(pieces[chosen], options, random)
        top = random.integers(height - ink.shape[0] + 1)
        left = random.integers(width - ink.shape[1] + 1)
        place = (slice(top, top + ink.shape[0]), slice(left, left + ink.shape[1]))
        mask = np.zeros((height, width), dtype=bool)
        mask[place] = ink >= 0.5
        below = [other & ~mask for other in masks]
        if any(left.sum() < options.visible * area for left, area in zip(below, areas)):
            continue
        image[place] = _draw(image[place], ink, options, random)
        masks = [*below, mask]
        digits.append(int(labels[chosen]))
        areas.append(int(mask.sum()))
    return Scene(
        np.round(image).astype(np.uint8),
        np.array(digits, dtype=int),
        np.array(masks, dtype=bool).reshape(-1, height, width),
    )


def scenes_folder(root: str | Path | None = None, options: SceneOptions | None = None) -> Path:
    """The folder of the scenes, written at the first call.

    Args:
        root: where to; by default a folder of these options' own in `~/.cache/visionattn`, or in the
            `visionattn` of the folder that `XDG_CACHE_HOME` names.
        options: what scenes look like.

    Raises:
        FileExistsError: `root` holds something else than these scenes.
        ModuleNotFoundError: scikit-learn or scikit-image is not installed.
    """
    options = options or SceneOptions()
    facts = json.dumps({"scenes": _VERSION, **asdict(options)}, indent=2) + "\n"
    if root is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = cache / "visionattn" / f"scenes-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"
    else:
        folder = Path(root)
    if not folder.exists():
        # Several processes may write at once; the first that is done puts its folder in place.
        beside = folder.with_name(f".{folder.name}.{os.getpid()}")
        try:
            for split in _SPLITS:
                _write_split(beside, split, options)
            (beside / "dataset.json").write_text(facts, encoding="utf-8")
            _put_in_place(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    made = folder / "dataset.json"
    if not made.is_file() or made.read_text(encoding="utf-8") != facts:
        raise FileExistsError(f"{folder} exists, but does not hold the scenes that are asked for")
    return folder


def _write_split(folder: Path, split: Split, options: SceneOptions) -> None:
    places = [folder / "images" / split, folder / "annotations" / split]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)

    def write(index: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        scene = make_scene(split, index, options)
        classes = ((scene.digits + 1)[:, None, None] * scene.masks).sum(0).astype(np.uint8)
        for place, pixels in zip(places, (scene.image, classes), strict=True):
            Image.fromarray(pixels).save(place / f"{index:06d}.png", compress_level=1)
        height, width = classes.shape
        image = {"id": index, "file_name": f"{index:06d}.png", "height": height, "width": width}
        return image, [_annotation(index, *pair) for pair in zip(scene.digits, scene.masks, strict=True)]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images, objects = zip(*pool.map(write, range(getattr(options, split))), strict=True)
    annotations = [{"id": number, **found} for number, found in enumerate(chain(*objects), start=1)]
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASS_NAMES) if number]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")


def _annotation(image: int, digit: int, mask: np.ndarray) -> dict[str, Any]:
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    top, left = int(rows[0]), int(columns[0])
    return {
        "image_id": image,
        "category_id": int(digit) + 1,
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "area": int(mask.sum()),
        "segmentation": encode_mask(mask),
        "iscrowd": 0,
    }


def _put_in_place(beside: Path, folder: Path) -> None:
    try:
        os.rename(beside, folder)
    except OSError:
        if not folder.exists():
            raise


@lru_cache(maxsize=2)
def _sources(split: Split) -> tuple[np.ndarray, np.ndarray, list[Image.Image]]:
    """Images `[N, 8, 8]` and labels `[N]` of the digits, and the photographs of a split."""
    digits = Digits(split)
    return digits.images, digits.labels, [open_image(file) for file in photograph_files(split).values()]


def _background(
    photograph: Image.Image, height: int, width: int, random: np.random.Generator, smallest: float = 1.0
) -> np.ndarray:
    """A part of a photograph at a random scale, perhaps mirrored: float32 `[H, W, 3]`.

    The scale is of its pixels to those of the scene, at least `smallest`.
    """
    largest = min(photograph.width / width, photograph.height / height)
    scale = random.uniform(min(smallest, largest), largest)
    x = random.uniform(0, photograph.width - scale * width)
    y = random.uniform(0, photograph.height - scale * height)
    box = (x, y, x + scale * width, y + scale * height)
    part = photograph.resize((width, height), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(part, dtype=np.float32)
    return (pixels[:, ::-1] if random.random() < 0.5 else pixels).copy()


def _varied_background(
    photograph: Image.Image, height: int, width: int, random: np.random.Generator
) -> np.ndarray:
    """The same, at larger scales too, upside down or on its side, in other colours."""
    turned = random.random() < 0.5
    sides = (width, height) if turned else (height, width)
    pixels = _background(photograph, *sides, random, smallest=0.2)
    pixels = pixels.transpose(1, 0, 2) if turned else pixels
    pixels = pixels[::-1] if random.random() < 0.5 else pixels
    # A random mixture of the channels with the sum of a grey image in each, then other brightness.
    mixture = random.dirichlet((0.5, 0.5, 0.5), 3).astype(np.float32)
    pixels = pixels @ mixture.T
    if random.random() < 0.3:
        pixels = 255 - pixels
    gain, gamma = random.uniform(0.6, 1.0, 3), random.uniform(0.6, 1.6)
    return (255 * gain * (pixels.clip(0, 255) / 255) ** gamma).astype(np.float32)


def _ink(piece: np.ndarray, options: SceneOptions, random: np.random.Generator) -> np.ndarray:
    """How much each pixel of an enlarged and turned digit covers, 0 to 1, `[h, w]` cut to the ink."""
    height = random.uniform(*options.sides)
    width = height * random.uniform(0.8, 1.1)
    grey = Image.fromarray(np.pad(piece, 1))
    # The margin of one pixel on each side comes on top of the size.
    large = grey.resize((round(width * 10 / 8), round(height * 10 / 8)), Image.Resampling.BICUBIC)
    turned = large.rotate(random.uniform(-options.turn, options.turn), Image.Resampling.BICUBIC, expand=True)
    ink = np.asarray(turned, dtype=np.float32) / 255
    # Steeper edges than the interpolation of 8x8 pixels gives.
    ink = np.clip(2 * ink - 0.5, 0, 1)
    rows, columns = (np.flatnonzero((ink >= 0.5).any(axis)) for axis in (1, 0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _draw(
    covered: np.ndarray, ink: np.ndarray, options: SceneOptions, random: np.random.Generator
) -> np.ndarray:
    """`covered` `[h, w, 3]` under a digit of one colour that is lighter or darker by a random contrast."""
    luma = float((covered @ _LUMA).mean())
    contrast = random.uniform(*options.contrast)
    fitting = [luma + sign * contrast for sign in (-1, 1) if 0 <= luma + sign * contrast <= 255]
    wanted = random.choice(fitting) if fitting else (0.0 if luma > 127 else 255.0)
    chroma = random.uniform(-60, 60, 3).astype(np.float32)
    colour = np.clip(wanted + chroma - chroma @ _LUMA, 0, 255)
    return covered + ink[..., None] * (colour - covered)
