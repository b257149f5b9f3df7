"""Reading data in the COCO format: targets, every kind of mask, broken entries named with file and index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from visionattn.data.coco import CocoImages
from visionattn.data.coco_format import encode_mask
from visionattn.data.decode import ImageError

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
SQUARE = np.zeros((20, 30), dtype=np.uint8)
SQUARE[5:10, 4:12] = 1
OUTLINE = [[4.0, 5.0, 12.0, 5.0, 12.0, 10.0, 4.0, 10.0]]
# Columns of 20 pixels: 4 empty columns and 5 pixels, then 8 columns of 5 pixels with 15 between them.
COUNTS = [85, *[5, 15] * 7, 5, 370]


def entry(**changes: Any) -> dict[str, Any]:
    return {
        "id": 1,
        "image_id": 10,
        "category_id": 3,
        "bbox": [4, 5, 8, 5],
        "segmentation": OUTLINE,
        **changes,
    }


@pytest.fixture
def write(tmp_path: Path):
    """Writes two images, 30x20 and 16x12 pixels, and a file of annotations; returns both places."""

    def write(*annotations: dict[str, Any], **changes: Any) -> tuple[Path, Path]:
        (tmp_path / "images").mkdir(exist_ok=True)
        images = []
        for number, (width, height) in ((10, (30, 20)), (4, (16, 12))):
            Image.new("RGB", (width, height), "teal").save(tmp_path / f"images/{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
        content = {"images": images, "annotations": annotations, "categories": CATEGORIES, **changes}
        (tmp_path / "objects.json").write_text(json.dumps(content))
        return tmp_path / "images", tmp_path / "objects.json"

    return write


@pytest.mark.parametrize(
    "segmentation", [OUTLINE, {"size": [20, 30], "counts": COUNTS}, encode_mask(SQUARE)], ids=str
)
def test_every_kind_of_mask(write, segmentation: Any):
    images = CocoImages(*write(entry(segmentation=segmentation)))
    assert images.broken_objects() == {}
    pixels, target = images[0]
    assert pixels.shape == (3, 20, 30)
    assert torch.equal(target["masks"], torch.from_numpy(SQUARE)[None])
    assert target["boxes"].tolist() == [[4, 5, 12, 10]]


def test_labels_follow_the_ids_or_the_given_names(write):
    files = write(entry(), entry(id=2, category_id=7))
    assert CocoImages(*files).class_names == ["dog", "cat"]
    assert CocoImages(*files)[0][1]["labels"].tolist() == [1, 2]
    assert CocoImages(*files, ["bird", "cat", "dog"])[0][1]["labels"].tolist() == [3, 2]
    with pytest.raises(ValueError, match="has the class 'dog', which is not among the given ones"):
        CocoImages(*files, ["cat"])


def test_images_without_objects_and_crowds(write):
    images = CocoImages(*write(entry(iscrowd=1)))
    for index, shape in ((0, (20, 30)), (1, (12, 16))):
        target = images[index][1]
        assert target["boxes"].shape == (0, 4)
        assert target["masks"].shape == (0, *shape)
        assert target["labels"].shape == (0,)
    (crowd,) = images.truth()["annotations"]
    assert crowd["iscrowd"] == 1
    assert crowd["area"] == 40
    assert "masks" not in CocoImages(*write(entry()), masks=False)[0][1]


def test_results_go_back_into_the_format(write):
    images = CocoImages(*write(entry()), ["bird", "cat", "dog"])
    found = {
        "boxes": torch.tensor([[4.0, 5, 12, 10], [0, 0, 3, 4]]),
        "labels": torch.tensor([3, 1]),
        "scores": torch.tensor([0.75, 0.5]),
        "masks": torch.from_numpy(np.stack([SQUARE, SQUARE])).bool(),
    }
    shared = {"image_id": 10, "category_id": 3, "score": 0.75}
    # The file has no bird.
    assert images.as_results(0, found) == {
        "box": [{**shared, "bbox": [4, 5, 8, 5]}],
        "mask": [{**shared, "segmentation": encode_mask(SQUARE)}],
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"category_id": 5}, "of 10.png: its category_id 5 is not among the categories"),
        ({"image_id": 11}, "its image_id 11 is that of no image"),
        (
            {"bbox": [20, 5, 12, 5]},
            "of 10.png: its bbox [20, 5, 12, 5] lies outside the image of 30x20 pixels",
        ),
        ({"bbox": [-3, 5, 12, 5]}, "its bbox [-3, 5, 12, 5] lies outside the image"),
        ({"bbox": [4, 5, 0, 5]}, "its bbox [4, 5, 0, 5] is empty"),
        ({"bbox": [4, 5, "8", 5]}, "its bbox must be 4 numbers"),
        ({"bbox": [4, 5, 8]}, "its bbox must be 4 numbers"),
        ({"bbox": None}, "its bbox must be 4 numbers"),
        ({"image_id": [10]}, "its image_id should be a valid integer, but is [10]"),
        ({"category_id": [3]}, "its category_id should be a valid integer, but is [3]"),
        ({"area": "large"}, "its area should be a valid number"),
        ({"iscrowd": 2}, "its iscrowd should be less than or equal to 1, but is 2"),
        (
            {"segmentation": encode_mask(SQUARE.T)},
            "its mask has the size [30, 20], but the image is [20, 30]",
        ),
        ({"segmentation": {"size": [20, 30]}}, "of its mask, it has no counts"),
        ({"segmentation": {"size": [20, 30], "counts": [85, 5]}}, "its mask cannot be decoded"),
        ({"segmentation": {"size": [20, 30], "counts": [85, 5.5]}}, "of its mask, its counts"),
        ({"segmentation": {"size": [20, 30], "counts": "hello world"}}, "its mask cannot be decoded"),
        ({"segmentation": {"size": [20, 30], "counts": [900]}, "iscrowd": 1}, "its mask cannot be decoded"),
        ({"segmentation": []}, "it has no mask"),
        ({"segmentation": [[1, 2, 3, 4]]}, "of its mask, its 0 List should have at least 6 items"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "its mask has an outline of half a point"),
        (
            {"segmentation": [[1, 2, 3, 4, None, 4]]},
            "of its mask, its 0.4 should be a valid number, but is None",
        ),
        ({"segmentation": [[1, 2, 3, 4, 3, 25]]}, "its mask passes the border of the image by 5 pixels"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_broken_objects_are_named_and_can_be_left_out(write, changes: dict[str, Any], reason: str):
    folder, file = write(entry(), entry(id=2, **changes))
    images = CocoImages(folder, file)
    ((index, sentence),) = images.broken_objects().items()
    assert index == 1
    assert sentence.startswith(f"{file}: annotations[1]")
    assert reason in sentence
    assert len(images[0][1]["boxes"]) == 1
    assert len(images.truth()["annotations"]) == 1


def test_a_border_passed_by_rounding_is_no_error(write):
    images = CocoImages(*write(entry(bbox=[22.5, 5, 8, 15.5])))
    assert images.broken_objects() == {}
    assert images[0][1]["boxes"].tolist() == [[22.5, 5, 30, 20]]


def test_broken_images_are_named_and_can_be_left_out(write):
    folder, file = write(
        entry(), entry(id=2, image_id=4, bbox=[1, 2, 3, 4], segmentation=[[1, 2, 4, 2, 4, 6]])
    )
    images = CocoImages(folder, file)
    assert [images.why_broken(index) for index in (0, 1)] == [None, None]
    (folder / "10.png").write_bytes(b"")
    assert f"{file}: images[0]: {folder}/10.png: not an image file" in str(images.why_broken(0))
    Image.new("RGB", (31, 20)).save(folder / "10.png")
    assert "10.png has 20x31 pixels, but the entry says 20x30" in str(images.why_broken(0))
    assert images.why_broken(0, read=False) is None
    (folder / "10.png").unlink()
    assert images.why_broken(0, read=False) == f"{file}: images[0]: there is no file {folder}/10.png"
    images.remove_images([0])
    assert len(images) == 1
    assert images[0][1]["boxes"].tolist() == [[1, 2, 4, 6]]
    assert [image["id"] for image in images.truth()["images"]] == [4]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"images": []}, "lists no images"),
        ({"categories": None}, "no list 'categories'"),
        ({"categories": [*CATEGORIES, CATEGORIES[0]]}, "two categories have one id"),
        ({"categories": [*CATEGORIES, {"id": 9, "name": "dog"}]}, "two categories have one name, 'dog'"),
        ({"categories": [*CATEGORIES, {"id": "x", "name": "cow"}]}, r"categories\[2\]: its id should be"),
        ({"images": [{"id": 1, "file_name": "a", "height": 1, "width": 1}] * 2}, "two images have one id, 1"),
    ],
)
def test_files_that_are_not_in_the_format(write, changes: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        CocoImages(*write(**changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"height": None}, "of 10.png: its height should be a valid integer, but is None"),
        ({"height": 0}, "its height should be greater than 0, but is 0"),
        ({"width": 30.5}, "its width should be a valid integer"),
        ({"file_name": 10}, "its file_name should be a valid string, but is 10"),
        ({"file_name": ""}, "its file_name String should have at least 1 character"),
    ],
)
def test_broken_entries_of_images_are_named_and_can_be_left_out(write, changes: dict[str, Any], reason: str):
    folder, file = write(entry(), entry(id=2, image_id=4, bbox=[1, 2, 3, 4], segmentation=OUTLINE))
    content = json.loads(file.read_text())
    content["images"][0].update(changes)
    content["images"].append("x")
    file.write_text(json.dumps(content))
    images = CocoImages(folder, file)
    assert str(images.why_broken(0)).startswith(f"{file}: images[0]")
    assert reason in str(images.why_broken(0))
    assert f"{file}: images[2]: " in str(images.why_broken(2))
    with pytest.raises(ImageError, match=r"images\[0\]"):
        images[0]
    assert images.broken_objects() == {}  # the object of the broken image goes with it
    images.remove_images([0, 2])
    assert [image["id"] for image in images.truth()["images"]] == [4]
    assert [found["image_id"] for found in images.truth()["annotations"]] == [4]


def test_numbers_in_other_clothes(write):
    """Sides and ids as floats, which some tools write, and lists that say null for what is left open."""
    folder, file = write(entry(id=1.0, image_id=10.0, category_id=3.0, area=None, iscrowd=None))
    content = json.loads(file.read_text())
    content["images"][0].update(width=30.0, height="20")
    file.write_text(json.dumps(content))
    images = CocoImages(folder, file)
    assert images.why_broken(0) is None
    assert images[0][1]["labels"].tolist() == [1]
    (found,) = images.truth()["annotations"]
    assert (found["area"], found["iscrowd"], found["image_id"]) == (40, 0, 10)


def test_missing_files(write):
    folder, file = write()
    with pytest.raises(FileNotFoundError, match="there is no annotation file nowhere"):
        CocoImages(folder, "nowhere")
    with pytest.raises(FileNotFoundError, match="there is no folder of images nowhere"):
        CocoImages("nowhere", file)
    file.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        CocoImages(folder, file)
