"""Detection in miniature on the built-in scenes: training, resuming, precision, prediction, bad input."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from visionattn import tasks
from visionattn.data.scenes import SceneOptions, scenes_folder
from visionattn.engine import loop
from visionattn.engine.config import parse_config
from visionattn.engine.state import TrainingState
from visionattn.errors import InputError
from visionattn.tasks.dense.detection import (
    DetectionAugmentation,
    DetectionConfig,
    DetectionTask,
    training_transform,
)
from visionattn.tasks.dense.detectors import OwnSize

FEW = {"train": 8, "validation": 3}
# A network without batch norm, two maps, heads of a few channels.
MODEL = {
    "name": "nat_mini",
    "kwargs": {
        "embed_dim": 16,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 2, 4],
        "kernel_size": 3,
        "mlp_ratio": 1,
    },
}
DETECTOR = {
    "fpn_channels": 16,
    "box_channels": 32,
    "mask_channels": 8,
    "mask_layers": 1,
    "kwargs": {
        "rpn_pre_nms_top_n_train": 50,
        "rpn_post_nms_top_n_train": 20,
        "rpn_pre_nms_top_n_test": 50,
        "rpn_post_nms_top_n_test": 20,
        "box_batch_size_per_image": 16,
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes_folder(tmp_path_factory.mktemp("data") / "scenes", SceneOptions(**FEW))


@pytest.fixture
def make(root: Path, tmp_path: Path) -> Callable[..., DetectionTask]:
    """Makes a task whose run folder has a name; sections as keywords."""

    def make(name: str = "run", **sections: Any) -> DetectionTask:
        base: dict[str, Any] = {
            "task": "detection",
            "model": MODEL,
            "data": {"root": str(root), "scenes": FEW},
            "augment": {"hflip": 0.0},
            "detector": DETECTOR,
            "optimizer": {"lr": 2e-3},
            "schedule": {"steps": 6, "warmup": 2},
            "train": {"batch_size": 2, "workers": 0, "clip_grad": 5.0, "log_every": 1, "eval_every": None},
            "output": str(tmp_path / name),
        }
        for key, section in sections.items():
            merge = isinstance(section, dict) and key in base
            base[key] = {**base[key], **section} if merge else section
        task = tasks.create_task(parse_config(base, DetectionConfig))
        assert isinstance(task, DetectionTask)
        return task

    return make


def coco(root: Path, **changes: Any) -> dict[str, Any]:
    """Data options that read the scenes as any other data in the format."""
    return {
        "source": "coco",
        "root": str(root),
        "train_images": "images/train",
        "train_annotations": "annotations/instances_train.json",
        "eval_images": "images/validation",
        "eval_annotations": "annotations/instances_validation.json",
        **changes,
    }


def losses(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["split"] == "train"]


def perfect(images: list[Tensor], task: DetectionTask) -> list[dict[str, Tensor]]:
    """A detector that knows the truth, called with the held-out images in order."""
    found = []
    for index in range(len(images)):
        target = task._held_out[index][1]
        found.append(
            {
                "boxes": torch.as_tensor(target["boxes"]),
                "labels": target["labels"],
                "scores": torch.full((len(target["labels"]),), 0.9),
                "masks": torch.as_tensor(target["masks"])[:, None].float(),
            }
        )
    return found


def test_a_run_resumes_exactly_and_leaves_pictures(
    make: Callable[..., DetectionTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    result = loop.train(make("whole"))
    assert result.step == 6
    assert {"box_map", "box_map50", "box_map75", "mask_map", "mask_map50", "mask_map75"} <= set(
        result.metrics
    )
    assert result.best is not None
    assert result.best["metric"] == "box_map"
    with (tmp_path / "whole/metrics.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    parts = sum(float(row[name]) for name in row if name.startswith("loss_"))
    assert float(row["loss"]) == pytest.approx(parts, rel=1e-4)
    with Image.open(tmp_path / "whole/pictures/comparison.png") as picture:
        assert picture.height > 1.2 * picture.width  # three rows of two panels

    def die(state: Any, values: Any, add: Any = TrainingState.add) -> None:
        if state.step == 4:
            raise KeyboardInterrupt
        add(state, values)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "add", die)
        with pytest.raises(KeyboardInterrupt):
            loop.train(make("broken", train={"save_every": 2}))
    resumed = loop.train(make("broken", train={"save_every": 2}, resume="auto"))
    assert resumed.metrics == result.metrics
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / n / "checkpoints/last.safetensors") for n in ("broken", "whole"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)

    trained = tasks.create_task(tasks.load_trained_config(tmp_path / "whole"))
    assert loop.evaluate(trained) == pytest.approx(result.best and result.metrics)
    found = trained.eval().predict([Image.new("L", (70, 50)), Image.new("RGB", (41, 97), "teal")])
    for entry, shape in zip(found, ((50, 70), (97, 41)), strict=True):
        assert entry["masks"].shape == (len(entry["boxes"]), *shape)
        assert len(entry["names"]) == len(entry["scores"]) == len(entry["boxes"])
        assert set(entry["names"]) <= set("0123456789")


def test_it_learns(make: Callable[..., DetectionTask], tmp_path: Path):
    loop.train(make(schedule={"steps": 40, "warmup": 3}))
    found = losses(tmp_path / "run")
    assert sum(found[-5:]) < 0.8 * sum(found[:5])


def test_the_truth_has_full_precision(make: Callable[..., DetectionTask]):
    task = make(train={"eval_batch_size": 3}).eval()
    task.model = torch.nn.Module()
    task.model.forward = lambda images: perfect(images, task)  # type: ignore[method-assign]
    metrics = task.evaluate(task.eval_loader())
    assert all(value == pytest.approx(1) for value in metrics.values())
    task.model.forward = lambda images: [  # type: ignore[method-assign]
        {**found, "labels": found["labels"] % 10 + 1} for found in perfect(images, task)
    ]
    assert task.evaluate(task.eval_loader())["box_map"] < 0.3
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
    task.model.forward = lambda images: [  # type: ignore[method-assign]
        {**nothing, "masks": torch.zeros(0, 1, 9, 9)} for _ in images
    ]
    assert set(task.evaluate(task.eval_loader()).values()) == {0.0}


def test_any_data_in_the_format(make: Callable[..., DetectionTask], root: Path):
    task = make(data=coco(root), detector={"name": "retinanet", "kwargs": {}})
    assert task.config.data.class_names == list("0123456789")
    images, targets = next(iter(task.train_loader()))
    assert len(images) == len(targets) == 2
    assert "masks" not in targets[0]
    metrics = loop.evaluate(task)
    assert "box_map" in metrics
    assert not any(name.startswith("mask") for name in metrics)


def test_images_are_resized_and_results_are_in_their_pixels(make: Callable[..., DetectionTask]):
    task = make(data={"short_side": [64, 96], "long_side": 110})
    assert not isinstance(task.model.transform, OwnSize)
    sizes: list[tuple[int, ...]] = []
    task.model.backbone.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[2:]))
    task.eval().predict([Image.new("RGB", (200, 100))])
    assert sizes == [(64, 128)]  # 55x110, filled up to multiples of 32
    assert isinstance(make().model.transform, OwnSize)


def test_augmentation_keeps_boxes_and_masks_together(make: Callable[..., DetectionTask]):
    images = make()._open(True)
    augment = DetectionAugmentation(
        hflip=1.0, scale=(1.5, 1.5), crop=1.0, crop_resize=[150], crop_sides=(90, 120), distort=1.0
    )
    transform, kept, whole = training_transform(augment), 0, 0
    for index in range(8):
        image, target = transform(*images[index])
        height, width = image.shape[-2:]
        assert 90 <= height <= 120
        assert 90 <= width <= 120
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        kept += len(target["boxes"])
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            rows, columns = (mask.any(axis).nonzero().flatten() for axis in (1, 0))
            if not len(rows):  # the crop has a part of the box in which nothing is visible
                continue
            around = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
            room = torch.cat([around[:2] - box[:2], box[2:] - around[2:]])
            assert room.min() > -2
            if min(box[0], box[1]) > 0 and box[2] < width and box[3] < height:
                assert room.max() < 3
                whole += 1
    assert kept > whole > 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"category_id": 77},
            r"1 of \d+ annotations cannot be used: .*json: annotations\[2\] of 0.*category_id 77",
        ),
        ({"bbox": [100, 100, 500, 20]}, r"annotations\[2\] of .*lies outside the image"),
        (
            {"segmentation": {"size": [3, 4], "counts": "x"}},
            r"annotations\[2\] of .*its mask has the size \[3, 4\]",
        ),
        ("missing", r"1 of 8 images cannot be used: .*images\[5\]: there is no file .*000005.png"),
        ("empty", r"1 of 8 images cannot be used: .*images\[5\]: .*000005.png: not an image file"),
    ],
    ids=str,
)
def test_bad_data_is_named_before_training(
    make: Callable[..., DetectionTask],
    tmp_path: Path,
    change: Any,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
):
    root = scenes_folder(tmp_path / "scenes", SceneOptions(**FEW))
    file = root / "annotations/instances_train.json"
    if isinstance(change, dict):
        content = json.loads(file.read_text())
        content["annotations"][2].update(change)
        file.write_text(json.dumps(content))
    elif change == "missing":
        (root / "images/train/000005.png").unlink()
    else:
        (root / "images/train/000005.png").write_bytes(b"")
    with pytest.raises(InputError, match=sentence):
        loop.train(make(data=coco(root)))
    assert not (tmp_path / "run").exists()
    task = make(data=coco(root, broken="skip"))
    assert len(task.train_loader().dataset.dataset) == (8 if isinstance(change, dict) else 7)  # type: ignore
    assert "skipped: 1 of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"data": {"source": "coco", "root": None}}, "data.source=coco needs data.root"),
        ({"data": {"source": "coco", "root": "nowhere"}}, "there is no folder of images nowhere"),
        ({"data": {"scenes": {"trian": 3}}}, "cannot make data.source=scenes .*trian"),
        ({"data": {"scenes": {"train": 3}}}, "does not hold the scenes that are asked for"),
        ({"data": {"class_names": ["1", "2"]}}, "has the class '0', which is not among the given ones"),
        ({"model": {"name": "hat_x2", "kwargs": {}}}, "hat_x2 is no backbone"),
        ({"model": {"checkpoint": "gone.pth"}}, "cannot load the weights: there is no checkpoint gone.pth"),
        ({"detector": {"name": "yolo"}}, "detector.name"),
        ({"train": {"batch_size": 9}}, "has 8 samples, fewer than the 9 of one update"),
    ],
)
def test_wrong_input_is_one_sentence(
    make: Callable[..., DetectionTask], sections: dict[str, Any], sentence: str
):
    with pytest.raises(InputError, match=sentence) as caught:
        loop.train(make(**sections))
    assert "\n" not in str(caught.value)


def without_objects(content: dict[str, Any]) -> None:
    content["annotations"].clear()


def crowds_alone(content: dict[str, Any]) -> None:
    for entry in content["annotations"]:
        entry["iscrowd"] = 1


def crowd_without_mask(content: dict[str, Any]) -> None:
    content["annotations"][0] |= {"iscrowd": 1, "segmentation": None}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without_objects, "the 3 held-out images have no objects to be judged by: there are none"),
        (crowds_alone, r"no objects to be judged by: all \d+ are crowds, which do not count"),
        (crowd_without_mask, "the held-out annotations cannot be judged|its mask|it has no mask"),
    ],
)
def test_held_out_data_that_cannot_be_judged_is_refused_before_training(
    make: Callable[..., DetectionTask],
    root: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    sentence: str,
) -> None:
    content = json.loads((root / "annotations/instances_validation.json").read_text())
    change(content)
    (tmp_path / "changed.json").write_text(json.dumps(content))
    data = {
        "source": "coco",
        "root": str(root),
        "scenes": {},
        "train_images": "images/train",
        "train_annotations": "annotations/instances_train.json",
        "eval_images": "images/validation",
        "eval_annotations": str(tmp_path / "changed.json"),
    }
    task = make(data=data)
    with pytest.raises(InputError, match=sentence):
        loop.train(task)
    assert not task.config.run_folder.exists()


def test_metrics_that_may_be_required_are_known_before(make: Callable[..., DetectionTask]) -> None:
    task = make()
    found = loop.evaluate(task)
    assert set(found) <= set(task.metrics)
    assert {"box_map", "mask_map50", "box_map_small"} <= set(task.metrics)


def test_places_that_the_built_in_scenes_would_ignore_are_refused(make: Callable[..., DetectionTask]) -> None:
    with pytest.raises(InputError, match="data: train_images would be ignored: source=scenes is built in"):
        make(data={"train_images": "a"})


def test_detectors_take_no_arguments_of_another_kind(make: Callable[..., DetectionTask]) -> None:
    with pytest.raises(
        InputError, match=r"detector.kwargs.rpn_nms_thresh is made of numbers, as 0.7, but 'x'"
    ):
        make(detector={**DETECTOR, "kwargs": {"rpn_nms_thresh": "x"}})
