"""Image classification: sources of images, their checks, the loss, exact evaluation, prediction."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image

from visionattn.data.digits import Digits
from visionattn.data.images import open_image
from visionattn.engine.config import parse_config
from visionattn.errors import InputError, RunError
from visionattn.models.frames.common import Supervised
from visionattn.tasks import create_task
from visionattn.tasks.classification.task import ClassificationConfig, ClassificationTask, classify

SMALL = {"name": "test_vit", "kwargs": {"img_size": 32}}


def make_config(**sections: Any) -> ClassificationConfig:
    data = {"source": "digits", "image_size": 32, **sections.pop("data", {})}
    content = {
        "task": "classification",
        "model": SMALL,
        "schedule": {"epochs": 1},
        "train": {"batch_size": 16, "workers": 0},
        **sections,
        "data": data,
    }
    config = parse_config(content, ClassificationConfig)
    assert isinstance(config, ClassificationConfig)
    return config


def make_task(**sections: Any) -> ClassificationTask:
    task = create_task(make_config(**sections))
    assert isinstance(task, ClassificationTask)
    return task


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, red and green, with 6 training and 3 held-out images each."""
    for split, count in (("train", 6), ("val", 3)):
        for name, colour in (("green", (0, 200, 0)), ("red", (200, 0, 0))):
            place = tmp_path / "images" / split / name
            place.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (40, 36), colour).save(place / f"{index}.png")
    return tmp_path / "images"


