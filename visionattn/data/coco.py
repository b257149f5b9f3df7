"""Images with boxes and instance masks in the COCO format (https://cocodataset.org/#format-data), checked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from visionattn.data.images import ImageError, open_image, to_tensor

_ROUNDING = 1.0  # pixels by which a box or an outline may pass the border of the image


class CocoImages(Dataset):
    """The images of a COCO file, each with its objects; crowds (`iscrowd`) are left out.

    A sample is an image `tv_tensors.Image` uint8 `[3, H, W]` and a dict of `boxes` (x1, y1, x2, y2), `labels`
    (from 1, in the order of `class_names`), `masks` uint8 `[N, H, W]` unless they are left out, and `index`.

    Args:
        images: folder of the images.
        annotations: the COCO file.
        class_names: the classes in the order of the labels; by default the file's categories by their ids.
        masks: whether objects have masks.

    Attributes:
        class_names: the classes.
        content: what the file holds.
        kept: indices in the file's list of the images in use.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the file is not in the format, or has other classes than `class_names`.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path,
        class_names: Sequence[str] | None = None,
        masks: bool = True,
    ) -> None:
        self.folder, self.file, self.masks = Path(images), Path(annotations), masks
        if not self.folder.is_dir():
            raise FileNotFoundError(f"there is no folder of images {self.folder}")
        self.content = _read(self.file)
        categories = sorted(self.content["categories"], key=lambda category: category["id"])
        names = {category["id"]: str(category["name"]) for category in categories}
        self.class_names = list(class_names or names.values())
        unknown = sorted(set(names.values()) - set(self.class_names))
        if unknown:
            raise ValueError(f"{self.file} has the class {unknown[0]!r}, which is not among the given ones")
        self.labels = {number: self.class_names.index(name) + 1 for number, name in names.items()}
        self.kept = list(range(len(self.content["images"])))
        self._objects: dict[Any, list[dict[str, Any]]] = {}
        for entry in self.content["annotations"]:
            self._objects.setdefault(entry.get("image_id"), []).append(entry)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, dict[str, Any]]:
        image = self.content["images"][self.kept[index]]
        height, width = image["height"], image["width"]
        objects = self.objects(index)
        corners = np.array([entry["bbox"] for entry in objects], dtype=np.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        limits = np.array([width, height, width, height], dtype=np.float32)
        boxes = torch.from_numpy(np.clip(corners, 0, limits))
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),  # type: ignore
            "labels": torch.tensor(
                [self.labels[entry["category_id"]] for entry in objects], dtype=torch.int64
            ),
            "index": index,
        }
        if self.masks:
            found = [decode_mask(entry["segmentation"], height, width) for entry in objects]
            target["masks"] = tv_tensors.Mask(
                torch.stack(found) if found else torch.zeros(0, height, width).byte()
            )
        return tv_tensors.Image(to_tensor(open_image(self.path(index)))), target

    def path(self, index: int) -> Path:
        """The file of image `index`."""
        return self.folder / self.content["images"][self.kept[index]]["file_name"]

    def objects(self, index: int) -> list[dict[str, Any]]:
        """The entries of the objects in image `index`, without crowds."""
        entries = self._objects.get(self.content["images"][self.kept[index]]["id"], [])
        return [entry for entry in entries if not entry.get("iscrowd")]

    def truth(self) -> dict[str, Any]:
        """The images in use with all their objects, crowds too, in the form that COCO's evaluation takes."""
        images = [self.content["images"][kept] for kept in self.kept]
        entries = [entry for image in images for entry in self._objects.get(image["id"], [])]
        objects = [
            {"area": entry["bbox"][2] * entry["bbox"][3], "iscrowd": 0, **entry, "id": number}
            for number, entry in enumerate(entries, start=1)
        ]
        return {"images": images, "annotations": objects, "categories": self.content["categories"]}

    def as_results(self, index: int, found: Mapping[str, Tensor]) -> dict[str, list[dict[str, Any]]]:
        """Write the objects found in an image in COCO's format of results.

        Args:
            index: which image.
            found: `boxes` (x1, y1, x2, y2), `labels`, `scores`, and optionally `masks` bool `[N, H, W]`.

        Returns:
            The entries for `"box"`, and for `"mask"` where there are masks. Objects of classes that the file
            lacks are left out.
        """
        categories = {label: number for number, label in self.labels.items()}
        labels = found["labels"].tolist()
        chosen = [i for i, label in enumerate(labels) if label in categories]
        image = self.content["images"][self.kept[index]]["id"]
        scores, boxes = found["scores"].tolist(), found["boxes"].tolist()
        shared = [
            {"image_id": image, "category_id": categories[labels[i]], "score": scores[i]} for i in chosen
        ]
        corners = [boxes[i] for i in chosen]
        results = {
            "box": [
                {**entry, "bbox": [x1, y1, x2 - x1, y2 - y1]}
                for entry, (x1, y1, x2, y2) in zip(shared, corners, strict=True)
            ]
        }
        if "masks" in found:
            masks = found["masks"].numpy()
            results["mask"] = [
                {**entry, "segmentation": encode_mask(masks[i])}
                for entry, i in zip(shared, chosen, strict=True)
            ]
        return results

    def broken_objects(self) -> Iterator[tuple[int, str]]:
        """Where in the file's list an object stands that cannot be used, and why; reads no image."""
        images = {image["id"]: image for image in self.content["images"]}
        for index, entry in enumerate(self.content["annotations"]):
            image = images.get(entry.get("image_id"))
            if image is None:
                reason = f"its image_id {entry.get('image_id')!r} is that of no image"
            else:
                reason = _why_broken(entry, image, self.labels, self.masks)
            if reason:
                of = f" of {image['file_name']}" if image else ""
                yield index, f"{self.file}: annotations[{index}]{of}: {reason}"

    def remove_objects(self, indices: Sequence[int]) -> None:
        """Leave out objects, by where they stand in the file's list."""
        gone = {id(self.content["annotations"][index]) for index in indices}
        for image, entries in self._objects.items():
            self._objects[image] = [entry for entry in entries if id(entry) not in gone]

    def why_broken(self, index: int, read: bool = True) -> str | None:
        """Why image `index` cannot be used, naming file and entry; None where it can.

        Args:
            index: which image.
            read: decode the file; False only asks whether it is there.
        """
        entry = self.content["images"][self.kept[index]]
        where = f"{self.file}: images[{self.kept[index]}]"
        if not self.path(index).is_file():
            return f"{where}: there is no file {self.path(index)}"
        if not read:
            return None
        try:
            image = open_image(self.path(index))
        except ImageError as error:
            return f"{where}: {error}"
        if image.size != (entry["width"], entry["height"]):
            return (
                f"{where}: {self.path(index)} has {image.height}x{image.width} pixels, "
                f"but the entry says {entry['height']}x{entry['width']}"
            )
        return None

    def remove_images(self, indices: Sequence[int]) -> None:
        """Leave out images, by their indices here."""
        gone = set(indices)
        self.kept = [kept for index, kept in enumerate(self.kept) if index not in gone]


