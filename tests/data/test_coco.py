"""Reading data in the COCO format: targets, every kind of mask, broken entries named with file and index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from visionattn.data.coco import CocoImages, encode_mask

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
    assert dict(images.broken_objects()) == {}
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
        (
            {"segmentation": encode_mask(SQUARE.T)},
            "its mask has the size [30, 20], but the image is [20, 30]",
        ),
        ({"segmentation": {"size": [20, 30]}}, "its mask has no counts"),
        ({"segmentation": []}, "it has no mask"),
        ({"segmentation": [[1, 2, 3, 4]]}, "its mask has an outline of fewer than three points"),
        (
            {"segmentation": [[1, 2, 3, 4, None, 4]]},
            "its mask has an outline with an entry that is not a number",
        ),
        ({"segmentation": [[1, 2, 3, 4, 3, 25]]}, "its mask passes the border of the image by 5 pixels"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_broken_objects_are_named_and_can_be_left_out(write, changes: dict[str, Any], reason: str):
    folder, file = write(entry(), entry(id=2, **changes))
    images = CocoImages(folder, file)
    ((index, sentence),) = images.broken_objects()
    assert index == 1
    assert sentence.startswith(f"{file}: annotations[1]")
    assert reason in sentence
    images.remove_objects([1])
    assert len(images[0][1]["boxes"]) == 1
    assert len(images.truth()["annotations"]) == 1


def test_a_border_passed_by_rounding_is_no_error(write):
    images = CocoImages(*write(entry(bbox=[22.5, 5, 8, 15.5])))
    assert dict(images.broken_objects()) == {}
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
        ({"images": [{"id": 1}]}, r"images\[0\] needs the entries file_name, height, id, width"),
        ({"categories": None}, "no list 'categories'"),
        ({"categories": [*CATEGORIES, CATEGORIES[0]]}, "two categories have one id"),
        ({"annotations": ["x"]}, r"annotations\[0\] needs"),
    ],
)
def test_files_that_are_not_in_the_format(write, changes: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        CocoImages(*write(**changes))


def test_missing_files(write):
    folder, file = write()
    with pytest.raises(FileNotFoundError, match="there is no annotation file nowhere"):
        CocoImages(folder, "nowhere")
    with pytest.raises(FileNotFoundError, match="there is no folder of images nowhere"):
        CocoImages("nowhere", file)
    file.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        CocoImages(folder, file)