def test_classes_come_from_the_images() -> None:
    task = make_task()
    assert task.config.data.num_classes == 10
    assert task.config.data.class_names == list("0123456789")
    images, targets = next(iter(task.train_loader()))
    assert images.shape == (16, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert targets.dtype == torch.int64


def test_known_classes_need_no_training_images(folder: Path) -> None:
    data = {"source": "folder", "root": "/nowhere", "num_classes": 2, "class_names": ["red", "green"]}
    assert make_task(data=data).config.data.num_classes == 2
    task = make_task(data={**data, "root": str(folder)})  # names in another order than the folders'
    targets = torch.cat([targets for _, targets in task.eval_loader()])
    assert targets.tolist() == [1, 1, 1, 0, 0, 0]


def test_grey_images_for_one_channel() -> None:
    task = make_task(model={"name": "test_vit", "kwargs": {"img_size": 32, "in_chans": 1}})
    images, _ = next(iter(task.eval_loader()))
    assert images.shape == (16, 1, 32, 32)
    assert task.mean.numel() == 1


def test_folders_and_tar_files(folder: Path) -> None:
    for split in ("train", "val"):
        with tarfile.open(folder / f"{split}.tar", "w") as tar:
            tar.add(folder / split, arcname=".")
    for splits in ({}, {"train_split": "train.tar", "eval_split": "val.tar"}):
        task = make_task(
            data={"source": "folder", "root": str(folder), **splits}, train={"batch_size": 4, "workers": 0}
        )
        assert task.config.data.class_names == ["green", "red"]
        assert sum(len(targets) for _, targets in task.eval_loader()) == 6
        assert len(list(task.train_loader())) == 3


def test_evaluation_counts_every_image_once() -> None:
    task = make_task()
    task.eval()
    with torch.no_grad():
        metrics = task.evaluate(task.eval_loader())
        batches = [(task.model(task._normalize(images)), targets) for images, targets in task.eval_loader()]
    logits, targets = map(torch.cat, zip(*batches, strict=True))
    assert len(targets) == 355
    order = logits.argsort(1, descending=True)
    assert metrics["top1"] == pytest.approx(100 * (order[:, 0] == targets).double().mean().item())
    assert metrics["top5"] == pytest.approx(
        100 * (order[:, :5] == targets[:, None]).any(1).double().mean().item()
    )
    assert metrics["loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)


def test_fewer_than_five_classes(folder: Path) -> None:
    task = make_task(data={"source": "folder", "root": str(folder)}, train={"batch_size": 4, "workers": 0})
    with torch.no_grad():
        assert task.evaluate(task.eval_loader())["top5"] == 100


@pytest.mark.parametrize(
    "augment",
    [{}, {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}, {"erasing": 1.0, "auto_augment": "rand-m9"}],
)
def test_loss_has_gradients_for_every_parameter(augment: dict[str, Any]) -> None:
    task = make_task(augment=augment)
    loss = task.loss(next(iter(task.train_loader())))["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in task.parameters())


def test_smoothing_without_mixing() -> None:
    task = make_task(augment={"label_smoothing": 0.1}).eval()
    images, targets = next(iter(task.eval_loader()))
    expected = F.cross_entropy(task.model(task._normalize(images)), targets, label_smoothing=0.1)
    torch.testing.assert_close(task.loss((images, targets))["loss"], expected)


def test_a_second_classifier_adds_its_loss_in_training() -> None:
    class TwoHeads(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Supervised:
            logits = x.flatten(1)[:, :10]
            return Supervised(logits, 2 * logits, 0.25)

    task = make_task(augment={"label_smoothing": 0.1})
    batch = next(iter(task.train_loader()))
    task.model = TwoHeads()
    out = task.model(task._normalize(batch[0]))
    main, auxiliary = (F.cross_entropy(x, batch[1], label_smoothing=0.1) for x in out[:2])
    losses = task.loss(batch)
    torch.testing.assert_close(losses["loss"], main + 0.25 * auxiliary)
    torch.testing.assert_close(losses["auxiliary"], auxiliary)


def test_prediction_agrees_with_evaluation() -> None:
    task = make_task()
    pictures = [Digits("validation")[index][0] for index in range(8)]
    found = task.predict(pictures, top=3)
    images, _ = next(iter(task.eval_loader()))
    task.eval()
    with torch.no_grad():
        probabilities = task.model(task._normalize(images[:8])).softmax(1)
    for entries, row in zip(found, probabilities, strict=True):
        values, indices = row.topk(3)
        assert [name for name, _ in entries] == [str(index) for index in indices.tolist()]
        assert [p for _, p in entries] == pytest.approx(
            values.tolist(), abs=2e-3
        )  # uint8 against float pixels


def test_imagenet_names_without_a_run() -> None:
    model = timm.create_model("test_vit", num_classes=1000)
    ((name, probability),) = classify(model, [Image.new("L", (50, 40))], top=1)[0:1][0]
    assert 0 < probability < 1
    assert not name.isdigit()
    assert classify(model, []) == []


def test_broken_images_are_named_and_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (folder / "train" / "red" / "0.png").read_bytes()
    (folder / "train" / "red" / "0.png").write_bytes(whole[: len(whole) // 2])
    (folder / "train" / "green" / "3.png").write_text("not an image")
    data = {"source": "folder", "root": str(folder)}
    train = {"batch_size": 2, "workers": 0}
    with pytest.raises(
        InputError, match=r"2 of 12 images cannot be read: .*green/3\.png: .*red/0\.png: .*broken_images=skip"
    ):
        make_task(data=data, train=train).train_loader()
    loader = make_task(data={**data, "broken_images": "skip"}, train=train).train_loader()
    assert sum(len(targets) for _, targets in loader) == 10
    assert "skipped: 2 of 12 images" in capsys.readouterr().err
    make_task(data={**data, "check_images": 0}, train=train).train_loader()


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"model": {"name": "test_vitt"}}, "unknown network 'test_vitt': did you mean test_vit"),
        ({"model": {"name": "test_vit", "kwargs": {"widht": 3}}}, "cannot build test_vit with .*widht"),
        ({"model": {**SMALL, "checkpoint": "none.pth"}}, "there is no checkpoint none.pth"),
        ({"model": {"name": "test_vit", "kwargs": {"in_chans": 5}}}, "in_chans must be 1 or 3"),
        (
            {"model": {"name": "test_vit", "kwargs": {"num_classes": 7}}},
            "num_classes is 7, but the data has 10",
        ),
        ({"data": {"num_classes": 7}}, "data.num_classes is 7, but the images have 10 classes"),
        (
            {"data": {"class_names": ["a", "b"]}},
            "data.class_names has 2 names, but the images have 10 classes",
        ),
        ({"data": {"source": "digit"}}, "unknown data.source 'digit': did you mean digits"),
        ({"data": {"source": "folder"}}, "data.source=folder needs data.root"),
        ({"data": {"source": "folder", "root": "nowhere"}}, "there is no folder nowhere"),
        ({"data": {"source": "wds/a", "root": "nowhere"}}, "there is no data.root nowhere"),
        ({"data": {"image_size": 8}}, "test_vit does not take images of 8x8"),
        ({"data": {"mean": [0.5, 0.5]}}, "data.mean has 2 values for images of 3 channels"),
    ],
)
def test_wrong_input_is_refused_at_once(sections: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make_task(**sections).train_loader()


def test_mixing_needs_even_batches() -> None:
    with pytest.raises(InputError, match=r"mixing needs an even train\.batch_size, but it is 15"):
        make_config(augment={"mixup": 0.1}, train={"batch_size": 15})


def test_folder_pitfalls(folder: Path) -> None:
    data = {"source": "folder", "root": str(folder)}
    (folder / "val" / "blue").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "val" / "blue" / "0.png")
    with pytest.raises(InputError, match="the validation images have the class 'blue'"):
        make_task(data=data).eval_loader()
    with pytest.raises(InputError, match=r"data\.num_classes is 3, but the images have 2 classes"):
        make_task(data={**data, "num_classes": 3}).train_loader()
    # timm would judge on the training images where there is no folder of held-out ones.
    known = {"num_classes": 2, "class_names": ["green", "red"]}
    with pytest.raises(InputError, match=r"has no validation folder or tar file \(it has green, red"):
        make_task(data={**data, "root": str(folder / "train"), **known}).eval_loader()


def test_a_class_may_be_absent_from_the_held_out_images(folder: Path) -> None:
    for path in (folder / "val" / "green").iterdir():
        path.unlink()
    task = make_task(data={"source": "folder", "root": str(folder)}, train={"batch_size": 4, "workers": 0})
    assert {int(t) for _, targets in task.eval_loader() for t in targets} == {1}


def test_a_stream_without_images_has_no_value() -> None:
    task = make_task()
    found = task.evaluate([])
    assert set(found) == set(task.metrics)
    assert all(value != value for value in found.values())


def test_a_held_out_class_beyond_the_networks_is_one_sentence() -> None:
    task = make_task()
    batch = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([3, 10])
    with pytest.raises(RunError, match="held-out images have classes 3 to 10, but there are 10"):
        task.evaluate([batch])


def test_a_network_states_what_its_run_made_of_its_images() -> None:
    task = make_task(data={"mean": [0.4, 0.5, 0.6], "crop_pct": 0.9})
    cfg: Any = task.model.pretrained_cfg
    assert cfg["input_size"] == (3, 32, 32)
    assert (cfg["mean"], cfg["crop_pct"]) == ((0.4, 0.5, 0.6), 0.9)
    assert cfg["label_names"] == list("0123456789")
    (answer,) = classify(task.model, [Image.new("RGB", (40, 40))], top=None)
    assert {name for name, _ in answer} == set("0123456789")


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("cfsr_x2", {"embed_dim": 8, "depths": (1,), "num_classes": 10}),
        ("test_vit", {"img_size": 32, "features_only": True}),
    ],
)
def test_networks_that_do_not_classify_are_refused(name: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{name} does not classify: it gives|cannot build {name}"):
        make_task(model={"name": name, "kwargs": kwargs})


@pytest.mark.parametrize("kind", ["turned", "16 bits", "clear", "palette"])
def test_training_and_evaluation_see_what_prediction_sees(folder: Path, kind: str) -> None:
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:16] = (250, 250, 250, 0)
    pixels[16:, :, 3] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    for file in list(folder.glob("*/*/*.png")):
        file.unlink()
        if kind == "turned":
            Image.fromarray(pixels[..., :3]).save(file.with_suffix(".jpg"), exif=exif, quality=95)
        elif kind == "16 bits":
            Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(file)
        else:
            Image.fromarray(pixels).convert("RGBA" if kind == "clear" else "P").save(file)
    data = {"source": "folder", "root": str(folder), "crop_pct": 1.0}
    task = make_task(data=data, train={"batch_size": 2, "workers": 0})
    dataset: Any = task._ready(False, transform=np.asarray)
    shown = np.asarray(open_image(next(folder.glob("val/green/*"))))
    assert np.array_equal(dataset[0][0], shown)
    assert abs(float(shown[:8].mean()) - (0 if kind == "turned" else 250)) < 3
    images, _ = next(iter(task.eval_loader()))
    assert torch.equal(images[0], torch.from_numpy(shown.copy()).permute(2, 0, 1))


