from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import visionattn  # noqa: F401  (registers the networks)
from visionattn import tasks
from visionattn.data.files import list_by_stem
from visionattn.data.images import open_image, to_pil
from visionattn.data.paired import PairedImages
from visionattn.engine import loop
from visionattn.engine.config import parse_config
from visionattn.errors import InputError
from visionattn.tasks.restoration.data import _folder_files
from visionattn.tasks.restoration.task import RestorationConfig, RestorationTask, restore

TINY = {
    "embed_dim": 12,
    "depths": [1],
    "num_heads": 2,
    "window_size": 8,
    "compress_ratio": 3,
    "squeeze_factor": 6,
    "img_range": 16,
}
GENERATOR = torch.Generator().manual_seed(0)


def config(**sections: Any) -> RestorationConfig:
    base: dict[str, Any] = {
        "task": "restoration",
        "model": {"name": "hat_s_x2", "kwargs": TINY},
        "schedule": {"steps": 2},
        "data": {"patch_size": 16},
        "train": {"batch_size": 2, "workers": 0, "eval_every": None},
    }
    for name, section in sections.items():
        base[name] = {**base[name], **section} if isinstance(section, dict) and name in base else section
    parsed = parse_config(base, RestorationConfig)
    assert isinstance(parsed, RestorationConfig)
    return parsed


def folder_of_images(folder: Path, sides: dict[str, tuple[int, int]]) -> Path:
    folder.mkdir(parents=True)
    for name, (height, width) in sides.items():
        smooth = torch.rand(3, 6, 6, generator=GENERATOR)
        large = torch.nn.functional.interpolate(smooth[None], (height, width), mode="bicubic")[0]
        to_pil((large.clamp(0, 1) * 255).to(torch.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Any]:
    train = folder_of_images(tmp_path / "train", {"a": (48, 60), "b": (50, 41), "c": (64, 64)})
    held_out = folder_of_images(tmp_path / "eval", {"d": (45, 52), "e": (40, 70)})
    return {"source": "folders", "train_gt": [str(train)], "eval_gt": str(held_out), "patch_size": 12}


def test_losses():
    task = RestorationTask(config())
    task.model = torch.nn.Identity()
    batch = {"lq": torch.tensor([0.0, 0.3]), "gt": torch.tensor([0.0, 0.7])}
    assert task.loss(batch)["loss"].item() == pytest.approx(0.2)
    task.config = config(loss={"name": "charbonnier", "epsilon": 0.3})
    assert task.loss(batch)["loss"].item() == pytest.approx((0.3 + 0.5) / 2)


def test_training_on_photographs_learns_and_shows_it(tmp_path: Path):
    """A few dozen steps through the real loop: metrics, weights, pictures, prediction."""
    run = config(
        output=str(tmp_path / "run"),
        schedule={"steps": 40, "warmup": 5},
        optimizer={"lr": 2e-3, "weight_decay": 0},
        ema={"decay": 0.9, "warmup": True},
        data={"patch_size": 16, "repeat": 4},
        train={"batch_size": 4, "log_every": 5, "eval_every": None},
    )
    task = tasks.create_task(run)
    # The held-out photographs in full would take most of the time of this test.
    task._held_out._memory = {
        name: (lq[:, :40, :48], gt[:, :80, :96]) for name, (lq, gt) in task._held_out._memory.items()
    }
    before = loop.evaluate(task)
    result = loop.train(task)

    assert set(result.metrics) == {"psnr_y", "ssim_y", "gain_over_bicubic"}
    assert result.metrics["psnr_y"] > before["psnr_y"] + 3
    with (tmp_path / "run/metrics.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row.get("loss")]
    assert losses[-1] < 0.6 * losses[0]
    assert json.loads((tmp_path / "run/best.json").read_text())["metric"] == "psnr_y"
    with Image.open(tmp_path / "run/pictures/comparison.png") as picture:
        # Four panels in each of three rows.
        assert picture.width > picture.height > 600

    trained = tasks.create_task(tasks.load_trained_config(tmp_path / "run"))
    small, smaller = Image.new("RGB", (20, 17), "teal"), Image.new("L", (9, 12))
    enlarged = trained.eval().predict([small, smaller])
    assert [image.size for image in enlarged] == [(40, 34), (18, 24)]
    assert trained.predict(small).tobytes() == enlarged[0].tobytes()


def test_folders_are_judged_whole(folders: dict[str, Any]):
    task = RestorationTask(config(data=folders, metric="rgb")).eval()
    metrics = task.evaluate(task.eval_loader())
    assert task.monitor == "psnr_rgb"
    assert set(metrics) == {"psnr_rgb", "ssim_rgb", "gain_over_bicubic"}
    # The truths lose their odd rows and columns.
    assert [tuple(pair["gt"].shape) for pair in task.eval_loader()] == [(1, 3, 44, 52), (1, 3, 40, 70)]
    batches = list(task.train_loader())
    assert batches[0]["lq"].shape == (2, 3, 12, 12)
    assert batches[0]["gt"].shape == (2, 3, 24, 24)
    assert set(task.pictures()) == {"comparison"}


def test_several_folders_and_stored_inputs(folders: dict[str, Any], tmp_path: Path):
    inputs = folder_of_images(tmp_path / "lq", {"dx2": (22, 26), "ex2": (20, 35)})
    other = folder_of_images(tmp_path / "other", {"a": (40, 40)})
    data = {
        **folders,
        "train_gt": [*folders["train_gt"], str(other)],
        "eval_lq": [str(inputs)],
        "eval_template": "{}x2",
    }
    task = RestorationTask(config(data=data))
    assert len(task.train_loader().dataset.dataset) == 4  # type: ignore[attr-defined]
    assert [pair["name"] for pair in task.eval_loader()] == [["d"], ["e"]]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"name": "resnet18", "kwargs": {}}}, "resnet18 is not a restoration network"),
        (
            {"model": {"name": "hat_s_x2", "kwargs": {**TINY, "in_chans": 1}}, "metric": "bands"},
            "metric=bands does not fit the 1 channels",
        ),
        ({"data": {"source": "folders"}}, "data.train_gt"),
        ({"data": {"source": "folders", "train_gt": ["nowhere"]}}, "there is no folder nowhere"),
        ({"data": {"source": "folders", "train_gt": ["a"], "train_lq": ["b", "c"]}}, "names 1 folders"),
        ({"data": {"patch_size": 400}}, "each side must have at least 800"),
        ({"data": {"patchsize": 4}}, "did you mean data.patch_size"),
        ({"train": {"eval_batch_size": 2}}, "eval_batch_size must be 1"),
        ({"loss": {"name": "l2"}}, "loss.name"),
        ({"data": {"degradations": [{"name": "jpg"}]}}, "no degradation 'jpg': did you mean jpeg"),
        (
            {"data": {"degradations": [{"name": "jpeg", "quality": 9}]}},
            "make .* of 3x64x64, but hat_s_x2 needs 3x32",
        ),
        ({"data": {"train_lq": ["a"], "degradations": [{"name": "bicubic"}]}}, "train_lq and degradations"),
        ({"data": {"train_depth": ["a"], "degradations": [{"name": "bicubic"}]}}, "the degradation haze"),
        ({"data": {"patch_size": 16, "degraded_size": 12}}, r"degraded_size \(12\) is below patch_size"),
    ],
)
def test_bad_input_is_one_sentence(sections: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message) as caught:
        RestorationTask(config(**sections)).train_loader()
    assert "\n" not in str(caught.value)


