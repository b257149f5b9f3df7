"""What stands in a COCO file: type and range of every entry, looked at once, before anything believes it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from visionattn.errors import one_line

_ROUNDING = 1.0  # pixels by which a box or an outline may pass the border of the image
_IGNORE_MORE = ConfigDict(extra="ignore")
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Outline = Annotated[list[_Number], Field(min_length=6)]
_Count = Annotated[int, Field(ge=0, strict=True)]


class ImageEntry(TypedDict):
    """An image of the list `images`; numbers may be written as 80.0 or "80"."""

    __pydantic_config__ = _IGNORE_MORE  # type: ignore[misc]
    id: int
    file_name: Annotated[str, Field(min_length=1, strict=True)]
    height: Annotated[int, Field(gt=0)]
    width: Annotated[int, Field(gt=0)]


class CategoryEntry(TypedDict):
    """A class of the list `categories`."""

    __pydantic_config__ = _IGNORE_MORE  # type: ignore[misc]
    id: int
    name: str


class RunLengths(TypedDict):
    """A mask as run lengths, plain or compressed."""

    size: tuple[int, int]
    counts: Annotated[str, Field(strict=True)] | list[_Count]


class ObjectEntry(TypedDict):
    """An object or a crowd of the list `annotations`."""

    __pydantic_config__ = _IGNORE_MORE  # type: ignore[misc]
    image_id: int
    category_id: int
    bbox: Annotated[list[_Number], Field(min_length=4, max_length=4)]
    area: NotRequired[Annotated[float, Field(ge=0, allow_inf_nan=False)] | None]
    iscrowd: NotRequired[Annotated[int, Field(ge=0, le=1)] | None]
    segmentation: NotRequired[Any]


_IMAGE, _CATEGORY, _OBJECT = TypeAdapter(ImageEntry), TypeAdapter(CategoryEntry), TypeAdapter(ObjectEntry)
_RUN_LENGTHS, _OUTLINES = TypeAdapter(RunLengths), TypeAdapter(list[_Outline])


class CocoContent(NamedTuple):
    """The entries of a COCO file, by the places in its lists. Where one is None, `broken` says why.

    Attributes:
        images: entries, or None.
        objects: entries with a known image and category, or None.
        categories: entries, by their ids.
        broken_images: reasons by place.
        broken_objects: reasons by place.
    """

    images: list[ImageEntry | None]
    objects: list[ObjectEntry | None]
    categories: list[CategoryEntry]
    broken_images: dict[int, str]
    broken_objects: dict[int, str]


def read_coco(file: Path, masks: bool) -> CocoContent:
    """Read and check a COCO file.

    Args:
        file: it.
        masks: whether the masks of objects are of interest; otherwise they may be anything.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not in the format, or its categories or the ids of its images are not unique.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no annotation file {file}")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {one_line(error)}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key) if isinstance(content, dict) else None, list):
            raise ValueError(f"{file} is not in the COCO format: it has no list {key!r}")
    if not content["images"]:
        raise ValueError(f"{file} lists no images")
    categories = _read_categories(file, content["categories"])
    images, broken_images = _validated(_IMAGE, content["images"], f"{file}: images")
    _refuse_twice(file, "images", "id", [image["id"] for image in images if image is not None])
    objects, broken_objects = _validated(_OBJECT, content["annotations"], f"{file}: annotations")
    known = {image["id"]: image for image in images if image is not None}
    numbers = {category["id"] for category in categories}
    broken = [content["images"][place] for place in broken_images]
    nameless = {str(image.get("id")) for image in broken if isinstance(image, dict)}
    for place, entry in enumerate(objects):
        if entry is None:
            continue
        image = known.get(entry["image_id"])
        if image is None and str(entry["image_id"]) in nameless:
            objects[place] = None  # goes with its image, which is named itself
            continue
        if image is None:
            reason, of = f"its image_id {entry['image_id']!r} is that of no image", ""
        else:
            reason, of = _why_broken(entry, image, numbers, masks), f" of {image['file_name']}"
        if reason:
            broken_objects[place] = f"{file}: annotations[{place}]{of}: {reason}"
            objects[place] = None
    return CocoContent(images, objects, categories, broken_images, dict(sorted(broken_objects.items())))