def test_hidden_folders_are_no_classes(folder: Path) -> None:
    for name in ("train/.ipynb_checkpoints/0-checkpoint.png", "train/red/.cache/1.png", "train/red/._0.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 36), "blue").save(folder / name)
    for source in ("folder", "torch/image_folder"):
        root = folder if source == "folder" else folder / "train"
        task = make_task(data={"source": source, "root": str(root)}, train={"batch_size": 2, "workers": 0})
        assert task.config.data.class_names == ["green", "red"]
        dataset: Any = task._open(True)
        holder = getattr(dataset, "reader", dataset)
        assert [target for _, target in holder.samples] == [0] * 6 + [1] * 6


def test_folders_that_cannot_be_what_is_meant(folder: Path) -> None:
    data = {"source": "folder", "root": str(folder)}
    (folder / "train/green").rename(folder / "green")
    with pytest.raises(InputError, match="one class alone, 'red'"):
        make_task(data=data)
    (folder / "green").rename(folder / "train/green")
    Image.new("RGB", (8, 8)).save(folder / "train/stray.png")
    with pytest.raises(InputError, match=r"stray\.png stands in no folder of a class"):
        make_task(data=data)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_during_a_run_is_named(folder: Path, workers: int) -> None:
    train = {"batch_size": 2, "workers": workers}
    task = make_task(data={"source": "folder", "root": str(folder)}, train=train)
    loader = task.eval_loader()
    (folder / "val/red/1.png").write_text("not an image")
    with pytest.raises(RunError, match=r"^a sample cannot be read: .*red/1\.png: not an image file"):
        list(loader)