def test_broken_images_are_named_or_skipped(folders: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    (Path(folders["train_gt"][0]) / "b.png").write_text("not an image")
    with pytest.raises(InputError, match=r"1 of 3 images cannot be used: .*b\.png: not an image"):
        RestorationTask(config(data=folders)).train_loader()
    loader = RestorationTask(config(data={**folders, "broken_images": "skip"})).train_loader()
    assert len(loader.dataset.dataset) == 2  # type: ignore[attr-defined]
    assert "skipped: " in capsys.readouterr().err


def test_another_scale_is_a_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    small = RestorationTask(config()).model
    save_file(small.state_dict(), tmp_path / "x2.safetensors")
    model = {"name": "hat_s_x4", "kwargs": TINY}
    started = config(model=model, initial_weights=str(tmp_path / "x2.safetensors"))
    large = RestorationTask(started).model
    assert "upsample.2.weight" in capsys.readouterr().err
    assert all(torch.equal(value, large.state_dict()[name]) for name, value in small.state_dict().items())

    save_file(large.state_dict(), tmp_path / "x4.safetensors")
    (tmp_path / "x2.safetensors").unlink()
    RestorationTask(
        config(model={**model, "checkpoint": str(tmp_path / "x4.safetensors")}, initial_weights="gone")
    )
    with pytest.raises(InputError, match="cannot start from initial_weights: there is no checkpoint"):
        RestorationTask(started)


def test_restore_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="has 1 channels"):
        restore(timm.create_model("hat_s_x2", **TINY, in_chans=1), Image.new("L", (9, 9)))
    with pytest.raises(ValueError, match="3x4 pixels are too small: 5 per side"):
        restore(RestorationTask(config()).model.eval(), Image.new("RGB", (4, 3)))