def decode_mask(segmentation: Any, height: int, width: int) -> Tensor:
    """A COCO mask (polygons, run lengths, compressed run lengths) as uint8 `[H, W]`."""
    run_lengths = coco_mask.segmToRle(segmentation, width, height)
    return torch.from_numpy(np.ascontiguousarray(coco_mask.decode(run_lengths)))


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """A mask `[H, W]` as the compressed run lengths of a COCO file."""
    found = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": found["counts"].decode("ascii")}


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"there is no annotation file {file}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    needed = {
        "images": {"id", "file_name", "height", "width"},
        "annotations": set(),
        "categories": {"id", "name"},
    }
    for key, names in needed.items():
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{file} is not in the COCO format: it has no list {key!r}")
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict) or not names <= entry.keys():
                raise ValueError(f"{file}: {key}[{index}] needs the entries {', '.join(sorted(names))}")
        found = [entry["id"] for entry in entries if names]
        if len(set(found)) < len(found):
            raise ValueError(f"{file}: two {key} have one id")
    if not content["images"]:
        raise ValueError(f"{file} lists no images")
    return content


def _why_broken(
    entry: Mapping[str, Any], image: Mapping[str, Any], labels: Mapping[Any, int], masks: bool
) -> str | None:
    height, width = image["height"], image["width"]
    if entry.get("category_id") not in labels:
        return f"its category_id {entry.get('category_id')!r} is not among the categories"
    box = entry.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(_is_number(value) for value in box)):
        return f"its bbox must be 4 numbers [x, y, width, height], but is {box!r}"
    x, y, w, h = box
    if w <= 0 or h <= 0:
        return f"its bbox {box} is empty"
    if min(x, y) < -_ROUNDING or x + w > width + _ROUNDING or y + h > height + _ROUNDING:
        return f"its bbox {box} lies outside the image of {width}x{height} pixels (width x height)"
    if not masks or entry.get("iscrowd"):
        return None
    mask = entry.get("segmentation")
    if isinstance(mask, dict):
        size = mask.get("size")
        if size != [height, width]:
            return f"its mask has the size {size}, but the image is [{height}, {width}] (height, width)"
        if not isinstance(mask.get("counts"), (str, list)):
            return "its mask has no counts"
        return None
    if not isinstance(mask, list) or not mask:
        return "it has no mask"
    for outline in mask:
        if not isinstance(outline, list) or len(outline) < 6 or len(outline) % 2:
            return "its mask has an outline of fewer than three points"
        if not all(_is_number(value) for value in outline):
            return "its mask has an outline with an entry that is not a number"
        far = max(max(outline[::2]) - width, max(outline[1::2]) - height, -min(outline))
        if far > _ROUNDING:
            return f"its mask passes the border of the image by {far:g} pixels"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
