"""Denoising, JPEG, haze and cubes through the real loop: what is trained, judged and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from visionattn import tasks
from visionattn.data.images import to_pil
from visionattn.engine import loop
from visionattn.engine.config import parse_config
from visionattn.errors import InputError
from visionattn.tasks.restoration.config import RestorationConfig
from visionattn.tasks.restoration.task import RestorationTask

CFSR = {"upscale": 1, "embed_dim": 8, "depths": [1], "kernel_size": 3}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "denoising": (
        {"name": "cfsr_x2", "kwargs": CFSR},
        {"degradations": [{"name": "gaussian_noise", "sigma": [15, 50]}]},
        {"psnr_rgb", "ssim_rgb", "gain_over_input"},
    ),
    "jpeg": (
        {"name": "cfsr_x2", "kwargs": {**CFSR, "in_chans": 1, "task": "jpeg"}},
        {"degradations": [{"name": "jpeg", "quality": [10, 40]}], "degraded_size": 24},
        {"psnr_y", "ssim_y", "psnr_b_y", "gain_over_input"},
    ),
    "dehazing": (
        {"name": "pmnet_small", "kwargs": {}},
        {"degradations": [{"name": "haze"}]},
        {"psnr_rgb", "ssim_rgb", "gain_over_input"},
    ),
    "cubes": (
        {"name": "hsdt_s", "kwargs": {"embed_dim": 4, "in_chans": 5}},
        {"degradations": [{"name": "hyperspectral_noise", "kind": "mixture"}]},
        {"mpsnr", "mssim", "sam", "gain_over_input"},
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "cubes").mkdir()
    for name in "abc":
        grid = 0.3 + 0.4 * torch.rand(1, 5, 6, 6)  # so that noise seldom leaves [0, 1]
        smooth = torch.nn.functional.interpolate(grid, (40, 32), mode="bilinear")[0]
        to_pil((smooth[:3] * 255).to(torch.uint8)).save(tmp_path / f"images/{name}.png")
        np.save(tmp_path / f"cubes/{name}.npy", smooth.permute(1, 2, 0).numpy())
    return tmp_path


def config(folder: Path, kind: str, **sections: Any) -> RestorationConfig:
    model, data, _ = KINDS[kind]
    place = str(folder / ("cubes" if kind == "cubes" else "images"))
    loss = {"name": "charbonnier", **({"intermediate": 1} if kind == "dehazing" else {})}
    data = {"source": "folders", "train_gt": place, "eval_gt": place, "patch_size": 16, **data}
    content = {
        "task": "restoration",
        "model": model,
        "data": {**data, **sections.pop("data", {})},
        "loss": loss,
        "schedule": {"steps": 2},
        "train": {"batch_size": 2, "workers": 0, "eval_every": None},
        "output": str(folder / "run"),
        **sections,
    }
    parsed = parse_config(content, RestorationConfig)
    assert isinstance(parsed, RestorationConfig)
    return parsed


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_is_trained_judged_and_drawn(folder: Path, kind: str):
    task = tasks.create_task(config(folder, kind))
    before = [parameter.detach().clone() for parameter in task.model.parameters()]
    result = loop.train(task)
    assert set(result.metrics) == KINDS[kind][2]
    assert any(not torch.equal(a, b) for a, b in zip(before, task.model.parameters()))
    assert [row["name"] for row in task.rows] == ["a", "b", "c"]
    assert task.monitor == next(iter(task.rows[0].keys() - {"name"} & {"psnr_rgb", "psnr_y", "mpsnr"}))
    with Image.open(folder / "run/pictures/comparison.png") as picture:
        assert picture.width > 700  # input, ours and truth in three rows
    assert loop.evaluate(task) == pytest.approx(result.metrics)


def test_the_gain_is_over_the_input(folder: Path):
    task = RestorationTask(config(folder, "denoising", data={"eval_degradations": []})).eval()
    with pytest.raises(InputError, match=r"needs data\.eval_lq or data\.degradations"):
        task.eval_loader()
    task = RestorationTask(
        config(folder, "denoising", data={"eval_degradations": [{"name": "gaussian_noise", "sigma": 25}]})
    ).eval()
    task.model = Unchanged(task.model)
    metrics = task.evaluate(task.eval_loader())
    assert metrics["gain_over_input"] == 0
    # The noise of seed 0, the same for every image; rounding to bytes adds hardly anything.
    noise = np.random.RandomState(0).normal(0, 25 / 255, (40, 32, 3))
    assert metrics["psnr_rgb"] == pytest.approx(-10 * np.log10((noise**2).mean()), abs=0.02)


class Unchanged(torch.nn.Module):
    """Gives back its input, under the facts of another network."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.info, self.network = network.info, network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_the_intermediate_image_is_supervised(folder: Path):
    task: Any = RestorationTask(config(folder, "dehazing"))
    batch = next(iter(task.train_loader()))
    whole = task.loss(batch)["loss"]
    out = task.model.forward_all(batch["lq"])
    expected = sum(((image - batch["gt"]) ** 2 + 1e-6).sqrt().mean() for image in out[:2])
    torch.testing.assert_close(whole, expected)


def test_a_network_of_other_bands_is_refused(folder: Path):
    model = {"name": "hsdt_s", "kwargs": {"embed_dim": 4, "in_chans": 7}}
    with pytest.raises(InputError, match=r"shape \(40, 32, 5\) is not \[H, W, 7 bands\]"):
        RestorationTask(config(folder, "cubes", model=model)).train_loader()
    place = {"train_gt": str(folder / "images")}
    with pytest.raises(InputError, match="an image file has no 5 bands"):
        RestorationTask(config(folder, "cubes", data=place)).train_loader()
    with pytest.raises(InputError, match="metric=rgb does not fit the 5 channels"):
        RestorationTask(config(folder, "cubes", metric="rgb"))