@pytest.mark.parametrize(
    ("model", "data", "side", "needed"),
    [
        # 11 pixels of SSIM's window and the border on both sides, in whole pixels of the input.
        ({"name": "cfsr_x2", "kwargs": {"embed_dim": 8, "depths": [1]}}, {}, 15, 16),
        ({"name": "cfsr_x4", "kwargs": {"embed_dim": 8, "depths": [1]}}, {}, 19, 20),
        (
            {"name": "cfsr_x2", "kwargs": {"embed_dim": 8, "depths": [1], "upscale": 1}},
            {"degradations": [{"name": "gaussian_noise", "sigma": 9}]},
            10,
            11,
        ),
        # Two blocks of JPEG.
        (
            {"name": "cfsr_x2", "kwargs": {"embed_dim": 8, "depths": [1], "upscale": 1}},
            {"degradations": [{"name": "jpeg", "quality": 9}]},
            15,
            16,
        ),
    ],
)
def test_truths_smaller_than_a_window_are_refused_before_training(
    model: dict[str, Any], data: dict[str, Any], side: int, needed: int, tmp_path: Path
):
    train = folder_of_images(tmp_path / "train", {"a": (48, 60), "b": (64, 64)})
    held_out = folder_of_images(tmp_path / "eval", {"a": (needed, needed), "b": (side, 40)})
    places = {"source": "folders", "train_gt": [str(train)], "eval_gt": [str(held_out)], "patch_size": 8}
    made = config(model=model, data={**places, **data}, output=str(tmp_path / "run"))
    task = tasks.create_task(made)
    with pytest.raises(InputError, match=rf"b.png: .* but each side must have at least {needed}$"):
        loop.train(task)
    assert not (tmp_path / "run").exists()
    # What is just large enough is judged.
    (held_out / "b.png").unlink()
    found = loop.evaluate(tasks.create_task(made))
    assert set(found) == set(task.metrics)
    assert all(value == value for value in found.values())


def test_a_truth_that_its_input_makes_too_small_is_refused(tmp_path: Path):
    truths = folder_of_images(tmp_path / "gt", {"a": (32, 32), "b": (24, 24)})
    inputs = folder_of_images(tmp_path / "lq", {"a": (16, 16), "b": (7, 7)})
    places = {"source": "folders", "eval_gt": [str(truths)], "eval_lq": [str(inputs)]}
    model = {"name": "cfsr_x2", "kwargs": {"embed_dim": 8, "depths": [1]}}
    task = tasks.create_task(config(model=model, data=places))
    with pytest.raises(InputError, match=r"b.png: 14x14 pixels, but each side must have at least 16"):
        loop.evaluate(task)


def test_cubes_smaller_than_a_window_are_refused(tmp_path: Path):
    for place, side in (("gt", 6), ("lq", 6)):
        (tmp_path / place).mkdir()
        np.save(tmp_path / place / "a.npy", np.random.default_rng(0).random((side, 9, 4)).astype(np.float32))
    places = {"source": "folders", "eval_gt": [str(tmp_path / "gt")], "eval_lq": [str(tmp_path / "lq")]}
    model = {"name": "hsdt_s", "kwargs": {"embed_dim": 4, "in_chans": 4, "depth": 3, "downsample": [1]}}
    with pytest.raises(InputError, match="6x9 pixels, but each side must have at least 7"):
        loop.evaluate(tasks.create_task(config(model=model, data=places)))


def test_a_metric_without_a_value_is_said_and_does_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    held_out = folder_of_images(tmp_path / "eval", {"a": (40, 40), "b": (12, 40)})
    # Nothing is looked at before.
    places = {"source": "folders", "eval_gt": [str(held_out)], "check_images": 0}
    model = {"name": "cfsr_x2", "kwargs": {"embed_dim": 8, "depths": [1]}}
    task = tasks.create_task(config(model=model, data=places))
    task.__dict__["_held_out"] = PairedImages(dict(list_by_stem(held_out)), 2)
    found = loop.evaluate(task)
    of_a = task.rows[0]
    assert found["ssim_y"] == of_a["ssim_y"]
    assert found["psnr_y"] == pytest.approx((of_a["psnr_y"] + task.rows[1]["psnr_y"]) / 2)
    assert "ssim_y has no value for b, of 2 images" in capsys.readouterr().err


def test_places_that_the_built_in_photographs_would_ignore_are_refused():
    with pytest.raises(InputError, match="data: eval_gt would be ignored: source=photographs is built in"):
        config(data={"eval_gt": ["a"]})


def test_one_folder_of_truths_with_two_of_inputs(tmp_path: Path):
    """Every pair is there, though the names and the folder of the truths are the same."""
    places = [folder_of_images(tmp_path / name, {"a": (32, 32), "b": (32, 32)}) for name in ("gt", "x", "y")]
    gt, *inputs = map(str, places)
    data = {
        "source": "folders",
        "train_gt": [gt, gt],
        "train_lq": inputs,
        "eval_gt": gt,
        "eval_lq": inputs[0],
    }
    truths, found = _folder_files(config(data=data), "train")
    assert found is not None
    assert sorted(map(str, found.values())) == sorted(
        f"{place}/{name}.png" for place in inputs for name in "ab"
    )
    assert all(Path(str(truths[name])).name == Path(str(file)).name for name, file in found.items())


def test_pictures_that_lie_on_their_side_are_restored_as_they_are_judged():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    Image.effect_noise((24, 16), 60).convert("RGB").save(content, "PNG", exif=exif)
    task = RestorationTask(config())
    stored = Image.open(content)
    upright = open_image("a", content)
    assert upright.size == (16, 24)
    assert task.predict(stored).tobytes() == task.predict(upright).tobytes()
