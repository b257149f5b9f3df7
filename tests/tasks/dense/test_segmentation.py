"""Segmentation in miniature on the built-in scenes: training, resuming, metrics, inference, bad input."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision import tv_tensors

from visionattn import tasks
from visionattn.data.scenes import CLASS_NAMES, SceneOptions, scenes_folder
from visionattn.engine import loop
from visionattn.engine.config import parse_config
from visionattn.engine.state import TrainingState
from visionattn.errors import InputError
from visionattn.tasks.dense.segmentation import SegmentationConfig, SegmentationTask
from visionattn.tasks.dense.segmenters import InferenceOptions, segment
from visionattn.tasks.dense.transforms import RandomScale, VariedCrop

FEW = {"train": 8, "validation": 3}
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


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes_folder(tmp_path_factory.mktemp("data") / "scenes", SceneOptions(**FEW))


@pytest.fixture
def make(root: Path, tmp_path: Path) -> Callable[..., SegmentationTask]:
    """Makes a task whose run folder has a name; sections as keywords."""

    def make(name: str = "run", **sections: Any) -> SegmentationTask:
        base: dict[str, Any] = {
            "task": "segmentation",
            "model": MODEL,
            "data": {"root": str(root), "scenes": FEW},
            "augment": {"crop_size": 64, "scale": [0.8, 1.2], "hflip": 0.0},
            "segmenter": {"channels": 16, "fpn_channels": 16, "auxiliary_channels": 8},
            "optimizer": {"lr": 2e-3},
            "schedule": {"steps": 6, "warmup": 2},
            "train": {"batch_size": 2, "workers": 0, "clip_grad": 5.0, "log_every": 1, "eval_every": None},
            "output": str(tmp_path / name),
        }
        for key, section in sections.items():
            merge = isinstance(section, dict) and key in base
            base[key] = {**base[key], **section} if merge else section
        task = tasks.create_task(parse_config(base, SegmentationConfig))
        assert isinstance(task, SegmentationTask)
        return task

    return make


def folders(root: Path, **changes: Any) -> dict[str, Any]:
    """Data options that read the scenes as any other folders."""
    places = {
        f"{split}_{kind}": f"{folder}/{name}"
        for split, name in (("train", "train"), ("eval", "validation"))
        for kind, folder in (("images", "images"), ("labels", "annotations"))
    }
    return {"source": "folders", "root": str(root), "class_names": list(CLASS_NAMES), **places, **changes}


def losses(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["split"] == "train"]


class Known(nn.Module):
    """A segmenter that gives the logits it was made with, cut to the size of what it sees."""

    num_classes = 11

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        left, top = (int(value) for value in images[0, :2, 0, 0])
        return self.logits[None, :, top : top + images.shape[2], left : left + images.shape[3]], None


def test_a_run_resumes_exactly_and_leaves_pictures(
    make: Callable[..., SegmentationTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    result = loop.train(make("whole"))
    assert set(result.metrics) == {"miou", "macc", "aacc"}
    assert result.best is not None
    assert result.best["metric"] == "miou"
    with Image.open(tmp_path / "whole/pictures/comparison.png") as picture:
        assert picture.width == pytest.approx(picture.height, rel=0.1)  # three rows of three panels

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
    assert loop.evaluate(trained) == pytest.approx(result.metrics)
    found = trained.predict([Image.new("L", (70, 50)), Image.new("RGB", (41, 97), "teal")])
    assert [tuple(classes.shape) for classes in found] == [(50, 70), (97, 41)]


@pytest.mark.parametrize("name", ["upernet", "semantic_fpn"])
def test_it_learns(make: Callable[..., SegmentationTask], tmp_path: Path, name: str):
    options = {"optimizer": {"lr": 1e-2}, "schedule": {"steps": 20, "warmup": 3}}
    loop.train(make(segmenter={"name": name}, **options))
    found = losses(tmp_path / "run")
    assert sum(found[-5:]) < 0.8 * sum(found[:5])


def test_metrics_are_those_of_torchmetrics(make: Callable[..., SegmentationTask]):
    task = make().eval()
    judge = MulticlassJaccardIndex(len(CLASS_NAMES), ignore_index=255)
    batches = []
    for images, classes in task.eval_loader():
        classes = [torch.where(torch.rand(c.shape) < 0.1, 255, c) for c in classes]
        batches.append((images, classes))
    right = total = 0
    with torch.no_grad():
        for images, classes in batches:
            for image, truth in zip(images, classes, strict=True):
                found = task._classes(image)
                judge.update(found[None], truth[None])
                right += int((found == truth).sum())
                total += int((truth != 255).sum())
        metrics = task.evaluate(batches)
    assert metrics["miou"] == pytest.approx(float(judge.compute()), abs=1e-6)
    assert metrics["aacc"] == pytest.approx(right / total)


def test_the_loss_passes_over_unknown_pixels(make: Callable[..., SegmentationTask]):
    task = make(segmenter={"auxiliary": 0.0}).train()
    task.model.forward = lambda images: (logits, None)  # type: ignore[method-assign]
    logits = torch.zeros(1, 11, 2, 2, requires_grad=True)
    image = [torch.zeros(3, 2, 2, dtype=torch.uint8)]
    for classes in ([[0, 255], [3, 255]], [[0, 1], [2, 3]]):
        assert float(task.loss((image, [torch.tensor(classes)]))["loss"].detach()) == pytest.approx(
            np.log(11)
        )
    task.class_weights = torch.tensor([0.2, *[1.0] * 10])
    weighted = torch.zeros(1, 11, 2, 2)
    weighted[:, 0] = 3.0
    task.model.forward = lambda images: (weighted, None)  # type: ignore[method-assign]
    classes = torch.tensor([[0, 255], [3, 255]])
    logs = weighted.log_softmax(1)[0]
    expected = -(0.2 * logs[0, 0, 0] + logs[3, 1, 0]) / 1.2
    torch.testing.assert_close(task.loss((image, [classes]))["loss"], expected)
    task.model.forward = lambda images: (logits, None)  # type: ignore[method-assign]
    unknown = task.loss((image, [torch.full((2, 2), 255)]))["loss"]
    unknown.backward()
    assert unknown == 0
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_sliding_windows_average_to_the_whole():
    height, width = 50, 70
    logits = torch.randn(11, height, width)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([columns, rows, rows]).float()  # a window can tell where it was cut
    for window, stride in ((32, 20), (32, 32), (80, 40), (50, 7)):
        options = InferenceOptions(mode="slide", window=window, stride=stride)
        torch.testing.assert_close(segment(Known(logits), image, options), logits)  # type: ignore[arg-type]
    torch.testing.assert_close(segment(Known(logits), image, InferenceOptions()), logits)  # type: ignore[arg-type]


def test_inference_at_another_size(make: Callable[..., SegmentationTask]):
    task = make(inference={"short_side": 40, "long_side": 48}).eval()
    sizes = []
    task.model.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    assert task.predict([Image.new("RGB", (90, 60))])[0].shape == (60, 90)
    assert sizes == [(32, 48)]


def test_any_folders(make: Callable[..., SegmentationTask], root: Path):
    task = make(data=folders(root), model={"name": "nat_mini", "kwargs": MODEL["kwargs"]})
    images, classes = next(iter(task.train_loader()))
    assert images[0].shape == (3, 64, 64)
    assert images[0].dtype == torch.uint8
    assert classes[0].shape == (64, 64)
    assert {"miou", "macc", "aacc"} == set(loop.evaluate(task))
    assert task.config.data.background is None
    unnamed = make(data=folders(root, class_names=None, num_classes=11))
    assert unnamed.config.data.class_names[3] == "class 3"  # type: ignore[index]


def test_crops_are_varied_and_filled_up():
    image = tv_tensors.Image(torch.ones(3, 20, 40, dtype=torch.uint8))
    classes = tv_tensors.Mask((torch.arange(40) >= 30).long().expand(20, 40).clone())
    crop = VariedCrop(16, 0.75, ignored=255)
    shares = [(crop(image, classes)[1] == 0).float().mean().item() for _ in range(50)]
    assert sum(0.25 < share < 0.75 for share in shares) > 35
    plain = VariedCrop(16, 1.0, ignored=255)
    shares = [(plain(image, classes)[1] == 0).float().mean().item() for _ in range(50)]
    assert sum(share == 1 for share in shares) > 15
    large_image, large = VariedCrop(32, 1.0, ignored=255)(image, classes)
    assert large_image.shape == (3, 32, 32)
    assert (large[20:] == 255).all()
    assert (large_image[:, 20:] == 0).all()
    scaled, scaled_classes = RandomScale((0.5, 0.5), short_side=40, long_side=60)(image, classes)
    assert scaled.shape == (3, 15, 30)
    assert scaled_classes.shape == (15, 30)
    assert set(scaled_classes.unique().tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            "class",
            r"1 of 8 images cannot be used: sample 5: .*000005.png has the value 77, beyond the 11 classes",
        ),
        ("size", r"1 of 8 images cannot be used: sample 5: .*000005.png has 3x4 pixels"),
        ("empty", r"1 of 8 images cannot be used: sample 5: .*images/train/000005.png: not an image file"),
        ("missing", r"1 of 8 images in .* have no class map: there is no .*000005.png"),
    ],
)
def test_bad_data_is_named_before_training(
    make: Callable[..., SegmentationTask],
    tmp_path: Path,
    change: str,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
):
    root = scenes_folder(tmp_path / "scenes", SceneOptions(**FEW))
    labels = root / "annotations/train/000005.png"
    if change == "class":
        Image.fromarray(np.full_like(np.asarray(Image.open(labels)), 77)).save(labels)
    elif change == "size":
        Image.new("L", (4, 3)).save(labels)
    elif change == "empty":
        (root / "images/train/000005.png").write_bytes(b"")
    else:
        labels.unlink()
    with pytest.raises(InputError, match=sentence):
        loop.train(make(data=folders(root)))
    assert not (tmp_path / "run").exists()
    if change != "missing":
        loader: Any = make(data=folders(root, broken="skip")).train_loader()
        assert len(loader.dataset.dataset) == 7
        assert "skipped: 1 of 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"data": {"source": "folders"}}, "needs data.num_classes or data.class_names"),
        ({"data": {"source": "folders", "num_classes": 3, "root": None}}, "needs data.root"),
        ({"data": {"source": "folders", "num_classes": 3, "root": "nowhere"}}, "no folder of images nowhere"),
        ({"data": {"num_classes": 3}}, "data.num_classes is 3, but there are 11 class names"),
        ({"data": {"class_names": ["a", "b"]}}, "scenes have classes of their own"),
        ({"segmenter": {"class_weights": [1, 2]}}, "class_weights has 2 values, but there are 11 classes"),
        ({"train": {"batch_size": 1}}, "upernet normalises over a batch"),
        ({"inference": {"mode": "slide", "window": 9}}, "mode slide needs window and stride"),
        ({"augment": {"cropsize": 9}}, "unknown key augment.cropsize: did you mean augment.crop_size"),
    ],
)
def test_wrong_input_is_one_sentence(
    make: Callable[..., SegmentationTask], sections: dict[str, Any], sentence: str
):
    with pytest.raises(InputError, match=sentence) as caught:
        loop.train(make(**sections))
    assert "\n" not in str(caught.value)


def test_held_out_class_maps_without_a_class_are_refused_before_training(
    make: Callable[..., SegmentationTask], root: Path, tmp_path: Path
) -> None:
    for file in (root / "annotations/validation").iterdir():
        unknown = np.full_like(np.array(Image.open(file)), 255)
        (tmp_path / "labels").mkdir(exist_ok=True)
        Image.fromarray(unknown).save(tmp_path / "labels" / file.name)
    data = {
        "source": "folders",
        "root": str(root),
        "scenes": {},
        "class_names": list(CLASS_NAMES),
        "train_labels": "annotations/train",
        "train_images": "images/train",
        "eval_images": "images/validation",
        "eval_labels": str(tmp_path / "labels"),
    }
    task = make(data=data)
    with pytest.raises(InputError, match="no pixel of the 3 held-out class maps has a class"):
        loop.train(task)
    assert not task.config.run_folder.exists()
    # Where nothing is held against anything, there is no value.
    nothing = task.eval().evaluate([([torch.zeros(3, 64, 64).byte()], [torch.full((64, 64), 255)])])
    assert set(nothing) == set(task.metrics)
    assert np.isnan(nothing["aacc"])
