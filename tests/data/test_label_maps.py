"""Folders of images and class maps, as ADE20K and Cityscapes have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visionattn.data.label_maps import LabelMaps

CLASSES = np.arange(20, dtype=np.uint8).reshape(4, 5) % 3


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("a", "b"):
        save(tmp_path / f"images/{name}.jpg", np.zeros((4, 5, 3), dtype=np.uint8))
        save(tmp_path / f"labels/{name}.png", CLASSES)
    return tmp_path / "images", tmp_path / "labels"


def test_images_and_class_maps_by_name(folders: tuple[Path, Path]):
    (folders[0] / "notes.txt").write_text("not an image")
    maps = LabelMaps(*folders, num_classes=3)
    assert [maps.path(index).name for index in range(len(maps))] == ["a.jpg", "b.jpg"]
    pixels, classes = maps[1]
    assert pixels.shape == (3, 4, 5)
    assert np.array_equal(classes.numpy(), CLASSES)
    assert [maps.why_broken(index) for index in (0, 1)] == [None, None]


def test_zero_can_be_ignored(folders: tuple[Path, Path]):
    save(folders[1] / "b.png", np.where(CLASSES == 2, 255, CLASSES).astype(np.uint8))
    maps = LabelMaps(*folders, num_classes=2, reduce_zero_label=True)
    assert maps.why_broken(0) is None
    assert np.array_equal(maps[0][1].numpy(), np.array([255, 0, 1])[CLASSES])
    assert np.array_equal(maps[1][1].numpy(), np.array([255, 0, 255])[CLASSES])


def test_the_names_of_cityscapes(tmp_path: Path):
    save(tmp_path / "left/aachen/aachen_1_leftImg8bit.png", np.zeros((4, 5, 3), dtype=np.uint8))
    save(tmp_path / "left/aachen/other.png", np.zeros((4, 5, 3), dtype=np.uint8))
    save(tmp_path / "gt/aachen/aachen_1_gtFine_labelTrainIds.png", CLASSES)
    suffixes = ("_leftImg8bit.png", "_gtFine_labelTrainIds.png")
    maps = LabelMaps(tmp_path / "left", tmp_path / "gt", 19, *suffixes)
    assert len(maps) == 1
    assert maps[0][1].shape == (4, 5)


def test_the_indices_of_a_palette_are_the_classes(folders: tuple[Path, Path]):
    image = Image.fromarray(CLASSES, mode="P")
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    image.save(folders[1] / "a.png")
    assert np.array_equal(LabelMaps(*folders, num_classes=3)[0][1].numpy(), CLASSES)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ((CLASSES + 5, {}), "a.png has the value 5, beyond the 3 classes"),
        ((CLASSES + 5, {"reduce_zero_label": True}), "a.png has the value 5, beyond the 3 classes"),
        ((CLASSES.T, {}), "a.png has 5x4 pixels, but"),
        ((np.zeros((4, 5, 3), dtype=np.uint8), {}), "a class map has one whole number per pixel"),
        ((b"", {}), "a.png: not an image file"),
    ],
)
def test_broken_class_maps_are_named(folders: tuple[Path, Path], change: tuple[Any, Any], reason: str):
    pixels, options = change
    if isinstance(pixels, bytes):
        (folders[1] / "a.png").write_bytes(pixels)
    else:
        save(folders[1] / "a.png", pixels)
    maps = LabelMaps(*folders, num_classes=3, **options)
    sentence = maps.why_broken(0)
    assert sentence is not None
    assert sentence.startswith("sample 0: ")
    assert reason in sentence
    assert maps.why_broken(1) is None
    maps.remove_images([0])
    assert [path.name for path, _ in maps.files] == ["b.jpg"]


def test_broken_images_are_named(folders: tuple[Path, Path]):
    (folders[0] / "b.jpg").write_bytes(b"")
    assert "b.jpg: not an image file" in str(LabelMaps(*folders, num_classes=3).why_broken(1))


def test_missing_files(folders: tuple[Path, Path], tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no folder of class maps nowhere"):
        LabelMaps(folders[0], "nowhere", 3)
    with pytest.raises(FileNotFoundError, match="holds no image"):
        LabelMaps(*folders, 3, image_suffix="_left.png")
    (folders[1] / "b.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 of 2 images in .* have no class map: there is no .*b\.png"
    ):
        LabelMaps(*folders, 3)


def test_linked_folders_and_hidden_ones(folders: tuple[Path, Path], tmp_path: Path):
    for kind, place in zip(("images", "labels"), folders, strict=True):
        save(tmp_path / f"real_{kind}/1.png", CLASSES)
        (place / "city").symlink_to(tmp_path / f"real_{kind}")
        save(place / ".ipynb_checkpoints/a-checkpoint.png", CLASSES)
    maps = LabelMaps(*folders, num_classes=3)
    assert [maps.path(index).name for index in range(len(maps))] == ["a.jpg", "b.jpg", "1.png"]


@pytest.mark.parametrize(
    ("value", "reason"), [(256, "the value 256 would become"), (3, "the value 3, beyond")]
)
def test_values_that_no_class_has(folders: tuple[Path, Path], value: int, reason: str):
    wrong = CLASSES.astype(np.uint16)
    wrong[1, 1] = value
    save(folders[1] / "b.png", wrong)
    assert reason in str(LabelMaps(*folders, num_classes=2, reduce_zero_label=True).why_broken(1))


def test_a_lost_image_is_named(folders: tuple[Path, Path], tmp_path: Path):
    (folders[0] / "a.jpg").unlink()
    (folders[0] / "a.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert "a.jpg" in str(LabelMaps(*folders, num_classes=3).why_broken(0))
