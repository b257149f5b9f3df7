"""Images with boxes and instance masks in the COCO format (https://cocodataset.org/#format-data), checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from visionattn.data.coco_format import ImageEntry, ObjectEntry, decode_mask, encode_mask, read_coco
from visionattn.data.decode import ImageError
from visionattn.data.images import open_image, to_tensor


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
        content: what the file holds; entries that are broken are None.
        kept: indices in the file's list of the images in use.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the file is not in the format, has two categories of one name, or other classes than
            `class_names`.
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
        self.content = read_coco(self.file, masks)
        names = {category["id"]: category["name"] for category in self.content.categories}
        self.class_names = list(class_names or names.values())
        unknown = sorted(set(names.values()) - set(self.class_names))
        if unknown:
            raise ValueError(f"{self.file} has the class {unknown[0]!r}, which is not among the given ones")
        self.labels = {number: self.class_names.index(name) + 1 for number, name in names.items()}
        self.kept = list(range(len(self.content.images)))
        self._objects: dict[int, list[ObjectEntry]] = {}
        for entry in self.content.objects:
            if entry is not None:
                self._objects.setdefault(entry["image_id"], []).append(entry)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, dict[str, Any]]:
        image = self._entry(index)
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
            found = [decode_mask(entry.get("segmentation"), height, width) for entry in objects]
            target["masks"] = tv_tensors.Mask(
                torch.stack(found) if found else torch.zeros(0, height, width).byte()
            )
        return tv_tensors.Image(to_tensor(open_image(self.path(index)))), target

    def path(self, index: int) -> Path:
        """The file of image `index`."""
        return self.folder / self._entry(index)["file_name"]

    def _entry(self, index: int) -> ImageEntry:
        entry = self.content.images[self.kept[index]]
        if entry is None:
            raise ImageError(self.content.broken_images[self.kept[index]])
        return entry

    def objects(self, index: int) -> list[ObjectEntry]:
        """The entries of the objects in image `index`, without crowds and broken ones."""
        entries = self._objects.get(self._entry(index)["id"], [])
        return [entry for entry in entries if not entry.get("iscrowd")]

    def truth(self) -> dict[str, Any]:
        """The images in use with all their objects, crowds too, in the form that COCO's evaluation takes."""
        images = [self._entry(index) for index in range(len(self))]
        objects = []
        for entry in (entry for image in images for entry in self._objects.get(image["id"], [])):
            given = {key: value for key, value in entry.items() if value is not None}
            area = entry["bbox"][2] * entry["bbox"][3]
            objects.append({"area": area, "iscrowd": 0, **given, "id": len(objects) + 1})
        return {"images": images, "annotations": objects, "categories": self.content.categories}

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
        image = self._entry(index)["id"]
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

    def broken_objects(self) -> dict[int, str]:
        """Where in the file's list objects stand that cannot be used and are left out, and why."""
        return self.content.broken_objects

    def why_broken(self, index: int, read: bool = True) -> str | None:
        """Why image `index` cannot be used, naming file and entry; None where it can.

        Args:
            index: which image.
            read: decode the file; False only asks whether it is there.
        """
        place = self.kept[index]
        if place in self.content.broken_images:
            return self.content.broken_images[place]
        entry, where = self._entry(index), f"{self.file}: images[{place}]"
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
