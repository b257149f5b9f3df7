"""The built-in scenes: exact, repeatable, written once, and nothing shared between the two sides."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_mask
from PIL import Image

from visionattn.data import scenes
from visionattn.data.digits import Digits
from visionattn.data.scenes import CLASS_NAMES, SceneOptions, make_scene, scenes_folder

FEW = SceneOptions(train=6, validation=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes_folder(tmp_path_factory.mktemp("data") / "scenes", FEW)


def test_annotations_and_class_maps_say_what_was_drawn(folder: Path):
    for split, count in (("train", 6), ("validation", 4)):
        content = json.loads((folder / f"annotations/instances_{split}.json").read_text())
        assert [entry["name"] for entry in content["categories"]] == list("0123456789")
        assert len(content["images"]) == count
        for index, image in enumerate(content["images"]):
            scene = make_scene(split, index, FEW)
            shape = image["height"], image["width"]
            with Image.open(folder / "images" / split / image["file_name"]) as pixels:
                assert np.array_equal(np.asarray(pixels), scene.image)
            with Image.open(folder / "annotations" / split / image["file_name"]) as pixels:
                classes = np.asarray(pixels)
            assert classes.shape == shape
            objects = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
            assert len(objects) == len(scene.digits) >= 1
            union = np.zeros(shape, dtype=int)
            for entry, digit, mask in zip(objects, scene.digits, scene.masks, strict=True):
                assert np.array_equal(coco_mask.decode(entry["segmentation"]), mask)
                assert CLASS_NAMES[entry["category_id"]] == str(digit)
                assert (classes[mask] == entry["category_id"]).all()
                assert entry["area"] == mask.sum()
                x, y, width, height = entry["bbox"]
                inside = np.zeros(shape, dtype=bool)
                inside[y : y + height, x : x + width] = True
                assert not (mask & ~inside).any()
                assert mask[y].any()
                assert mask[y + height - 1].any()
                assert mask[:, x].any()
                assert mask[:, x + width - 1].any()
                union += mask
            assert union.max() == 1
            assert (classes[union == 0] == 0).all()


def test_scenes_vary_as_asked():
    drawn = [make_scene("train", index) for index in range(60)]
    assert {len(scene.digits) for scene in drawn} == {2, 3, 4, 5, 6}
    assert {int(digit) for scene in drawn for digit in scene.digits} == set(range(10))
    assert len({scene.image.shape for scene in drawn}) == 3
    heights = [int(mask.any(1).sum()) for scene in drawn for mask in scene.masks]
    assert min(heights) < 28
    assert max(heights) > 50
    boxes = [(mask.any(0), mask.any(1)) for scene in drawn for mask in scene.masks]
    assert all(columns.any() and rows.any() for columns, rows in boxes)
    overlapping = [
        scene
        for scene in drawn
        if any((a.any(0) & b.any(0)).any() and (a.any(1) & b.any(1)).any() for a, b in _pairs(scene.masks))
    ]
    assert 5 < len(overlapping) < 55
    alone = SceneOptions(objects=(1, 1), visible=1.0)
    assert all(len(make_scene("train", index, alone).digits) == 1 for index in range(5))


def _pairs(masks: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(a, b) for i, a in enumerate(masks) for b in masks[:i]]


def test_the_sides_share_neither_digit_images_nor_photographs():
    (digits, _, photographs), (others, _, held_out) = (scenes._sources(s) for s in ("train", "validation"))
    assert np.array_equal(digits, Digits("train").images)
    assert np.array_equal(others, Digits("validation").images)
    assert len(photographs) == 6
    assert len(held_out) == 3
    assert {photograph.tobytes() for photograph in photographs}.isdisjoint(p.tobytes() for p in held_out)


def test_a_scene_depends_on_split_index_and_seed_alone():
    first, again = make_scene("train", 3), make_scene("train", 3)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.masks, again.masks)
    others = [
        make_scene("train", 4),
        make_scene("validation", 3),
        make_scene("train", 3, SceneOptions(seed=1)),
    ]
    assert all(not np.array_equal(first.image, other.image) for other in others)


def test_crowd_and_variety_change_training_scenes_alone():
    changed = SceneOptions(crowd=(7, 9), variety=1.0)
    for index in range(8):
        held_out, again = make_scene("validation", index), make_scene("validation", index, changed)
        assert np.array_equal(held_out.image, again.image)
        assert np.array_equal(held_out.masks, again.masks)
    drawn = [make_scene("train", index, changed) for index in range(20)]
    assert max(len(scene.digits) for scene in drawn) == 9
    assert np.mean([len(scene.digits) for scene in drawn]) > 6  # some find no place
    assert len({scene.image.shape for scene in drawn}) == 3
    greenest = {
        share: max(
            _tint(make_scene("train", index, SceneOptions(objects=(1, 1), variety=share)).image)
            for index in range(40)
        )
        for share in (0.0, 1.0)
    }
    assert greenest[1.0] > 2 * greenest[0.0]  # the photographs have little green


def _tint(image: np.ndarray) -> float:
    """How much greener than the mean of red and blue."""
    red, green, blue = image.reshape(-1, 3).mean(0)
    return green - (red + blue) / 2


def test_the_folder_is_written_once_and_nothing_else_is_taken_for_it(folder: Path, tmp_path: Path):
    before = (folder / "dataset.json").stat().st_mtime_ns
    assert scenes_folder(folder, FEW) == folder
    assert (folder / "dataset.json").stat().st_mtime_ns == before
    assert [path.name for path in folder.parent.iterdir()] == ["scenes"]
    with pytest.raises(FileExistsError, match="does not hold the scenes that are asked for"):
        scenes_folder(folder, SceneOptions(train=7, validation=4))
    with pytest.raises(FileExistsError, match="does not hold the scenes"):
        scenes_folder(tmp_path, FEW)


def test_the_default_folder_is_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, other = (scenes_folder(options=SceneOptions(train=1, validation=count)) for count in (1, 2))
    assert first != other
    assert first.parent == other.parent == tmp_path / "visionattn"