def decode_mask(segmentation: Any, height: int, width: int) -> Tensor:
    """A COCO mask (polygons, run lengths, compressed run lengths) as uint8 `[H, W]`."""
    run_lengths = coco_mask.segmToRle(segmentation, width, height)
    return torch.from_numpy(np.ascontiguousarray(coco_mask.decode(run_lengths)))


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """A mask `[H, W]` as the compressed run lengths of a COCO file."""
    found = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": found["counts"].decode("ascii")}


def _read_categories(file: Path, entries: list[Any]) -> list[CategoryEntry]:
    """The classes, by their ids; without all of them nothing in the file can be believed."""
    categories, broken = _validated(_CATEGORY, entries, f"{file}: categories")
    if broken:
        raise ValueError(next(iter(broken.values())))
    found = [category for category in categories if category is not None]
    for key in ("id", "name"):
        _refuse_twice(file, "categories", key, [category[key] for category in found])
    return sorted(found, key=lambda category: category["id"])


def _refuse_twice(file: Path, kind: str, key: str, values: list[Any]) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ValueError(f"{file}: two {kind} have one {key}, {twice[0]!r}")


def _validated(adapter: TypeAdapter[Any], entries: list[Any], where: str) -> tuple[list[Any], dict[int, str]]:
    """Entries of the right types, None in place of others; and for those the reason, by place."""
    good: list[Any] = []
    broken: dict[int, str] = {}
    for place, entry in enumerate(entries):
        try:
            good.append(adapter.validate_python(entry))
        except ValidationError as error:
            good.append(None)
            name = f" of {entry['file_name']}" if isinstance(entry, dict) and "file_name" in entry else ""
            broken[place] = f"{where}[{place}]{name}: {_explain(error)}"
    return good, broken


def _explain(error: ValidationError) -> str:
    """The first thing that is wrong with an entry."""
    first = error.errors(include_url=False)[0]
    name = ".".join(map(str, first["loc"]))
    if name.startswith("bbox.") or (name == "bbox" and first["type"] != "missing"):
        return f"its bbox must be 4 numbers [x, y, width, height], but {first['input']!r} was given"
    if first["type"] == "missing":
        return f"it has no {name}"
    problem = first["msg"].removeprefix("Input ").removeprefix("Value ")
    shown = repr(first["input"])
    shown = shown if len(shown) < 60 else f"{shown[:57]}..."
    return f"its {name} {problem}, but is {shown}" if name else f"{problem}, but is {shown}"


def _why_broken(entry: ObjectEntry, image: ImageEntry, categories: set[int], masks: bool) -> str | None:
    height, width = image["height"], image["width"]
    if entry["category_id"] not in categories:
        return f"its category_id {entry['category_id']!r} is not among the categories"
    x, y, w, h = entry["bbox"]
    shown = f"[{x:g}, {y:g}, {w:g}, {h:g}]"
    if w <= 0 or h <= 0:
        return f"its bbox {shown} is empty"
    if min(x, y) < -_ROUNDING or x + w > width + _ROUNDING or y + h > height + _ROUNDING:
        return f"its bbox {shown} lies outside the image of {width}x{height} pixels (width x height)"
    return _why_mask_broken(entry.get("segmentation"), height, width) if masks else None


def _why_mask_broken(mask: Any, height: int, width: int) -> str | None:
    if not mask:
        return "it has no mask"
    try:
        (_RUN_LENGTHS if isinstance(mask, Mapping) else _OUTLINES).validate_python(mask)
    except ValidationError as error:
        return f"of its mask, {_explain(error)}"
    if isinstance(mask, Mapping):
        if list(mask["size"]) != [height, width]:
            return (
                f"its mask has the size {mask['size']}, but the image is [{height}, {width}] (height, width)"
            )
        try:
            decode_mask(mask, height, width)
        except (RuntimeError, ValueError, TypeError) as error:
            return f"its mask cannot be decoded: {one_line(error)}"
        return None
    for outline in mask:
        if len(outline) % 2:
            return "its mask has an outline of half a point"
        far = max(max(outline[::2]) - width, max(outline[1::2]) - height, -min(outline))
        if far > _ROUNDING:
            return f"its mask passes the border of the image by {far:g} pixels"
    return None
